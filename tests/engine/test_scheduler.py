"""The scheduler's laws over random arrivals, on a simulated device."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.engine.request import SamplingParams
from l4jax.engine.scheduler import SchedulerOutput
from tests.engine.simulated import (
    VOCAB,
    complete,
    drain,
    make_engine,
    make_limits,
    make_params,
    propose_randomly,
)

works = st.lists(
    st.tuples(
        st.integers(0, 9),  # the step that it arrives in
        st.integers(0, 2),  # the text that its prompt begins with
        st.integers(0, 34),  # tokens of that text
        st.integers(1, 8),  # tokens of its own
        st.integers(1, 24),  # output tokens
        st.booleans(),  # whether it is cancelled, in step 8
    ),
    min_size=1,
    max_size=12,
)
TEXTS = [[random.Random(seed).randrange(VOCAB) for _ in range(40)] for seed in range(3)]


def find_longest(engine) -> int:
    """Return the longest request that fits in a shard's pages."""
    pages, count = engine.limits.pages, engine.limits.geometry.count
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
            "stripes": st.sampled_from([1, 2]),
        }
    ),
    st.booleans(),
    st.booleans(),
)
def test_a_request_has_the_same_output_in_any_batch_as_at_batch_size_1(
    work, seed, sizes, caches, drafts
):
    """Arrivals, cancellations, preemption, prefix cache hits, drafts and chunked prefill together:
    the tokens are the same, no request starves, and every page is released."""
    rng = random.Random(seed)
    limits = make_limits(**sizes, drafts=3 if drafts else 0)
    engine = make_engine(
        limits,
        enable_prefix_caching=caches,
        proposer=propose_randomly(seed, limits.chunk) if drafts else None,
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
        raise AssertionError("a request starves")
    for number, (prompt, count) in asked.items():
        if number not in cancelled:
            assert found[number] == complete(prompt, count, limits.chunk)
    engine.step()  # the pending step of requests that ended
    stats = engine.stats()
    assert stats.pages_used == stats.running == stats.waiting == 0
    assert all(slots.free == limits.requests for slots in engine.scheduler.slots)


def test_a_decoding_request_is_in_every_step_during_a_long_prompt():
    engine = make_engine(make_limits(pages=400, max_length=400))
    short = engine.add([1, 2, 3], make_params(30))
    engine.step()
    engine.add([5] * 300, make_params(5))
    for _ in range(3):
        engine.step()
        output = engine.runner.outputs[-1]
        assert output.chunks[0][0].request.id == short and not output.is_loop
        tokens = sum(chunk.stop - chunk.start for chunk in output.chunks[0])
        assert tokens == engine.limits.tokens


def test_the_next_step_is_scheduled_before_the_last_ones_tokens_are_known():
    engine = make_engine(make_limits())
    engine.add([1, 2, 3], make_params(30))
    assert engine.step() == [] and len(engine.runner.outputs) == 1
    (first,) = engine.step()
    assert len(first.token_ids) == 1 and len(engine.runner.outputs) == 2
    second = engine.runner.outputs[1].chunks[0][0]
    assert len(engine.step()[0].token_ids) == second.max_sampled == 5


def test_waiting_requests_are_admitted_in_order_of_arrival():
    engine = make_engine(make_limits(requests=1))
    for number in range(4):
        engine.add([number] * 5, make_params(3))
    drain(engine)
    order = [chunk.request.id for output in engine.runner.outputs for chunk in output.chunks[0]]
    assert order == sorted(order)


def test_no_request_is_admitted_into_pages_that_the_next_two_loops_need():
    """A request of 18 positions owns 9 global pages, and four per group in a chunk of 8."""

    def count_admitted(pages: int, output: int) -> int:
        engine = make_engine(make_limits(pages=pages, chunk=8, loop_steps=8))
        for _ in range(2):
            engine.add([1, 2], make_params(output))
        engine.step()
        return len(engine.scheduler.running)

    assert count_admitted(2 * 21, output=40) == 2
    assert count_admitted(2 * 21 - 1, output=40) == 1  # five times what the prompts need
    assert count_admitted(2 * 8, output=2) == 2  # the outputs end before that


def test_requests_go_to_the_shard_with_most_free_pages():
    engine = make_engine(make_limits(shards=2))
    for number in range(4):
        engine.add([number] * 5, make_params(3))
    engine.step()
    assert [len(chunks) for chunks in engine.runner.outputs[0].chunks] == [2, 2]


def test_requests_go_to_the_shard_that_caches_their_prefix():
    engine = make_engine(make_limits(shards=2))
    drain_one(engine, TEXTS[0][:12])
    shard = engine.runner.outputs[0].chunks.index([]) ^ 1
    for _ in range(3):
        before = len(engine.runner.outputs)
        drain_one(engine, TEXTS[0][:12])
        assert engine.runner.outputs[before].chunks[shard]


def test_a_prompt_crosses_boundaries_in_one_step_where_pages_allow():
    rows = []
    for pages in (100, 34, 27):
        engine = make_engine(make_limits(pages=pages))
        engine.add([1] * 20, make_params(8))
        engine.step()
        chunks = engine.runner.outputs[0].chunks[0]
        rows.append([(chunk.start, chunk.stop) for chunk in chunks])
    assert rows == [[(0, 8), (8, 16), (16, 20)], [(0, 8), (8, 16)], [(0, 8)]]


def drain_one(engine, prompt: list[int], count: int = 3) -> tuple[list[int], int]:
    """Run one request; return its output and its prefix cache hit, in tokens."""
    number, tokens, cached = engine.add(prompt, make_params(count)), [], 0
    while engine.has_work:
        for update in engine.step():
            assert update.request_id == number
            tokens += update.token_ids
            cached = update.cached_tokens
    return tokens, cached


def test_a_prefix_is_found_up_to_the_page_within_the_chunk():
    """With chunks of 8 and pages of 2, the shared part of 13 tokens is found, in whole pages; the
    last token of a prompt always runs."""
    engine = make_engine(make_limits())
    prompt = TEXTS[0][:13]
    assert drain_one(engine, prompt)[1] == 0
    for shared, found in [(13, 12), (12, 12), (11, 10), (9, 8), (8, 8), (7, 6), (1, 0)]:
        other = [*prompt[:shared], VOCAB - 1, 3]
        assert drain_one(engine, other) == (complete(other, 3, 8), found), shared
    assert drain_one(engine, prompt) == (complete(prompt, 3, 8), 12)
    assert drain_one(engine, prompt[:12]) == (complete(prompt[:12], 3, 8), 10)


def test_a_prefix_that_ends_with_a_chunk_needs_the_global_pages_only():
    """The local pages of the first chunk are evicted: a prefix that ends with the chunk is found,
    one that ends within it is not."""
    engine = make_engine(make_limits(pages=29))
    prompt = TEXTS[0][:16]
    drain_one(engine, [*prompt, 1])
    pages, request = engine.scheduler.pages[0], engine.runner.outputs[0].chunks[0][0].request
    hashes = [request.hash_block(block, 2) for block in range(8)]
    for block in (0, 1, 2, 3):
        for group in range(3):
            page = pages.find_cached((group, hashes[block]))
            if page is not None:
                del pages._evictable[page]
                pages._evict(page)
                pages._empty.release([page])
    assert drain_one(engine, [*prompt[:8], 9]) == (complete([*prompt[:8], 9], 3, 8), 8)
    assert drain_one(engine, [*prompt[:7], 9]) == (complete([*prompt[:7], 9], 3, 8), 0)


def test_the_least_recently_used_prefix_is_evicted_first():
    engine = make_engine(make_limits(pages=52))
    first, second = TEXTS[0][:9], TEXTS[1][:9]
    for prompt in (first, second, first):
        drain_one(engine, prompt)
    drain_one(engine, TEXTS[2][:24], count=1)  # allocates most of the free pages
    assert drain_one(engine, first)[1] >= drain_one(engine, second)[1]
    assert engine.stats().prefix_hits >= 8


def test_without_prefix_caching_no_prefix_is_found():
    engine = make_engine(make_limits(), enable_prefix_caching=False)
    for _ in range(2):
        assert drain_one(engine, TEXTS[0][:13])[1] == 0
    assert engine.stats().prefix_hits == 0


def test_a_preempted_request_keeps_its_tokens_and_its_place_in_the_queue():
    limits = make_limits(pages=40, requests=3, loop_steps=1)
    engine = make_engine(limits)
    prompts = [TEXTS[i][:6] for i in range(3)]
    for prompt in prompts:
        engine.add(prompt, make_params(20))
    found = drain(engine)
    assert engine.stats().preemptions > 0
    assert found == {i: complete(prompt, 20, 8) for i, prompt in enumerate(prompts)}
    order = [chunk.request.id for output in engine.runner.outputs for chunk in output.chunks[0]]
    assert order.index(0) < order.index(1) < order.index(2) and order[-1] == 2


def test_drafts_stay_within_the_chunk_and_the_length():
    limits = make_limits(drafts=4)
    engine = make_engine(limits, proposer=lambda r, n: complete(r.tokens, n, 8))
    engine.add(TEXTS[0][:5], make_params(17))
    assert drain(engine)[0] == complete(TEXTS[0][:5], 17, 8)
    chunks = [chunk for output in engine.runner.outputs for chunk in output.chunks[0]]
    assert max(len(chunk.drafts) for chunk in chunks) == 4
    for chunk in chunks:
        assert chunk.start // 8 == (chunk.stop - 1) // 8 and chunk.stop <= 22
    stats = engine.stats()
    assert stats.accepted == stats.drafted > 8  # all drafts are right
    assert len(chunks) < 17


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
    assert found[waits[2]] == complete(TEXTS[2][:6], 9, 8)
    assert engine.stats().pages_used == 0 and not engine.has_work


def test_a_request_that_was_not_in_the_failed_step_is_computed_again():
    engine = make_engine(make_limits(tokens=6))
    first = engine.add(TEXTS[0][:6], make_params(9))
    engine.step()
    second = engine.add(TEXTS[1][:30], make_params(4))
    third = engine.add(TEXTS[2][:30], make_params(4))
    engine.runner.fails = {4}  # the first's next token and a chunk of the second's prompt
    reasons, found = {}, {}
    while engine.has_work:
        for update in engine.step():
            reasons[update.request_id] = update.finish_reason
            found.setdefault(update.request_id, []).extend(update.token_ids)
    assert reasons == {first: "error", second: "error", third: "length"}
    assert found[third] == complete(TEXTS[2][:30], 4, 8)


def test_a_request_ends_with_its_tokens_so_far_at_its_timeout(monkeypatch):
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
    assert tokens[late] == complete(TEXTS[0][:6], 30, 8)[: len(tokens[late])]
    assert engine.stats().pages_used == 0


def test_a_stop_id_ends_a_request_while_the_next_step_is_pending():
    prompt = TEXTS[0][:6]
    tokens = complete(prompt, 20, 8)
    stop = tokens[4]
    engine = make_engine(make_limits(loop_steps=2))
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    engine.add(prompt, params)
    assert drain(engine)[0] == tokens[: tokens.index(stop) + 1]
    # A prompt may end in a stop id, which runs like any other token.
    engine.add([*prompt, stop], params)
    again = complete([*prompt, stop], 20, 8)
    end = again.index(stop) + 1 if stop in again else 20
    assert drain(engine)[1] == again[:end]


def test_loops_are_short_while_a_request_waits():
    engine = make_engine(make_limits(requests=1, loop_steps=8, chunk=64))
    for _ in range(2):
        engine.add([1, 2], make_params(20))
    drain(engine)
    loops = [output.chunks[0][0] for output in engine.runner.outputs if output.is_loop]
    counts = [[loop.max_sampled for loop in loops if loop.request.id == n] for n in (0, 1)]
    assert max(counts[0]) == 2 and max(counts[1]) == 8
    assert list(map(sum, counts)) == [19, 19]  # the prompt's step samples the first token


def test_a_loop_has_no_prompt_chunks():
    engine = make_engine(make_limits())
    engine.add([1, 2], make_params(12))
    drain(engine)
    assert [output.is_loop for output in engine.runner.outputs] == [False, True, True]
    assert isinstance(engine.runner.outputs[0], SchedulerOutput)
