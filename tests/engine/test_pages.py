"""A page has owners, or is evictable, or is empty."""

import pytest

from l4jax.engine.pages import Freelist, PageAllocator


def test_the_freelist_allocates_each_id_once():
    freelist = Freelist(5)
    first, second = freelist.allocate(2), freelist.allocate(3)
    assert sorted(first + second) == list(range(5)) and freelist.free == 0
    assert freelist.allocate(0) == []
    freelist.release(second)
    with pytest.raises(AssertionError, match="released twice"):
        freelist.release(second)
    with pytest.raises(AssertionError, match="4 ids requested, 3 free"):
        freelist.allocate(4)


def test_a_released_page_stays_cached_until_it_is_evicted():
    pages = PageAllocator(3)
    first, second = pages.allocate(2)
    pages.cache(first, "a")
    pages.cache(second, "b")
    pages.release([first, second])
    assert pages.free == 3 and pages.find_cached("a") == first and pages.find_cached("b") == second
    assert sorted(pages.allocate(2)) == [second, 2]  # the empty page, then the end of the prefix
    assert pages.find_cached("b") is None and pages.find_cached("a") == first


def test_a_shared_page_is_free_when_its_last_owner_releases_it():
    pages = PageAllocator(2)
    (page,) = pages.allocate(1)
    pages.cache(page, "a")
    pages.share([page])
    pages.release([page])
    assert pages.free == 1 and pages._owners[page] == 1 and pages.count_evictable([page]) == 0
    pages.release([page])
    assert pages.free == 2 and pages.count_evictable([page]) == 1
    with pytest.raises(AssertionError, match="released twice"):
        pages.release([page])
    pages.share([page])
    assert pages.free == 1


def test_the_first_page_of_a_key_stays():
    pages = PageAllocator(2)
    first, second = pages.allocate(2)
    pages.cache(first, "a")
    pages.cache(second, "a")
    pages.release([second, first])
    assert pages.find_cached("a") == first
    pages.reset_cache()
    assert pages.find_cached("a") is None and pages.free == 2 and len(pages.allocate(2)) == 2


def test_without_caching_no_page_is_found():
    pages = PageAllocator(1, enable_caching=False)
    (page,) = pages.allocate(1)
    pages.cache(page, "a")
    pages.release([page])
    assert pages.find_cached("a") is None and pages.free == 1
