"""Ownership of pages and of feature slots, and the prefix cache over free pages. No jax."""

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
        """The number of free ids."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Own `count` ids. The caller has checked that as many are free."""
        assert count <= self.free, f"{count} ids requested, {self.free} free"
        if count == 0:
            return []
        ids = self._free[-count:][::-1]
        del self._free[-count:]
        for i in ids:
            self._is_free[i] = False
        return ids

    def release(self, ids: Iterable[int]) -> None:
        """Free owned ids. Releasing an id twice is a bug of the caller."""
        for i in ids:
            assert not self._is_free[i], f"id {i} released twice"
            self._is_free[i] = True
            self._free.append(i)


class PageAllocator:
    """Page ids, each owned by one caller or several, or free.

    The prefix cache maps keys to pages. A cached page stays in it while it is free, until it is
    evicted: allocated for other contents.
    """

    def __init__(self, size: int, *, enable_caching: bool = True):
        self.size, self._enable_caching = size, enable_caching
        self._empty = Freelist(size)
        self._owners = [0] * size
        self._keys: dict[int, Hashable] = {}
        self._pages: dict[Hashable, int] = {}
        # Free and cached pages, the least recently used first.
        self._evictable: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def free(self) -> int:
        """The number of pages that can be allocated, evictable ones included."""
        return self._empty.free + len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Own `count` pages, empty ones first. The caller has checked that as many are free."""
        assert count <= self.free, f"{count} pages requested, {self.free} free"
        for _ in range(count - self._empty.free):
            page, _ = self._evictable.popitem(last=False)
            self._evict(page)
            self._empty.release([page])
        pages = self._empty.allocate(count)
        for page in pages:
            self._owners[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give up ownership of pages, in the order of their prefix: the last is evicted first."""
        for page in reversed(pages):
            assert self._owners[page], f"page {page} released twice"
            self._owners[page] -= 1
            if not self._owners[page]:
                if page in self._keys:
                    self._evictable[page] = None
                else:
                    self._empty.release([page])

    def cache(self, page: int, key: Hashable) -> None:
        """Add an owned page to the prefix cache; the first page of a key stays."""
        assert self._owners[page], f"page {page} has no owner"
        if self._enable_caching and key not in self._pages:
            self._keys[page], self._pages[key] = key, page

    def find_cached(self, key: Hashable) -> int | None:
        """Return the page that is cached under a key."""
        return self._pages.get(key)

    def share(self, pages: Iterable[int]) -> None:
        """Own cached pages, together with their other owners if they have any."""
        for page in pages:
            if not self._owners[page]:
                del self._evictable[page]
            self._owners[page] += 1

    def count_evictable(self, pages: Iterable[int]) -> int:
        """Count the pages among these that are free, and would not be after `share`."""
        return sum(not self._owners[page] for page in pages)

    def reset_cache(self) -> None:
        """Empty the prefix cache, when the contents of the pool are lost."""
        self._empty.release(self._evictable)
        self._evictable.clear()
        self._keys.clear()
        self._pages.clear()

    def _evict(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]
