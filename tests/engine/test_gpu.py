"""On an NVIDIA GPU: the same tokens as the reference, in float32; in bfloat16 the fast kernels, run
by the engine, score as the portable ones do.
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
from tests.engine.engines import GREEDY, assert_all_free, find_tiles, make_engine, run_all

pytestmark = pytest.mark.gpu

# Scout's widths, where the fast kernels have tiles for every product; three local layers and a
# global one. Of fewer experts, so that several such tests have room side by side.
SMALL_SCOUT = dataclasses.replace(SCOUT, vision=None).replace_text(layers=4, vocab=4096, experts=4)
LENGTHS = (1, 40, 129, 700)  # the last one in several steps, beside the others' decoding


@pytest.mark.parametrize("name", weights.GOLDENS)
def test_greedy_tokens_equal_the_reference_on_a_gpu(name):
    golden = weights.read_golden(name)
    engine = make_engine(name)
    (device,) = engine.runner.pool.k[0].devices()
    assert device.platform == "gpu" and device in jax.devices("gpu")
    for _ in range(3):
        engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
    found = run_all(engine)
    assert all(tokens == golden.greedy_tokens.tolist() for tokens in found.values())
    assert_all_free(engine)


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_the_fast_kernels_score_as_the_portable_ones_do(quantization):
    """Each token of prompts of several lengths, cut and mixed with decoding as they come."""
    portable = score("portable", quantization)
    fast = score("hopper", quantization)
    assert len(fast) == len(portable) == sum(LENGTHS) - len(LENGTHS)
    # Both round to bfloat16, at other places; behind a wrong page all would be another number.
    assert np.sqrt(np.mean((fast - portable) ** 2)) < 0.05 * np.std(portable)


def test_answers_of_the_fast_kernels_score_as_the_portable_ones_score_them():
    """What several rows drew step after step, each behind what it had stored: the other kernels
    find the same log-probabilities where they read prompt and answer at once."""
    prompts = make_prompts()
    drawn, answers = find_answers(make_small("hopper", None), prompts, 150)
    whole = [ids + answer for ids, answer in zip(prompts, answers, strict=True)]
    scored = find_scores(make_small("portable", None), whole)
    fast = np.concatenate(drawn)
    found = zip(scored, prompts, strict=True)
    portable = np.concatenate([scores[len(ids) - 1 :] for scores, ids in found])
    assert len(fast) == len(portable) == 150 * len(LENGTHS)
    assert np.sqrt(np.mean((fast - portable) ** 2)) < 0.05 * np.std(np.concatenate(scored))


def test_the_device_runs_a_loop_by_itself(monkeypatch):
    """The call returns before the loop is done; a host that read each condition would wait for the
    end of the loop."""
    engine = make_small("hopper", None, loop_steps=128)
    dispatch, is_done = engine.runner.dispatch, []

    def watch(plan):
        flight = dispatch(plan)
        found = flight.found.result()
        if plan.is_loop:
            is_done.append(all(leaf.is_ready() for leaf in jax.tree.leaves(found)))
        jax.block_until_ready(found)
        return flight

    monkeypatch.setattr(engine.runner, "dispatch", watch)
    engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True))
    run_all(engine)
    assert not all(is_done)  # the first loop is compiled, the second recorded


def score(kernels: str, quantization: str | None) -> np.ndarray:
    """The log-probabilities of random prompts' tokens, as an engine with these kernels has them."""
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


def find_answers(
    engine: Engine, prompts: list[list[int]], length: int
) -> tuple[list[np.ndarray], list[list[int]]]:
    """The log-probabilities of what answers prompts, and its tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=length, logprobs=0, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in prompts]
    drawn, answers = {request: [] for request in ids}, {request: [] for request in ids}
    while engine.has_work:
        for update in engine.step():
            answers[update.request_id] += update.token_ids
            drawn[update.request_id] += [x.chosen for x in update.logprobs or ()]
    return [np.array(drawn[request]) for request in ids], [answers[request] for request in ids]


def find_scores(engine: Engine, prompts: list[list[int]]) -> list[np.ndarray]:
    """The log-probabilities of the tokens of each prompt but the first."""
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
