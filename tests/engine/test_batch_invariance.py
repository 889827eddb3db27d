"""Batch invariance: a request has the same output in any batch as at batch size 1."""

from concurrent.futures import Future

import numpy as np
import pytest

from l4jax.engine import buckets
from l4jax.engine.buckets import Bucket, Buckets
from l4jax.engine.ngram_proposer import NgramProposer, SpeculativeConfig
from l4jax.engine.program_cache import ProgramCache
from l4jax.engine.request import Request, SamplingParams
from l4jax.engine.runner import PendingStep, Runner
from l4jax.text.image import Tiles
from tests import weights
from tests.engine.engines import GREEDY, assert_all_free, find_tiles, make_engine, run_all
from tests.engine.simulated import make_limits

NAME = "scout-8-text"


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Make prompts with common beginnings, some repetitive, for prefix cache hits and drafts."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(4, 300, 40).tolist() for _ in range(2)]
    prompts = []
    for n in range(count):
        own = rng.integers(4, 300, int(rng.integers(1, 9))).tolist()
        prompts.append(stems[n % 2][: int(rng.integers(0, 40))] + own * (1 + n % 3))
    return prompts


def make_params(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=t, top_p=0.9, seed=i, max_tokens=10 + 3 * i, ignore_eos=True)
        for i, t in zip(range(count), [0.0, 0.0, 1.0, 0.0, 0.7, 0.0] * count, strict=False)
    ]


# Few pages of a data shard, over its stripes, so that requests are preempted.
PAGES = {"1": 46, "2x4": 39, "data=2,seq=2,model=2": 2 * 23, "2x2 experts": 39}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "speculates"),
    [("1", False), ("2x4", True), ("data=2,seq=2,model=2", True), ("2x2 experts", False)],
    ids=str,
)
def test_a_request_has_the_same_output_in_any_batch_as_at_batch_size_1(mesh, speculates):
    """Random arrivals, preemption, prefix cache hits, drafts and chunked prefill together, greedy
    and sampled."""
    prompts, params = make_prompts(12), make_params(12)
    engine = make_engine(
        NAME,
        mesh,
        max_model_len=128,
        max_num_seqs=6,
        max_num_batched_tokens=24 if mesh == "1" else 48,
        kv_cache_memory_bytes=PAGES[mesh] * page_bytes(),
        speculative_config={"num_speculative_tokens": 3, "prompt_lookup_min": 1}
        if speculates
        else None,
    )
    rng, found, waiting = np.random.default_rng(1), {}, list(range(12))
    for _ in range(2000):
        for _ in range(int(rng.integers(0, 3))):
            if waiting:
                number = waiting.pop(0)
                assert engine.add(prompts[number], params[number]) == number
        for update in engine.step():
            found.setdefault(update.request_id, []).extend(update.token_ids)
        if not waiting and not engine.has_work:
            break
    stats = engine.stats()
    assert stats.preemptions and stats.prefix_hits
    assert (stats.accepted > 0) == speculates and stats.accepted <= stats.drafted
    assert_all_free(engine)
    alone = make_engine(NAME, enable_prefix_caching=False)
    for number, (prompt, its) in enumerate(zip(prompts, params, strict=True)):
        alone.add(prompt, its)
        assert run_all(alone)[number] == found[number], f"prompt {number}"


def page_bytes() -> int:
    engine = make_engine(NAME, kv_cache_memory_bytes=2**20)
    return 2**20 // engine.limits.pages


