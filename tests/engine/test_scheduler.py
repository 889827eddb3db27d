"""The scheduler's laws, over random arrivals and cancellations, without a device."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.engine.pages import Freelist
from l4jax.engine.request import Request, SamplingParams
from l4jax.engine.scheduler import Limits, Plan, Scheduler


def make_limits(**changes) -> Limits:
    limits = {
        "shards": 1,
        "requests": 4,
        "pages": 60,
        "tokens": 20,
        "rows": 8,
        "feature_slots": 0,
        "page": 2,
        "chunk": 8,
        "local_groups": 3,
        "loop_steps": 8,
        "max_length": 64,
    }
    return Limits(**{**limits, **changes})


def make_request(number: int, prompt: int, output: int) -> Request:
    return Request(
        id=number,
        tokens=[number] * prompt,
        prompt_length=prompt,
        max_length=prompt + output,
        params=SamplingParams(),
        seed=0,
        stop_ids=(),
    )


def check_plan(plan: Plan, limits: Limits) -> None:
    """What has to hold of every plan."""
    for shard, runs in enumerate(plan.runs):
        assert sum(run.stop - run.start for run in runs) <= limits.tokens
        assert len(runs) <= limits.rows
        owners: dict[int, int] = {}
        seen: dict[int, int] = {}
        for run in runs:
            request = run.request
            assert request.shard == shard
            assert run.start // limits.chunk == (run.stop - 1) // limits.chunk  # one chunk a row
            assert run.start == seen.get(request.id, request.computed)  # nothing left out
            seen[request.id] = run.stop
            assert len(request.whole_pages) * limits.page >= request.max_length
            pages = [page for group in run.chunk_pages for page in group]
            if request.id not in owners.values():
                pages += request.whole_pages
            for page in pages:
                assert page not in owners, f"page {page} has two rows"
                owners[page] = request.id
        numbers = [number for number, _ in itertools.groupby(run.request.id for run in runs)]
        assert len(numbers) == len(set(numbers))  # the rows of a request stand side by side


def advance(scheduler: Scheduler, plan: Plan) -> list[Request]:
    """Pretend to run a plan; the requests that ended."""
    ended = []
    for runs in plan.runs:
        for run in runs:
            request = run.request
            if plan.is_loop:
                count = plan.count_limit(run, scheduler.limits)
                assert count >= 1
                first, last = run.start, run.start + count - 1
                assert first // scheduler.limits.chunk == last // scheduler.limits.chunk
                request.computed += count
                request.take([0] * count)
            else:
                request.computed = run.stop
                if run.stop == len(request.tokens):
                    request.take([0])
            if request.finish_reason is not None:
                ended.append(request)
    for request in ended:
        scheduler.end(request)
    return ended


arrivals = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(1, 24), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals, st.sampled_from([1, 2]), st.integers(30, 80), st.integers(4, 40), st.integers(5, 9)
)
def test_all_end_no_page_is_shared_and_every_page_comes_back(work, shards, pages, tokens, rows):
    limits = make_limits(shards=shards, pages=pages, tokens=tokens, rows=rows)
    scheduler = Scheduler(limits)
    longest = max(n for n in range(1, 65) if scheduler.count_pages(n) <= pages)
    pending = [
        (
            at,
            make_request(i, max(1, min(prompt, longest - output)), min(output, longest - 1)),
            cancels,
        )
        for i, (at, prompt, output, cancels) in enumerate(work)
    ]
    ended: list[int] = []
    for tick in range(2000):
        for item in [item for item in pending if item[0] <= tick]:
            pending.remove(item)
            scheduler.add(item[1])
        if tick == 5:
            for request in [*scheduler.running, *scheduler.waiting]:
                if work[request.id][3]:
                    scheduler.end(request)
                    ended.append(request.id)
        plan = scheduler.plan()
        if plan is None:
            if not pending:
                break
            continue
        check_plan(plan, limits)
        ended += [request.id for request in advance(scheduler, plan)]
    else:
        raise AssertionError("somebody starves")
    assert sorted(ended) == list(range(len(work)))
    assert [pages.free for pages in scheduler.pages] == [limits.pages] * shards


def test_who_decodes_is_in_every_step_however_long_a_prompt_is():
    scheduler = Scheduler(make_limits(pages=400, max_length=400))
    short, long = make_request(0, 3, 30), make_request(1, 300, 5)
    scheduler.add(short)
    advance(scheduler, scheduler.plan())
    scheduler.add(long)
    for _ in range(3):
        plan = scheduler.plan()
        assert plan.runs[0][0].request.id == short.id and not plan.is_loop
        before = len(short.tokens)
        advance(scheduler, plan)
        assert len(short.tokens) == before + 1


def test_those_who_wait_are_admitted_in_order_of_arrival():
    scheduler = Scheduler(make_limits(requests=1))
    for number in range(4):
        scheduler.add(make_request(number, 5, 3))
    order = []
    while (plan := scheduler.plan()) is not None:
        order += [run.request.id for run in plan.runs[0] if run.request.id not in order]
        advance(scheduler, plan)
    assert order == [0, 1, 2, 3]


def test_requests_go_to_the_shard_with_most_room():
    scheduler = Scheduler(make_limits(shards=2))
    for number in range(4):
        scheduler.add(make_request(number, 5, 3))
    plan = scheduler.plan()
    assert [len(runs) for runs in plan.runs] == [2, 2]


def test_a_prompt_crosses_boundaries_in_one_step_where_pages_allow():
    rich, poor = Scheduler(make_limits(pages=100)), Scheduler(make_limits(pages=27))
    rows = []
    for scheduler in (rich, poor):
        scheduler.add(make_request(0, 20, 8))
        rows.append([(run.start, run.stop) for run in scheduler.plan().runs[0]])
    assert rows == [[(0, 8), (8, 16), (16, 20)], [(0, 8)]]


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", 1.5),
        ("seed", -1),
        ("max_tokens", 0),
        ("logprobs", 21),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*: it must be"):
        SamplingParams(**{name: value})
