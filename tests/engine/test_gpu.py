"""On an NVIDIA GPU: the reference's tokens in float32; in bfloat16, the Hopper kernels give the
same log-probabilities as the portable ones.
"""

import dataclasses

import jax
import numpy as np
import pytest

from l4jax.config import SCOUT
from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.request import SamplingParams
from l4jax.engine.runner import Runner
from tests import weights
from tests.engine.engines import GREEDY, assert_all_free, find_tiles, get_pool, make_engine, run_all

pytestmark = pytest.mark.gpu

# Scout's widths, for which the Hopper kernels have tiles of every product; three local layers and a
# global one. Fewer experts, so that several tests fit in memory at once.
SMALL_SCOUT = dataclasses.replace(SCOUT, vision=None).replace_text(layers=4, vocab=4096, experts=4)
LENGTHS = (1, 40, 129, 700)  # the last one in several steps, while the others decode


@pytest.mark.parametrize("name", weights.GOLDENS)
def test_greedy_tokens_equal_the_reference_on_a_gpu(name):
    golden = weights.read_golden(name)
    engine = make_engine(name)
    (device,) = get_pool(engine.runner).k[0].devices()
    assert device.platform == "gpu" and device in jax.devices("gpu")
    for _ in range(3):
        engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
    found = run_all(engine)
    assert all(tokens == golden.greedy_tokens.tolist() for tokens in found.values())
    assert_all_free(engine)


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_the_hopper_kernels_give_the_logprobs_of_the_portable_ones(quantization):
    """For each token of prompts of several lengths, chunked and mixed with decoding."""
    portable = score("portable", quantization)
    fast = score("hopper", quantization)
    assert len(fast) == len(portable) == sum(LENGTHS) - len(LENGTHS)
    # Both round to bfloat16, at different places; after a wrong page all values would differ.
    assert np.sqrt(np.mean((fast - portable) ** 2)) < 0.05 * np.std(portable)


def test_outputs_of_the_hopper_kernels_have_the_logprobs_of_the_portable_ones():
    """Outputs of several rows, decoded step by step from the KV cache: the portable kernels give
    the same log-probabilities when they prefill prompt and output at once."""
    prompts = make_prompts()
    sampled, outputs = find_outputs(make_small("hopper", None), prompts, 150)
    whole = [ids + output for ids, output in zip(prompts, outputs, strict=True)]
    scored = find_scores(make_small("portable", None), whole)
    fast = np.concatenate(sampled)
    found = zip(scored, prompts, strict=True)
    portable = np.concatenate([scores[len(ids) - 1 :] for scores, ids in found])
    assert len(fast) == len(portable) == 150 * len(LENGTHS)
    assert np.sqrt(np.mean((fast - portable) ** 2)) < 0.05 * np.std(np.concatenate(scored))


def test_the_device_runs_a_loop_without_the_host(monkeypatch):
    """The call returns before the loop is done; without a CUDA graph the host would evaluate
    each condition until the end."""
    engine = make_small("hopper", None, loop_steps=128)
    dispatch, is_done = engine.runner.dispatch, []

    def watch(output):
        pending = dispatch(output)
        found = pending.outputs.result()
        if output.is_loop:
            is_done.append(all(leaf.is_ready() for leaf in jax.tree.leaves(found)))
        jax.block_until_ready(found)
        return pending

    monkeypatch.setattr(engine.runner, "dispatch", watch)
    engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True))
    run_all(engine)
    assert not all(is_done)  # the first loop compiles, the second records the graph


def score(kernels: str, quantization: str | None) -> np.ndarray:
    """Return the log-probabilities of random prompts' tokens with these kernels."""
    return np.concatenate(find_scores(make_small(kernels, quantization), make_prompts()))


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, SMALL_SCOUT.text.vocab, length).tolist() for length in LENGTHS]


def make_small(kernels: str, quantization: str | None, **changes) -> Engine:
    runner = Runner(SMALL_SCOUT, "1", "bfloat16", kernels=kernels)
    runner.initialize(0, quantization=quantization)
    return Engine(
        runner,
        EngineConfig(
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            kv_cache_memory_bytes=2**30,
            **changes,
        ),
    )


def find_outputs(
    engine: Engine, prompts: list[list[int]], length: int
) -> tuple[list[np.ndarray], list[list[int]]]:
    """Return the log-probabilities of sampled tokens, and the tokens, of each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=length, logprobs=0, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in prompts]
    sampled, outputs = {request: [] for request in ids}, {request: [] for request in ids}
    while engine.has_work:
        for update in engine.step():
            outputs[update.request_id] += update.token_ids
            sampled[update.request_id] += [x.chosen for x in update.logprobs or ()]
    return [np.array(sampled[request]) for request in ids], [outputs[request] for request in ids]


def find_scores(engine: Engine, prompts: list[list[int]]) -> list[np.ndarray]:
    """Return the log-probabilities of each prompt's tokens, except the first."""
    params = SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=0, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in prompts]
    scored = {}
    while engine.has_work:
        for update in engine.step():
            assert update.finish_reason != "error", update
            if update.prompt_logprobs is not None:
                scored[update.request_id] = [x.chosen for x in update.prompt_logprobs if x]
    assert_all_free(engine)
    return [np.array(scored[request]) for request in ids]
