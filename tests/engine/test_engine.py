"""The engine samples the reference's tokens on any mesh and in any batch, and frees everything."""

import jax
import numpy as np
import pytest

from l4jax import cache, decode
from l4jax.engine.input_batch import fill_step
from l4jax.engine.request import Request, SamplingParams
from l4jax.engine.scheduler import ScheduledChunk, SchedulerOutput
from l4jax.strategies import activate
from l4jax.text.chat import PromptError
from tests import tiers, weights
from tests.engine.engines import (
    GREEDY,
    assert_all_free,
    find_tiles,
    get_pool,
    load_runner,
    make_engine,
    run_all,
)


@pytest.mark.parametrize("name", tiers.every(2, weights.GOLDENS))
def test_greedy_tokens_equal_the_reference_over_64_steps(name):
    golden = weights.read_golden(name)
    engine = make_engine(name)
    engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
    assert run_all(engine)[0] == golden.greedy_tokens.tolist()
    assert_all_free(engine)


@pytest.mark.parametrize("mesh", [pytest.param("8", marks=pytest.mark.slow), "2x4"])
@pytest.mark.parametrize("name", ["scout-8-image", "maverick-32-image"])
def test_sharded_equals_unsharded(name, mesh):
    golden = weights.read_golden(name)
    engine = make_engine(name, mesh)
    for _ in range(2):  # on 2x4 one for each data shard
        engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
    found = run_all(engine)
    assert found[0] == found[1] == golden.greedy_tokens.tolist()
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("tokens", "mesh"),
    [
        (16, "2x4"),
        pytest.param(4, "1", marks=pytest.mark.slow),
        pytest.param(2048, "1", marks=pytest.mark.slow),
    ],
)
def test_a_request_has_the_same_output_in_a_batch_as_at_batch_size_1(tokens, mesh):
    """Prompts of all lengths around the chunk, more than run at once, greedy and sampled."""
    name, rng = "scout-8-text", np.random.default_rng(0)
    prompts = [rng.integers(4, 300, n).tolist() for n in (1, 7, 8, 9, 16, 29, 50, 2)]
    params = [
        SamplingParams(temperature=t, top_p=0.9, seed=i, max_tokens=12 + i, ignore_eos=True)
        for i, t in enumerate([0.0, 1.0, 0.0, 0.7, 0.0, 1.3, 0.0, 1.0])
    ]
    together = make_engine(name, mesh, max_num_batched_tokens=tokens)
    for prompt, its in zip(prompts, params, strict=True):
        together.add(prompt, its)
    found = run_all(together)
    assert_all_free(together)
    alone = make_engine(name, "1")
    for i, (prompt, its) in enumerate(zip(prompts, params, strict=True)):
        alone.add(prompt, its)
        assert run_all(alone)[i] == found[i], f"prompt {i}"


def test_decode_compiles_once_per_bucket():
    engine = make_engine("scout-32-text", max_model_len=252)  # shapes that no other test has
    rng = np.random.default_rng(1)

    def run(count: int) -> None:
        for _ in range(count):
            length = int(rng.integers(1, 100))
            engine.add(rng.integers(4, 300, length).tolist(), GREEDY)
        run_all(engine)

    functions = engine.runner.functions
    loop, step = functions["loop", False], functions["step", False]
    before = loop._cache_size(), step._cache_size()
    for count in (1, 2, 4, 3, 1, 4, 2):
        run(count)
    after = loop._cache_size(), step._cache_size()
    assert after[0] - before[0] == len(engine.runner.buckets.loops) == 2
    assert after[1] - before[1] <= len(engine.runner.buckets.steps)
    for count in (4, 1, 2):
        run(count)
    assert (loop._cache_size(), step._cache_size()) == after


def find_addresses(pool: cache.PagePool) -> set[int]:
    """Return the address of the first device's shard of each array."""
    parts = (leaf.addressable_shards[0].data for leaf in jax.tree.leaves(pool))
    return {part.unsafe_buffer_pointer() for part in parts}


