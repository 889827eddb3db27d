"""What runs when, in which pages: laws over random arrivals, on a simulated device."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.engine.request import SamplingParams
from l4jax.engine.scheduler import SchedulerOutput
from tests.engine.simulated import (
    VOCAB,
    continue_alone,
    drain,
    guess_by_chance,
    make_engine,
    make_limits,
    make_params,
)

works = st.lists(
    st.tuples(
        st.integers(0, 9),  # the step that it arrives in
        st.integers(0, 2),  # which text its prompt begins with
        st.integers(0, 34),  # how much of it
        st.integers(1, 8),  # and how much of its own
        st.integers(1, 24),  # tokens of the answer
        st.booleans(),  # whether somebody cancels it, in step 8
    ),
    min_size=1,
    max_size=12,
)
TEXTS = [[random.Random(seed).randrange(VOCAB) for _ in range(40)] for seed in range(3)]


def find_longest(engine) -> int:
    """The longest request that a shard's pages hold."""
    pages, count = engine.limits.pages, engine.limits.count_pages
    return max(n for n in range(1, 65) if count(n) <= pages)


@settings(max_examples=300, deadline=None)
@given(
    works,
    st.integers(0, 2**30),
    st.fixed_dictionaries(
        {
            "shards": st.sampled_from([1, 2]),
            "pages": st.integers(16, 90),
            "tokens": st.integers(5, 40),
            "rows": st.integers(5, 9),
            "loop_steps": st.integers(1, 8),
            "page": st.sampled_from([1, 2, 4]),
        }
    ),
    st.booleans(),
    st.booleans(),
)
def test_in_any_company_a_request_draws_what_it_draws_alone(work, seed, sizes, keeps, guesses):
    """Arrivals, cancellations, preemption, prefix hits, guesses and chunked prompts together: the
    tokens are the same, nobody starves, and every page comes back."""
    rng = random.Random(seed)
    limits = make_limits(**sizes, drafts=3 if guesses else 0)
    engine = make_engine(
        limits, keeps=keeps, guess=guess_by_chance(seed, limits.chunk) if guesses else None
    )
    longest = find_longest(engine)
    if longest < 4:
        return
    asked, found, cancelled = {}, {}, set()
    for tick in range(3000):
        for at, text, shared, own, count, _ in work:
            if at == tick:
                prompt = TEXTS[text][:shared] + [rng.randrange(VOCAB) for _ in range(own)]
                prompt, count = prompt[: longest - 2], min(count, 2 + longest // 3)
                count = min(count, longest - len(prompt))
                asked[engine.add(prompt, make_params(count))] = (prompt, count)
        if tick == 8:
            for number, item in zip(list(asked), work, strict=False):
                if item[5]:
                    engine.cancel(number)
                    cancelled.add(number)
        for update in engine.step():
            assert update.request_id not in cancelled
            found.setdefault(update.request_id, []).extend(update.token_ids)
        stats = engine.stats()
        assert stats.running <= limits.shards * limits.requests
        if tick > 9 and not engine.has_work:
            break
    else:
        raise AssertionError("somebody starves")
    for number, (prompt, count) in asked.items():
        if number not in cancelled:
            assert found[number] == continue_alone(prompt, count, limits.chunk)
    engine.step()  # what was under way for those that ended
    stats = engine.stats()
    assert stats.pages_used == stats.running == stats.waiting == 0
    assert all(slots.free == limits.requests for slots in engine.scheduler.slots)


def test_who_decodes_is_in_every_step_however_long_a_prompt_is():
    engine = make_engine(make_limits(pages=400, max_length=400))
    short = engine.add([1, 2, 3], make_params(30))
    engine.step()
    engine.add([5] * 300, make_params(5))
    for _ in range(3):
        engine.step()
        plan = engine.runner.plans[-1]
        assert plan.runs[0][0].request.id == short and not plan.is_loop
        assert sum(run.stop - run.start for run in plan.runs[0]) == engine.limits.tokens


def test_the_next_plan_is_made_before_the_last_ones_tokens_are_known():
    engine = make_engine(make_limits())
    engine.add([1, 2, 3], make_params(30))
    assert engine.step() == [] and len(engine.runner.plans) == 1
    (first,) = engine.step()
    assert len(first.token_ids) == 1 and len(engine.runner.plans) == 2
    assert len(engine.step()[0].token_ids) == engine.runner.plans[1].runs[0][0].draws == 5


def test_those_who_wait_are_admitted_in_order_of_arrival():
    engine = make_engine(make_limits(requests=1))
    for number in range(4):
        engine.add([number] * 5, make_params(3))
    drain(engine)
    order = [run.request.id for plan in engine.runner.plans for run in plan.runs[0]]
    assert order == sorted(order)


def test_nobody_is_admitted_into_pages_that_the_next_two_loops_need():
    """Of 18 positions a request owns 9 global pages and, of a chunk of 8, four in each group."""

    def count_admitted(pages: int, answer: int) -> int:
        engine = make_engine(make_limits(pages=pages, chunk=8, loop_steps=8))
        for _ in range(2):
            engine.add([1, 2], make_params(answer))
        engine.step()
        return len(engine.scheduler.running)

    assert count_admitted(2 * 21, answer=40) == 2
    assert count_admitted(2 * 21 - 1, answer=40) == 1  # as many as the prompts need, five times
    assert count_admitted(2 * 8, answer=2) == 2  # whose answers are shorter than that


def test_requests_go_to_the_shard_with_most_room():
    engine = make_engine(make_limits(shards=2))
    for number in range(4):
        engine.add([number] * 5, make_params(3))
    engine.step()
    assert [len(runs) for runs in engine.runner.plans[0].runs] == [2, 2]


def test_requests_go_to_the_shard_that_knows_their_prefix():
    engine = make_engine(make_limits(shards=2))
    drain_one(engine, TEXTS[0][:12])
    shard = engine.runner.plans[0].runs.index([]) ^ 1
    for _ in range(3):
        before = len(engine.runner.plans)
        drain_one(engine, TEXTS[0][:12])
        assert engine.runner.plans[before].runs[shard]


def test_a_prompt_crosses_boundaries_in_one_step_where_pages_allow():
    rows = []
    for pages in (100, 34, 27):
        engine = make_engine(make_limits(pages=pages))
        engine.add([1] * 20, make_params(8))
        engine.step()
        rows.append([(run.start, run.stop) for run in engine.runner.plans[0].runs[0]])
    assert rows == [[(0, 8), (8, 16), (16, 20)], [(0, 8), (8, 16)], [(0, 8)]]


def drain_one(engine, prompt: list[int], count: int = 3) -> tuple[list[int], int]:
    """Run a request alone; its tokens, and how many of its prompt's were found."""
    number, tokens, cached = engine.add(prompt, make_params(count)), [], 0
    while engine.has_work:
        for update in engine.step():
            assert update.request_id == number
            tokens += update.token_ids
            cached = update.cached_tokens
    return tokens, cached


def test_a_prefix_is_found_up_to_the_page_within_the_chunk():
    """Chunks of 8 and pages of 2: what of 13 tokens is shared is found, in whole pages; the last
    token of a prompt is always run."""
    engine = make_engine(make_limits())
    prompt = TEXTS[0][:13]
    assert drain_one(engine, prompt)[1] == 0
    for shared, found in [(13, 12), (12, 12), (11, 10), (9, 8), (8, 8), (7, 6), (1, 0)]:
        other = [*prompt[:shared], VOCAB - 1, 3]
        assert drain_one(engine, other) == (continue_alone(other, 3, 8), found), shared
    assert drain_one(engine, prompt) == (continue_alone(prompt, 3, 8), 12)
    assert drain_one(engine, prompt[:12]) == (continue_alone(prompt[:12], 3, 8), 10)


def test_behind_a_chunk_that_is_over_a_prefix_needs_the_global_pages_only():
    """The local pages of the first chunk are taken by others; a prefix that ends with it is found,
    one that ends within it is not."""
    engine = make_engine(make_limits(pages=29))
    prompt = TEXTS[0][:16]
    drain_one(engine, [*prompt, 1])
    pages, request = engine.scheduler.pages[0], engine.runner.plans[0].runs[0][0].request
    names = [request.hash_block(block, 2) for block in range(8)]
    for block in (0, 1, 2, 3):  # as if evicted
        for group in range(3):
            page = pages.find((group, names[block]))
            if page is not None:
                del pages._idle[page]
                pages._forget(page)
                pages._empty.give_back([page])
    assert drain_one(engine, [*prompt[:8], 9]) == (continue_alone([*prompt[:8], 9], 3, 8), 8)
    assert drain_one(engine, [*prompt[:7], 9]) == (continue_alone([*prompt[:7], 9], 3, 8), 0)


def test_the_prefix_used_longest_ago_is_forgotten_first():
    engine = make_engine(make_limits(pages=52))
    first, second = TEXTS[0][:9], TEXTS[1][:9]
    for prompt in (first, second, first):
        drain_one(engine, prompt)
    drain_one(engine, TEXTS[2][:24], count=1)  # takes most of what is free
    assert drain_one(engine, first)[1] >= drain_one(engine, second)[1]
    assert engine.stats().prefix_hits >= 8


def test_without_the_prefix_cache_nothing_is_found():
    engine = make_engine(make_limits(), keeps=False)
    for _ in range(2):
        assert drain_one(engine, TEXTS[0][:13])[1] == 0
    assert engine.stats().prefix_hits == 0


def test_who_is_preempted_loses_nothing_and_goes_before_who_came_later():
    limits = make_limits(pages=40, requests=3, loop_steps=1)
    engine = make_engine(limits)
    prompts = [TEXTS[i][:6] for i in range(3)]
    for prompt in prompts:
        engine.add(prompt, make_params(20))
    found = drain(engine)
    assert engine.stats().preemptions > 0
    assert found == {i: continue_alone(prompt, 20, 8) for i, prompt in enumerate(prompts)}
    ends = [run.request.id for plan in engine.runner.plans for run in plan.runs[0]]
    assert ends.index(0) < ends.index(1) < ends.index(2) and ends[-1] == 2


def test_guesses_stay_within_the_chunk_and_the_length():
    limits = make_limits(drafts=4)
    engine = make_engine(limits, guess=lambda r, n: continue_alone(r.tokens, n, 8))
    engine.add(TEXTS[0][:5], make_params(17))
    assert drain(engine)[0] == continue_alone(TEXTS[0][:5], 17, 8)
    runs = [run for plan in engine.runner.plans for run in plan.runs[0]]
    assert max(len(run.drafts) for run in runs) == 4
    for run in runs:
        assert run.start // 8 == (run.stop - 1) // 8 and run.stop <= 22
    stats = engine.stats()
    assert stats.accepted == stats.drafted > 8  # all of these guesses are right
    assert len(runs) < 17


def test_a_step_that_fails_ends_its_requests_and_no_others():
    engine = make_engine(make_limits(requests=2))
    waits = [engine.add(TEXTS[i][:6], make_params(9)) for i in range(3)]
    engine.runner.fails = {3}
    reasons, found = {}, {}
    for _ in range(50):
        for update in engine.step():
            reasons[update.request_id] = update.finish_reason
            found.setdefault(update.request_id, []).extend(update.token_ids)
    assert reasons == {waits[0]: "error", waits[1]: "error", waits[2]: "length"}
    assert found[waits[2]] == continue_alone(TEXTS[2][:6], 9, 8)
    assert engine.stats().pages_used == 0 and not engine.has_work


def test_a_request_that_was_not_in_the_failed_step_is_computed_again():
    engine = make_engine(make_limits(tokens=6))
    first = engine.add(TEXTS[0][:6], make_params(9))
    engine.step()
    second = engine.add(TEXTS[1][:30], make_params(4))
    third = engine.add(TEXTS[2][:30], make_params(4))
    engine.runner.fails = {4}  # holds the first's next token and a part of the second's prompt
    reasons, found = {}, {}
    while engine.has_work:
        for update in engine.step():
            reasons[update.request_id] = update.finish_reason
            found.setdefault(update.request_id, []).extend(update.token_ids)
    assert reasons == {first: "error", second: "error", third: "length"}
    assert found[third] == continue_alone(TEXTS[2][:30], 4, 8)


def test_whose_time_is_up_ends_with_what_it_has(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine = make_engine(make_limits(loop_steps=1))
    late = engine.add(TEXTS[0][:6], make_params(30), timeout=5)
    other = engine.add(TEXTS[1][:6], make_params(5))
    tokens: dict[int, list[int]] = {late: [], other: []}
    reasons = {}
    for tick in range(40):
        now = 100.0 + tick
        for update in engine.step():
            tokens[update.request_id] += update.token_ids
            reasons[update.request_id] = update.finish_reason
    assert reasons == {late: "abort", other: "length"}
    assert 1 <= len(tokens[late]) < 9
    assert tokens[late] == continue_alone(TEXTS[0][:6], 30, 8)[: len(tokens[late])]
    assert engine.stats().pages_used == 0


def test_a_stop_id_ends_a_request_though_the_next_plan_is_under_way():
    prompt = TEXTS[0][:6]
    tokens = continue_alone(prompt, 20, 8)
    stop = tokens[4]
    engine = make_engine(make_limits(loop_steps=2))
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    engine.add(prompt, params)
    assert drain(engine)[0] == tokens[: tokens.index(stop) + 1]
    # A prompt may end in such a token: it is run like any other.
    engine.add([*prompt, stop], params)
    again = continue_alone([*prompt, stop], 20, 8)
    end = again.index(stop) + 1 if stop in again else 20
    assert drain(engine)[1] == again[:end]


def test_loops_are_short_while_somebody_waits():
    engine = make_engine(make_limits(requests=1, loop_steps=8, chunk=64))
    for _ in range(2):
        engine.add([1, 2], make_params(20))
    drain(engine)
    loops = [plan.runs[0][0] for plan in engine.runner.plans if plan.is_loop]
    draws = [[run.draws for run in loops if run.request.id == who] for who in (0, 1)]
    assert max(draws[0]) == 2 and max(draws[1]) == 8
    assert [sum(counts) for counts in draws] == [19, 19]  # the first is drawn with the prompt


def test_a_loop_stands_alone():
    engine = make_engine(make_limits())
    engine.add([1, 2], make_params(12))
    drain(engine)
    assert [plan.is_loop for plan in engine.runner.plans] == [False, True, True]
    assert isinstance(engine.runner.plans[0], SchedulerOutput)
