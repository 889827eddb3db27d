"""Sampling parameters and constraints of requests, with vLLM's meanings."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import cache, decode, sampling
from l4jax.engine.engine import Engine, RequestUpdate
from l4jax.engine.input_batch import find_banned_tokens
from l4jax.engine.request import (
    MAX_BIASES,
    Constraints,
    SamplingParams,
    StructuredOutputsParams,
)
from tests import tiers, weights
from tests.engine.engines import GREEDY, STRATEGIES, assert_all_free, make_engine, run_all
from tests.models import load_golden

NAME = "scout-8-text"
IDS = weights.read_golden(NAME).ids.tolist()
TOKENS = weights.read_golden(NAME).greedy_tokens.tolist()


def run(params: SamplingParams, prompt=IDS, **kwargs) -> list[int]:
    engine = make_engine(NAME)
    engine.add(prompt, params, **kwargs)
    found = run_all(engine)[0]
    assert_all_free(engine)
    return found


def compute_logits(tokens: list[int]) -> np.ndarray:
    """Return the model's logits after each token, from one forward call."""
    tiny, _ = load_golden(NAME)
    engine = make_engine(NAME, max_num_seqs=1)
    text = tiny.config.text
    rows, at = -(-len(tokens) // text.chunk), np.arange(len(tokens), dtype=np.int32)
    whole, per = -(-len(tokens) // 4), text.chunk // 4
    local = whole + np.arange(3 * rows * per).reshape(rows, 3, per).transpose(1, 0, 2)
    tables = cache.PageTables(
        np.tile(np.arange(whole, dtype=np.int32), (rows, 1)), local.astype(np.int32)
    )
    pool = cache.make_pool(text, whole + 3 * rows * per, 4, jnp.float32)
    batch = cache.Batch(np.array(tokens, np.int32), at, at // text.chunk, tables)
    with jax.default_matmul_precision("highest"):
        _, logits = decode.score(tiny.params, pool, batch, model=engine.runner.model)
    return np.asarray(logits)


def penalize(logits, prompt, output, presence=0.0, frequency=0.0, repetition=1.0) -> np.ndarray:
    """The definition, in numpy."""
    found = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        found[token] = found[token] / repetition if found[token] > 0 else found[token] * repetition
    for token in set(output):
        found[token] -= presence + frequency * output.count(token)
    return found


FEATURES = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "prompt logprobs": {"prompt_logprobs": 2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 2.0},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": {7: 9.0}},
    "min tokens": {"min_tokens": 3, "stop_token_ids": [TOKENS[1]]},
    "seed": {"temperature": 1.0, "seed": 5, "logprobs": 0},
    "seed of 64 bits": {"temperature": 1.0, "seed": 5 + 2**40},
    "filters": {"temperature": 0.8, "seed": -9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "all penalties": {
        "temperature": 1.0,
        "seed": 7,
        "logit_bias": {9: 5.0},
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    },
    "n": {"temperature": 1.0, "seed": 11, "n": 3},
}


def make_engine_of_features(mesh: str, **engine_args) -> Engine:
    page = 2 if "seq=4" in mesh else 4  # pages of all stripes end with a chunk of 8
    return make_engine(NAME, mesh, max_num_batched_tokens=32, block_size=page, **engine_args)


def run_on(engine: Engine, preempts_at: int | None = None) -> dict[str, list[RequestUpdate]]:
    """Run a request of each sampling feature in one batch; return the updates by feature.

    Args:
        preempts_at: step before which all running requests are preempted.
    """
    params = {name: GREEDY.replace(max_tokens=6, **each) for name, each in FEATURES.items()}
    names = {
        engine.add(IDS, one): f"{name} {index}" if each.n > 1 else name
        for name, each in params.items()
        for index, one in enumerate(each.split())
    }
    words = Constraints(((TOKENS[0],), (TOKENS[1], TOKENS[2])))
    names[engine.add(IDS, GREEDY.replace(max_tokens=6), constraints=words)] = "bad words"
    grammar = Constraints(matcher=Alternate(320, engine.runner.config.eos_ids[0]))
    names[engine.add(IDS, GREEDY.replace(max_tokens=9), constraints=grammar)] = "structured outputs"
    found: dict[str, list[RequestUpdate]] = {name: [] for name in names.values()}
    for tick in itertools.count():
        if not engine.has_work:
            break
        if tick == preempts_at:
            for update in engine._postprocess(engine._pending):
                found[names[update.request_id]].append(update)
            engine._pending = None
            for request in list(engine.scheduler.running):
                engine.scheduler.preempt(request)
        for update in engine.step():
            found[names[update.request_id]].append(update)
    assert_all_free(engine)
    return found


@functools.cache
def run_features(mesh: str) -> dict[str, list[RequestUpdate]]:
    """Run the requests of `run_on` on a mesh."""
    return run_on(make_engine_of_features(mesh))


def assert_same(found: dict[str, list[RequestUpdate]], wanted: dict[str, list[RequestUpdate]]):
    """Assert that tokens and finish reasons are equal, and log-probabilities are close."""
    assert read_logprobs(wanted["prompt logprobs"]) and read_logprobs(wanted["logprobs"])
    assert set(found) == set(wanted)
    for name, updates in wanted.items():
        assert found[name][-1].finish_reason == updates[-1].finish_reason != "error", name
        tokens, expected = (
            [token for update in each for token in update.token_ids]
            for each in (found[name], updates)
        )
        assert tokens == expected, name
        np.testing.assert_allclose(
            read_logprobs(found[name]), read_logprobs(updates), atol=1e-4, err_msg=name
        )


def read_logprobs(updates: list[RequestUpdate]) -> list[float]:
    """Return all log-probabilities of a request, of its prompt and of its output."""
    prompt = [one for update in updates for one in update.prompt_logprobs or () if one is not None]
    output = [one for update in updates for one in update.logprobs]
    return [value for one in prompt + output for value in (one.chosen, *one.top.values())]


@pytest.mark.parametrize("mesh", tiers.every(2, ["2x4", "8", "2x1", *STRATEGIES]))
def test_every_sampling_feature_gives_the_same_on_every_mesh(mesh):
    """In one batch: no feature fails the requests of another one."""
    assert_same(run_features(mesh), run_features("1"))


@pytest.mark.parametrize("speculates", [False, True], ids=["one step a call", "drafts"])
def test_every_sampling_feature_gives_the_same_without_loops_and_with_drafts(speculates):
    speculation = {"num_speculative_tokens": 3, "prompt_lookup_min": 1} if speculates else None
    engine = make_engine_of_features("1", loop_steps=1, speculative_config=speculation)
    assert_same(run_on(engine), run_features("1"))
    assert bool(engine.stats().drafted) == speculates


def test_every_sampling_feature_gives_the_same_after_preemption_and_prefix_cache_hits():
    engine = make_engine_of_features("1")
    assert_same(run_on(engine, preempts_at=7), run_features("1"))
    preemptions, hits = engine.stats().preemptions, engine.stats().prefix_hits
    assert preemptions
    assert_same(run_on(engine), run_features("1"))
    assert engine.stats().prefix_hits > hits


@pytest.mark.parametrize(
    "penalties",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1.4},
        {"presence_penalty": -0.5, "frequency_penalty": 1.9, "repetition_penalty": 1.2},
        {"logit_bias": {TOKENS[0]: -4.0, 3: 9.0, IDS[0]: 8.0}, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_penalties_equal_their_definition_token_by_token(penalties):
    """In steps and loops, together with requests without penalties. Biases come first."""
    engine = make_engine(NAME)
    other = engine.add(IDS, GREEDY.replace(max_tokens=30))
    mine = engine.add(IDS, GREEDY.replace(max_tokens=30, **penalties))
    found = run_all(engine)
    assert found[other] == TOKENS[:30]
    output = found[mine]
    assert output != TOKENS[:30]
    logits = compute_logits([*IDS, *output]).copy()
    for token, bias in penalties.get("logit_bias", {}).items():
        logits[:, token] += bias
    short = {
        key.removesuffix("_penalty"): value
        for key, value in penalties.items()
        if key != "logit_bias"
    }
    for at in range(30):
        want = penalize(logits[len(IDS) - 1 + at], IDS, output[:at], **short)
        assert want[output[at]] >= want.max() - 1e-4, at


def test_penalties_survive_preemption_and_prefix_cache_hits():
    params = GREEDY.replace(max_tokens=30, frequency_penalty=0.9, repetition_penalty=1.2)
    alone = run(params)
    engine = make_engine(NAME, max_num_seqs=3)
    for _ in range(2):  # the second time with a prefix cache hit
        number = engine.add(IDS, params)
        assert run_all(engine)[number] == alone
    request = engine._requests[engine.add(IDS, params)]
    for tick in range(60):
        if tick == 3:
            engine._postprocess(engine._pending)
            engine._pending = None
            assert 5 < len(request.output) < 25
            engine.scheduler.preempt(request)
        engine.step()
    assert engine.stats().preemptions == 1 and request.output == alone


def test_a_bias_is_added_and_a_large_one_decides():
    logits = compute_logits(IDS)[-1]
    order = np.argsort(-logits)
    second, gap = int(order[1]), float(logits[order[0]] - logits[order[1]])
    one = GREEDY.replace(max_tokens=1)
    assert run(one.replace(logit_bias={second: gap + 0.01})) == [second]
    assert run(one.replace(logit_bias={second: gap - 0.01})) == [int(order[0])]
    assert run(GREEDY.replace(max_tokens=5, logit_bias={17: 100.0})) == [17] * 5
    many = {int(token): -100.0 for token in order[: MAX_BIASES - 20]}
    assert run(one.replace(logit_bias=many)) == [int(order[MAX_BIASES - 20])]


def test_no_stop_id_is_sampled_before_min_tokens():
    stop = TOKENS[3]
    params = GREEDY.replace(stop_token_ids=[stop])
    assert len(run(params)) <= 4
    for count in (6, 20):
        found = run(params.replace(min_tokens=count))
        assert stop not in found[:count]
        assert stop not in found[:-1]


def test_a_bad_word_is_not_completed():
    pair, single = tuple(TOKENS[4:6]), (TOKENS[2],)
    found = run(GREEDY.replace(max_tokens=20), constraints=Constraints(bad_words=(single,)))
    assert single[0] not in found and found[:2] == TOKENS[:2]
    found = run(GREEDY.replace(max_tokens=20), constraints=Constraints(bad_words=(pair,)))
    assert found[:5] == TOKENS[:5] and pair not in set(itertools.pairwise(found))


def test_tokens_that_would_complete_a_bad_word_are_banned():
    constraints = Constraints(bad_words=((5,), (1, 2, 3), (2, 9)))
    assert find_banned_tokens(constraints, [1, 2]) == [5, 3, 9]
    assert find_banned_tokens(constraints, [1]) == [5]
    assert find_banned_tokens(constraints, []) == [5]


@pytest.mark.parametrize("tokens", [4, 64], ids="{} a step".format)
def test_prompt_logprobs_are_those_of_one_forward_call(tokens):
    engine = make_engine(NAME, max_num_batched_tokens=tokens)
    warm = engine.add(IDS, GREEDY.replace(max_tokens=2))  # cached prompts are computed again
    run_all(engine)
    number = engine.add(IDS, GREEDY.replace(max_tokens=2, prompt_logprobs=3))
    found = None
    while engine.has_work:
        for update in engine.step():
            found = found or update.prompt_logprobs
    assert number != warm and found is not None
    want = jax.nn.log_softmax(compute_logits(IDS))
    assert found[0] is None and len(found) == len(IDS)
    for at, entry in enumerate(found[1:]):
        assert entry is not None
        assert entry.chosen == pytest.approx(float(want[at, IDS[at + 1]]), abs=1e-4)
        assert list(entry.top) == np.argsort(-want[at])[:3].tolist()


def test_a_prompt_of_one_token_has_no_logprobs():
    engine = make_engine(NAME)
    engine.add([5], GREEDY.replace(max_tokens=1, prompt_logprobs=0))
    updates = [update for _ in range(3) for update in engine.step()]
    assert updates[0].prompt_logprobs == [None]


class Alternate:
    """A grammar of five tokens, alternately even and odd, then the stop id."""

    def __init__(self, vocab: int, stop: int):
        self.vocab, self.stop, self.taken = vocab, stop, []

    def find(self) -> set[int]:
        if len(self.taken) >= 5:
            return {self.stop}
        return {t for t in range(4, self.vocab) if t % 2 == len(self.taken) % 2 and t != self.stop}

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-self.vocab // 32), np.uint32)
        for token in self.find():
            words[token // 32] |= np.uint32(1 << token % 32)
        return words.view(np.int32)

    def accept(self, token: int) -> bool:
        is_right = token in self.find()
        self.taken.append(token)
        return is_right


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_output_matches_its_grammar_and_other_requests_do_not_change(temperature):
    engine = make_engine(NAME)
    stop = engine.runner.config.eos_ids[0]
    other = engine.add(IDS, GREEDY.replace(max_tokens=20))
    matcher = Alternate(320, stop)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=20, ignore_eos=True)
    mine = engine.add(IDS, params, constraints=Constraints(matcher=matcher))
    found = run_all(engine)
    assert found[other] == TOKENS[:20]
    assert found[mine] == [*matcher.taken, stop] and len(matcher.taken) == 5
    assert [token % 2 for token in found[mine][:5]] == [0, 1, 0, 1, 0]


class Overgrown(Alternate):
    def mask(self) -> np.ndarray:
        if len(self.taken) == 2:
            raise ValueError("the grammar has grown beyond its limits")
        return super().mask()


def test_a_grammar_that_fails_ends_its_own_request_only():
    engine = make_engine(NAME)
    other = engine.add(IDS, GREEDY.replace(max_tokens=20))
    mine = engine.add(IDS, GREEDY, constraints=Constraints(matcher=Overgrown(320, 1)))
    reasons, found = {}, {}
    while engine.has_work:
        for update in engine.step():
            found.setdefault(update.request_id, []).extend(update.token_ids)
            reasons[update.request_id] = update.finish_reason
    assert reasons == {other: "length", mine: "error"}
    assert found[other] == TOKENS[:20] and len(found[mine]) == 2
    assert engine.stats().preemptions == 0


def test_logits_processors_do_not_change_reported_logprobs():
    params = GREEDY.replace(max_tokens=1, logprobs=2)
    engine = make_engine(NAME)
    for changes in ({}, {"logit_bias": {17: 100.0}}):
        engine.add(IDS, params.replace(**changes))
    updates = {}
    while engine.has_work:
        updates |= {update.request_id: update for update in engine.step()}
    plain, biased = (updates[i].logprobs[0] for i in (0, 1))
    assert updates[1].token_ids == [17]
    assert biased.top == pytest.approx(plain.top) and biased.chosen < plain.chosen


def test_neutral_logits_processors_change_no_bit():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 70)).astype(np.float32)
    none = sampling.LogitsProcessors(
        slot_R=np.full(3, 9),
        presence_R=np.zeros(3, np.float32),
        frequency_R=np.zeros(3, np.float32),
        repetition_R=np.ones(3, np.float32),
        bias_token_RL=np.full((3, 4), -1),
        bias_RL=np.ones((3, 4), np.float32),
        first_stop_R=np.zeros(3, np.int32),
        stop_RL=np.full((3, 2), 5),
        allowed_RL=np.full((3, 3), -1),
    )
    seen = jnp.ones((2, 70), jnp.int32)
    positions = jnp.array([4, 0, 9])
    found = sampling.apply_logits_processors(jnp.asarray(logits), seen, none, positions)
    np.testing.assert_array_equal(found, logits)


def test_a_seed_counts_with_all_its_bits():
    params = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
    engine = make_engine(NAME)
    seeds = [5, 5 + 2**32, 5 + 2**62, 5 - 2**63, -5, 2**31, 2**63 - 1]
    for seed in [*seeds, seeds[1]]:
        engine.add(IDS, params.replace(seed=seed))
    *outputs, again = (tuple(output) for _, output in sorted(run_all(engine).items()))
    assert len(set(outputs)) == len(seeds) and again == outputs[1]


def test_the_seed_minus_one_is_random_as_in_vllm():
    assert SamplingParams(seed=-1) == SamplingParams()
    seeds = [p.seed for p in SamplingParams(n=4, seed=-3).split()]
    assert seeds == [-3, -2, 0, 1]  # no output of a fixed seed is random


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 2**70},
        {"min_tokens": 2**40, "max_tokens": None},
        {"max_tokens": 2**70},
        {"logit_bias": {17: 100.0}, "repetition_penalty": 1e-6},
        {"logit_bias": {17: 100.0}, "repetition_penalty": 1e6, "temperature": 1e-5},
        {"temperature": 1e6, "top_p": 1e-300},
        {"temperature": 1e-300},
        {"temperature": 1.0, "seed": 3, "top_p": 1e-40},
        {"temperature": 1.0, "seed": 3, "min_p": 1e-300, "top_k": 1},
    ],
    ids=str,
)
def test_extreme_parameters_are_served(changes):
    """The likeliest token is sampled where they leave only that one."""
    engine = make_engine(NAME, max_model_len=len(IDS) + 8)
    number = engine.add(IDS, GREEDY.replace(**changes))
    found = run_all(engine)[number]
    assert len(found) == 8
    if "logit_bias" not in changes:
        assert found == TOKENS[:8]