def test_cached_images_are_found_by_their_pixels():
    """The same image twice, then another of the same size, with the same token ids."""
    golden = weights.read_golden("scout-8-image")
    prompt, tiles = golden.ids.tolist(), find_tiles(golden)
    other = (Tiles(tiles[0].pixels_ICHW[::-1].copy(), 1, 2),)
    engine = make_engine("scout-8-image")

    def run(images) -> tuple[list[int], int]:
        engine.add(prompt, GREEDY, images)
        tokens, cached = [], 0
        while engine.has_work:
            for update in engine.step():
                tokens, cached = tokens + update.token_ids, update.cached_tokens
        return tokens, cached

    first, second, third = run(tiles), run(tiles), run(other)
    assert first == (golden.greedy_tokens.tolist(), 0)
    whole = (len(prompt) - 1) // 4 * 4
    assert second == (first[0], whole)
    assert run(other) == (third[0], whole)
    assert third[1] < int(np.flatnonzero(golden.ids == weights.PATCH_ID)[0])
    assert_all_free(engine)
    fresh = make_engine("scout-8-image")
    fresh.add(prompt, GREEDY, other)
    assert third[0] == run_all(fresh)[0] != first[0]


def test_an_image_is_encoded_if_the_cached_prefix_ends_within_it():
    """The first prompt ends with the first tile; the second has all three."""
    golden = weights.read_golden("scout-8-image")
    prompt, (tiles,) = golden.ids.tolist(), find_tiles(golden)
    end = int(np.flatnonzero(golden.ids == weights.PATCH_ID)[4])
    engine = make_engine("scout-8-image")
    first = (Tiles(tiles.pixels_ICHW[:1], 1, 1),)
    engine.add(prompt[:end], GREEDY.replace(max_tokens=2), first)
    run_all(engine)
    engine.add(prompt, GREEDY, (tiles,))
    tokens, cached = [], 0
    while engine.has_work:
        for update in engine.step():
            tokens, cached = tokens + update.token_ids, update.cached_tokens
    assert tokens == golden.greedy_tokens.tolist()
    assert end - 8 < cached < end


@pytest.mark.slow
def test_after_the_warm_up_no_request_compiles_a_program():
    golden = weights.read_golden("scout-8-image")
    engine = make_engine(
        "scout-8-image",
        max_model_len=124,  # shapes that no other test has
        max_num_batched_tokens=64,
        speculative_config={"num_speculative_tokens": 2},
    )
    engine.warm_up()
    functions = engine.runner.functions.values()
    before = [function._cache_size() for function in functions]
    rng = np.random.default_rng(3)
    some = [
        {},
        {"temperature": 1.0, "top_k": 5, "seed": 1},
        {"logprobs": 2, "presence_penalty": 1.0},
        {"prompt_logprobs": 1, "logit_bias": {7: 3.0}},
        {"min_tokens": 3},
    ]
    for _ in range(3):
        for changes in some:
            length = int(rng.integers(1, 90))
            engine.add(
                rng.integers(4, 300, length).tolist(),
                SamplingParams(**{"temperature": 0.0, "max_tokens": 9, **changes}),
            )
            engine.add(golden.ids.tolist(), GREEDY.replace(max_tokens=9), find_tiles(golden))
            engine.step()
        run_all(engine)
    assert [function._cache_size() for function in functions] == before
    shapes = engine.runner.buckets
    assert len(shapes.steps) == 2 and len(shapes.loops) == 2


@pytest.mark.parametrize("at", ["dispatch", "result"])
def test_a_failing_step_ends_its_requests_and_the_others_go_on(monkeypatch, at):
    """The failed step donated the pool: a new one is allocated, and other requests are computed
    again."""
    golden = weights.read_golden(NAME)
    engine = make_engine(NAME, max_num_seqs=1, max_num_batched_tokens=16)
    first = engine.add(golden.ids.tolist(), GREEDY)
    second = engine.add(golden.ids.tolist(), GREEDY)
    reasons, found = {}, {first: [], second: []}

    def run(steps: int) -> None:
        for _ in range(steps):
            for update in engine.step():
                found[update.request_id] += update.token_ids
                reasons[update.request_id] = update.finish_reason

    run(4)
    loop = engine.runner.functions["loop", False]

    def fail(*args):
        if at == "dispatch":
            loop(*args)  # donates the pool
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        if at == "dispatch":
            engine.runner.functions["loop", False] = fail  # until the state is reset
        else:
            patch.setattr(PendingStep, "result", fail)
        run(2 if at == "dispatch" else 1)  # the launcher's error is raised by `result`
    assert reasons[first] == "error"
    run(200)
    assert found[second] == golden.greedy_tokens.tolist() and reasons[second] == "length"
    assert_all_free(engine)