@pytest.mark.parametrize("mesh", tiers.every(2, ["8", "1"]))
def test_the_pool_is_donated_and_updated_in_place(mesh):
    """Read from the executables: every byte of the pool and of the decode state is aliased to an
    output."""
    engine = make_engine("scout-8-text", mesh, max_num_seqs=1)
    compiled = {}
    for name in ("step", "loop"):
        jitted = engine.runner.functions[name, False]

        def spy(*args, _name=name, _jitted=jitted):
            compiled[_name] = _jitted.lower(*args).compile()
            return _jitted(*args)

        engine.runner.functions[name, False] = spy
    pool = get_pool(engine.runner)
    addresses = {
        a.addressable_shards[0].data.unsafe_buffer_pointer() for a in jax.tree.leaves(pool)
    }
    engine.add([5, 6, 7], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    run_all(engine)
    kept = jax.tree.leaves((engine.runner.pool, engine.runner.decode_state))
    kept_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in kept)
    for name, executable in compiled.items():
        aliased = executable.memory_analysis().alias_size_in_bytes
        assert aliased == kept_bytes, name
    assert pool.k[0].is_deleted()
    assert find_addresses(get_pool(engine.runner)) == addresses


@pytest.mark.parametrize("mesh", tiers.every(2, ["2x4", "8"]))
def test_the_pool_stays_sharded_as_the_strategy_says(mesh):
    engine = make_engine("scout-8-image", mesh)
    golden = weights.read_golden("scout-8-image")
    engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
    run_all(engine)
    runner, place = engine.runner, engine.runner.layout.place
    model = 8 if mesh == "8" else 4
    for leaf in jax.tree.leaves(runner.pool):
        assert leaf.sharding.is_equivalent_to(place(cache.POOL_AXES), leaf.ndim)
        assert leaf.sharding.shard_shape(leaf.shape)[1] == runner.config.text.kv_heads // model
    text = runner.params["text"]
    names = {
        "embedding": ("vocab", "width"),
        "head": ("vocab", "width"),
    }
    for key, its in names.items():
        assert text[key].sharding.spec == runner.layout.spec(its)
    layer = text["layer_0"]
    assert layer["attention"]["qkv"].sharding.spec[0] == "model"
    assert layer["feed_forward"]["down"].sharding.spec[2] == "model"


def test_logits_are_sharded_by_vocabulary():
    runner = load_runner("scout-8-text", "8")
    engine = make_engine("scout-8-text", "8", max_num_seqs=1)
    batch = cache.Batch(
        token_T=np.array([5], np.int32),
        position_T=np.array([0], np.int32),
        row_T=np.array([0], np.int32),
        tables=cache.PageTables(
            np.zeros((1, 64), np.int32), np.zeros((engine.limits.local_groups, 1, 2), np.int32)
        ),
    )
    with activate(runner.layout):
        runner.pool, logits = decode.score(runner.params, runner.pool, batch, model=runner.model)
    assert logits.shape == (1, 320)
    assert logits.sharding.shard_shape(logits.shape) == (1, 40)


def test_a_stop_id_ends_a_request_within_the_loop_and_after_it():
    golden = weights.read_golden("scout-8-text")
    tokens = golden.greedy_tokens.tolist()
    stop = tokens[10]
    first = tokens.index(stop)
    engine = make_engine("scout-8-text")
    params = SamplingParams(temperature=0, max_tokens=64, stop_token_ids=[stop], ignore_eos=True)
    engine.add(golden.ids.tolist(), params)
    assert run_all(engine)[0] == tokens[: first + 1]
    # More stop ids than the device checks: the host checks them all.
    many = [300 + i for i in range(20)] + [stop]
    engine.add(golden.ids.tolist(), params.__class__(**{**vars(params), "stop_token_ids": many}))
    found = run_all(engine)[1]
    assert found == tokens[: first + 1]
    assert_all_free(engine)


