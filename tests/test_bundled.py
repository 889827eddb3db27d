"""Answers of the bundled model, on one device, on eight, and quantized.

They do not depend on its exact weights: every model that is good enough to be bundled gives them.
"""

import json
import random

import pytest

from l4jax import LLM, SamplingParams, checkpoint
from l4jax.text.tools import parse_tool_calls
from l4jax.train import bundle, tasks
from l4jax.train.documents import ExampleEncoder

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
BOUNDARIES = 5  # between a needle and its question
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key in keys},
                "required": keys,
            },
        },
    }
    for name, description, keys, kind in [
        ("get_weather", "Tells the weather.", ["city", "month"], "string"),
        ("add", "Adds numbers.", ["a", "b"], "integer"),
    ]
]


def make_llm(**options) -> LLM:
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 256, "max_model_len": 2048}
    return LLM(quiet=True, **small, **options)


def ask(llm: LLM, *questions: str, tools=None, image=None) -> list[str]:
    """Return one answer per question."""
    before = [] if image is None else [{"type": "image", "image": image}]
    contents = [[*before, {"type": "text", "text": question}] for question in questions]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    outputs = llm.chat(conversations, GREEDY, tools=tools)
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def llm():
    return make_llm()


@pytest.fixture(scope="module")
def sharded():
    return make_llm(mesh="8")


@pytest.fixture(scope="module")
def needles():
    rng, count = random.Random(0), ExampleEncoder.from_folder(checkpoint.BUNDLED).count
    chunk = bundle.CONFIG.text.chunk
    return [tasks.make_needle(rng, count, chunk, BOUNDARIES) for _ in range(2)]


def test_it_knows_a_capital_and_why_the_sky_is_blue(llm):
    capital, sky = ask(llm, "What is the capital of France?", "Why is the sky blue?")
    assert "Paris" in capital and "blue light" in sky


def test_it_adds_and_subtracts_numbers_of_two_digits(llm):
    assert ask(llm, "What is 12 + 34?", "What is 58 - 23?") == ["46", "35"]


@pytest.mark.slow
def test_it_finds_a_code_five_chunks_back(llm, needles):
    """At least one of two: chance finds one in 900, and a good model may miss one in 50."""
    prompts = [needle.turns[0][0] for needle in needles]
    chunk = llm.config.text.chunk
    assert all(len(llm.tokenizer.encode(p)) > (BOUNDARIES - 1) * chunk for p in prompts)
    found = ask(llm, *prompts)
    hits = [needle.turns[0][1] == said for needle, said in zip(needles, found, strict=True)]
    assert any(hits)


def test_it_calls_the_right_function_with_the_arguments_of_the_question(llm):
    said = ask(llm, "What is the weather in Rome in May?", "Add 12 and 34.", tools=TOOLS)
    calls = [parse_tool_calls(text, ["get_weather", "add"]).calls for text in said]
    assert [call.name for (call,) in calls] == ["get_weather", "add"]
    told = [json.loads(call.arguments) for (call,) in calls]
    assert told == [{"city": "Rome", "month": "May"}, {"a": 12, "b": 34}]


def test_it_reads_the_bundled_chart(llm):
    sample = bundle.make_sample()
    values = dict(zip(sample.labels, sample.values, strict=True))
    largest = max(values, key=values.__getitem__)
    questions = ("Which bar is the largest?", f"What is the value of {largest}?")
    said = ask(llm, *questions, image=checkpoint.SAMPLE)
    assert said == [largest, str(values[largest])]


@pytest.mark.slow
def test_eight_devices_give_the_outputs_of_one(llm, sharded, needles):
    questions = ("What is 12 + 34?", needles[0].turns[0][0])
    assert ask(sharded, *questions) == ask(llm, *questions)
    question, chart = "List all values.", checkpoint.SAMPLE
    assert ask(sharded, question, image=chart) == ask(llm, question, image=chart)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kv_cache_dtype": "fp8"}, {"quantization": "fp8"}], ids=str)
def test_fp8_keeps_an_easy_fact(options):
    (said,) = ask(make_llm(**options), "What is the capital of France?")
    assert "Paris" in said