def make_request(tokens: list[int]) -> Request:
    return Request(0, tokens, len(tokens), 100, GREEDY, 0, ())


def test_drafts_are_the_tokens_after_an_earlier_occurrence():
    propose = NgramProposer(SpeculativeConfig(4, prompt_lookup_max=3, prompt_lookup_min=2))
    assert propose(make_request([1, 2, 3, 4, 5, 6, 2, 3]), 3) == [4, 5, 6]
    assert propose(make_request([1, 2, 3, 4, 5, 6, 2, 3]), 1) == [4]
    assert propose(make_request([9, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]), 9) == [
        8,
        1,
        2,
        3,
    ]  # longest wins
    assert propose(make_request([2, 3, 7, 5, 2, 3, 8, 5, 2, 3]), 2) == [8, 5]  # then the latest
    assert propose(make_request([5, 5, 5, 5]), 4) == [5]
    assert propose(make_request([1, 2, 3]), 4) == [] and propose(make_request([1]), 4) == []


def test_drafts_come_from_new_tokens_too():
    propose, request = (
        NgramProposer(SpeculativeConfig(2, prompt_lookup_min=1)),
        make_request([1, 2]),
    )
    assert propose(request, 2) == []
    request.tokens += [3, 1]
    assert propose(request, 2) == [2, 3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0: it must be from 1 to 16"),
        ({"method": "eagle"}, "method is 'eagle': it is 'ngram'"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5: it must be from 1 to .* 4"),
    ],
)
def test_an_invalid_speculative_config_is_refused_by_name(changes, says):
    with pytest.raises(ValueError, match=says):
        SpeculativeConfig(**{"num_speculative_tokens": 4, **changes})


def make_steps(*tokens: int) -> tuple[Bucket, ...]:
    return tuple(Bucket(False, count, 9) for count in tokens)


def make_loops(*rows: int) -> tuple[Bucket, ...]:
    return tuple(map(Bucket.of_loop, rows))


def test_a_server_starts_with_two_shapes_and_logits_processors_have_about_every_second():
    buckets = Buckets(make_steps(16, 64, 256, 1024, 2048), make_loops(1, 4, 16, 64))
    assert buckets.first == (*make_steps(16, 2048), *make_loops(1, 64))
    assert buckets.coarse == (*make_steps(16, 256, 2048), *make_loops(1, 4, 64))

    def choose_step(tokens: int, has_processors: bool = False, is_ready=None) -> int:
        return buckets.choose(
            is_loop=False,
            tokens=tokens,
            rows=9,
            has_logits_processors=has_processors,
            is_ready=is_ready,
        ).tokens

    def choose_loop(rows: int, has_processors: bool = False, is_ready=None) -> int:
        return buckets.choose(
            is_loop=True,
            tokens=rows,
            rows=rows,
            has_logits_processors=has_processors,
            is_ready=is_ready,
        ).rows

    assert choose_step(17, True) == 256 and choose_step(17) == 64
    assert choose_loop(5, True) == 64 and choose_loop(5) == 16
    assert choose_step(17, is_ready=lambda bucket: False) == 2048
    assert choose_step(16, is_ready=lambda bucket: False) == 16
    assert choose_step(300, is_ready=lambda bucket: bucket.tokens == 1024) == 1024
    assert choose_loop(5, is_ready=lambda bucket: False) == 64
    single = Buckets(make_steps(16), make_loops(1))
    assert single.first == single.coarse == single.all


