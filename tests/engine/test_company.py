"""Continuous batching changes nothing: in any company the model draws what it draws alone."""

from concurrent.futures import Future

import numpy as np
import pytest

from l4jax import decode
from l4jax.engine import buckets as buckets_module
from l4jax.engine.buckets import Buckets
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
    """Prompts that begin alike, some in a loop: what caches and guesses live on."""
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


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "speculates"), [("1", False), ("2x4", True)], ids=str)
def test_in_any_company_a_request_draws_what_it_draws_alone(mesh, speculates):
    """Random arrivals, preemption, prefix hits, guesses and chunked prompts together, greedy and
    drawn."""
    prompts, params = make_prompts(12), make_params(12)
    engine = make_engine(
        NAME,
        mesh,
        max_model_len=128,
        max_num_seqs=6,
        max_num_batched_tokens=24 if mesh == "1" else 48,
        kv_cache_memory_bytes=(46 if mesh == "1" else 39) * page_bytes(),
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


def test_images_are_found_by_their_pixels():
    """The same picture twice, then another of the same size: token ids alone cannot tell."""
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


def test_an_image_is_encoded_where_a_prefix_ends_within_it():
    """The first prompt ends with the first tile; the second goes on through all three."""
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
def test_after_the_warm_up_nothing_is_compiled_whatever_arrives():
    golden = weights.read_golden("scout-8-image")
    engine = make_engine(
        "scout-8-image",
        max_model_len=124,  # shapes that no other test has
        max_num_batched_tokens=64,
        speculative_config={"num_speculative_tokens": 2},
    )
    engine.warm_up()
    functions = list(engine.runner.functions.values())
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


@pytest.mark.parametrize("at", ["dispatch", "landing"])
def test_a_failing_step_ends_its_requests_and_the_others_go_on(monkeypatch, at):
    """The pool was donated to the step that failed: it is made anew, and what was computed for
    others is computed again."""
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
    functions = engine.runner.functions

    def fail(*args, **kwargs):
        if at == "dispatch":
            functions["decode_loop"](*args, **kwargs)  # takes the pool with it
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        if at == "dispatch":
            broken = {**functions, "decode_loop": fail}
            patch.setattr(engine.runner, "functions", broken)
            patch.setattr(decode, "jit_functions", lambda *places: functions)
        else:
            patch.setattr(PendingStep, "result", fail)
        run(2 if at == "dispatch" else 1)  # what could not be started is told when it is landed
    engine.runner.functions = functions
    assert reasons[first] == "error"
    run(200)
    assert found[second] == golden.greedy_tokens.tolist() and reasons[second] == "length"
    assert_all_free(engine)


def make_request(tokens: list[int]) -> Request:
    return Request(0, tokens, len(tokens), 100, GREEDY, 0, ())


def test_a_lookup_goes_on_as_the_text_did_before():
    look = NgramProposer(SpeculativeConfig(4, prompt_lookup_max=3, prompt_lookup_min=2))
    assert look(make_request([1, 2, 3, 4, 5, 6, 2, 3]), 3) == [4, 5, 6]
    assert look(make_request([1, 2, 3, 4, 5, 6, 2, 3]), 1) == [4]
    assert look(make_request([9, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]), 9) == [8, 1, 2, 3]  # longest wins
    assert look(make_request([2, 3, 7, 5, 2, 3, 8, 5, 2, 3]), 2) == [8, 5]  # then the latest
    assert look(make_request([5, 5, 5, 5]), 4) == [5]
    assert look(make_request([1, 2, 3]), 4) == [] and look(make_request([1]), 4) == []


def test_a_lookup_sees_what_came_since():
    look, request = NgramProposer(SpeculativeConfig(2, prompt_lookup_min=1)), make_request([1, 2])
    assert look(request, 2) == []
    request.tokens += [3, 1]
    assert look(request, 2) == [2, 3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0: it must be from 1 to 16"),
        ({"method": "eagle"}, "method is 'eagle': it is 'ngram'"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5: it must be from 1 to .* 4"),
    ],
)
def test_a_speculation_that_cannot_be_had_is_refused_by_name(changes, says):
    with pytest.raises(ValueError, match=says):
        SpeculativeConfig(**{"num_speculative_tokens": 4, **changes})


def test_a_server_begins_with_two_shapes_and_adjusted_rows_have_about_every_other():
    buckets = Buckets(((16, 9), (64, 9), (256, 9), (1024, 9), (2048, 9)), (1, 4, 16, 64))
    first, coarse = buckets.first, buckets.coarse
    assert first == Buckets(((16, 9), (2048, 9)), (1, 64))
    assert coarse == Buckets(((16, 9), (256, 9), (2048, 9)), (1, 4, 64))
    assert coarse.without(first) == Buckets(((256, 9),), (4,))
    assert buckets.without(coarse) == Buckets(((64, 9), (1024, 9)), (16,))
    assert buckets.fit(17, 9, True) == (256, 9) and buckets.fit(17, 9) == (64, 9)
    assert buckets.fit_loop(5, True) == 64 and buckets.fit_loop(5) == 16
    assert buckets.fit(17, 9, has=lambda shape: False) == (2048, 9)
    assert buckets.fit(16, 9, has=lambda shape: False) == (16, 9)
    assert buckets.fit(300, 9, has=lambda shape: shape == (1024, 9)) == (1024, 9)
    assert buckets.fit_loop(5, has=lambda rows: False) == 64
    alone = Buckets(((16, 2),), (1,))
    assert alone.first == alone.coarse == alone


def test_many_rows_waste_less_than_a_few_once_the_loops_between_are_there():
    limits = make_limits(requests=256, rows=257, tokens=2048)
    buckets = Buckets.of(limits)
    assert buckets.loops == (1, 4, 16, 64, 256) and not set(buckets.between) & set(buckets.loops)
    for rows in range(17, 257):
        assert 0 <= buckets.fit_loop(rows, has=lambda _: True) - rows < 32
        there = buckets.fit_loop(rows, has=lambda found: found == 128)
        assert there == next(x for x in (128, 256) if x >= rows)
        assert buckets.fit_loop(rows, True, has=lambda _: True) == 256  # those are others
    assert not Buckets.of(make_limits(requests=64, rows=65, tokens=2048)).between
    many = Buckets.of(make_limits(requests=1024, rows=1025, tokens=2048))
    assert max(r for r in many.between if r < 512) == 448 and len(many.between) < 16
    assert all(many.fit_loop(rows, has=lambda _: True) < 1.5 * rows for rows in range(65, 1025))


def test_a_server_begins_with_the_first_shapes_and_draws_the_same(monkeypatch):
    """What is compiled meanwhile is not waited for."""
    golden = weights.read_golden(NAME)
    first, shapes = [], []
    compile_first, dispatch = ProgramCache.compile, Runner.dispatch

    def compile_and_tell(self, calls, **options):
        first.extend(calls)
        return compile_first(self, calls, **options)

    def never_finish(self, calls):
        self._compiled |= {key: Future() for key in calls}

    def spy(self, plan):
        flight = dispatch(self, plan)
        shapes.append(flight.key.shape)
        return flight

    monkeypatch.setattr(ProgramCache, "compile", compile_and_tell)
    monkeypatch.setattr(ProgramCache, "compile_in_background", never_finish)
    monkeypatch.setattr(Runner, "dispatch", spy)
    engine = make_engine(NAME, max_num_seqs=16, max_num_batched_tokens=256)
    engine.warm_up()
    assert engine.is_compiling and len(first) == 2 + 2 + 2  # steps, loops, and those of image tiles
    found = [engine.add(golden.ids.tolist(), GREEDY.replace(max_tokens=9)) for _ in range(2)]
    drawn = run_all(engine)
    assert [drawn[each] for each in found] == [golden.greedy_tokens.tolist()[:9]] * 2
    buckets = engine.runner.buckets
    assert len(buckets.steps) == len(buckets.loops) == 3
    assert {tokens for tokens, *_ in shapes} == {
        256,
        16,
    }  # not the step of 64, nor the loop of 4


@pytest.mark.slow
def test_a_loop_between_is_run_once_it_is_compiled_and_draws_the_same(monkeypatch):
    monkeypatch.setattr(buckets_module, "_MANY", 1)
    monkeypatch.setattr(buckets_module, "_FINE", 2)
    golden = weights.read_golden(NAME)
    shapes = []
    run_program = Runner._run

    def spy(self, key, inputs):
        if key.kind == "decode_loop":
            shapes.extend(key.shape)
        return run_program(self, key, inputs)

    monkeypatch.setattr(Runner, "_run", spy)

    def run(engine):
        shapes.clear()
        ids = [engine.add(golden.ids.tolist(), GREEDY.replace(max_tokens=9)) for _ in range(2)]
        found = run_all(engine)
        assert [found[each] for each in ids] == [golden.greedy_tokens.tolist()[:9]] * 2
        return set(shapes)

    engine = make_engine(NAME, max_num_batched_tokens=16)
    assert run(engine) == {4}  # nothing is compiled beforehand, nor behind
    engine.warm_up()
    engine.runner.wait_for_compilers()
    assert run(engine) == {2}
