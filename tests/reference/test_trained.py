"""Models written by training are loaded by transformers with equal logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams, checkpoint
from l4jax.text.tokenizer import Tokenizer
from l4jax.train import bundle, scoring
from l4jax.train.documents import ExampleEncoder
from l4jax.train.train_step import Hyperparameters, initialize
from tests.reference import oracle
from tests.train import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    state = jax.jit(lambda: initialize(tiny.CONFIG, Hyperparameters(steps=1), 0))()
    bundle.export(folder, tiny.CONFIG, state.params, tiny.make_tokenizer_folder())
    return folder


def test_transformers_and_the_engine_give_the_same_distributions(folder):
    """Compare the first token's float32 logprobs for a chart, a needle, a call and a sum."""
    model, encoder = oracle.load(folder), ExampleEncoder.from_folder(folder)
    llm = LLM(folder, dtype="float32", quiet=True, max_num_seqs=2, max_model_len=1024)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
    for exchange in scoring.list_questions(encoder, tiny.CHUNK, 1):
        document = encoder(exchange)
        ids, pixels = scoring.take_prompt(document), scoring.normalize(document, encoder)
        logits_TV = oracle.logits(model, np.array(ids), pixels)
        wanted_V = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_TV[-1])))
        if pixels is None:
            (output,) = llm.generate({"prompt_token_ids": ids}, params)
        else:
            (output,) = llm.chat(scoring.make_messages(exchange), params)
        assert list(output.prompt_token_ids) == ids
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        (entry,) = logprobs
        found = dict(entry.top)
        assert len(found) >= 20
        for token, logprob in found.items():
            assert abs(logprob - wanted_V[token]) < 2e-4, exchange.kind


def test_transformers_reads_the_bundled_tokenizer_equally():
    from transformers import AutoTokenizer

    folder = checkpoint.BUNDLED
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 12 + 34? Rome, naïve 東京"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(
        text, add_special_tokens=False
    )
    assert theirs.vocab_size <= bundle.CONFIG.text.vocab == ours.vocab_size