def test_fine_loops_save_padding_of_many_rows_once_they_are_compiled():
    limits = make_limits(requests=256, rows=257, tokens=2048)
    buckets = Buckets.of(limits)
    assert buckets.loops == make_loops(1, 4, 16, 64, 256)
    assert not set(buckets.fine_loops) & set(buckets.loops)

    def choose(buckets, rows: int, has_processors: bool = False, is_ready=lambda _: True) -> int:
        return buckets.choose(
            is_loop=True,
            tokens=rows,
            rows=rows,
            has_logits_processors=has_processors,
            is_ready=is_ready,
        ).rows

    for rows in range(17, 257):
        assert 0 <= choose(buckets, rows) - rows < 32
        found = choose(buckets, rows, is_ready=lambda bucket: bucket.rows == 128)
        assert found == next(x for x in (128, 256) if x >= rows)
        assert choose(buckets, rows, True) == 256
        assert choose(buckets, rows, is_ready=None) == (64 if rows <= 64 else 256)
    assert not Buckets.of(make_limits(requests=64, rows=65, tokens=2048)).fine_loops
    many = Buckets.of(make_limits(requests=1024, rows=1025, tokens=2048))
    assert max(loop.rows for loop in many.fine_loops if loop.rows < 512) == 448
    assert len(many.fine_loops) < 16
    assert all(choose(many, rows) < 1.5 * rows for rows in range(65, 1025))


def test_a_server_starts_with_the_first_shapes_and_samples_the_same(monkeypatch):
    """No step waits for programs that compile in the background."""
    golden = weights.read_golden(NAME)
    first, used = [], []
    compile_first, dispatch = ProgramCache.compile, Runner.dispatch

    def record_programs(self, programs, **options):
        first.extend(programs)
        return compile_first(self, programs, **options)

    def never_finish(self, programs):
        self._executables |= {program.key: Future() for program in programs}

    def record_bucket(self, output):
        pending = dispatch(self, output)
        used.append(pending.bucket)
        return pending

    monkeypatch.setattr(ProgramCache, "compile", record_programs)
    monkeypatch.setattr(ProgramCache, "compile_in_background", never_finish)
    monkeypatch.setattr(Runner, "dispatch", record_bucket)
    engine = make_engine(NAME, max_num_seqs=16, max_num_batched_tokens=256)
    engine.warm_up()
    assert engine.is_compiling and len(first) == 2 + 2 + 2  # steps, loops, and image tiles
    ids = [engine.add(golden.ids.tolist(), GREEDY.replace(max_tokens=9)) for _ in range(2)]
    found = run_all(engine)
    assert [found[request_id] for request_id in ids] == [golden.greedy_tokens.tolist()[:9]] * 2
    buckets = engine.runner.buckets
    assert len(buckets.steps) == len(buckets.loops) == 3
    assert {bucket.tokens for bucket in used} == {256, 16}  # no step of 64, no loop of 4


@pytest.mark.slow
def test_a_fine_loop_runs_once_it_is_compiled_and_samples_the_same(monkeypatch):
    monkeypatch.setattr(buckets, "_FINE_FROM", 1)
    monkeypatch.setattr(buckets, "_FINE_ROWS", 2)
    golden = weights.read_golden(NAME)
    used, dispatch = [], Runner.dispatch

    def record_bucket(self, output):
        pending = dispatch(self, output)
        used.append(pending.bucket)
        return pending

    monkeypatch.setattr(Runner, "dispatch", record_bucket)

    def run(engine):
        used.clear()
        ids = [engine.add(golden.ids.tolist(), GREEDY.replace(max_tokens=9)) for _ in range(2)]
        found = run_all(engine)
        assert [found[request_id] for request_id in ids] == [golden.greedy_tokens.tolist()[:9]] * 2
        return {bucket.rows for bucket in used if bucket.is_loop}

    engine = make_engine(NAME, max_num_batched_tokens=16)
    assert run(engine) == {4}  # no program was compiled ahead
    engine.warm_up()
    engine.runner.wait_for_compilers()
    assert run(engine) == {2}