def test_the_outputs_of_one_request_have_consecutive_seeds():
    params = SamplingParams(n=3, seed=2**63 - 2, temperature=1.0)
    assert [p.seed for p in params.split()] == [2**63 - 2, 2**63 - 1, 0]
    assert all(p.n == 1 for p in params.split())
    assert [p.seed for p in SamplingParams(n=2).split()] == [None, None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 2**40),
        ("n", 1.5),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("temperature", "hot"),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", math.inf),
        ("top_k", None),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("presence_penalty", 2.1),
        ("presence_penalty", 1e300),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: 1e300}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3: None}),
        ("logit_bias", [3]),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", dict.fromkeys(range(MAX_BIASES + 1), 1.0)),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 2**70),
        pytest.param("seed", 10**5000, id="seed-of 5001 digits"),
        ("seed", 0.5),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("max_tokens", 0),
        ("max_tokens", math.inf),
        ("stop", [7]),
        ("stop", 7),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 7),
        ("bad_words", "word"),
        ("bad_words", [7]),
        ("logprobs", 21),
        ("logprobs", 2**70),
        ("prompt_logprobs", -1),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*: it must be") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("given", "says"),
    [({}, "has nothing"), ({"regex": "a", "choice": ["b"]}, "has regex, choice: give exactly one")],
)
def test_an_output_has_one_form(given, says):
    with pytest.raises(ValueError, match=f"structured_outputs {says}"):
        StructuredOutputsParams(**given)
