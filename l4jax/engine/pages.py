"""Who owns which page, and which slots of the image feature buffer. No jax."""

from collections.abc import Iterable


class Freelist:
    """Ids 0 .. size-1, each either free or owned by one caller."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._is_free = [True] * size

    @property
    def free(self) -> int:
        """How many ids are free."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Own `count` ids. The caller has checked that they are there."""
        assert count <= self.free, f"{count} ids asked for, {self.free} free"
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for i in taken:
            self._is_free[i] = False
        return taken

    def give_back(self, ids: Iterable[int]) -> None:
        """Free ids. Each was owned: giving one back twice is a bug of the caller."""
        for i in ids:
            assert not self._is_free[i], f"id {i} given back twice"
            self._is_free[i] = True
            self._free.append(i)
