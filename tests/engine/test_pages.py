"""A page has owners, or contents that can be found, or neither."""

import pytest

from l4jax.engine.pages import Freelist, PageAllocator


def test_the_freelist_gives_each_id_once():
    freelist = Freelist(5)
    first, second = freelist.take(2), freelist.take(3)
    assert sorted(first + second) == list(range(5)) and freelist.free == 0
    assert freelist.take(0) == []
    freelist.give_back(second)
    with pytest.raises(AssertionError, match="given back twice"):
        freelist.give_back(second)
    with pytest.raises(AssertionError, match="4 ids asked for, 3 free"):
        freelist.take(4)


def test_a_page_given_back_is_found_by_its_name_until_it_is_taken():
    pages = PageAllocator(3)
    first, second = pages.take(2)
    pages.name(first, "a")
    pages.name(second, "b")
    pages.give_back([first, second])
    assert pages.free == 3 and pages.find("a") == first and pages.find("b") == second
    assert sorted(pages.take(2)) == [second, 2]  # the empty one, then the end of the prefix
    assert pages.find("b") is None and pages.find("a") == first


def test_a_shared_page_is_free_when_its_last_owner_leaves():
    pages = PageAllocator(2)
    (page,) = pages.take(1)
    pages.name(page, "a")
    pages.share([page])
    pages.give_back([page])
    assert pages.free == 1 and pages._owners[page] == 1 and pages.count_idle([page]) == 0
    pages.give_back([page])
    assert pages.free == 2 and pages.count_idle([page]) == 1
    with pytest.raises(AssertionError, match="given back twice"):
        pages.give_back([page])
    pages.share([page])
    assert pages.free == 1


def test_the_first_page_of_a_name_stays():
    pages = PageAllocator(2)
    first, second = pages.take(2)
    pages.name(first, "a")
    pages.name(second, "a")
    pages.give_back([second, first])
    assert pages.find("a") == first
    pages.forget_all()
    assert pages.find("a") is None and pages.free == 2 and len(pages.take(2)) == 2


def test_pages_that_keep_nothing_find_nothing():
    pages = PageAllocator(1, keeps=False)
    (page,) = pages.take(1)
    pages.name(page, "a")
    pages.give_back([page])
    assert pages.find("a") is None and pages.free == 1
