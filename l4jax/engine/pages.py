"""Who owns which page, what free pages still hold, and which feature slots are free. No jax."""

import collections
from collections.abc import Hashable, Iterable, Sequence


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


class PageAllocator:
    """Ids of pages: owned by one caller or several, or free; a free one may still hold what its
    last owner named, and is found by that name until it is taken for something else.
    """

    def __init__(self, size: int, *, keeps: bool = True):
        """`keeps` is whether free pages can be found again at all."""
        self.size, self._keeps = size, keeps
        self._empty = Freelist(size)
        self._owners = [0] * size
        self._names: dict[int, Hashable] = {}
        self._by_name: dict[Hashable, int] = {}
        # Free, and named: the one that has been so for longest comes first.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def free(self) -> int:
        """How many pages can be taken."""
        return self._empty.free + len(self._idle)

    def take(self, count: int) -> list[int]:
        """Own `count` pages, empty ones first. The caller has checked that they are there."""
        assert count <= self.free, f"{count} pages asked for, {self.free} free"
        for _ in range(count - self._empty.free):
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._empty.give_back([page])
        taken = self._empty.take(count)
        for page in taken:
            self._owners[page] = 1
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Give up owning these pages, the first of a prefix first: the last will be taken first."""
        for page in reversed(pages):
            assert self._owners[page], f"page {page} given back twice"
            self._owners[page] -= 1
            if not self._owners[page]:
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._empty.give_back([page])

    def name(self, page: int, name: Hashable) -> None:
        """Say what an owned page holds, so that others can find it. The first of a name stays."""
        assert self._owners[page], f"page {page} is nobody's"
        if self._keeps and name not in self._by_name:
            self._names[page], self._by_name[name] = name, page

    def find(self, name: Hashable) -> int | None:
        """The page that holds what is named so."""
        return self._by_name.get(name)

    def share(self, pages: Iterable[int]) -> None:
        """Own pages that were found, beside their other owners if they have any."""
        for page in pages:
            if not self._owners[page]:
                del self._idle[page]
            self._owners[page] += 1

    def count_idle(self, pages: Iterable[int]) -> int:
        """How many of these are free now, and would not be once they are shared."""
        return sum(not self._owners[page] for page in pages)

    def forget_all(self) -> None:
        """Forget what every page holds: the pool is gone."""
        self._empty.give_back(self._idle)
        self._idle.clear()
        self._names.clear()
        self._by_name.clear()

    def _forget(self, page: int) -> None:
        del self._by_name[self._names.pop(page)]