def test_logprobs_come_for_requests_that_ask_and_change_no_token():
    golden = weights.read_golden("scout-8-text")
    engine = make_engine("scout-8-text")
    asking = engine.add(golden.ids.tolist(), GREEDY.replace(logprobs=3, max_tokens=20))
    plain = engine.add(golden.ids.tolist(), GREEDY.replace(max_tokens=20))
    tokens: dict[int, list[int]] = {asking: [], plain: []}
    logprobs: dict[int, list] = {asking: [], plain: []}
    while engine.has_work:
        for update in engine.step():
            tokens[update.request_id] += update.token_ids
            logprobs[update.request_id] += update.logprobs
    assert tokens[asking] == tokens[plain] == golden.greedy_tokens[:20].tolist()
    assert logprobs[plain] == [] and len(logprobs[asking]) == 20
    for token, entry in zip(tokens[asking], logprobs[asking], strict=True):
        best = next(iter(entry.top))
        assert len(entry.top) == 3 and best == token
        assert entry.chosen == pytest.approx(entry.top[best], abs=1e-6) and entry.chosen < 0


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelling_at_any_step_frees_everything(steps):
    golden = weights.read_golden("scout-8-image")
    engine = make_engine("scout-8-image", max_num_batched_tokens=16)
    ids = [engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden)) for _ in range(6)]
    for _ in range(steps):
        engine.step()
    for request_id in ids[:5]:
        engine.cancel(request_id)
        engine.cancel(request_id)  # once more does nothing
    assert run_all(engine).get(ids[5], [])[-5:] == golden.greedy_tokens[-5:].tolist()
    assert_all_free(engine)


def fill(request: Request, start: int, stop: int) -> np.ndarray:
    engine = make_engine("scout-8-image")
    chunk = ScheduledChunk(request, start, stop, [], feature_slots=tuple(request.feature_slots))
    output = SchedulerOutput([[chunk]], is_loop=False)
    batch, _ = fill_step(output, engine.limits, engine.runner.config, 16, 8)
    return batch.feature_T


def make_image_request(tokens: list[int], slots: list[int]) -> Request:
    positions = np.flatnonzero(np.array(tokens) == weights.PATCH_ID)
    return Request(
        0, tokens, len(tokens), 64, GREEDY, 0, (), patch_positions=positions, feature_slots=slots
    )


def test_image_tokens_take_the_features_of_their_tiles_in_order():
    """Four features per tile; the tiles are in slots 5 and 2, and the step begins in the first."""
    patch = weights.PATCH_ID
    request = make_image_request([9, *[patch] * 4, 8, *[patch] * 4, 7], [5, 2])
    assert fill(request, 2, 11).tolist() == [21, 22, 23, -1, 8, 9, 10, 11, -1, *[-1] * 7]


def test_a_patch_token_in_an_output_is_a_text_token():
    """The request has released its features by then, and none is read."""
    request = make_image_request([9, weights.PATCH_ID], [])
    assert (fill(request, 1, 2) == -1).all()


def test_features_are_allocated_again_for_other_limits():
    """A buffer of fewer slots would silently drop the tiles of further images."""
    golden = weights.read_golden("scout-8-image")
    for max_images in (1, 3):
        engine = make_engine("scout-8-image", limit_mm_per_prompt={"image": max_images})
        engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
        assert run_all(engine).popitem()[1] == golden.greedy_tokens.tolist()
        features = engine.runner.features
        assert features is not None
        assert features.shape[0] == engine.limits.feature_slots == 17 * max_images


@pytest.mark.parametrize(
    ("tokens", "images", "says"),
    [
        ([], 0, "the prompt is empty"),
        ([5] * 256, 0, "the prompt has 256 tokens, and with the answer 256 fit: shorten it to 255"),
        ([5, 320], 0, "token id 320 is not in the vocabulary of 320"),
        ([5, -1], 0, "token id -1"),
        ([5, weights.PATCH_ID], 0, "1 image tokens .* for 0 image features"),
        ([5], 1, "0 image tokens .* for 12 image features"),
        ([5], 11, "11 images, and 10 are allowed"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(tokens, images, says):
    engine = make_engine("scout-8-image")
    tiles = find_tiles(weights.read_golden("scout-8-image")) * images
    with pytest.raises(PromptError, match=says):
        engine.add(tokens, GREEDY, tiles)
    assert not engine.has_work
