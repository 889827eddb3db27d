"""Page counts: how many pages of the KV cache tokens need. No jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PageGeometry:
    """Sizes of pages and attention chunks, and the page counts that follow from them.

    A request owns pages of the global layers' group over its whole length, and pages of each local
    group over its current attention chunk.
    """

    page: int  # positions of a local page
    chunk: int  # positions; a multiple of `global_page`
    local_groups: int
    stripes: int = 1  # devices that share a global page

    @property
    def global_page(self) -> int:
        """Positions of a page of the global group: one stripe of `page` on each device."""
        return self.page * self.stripes

    def count_global(self, length: int) -> int:
        """Count the pages of the global group for this many positions."""
        return -(-length // self.global_page)

    def count_local(self, length: int) -> int:
        """Count the pages of one local group for this many positions, a chunk's at most."""
        return -(-min(length, self.chunk) // self.page)

    def count(self, length: int) -> int:
        """Count the pages that a request of this length, prompt and output, owns at most."""
        return self.count_global(length) + self.local_groups * self.count_local(length)

    def count_missing(
        self, start: int, stop: int, *, owned_global: int, owned_local: int
    ) -> tuple[int, int]:
        """Count the pages that positions start .. stop of one chunk need in addition.

        Args:
            start, stop: positions.
            owned_global: pages of the global group that the request owns.
            owned_local: pages of the chunk that it owns in each local group.

        Returns:
            Pages of the global group, and of each local group.
        """
        missing = self.count_global(stop) - owned_global
        missing_local = self.count_local(stop - self.find_chunk_start(start)) - owned_local
        return max(0, missing), max(0, missing_local)

    def count_prefill_spare(self, tokens: int) -> int:
        """Count the local pages of all chunks that one step of this many prompt tokens completes.

        Each row of a prompt owns the local pages of its chunk until the step has been dispatched.
        """
        return tokens // self.chunk * self.local_groups * (self.chunk // self.page)

    def find_chunk_start(self, position: int) -> int:
        """Return the first position of a position's chunk."""
        return position // self.chunk * self.chunk

    def find_chunk_block(self, position: int) -> int:
        """Return the index, in the global table, of the first page of a position's chunk."""
        return self.find_chunk_start(position) // self.global_page

    def find_longest(self, pages: int, max_length: int) -> int:
        """Return the longest request, up to `max_length`, that fits in `pages`; by bisection."""
        low, high = 0, max_length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(middle) <= pages else (low, middle - 1)
        return low
