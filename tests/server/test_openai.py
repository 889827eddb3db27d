"""The official client against a real server."""

import json
from typing import Any

import openai
import pytest

from tests.server.servers import (
    ASK,
    MODEL,
    ask_about,
    format_data_uri,
    make_image,
    make_llm,
    run_server,
)

GREEDY = {"temperature": 0.0, "max_tokens": 24}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(llm):
    with run_server(llm, max_waiting=64, served_model_names=(MODEL, "other")) as running:
        before = count_programs(llm)
        yield running
        assert count_programs(llm) == before  # the warm-up compiled all programs of these tests


def count_programs(llm) -> list[int]:
    """Count the compiled shapes of each of the engine's programs."""
    return [function._cache_size() for function in llm.engine.runner.functions.values()]


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def no_request_is_left(server):
    yield
    server.wait_idle()


def chat(client: openai.OpenAI, messages=ASK, **options) -> Any:
    """Return a completion, or a stream; the client's types make every field optional."""
    extra = {"ignore_eos": True, **options.pop("extra_body", {})}
    given = {"model": MODEL, "messages": messages, **GREEDY, **options}
    return client.chat.completions.create(**given, extra_body=extra)


def test_chat_equals_completion_of_the_rendered_template(client):
    answer = chat(client)
    assert answer.object == "chat.completion" and answer.model == MODEL
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    rendered = client.post("/../tokenize", body={"messages": ASK}, cast_to=object)
    again = client.completions.create(
        model=MODEL, prompt=rendered["tokens"], **GREEDY, extra_body={"ignore_eos": True}
    )
    assert again.choices[0].text == choice.message.content
    assert len(rendered["tokens"]) == answer.usage.prompt_tokens


def test_a_stream_has_the_text_one_finish_reason_and_the_usage(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_continuous_usage_stats_count_up(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, extra_body={"stream_options": options}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 24


def test_the_same_seed_repeats_and_n_choices_have_consecutive_seeds(client):
    one = [chat(client, temperature=1.0, seed=7).choices[0].message.content for _ in range(2)]
    assert one[0] == one[1]
    many = chat(client, temperature=1.0, seed=7, n=3)
    texts = [choice.message.content for choice in many.choices]
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert texts[0] == one[0] and len(set(texts)) == 3
    assert many.usage.completion_tokens == 72
    eighth = chat(client, temperature=1.0, seed=8).choices[0].message.content
    assert texts[1] == eighth  # seeds count up


def test_chunks_of_n_choices_carry_their_index(client):
    whole = chat(client, temperature=1.0, seed=7, n=3)
    texts = ["", "", ""]
    for chunk in chat(client, temperature=1.0, seed=7, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_the_text_before_or_after_it(client):
    text = chat(client).choices[0].message.content
    stop = text[6:9]
    before = text[: text.index(stop)]
    stopped = chat(client, stop=[stop, "never seen"]).choices[0]
    assert stopped.message.content == before
    assert stopped.finish_reason == "stop" and stopped.stop_reason == stop
    kept = chat(client, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == before + stop
    streamed = chat(client, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == before


def test_a_stop_token_ends_the_text_and_is_the_stop_reason(client):
    tokens = chat(client, logprobs=True, extra_body={"return_tokens_as_token_ids": True})
    ids = [int(x.token.removeprefix("token_id:")) for x in tokens.choices[0].logprobs.content]
    stopped = chat(client, extra_body={"stop_token_ids": [ids[5]]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == ids[5]
    assert stopped.usage.completion_tokens == ids.index(ids[5]) + 1


def test_the_bytes_of_logprobs_concatenate_to_the_text(client):
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert len(content) == 24
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode(errors="replace") == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        best = entry.top_logprobs[0]
        assert (entry.logprob, entry.bytes) == (best.logprob, best.bytes)  # greedy
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] < 0
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == content


def test_images_change_the_output_and_add_prompt_tokens(client):
    first, second = (format_data_uri(make_image(seed=seed)) for seed in (0, 1))
    answers = [chat(client, ask_about(url)) for url in (first, second, first)]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[2] != texts[1]
    plain = chat(client, [{"role": "user", "content": "What is it?"}])
    assert answers[0].usage.prompt_tokens > plain.usage.prompt_tokens
    both = chat(client, ask_about(first, second))
    assert both.usage.prompt_tokens > answers[0].usage.prompt_tokens


def test_tools_are_in_the_prompt_unless_tool_choice_is_none(client):
    plain = chat(client).usage.prompt_tokens
    assert chat(client, tools=TOOLS).usage.prompt_tokens > plain
    assert chat(client, tools=TOOLS, tool_choice="none").usage.prompt_tokens == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_call_has_arguments_of_its_schema(client, choice):
    answer = chat(
        client,
        tools=TOOLS,
        tool_choice=choice,
        max_tokens=200,
        seed=3,
        temperature=1.0,
        parallel_tool_calls=False,
        extra_body={"ignore_eos": False},
    ).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city"} and len(arguments["city"]) <= 8
    streamed = chat(
        client,
        tools=TOOLS,
        tool_choice=choice,
        max_tokens=200,
        seed=3,
        temperature=1.0,
        parallel_tool_calls=False,
        stream=True,
        extra_body={"ignore_eos": False},
    )
    deltas = [d for c in streamed for d in c.choices[0].delta.tool_calls or []]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert deltas[0].function.name == "get_weather" and deltas[0].index == 0 and deltas[0].id


def test_a_call_and_its_result_are_rendered_in_the_next_prompt(client):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    talk = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    rendered = client.post("/../tokenize", body={"messages": talk, "tools": TOOLS}, cast_to=object)
    text = client.post("/../detokenize", body={"tokens": rendered["tokens"]}, cast_to=object)
    assert '"city": "Oslo"' in text["prompt"] and "Rain." in text["prompt"]
    assert chat(client, talk, tools=TOOLS).usage.prompt_tokens == rendered["count"]


FORMATS = [
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "t", "schema": TOOLS[0]["function"]["parameters"]},
        }
    },
    {"extra_body": {"guided_json": TOOLS[0]["function"]["parameters"]}},
    {"extra_body": {"structured_outputs": {"json": TOOLS[0]["function"]["parameters"]}}},
]


@pytest.mark.parametrize("constraint", FORMATS)
def test_a_response_format_is_obeyed(client, constraint):
    extra = {"ignore_eos": False, **constraint.get("extra_body", {})}
    rest = {key: value for key, value in constraint.items() if key != "extra_body"}
    answer = chat(client, temperature=1.0, seed=1, max_tokens=200, extra_body=extra, **rest)
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"city"} and answer.choices[0].finish_reason == "stop"


def test_choices_and_regular_expressions_are_obeyed(client):
    extra = {"ignore_eos": False, "structured_outputs": {"choice": ["red", "blue sky"]}}
    answer = chat(client, temperature=1.0, extra_body=extra)
    assert answer.choices[0].message.content in ("red", "blue sky")
    extra = {"ignore_eos": False, "guided_regex": "[0-9]{3}-[a-f]{2}"}
    text = chat(client, temperature=1.0, extra_body=extra).choices[0].message.content
    assert len(text) == 6 and text[3] == "-"


def test_continue_final_message_leaves_the_last_turn_open(client):
    begun = [*ASK, {"role": "assistant", "content": "Because of"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    tokens = client.post("/../tokenize", body={"messages": begun, **extra}, cast_to=object)
    text = client.post("/../detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)
    assert text["prompt"].endswith("Because of")
    assert chat(client, begun, extra_body=extra).usage.prompt_tokens == tokens["count"]


def test_completions_accept_texts_and_ids_and_lists_of_them(client, llm):
    ids = llm.tokenizer.encode("The sky")
    more = {"model": MODEL, **GREEDY, "extra_body": {"ignore_eos": True}}
    found = [
        client.completions.create(prompt=prompt, **more).choices
        for prompt in ("The sky", ["The sky", "a"], ids, [ids, [5, 6]])
    ]
    assert [len(choices) for choices in found] == [1, 2, 1, 2]
    assert len({choices[0].text for choices in found}) == 1
    assert [choice.index for choice in found[1]] == [0, 1]
    many = client.completions.create(
        prompt=["The sky", "a"], n=2, seed=1, **more | {"temperature": 1}
    )
    again = client.completions.create(
        prompt=["The sky", "a"], n=2, seed=1, **more | {"temperature": 1}
    )
    assert [c.text for c in many.choices] == [c.text for c in again.choices]
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]


def test_echo_gives_the_prompt_the_logprobs_of_its_generation(client, llm):
    more = {"model": MODEL, "logprobs": 2, "extra_body": {"ignore_eos": True}}
    first = client.completions.create(prompt="The sky", **GREEDY, **more).choices[0]
    ids = llm.tokenizer.encode("The sky")
    text = "The sky" + first.text
    tagged = client.completions.create(
        prompt="The sky",
        **GREEDY,
        **more | {"extra_body": {"ignore_eos": True, "return_tokens_as_token_ids": True}},
    ).choices[0]
    written = [int(token.removeprefix("token_id:")) for token in tagged.logprobs.tokens]
    echoed = client.completions.create(
        prompt=[*ids, *written], max_tokens=1, temperature=0.0, echo=True, **more
    ).choices[0]
    scored = echoed.logprobs
    assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
    end = len(ids) + len(written)
    assert scored.tokens[len(ids) : end] == first.logprobs.tokens
    assert scored.token_logprobs[len(ids) : end] == pytest.approx(
        first.logprobs.token_logprobs, abs=1e-4
    )
    assert echoed.text.startswith(text[: len("The sky") + 3])
    assert scored.text_offset == sorted(scored.text_offset) and scored.text_offset[0] == 0
    only = client.completions.create(prompt="The sky", max_tokens=0, echo=True, **more)
    assert only.choices[0].text == "The sky" and only.usage.completion_tokens == 0
    assert len(only.choices[0].logprobs.tokens) == len(ids)
    streamed = client.completions.create(
        prompt=[*ids, *written], max_tokens=1, temperature=0.0, echo=True, stream=True, **more
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.text


def test_prompt_logprobs_are_by_id_with_ranks(client):
    answer = chat(client, extra_body={"prompt_logprobs": 2})
    found = answer.prompt_logprobs
    assert found[0] is None and len(found) == answer.usage.prompt_tokens
    for entry in found[1:]:
        assert 2 <= len(entry) <= 3
        assert [x["rank"] for x in entry.values()][:2] == [1, 2]


def test_penalties_biases_and_bad_words_reach_the_sampler(client):
    text = chat(client).choices[0].message.content
    biased = chat(client, logit_bias={"65": 100}).choices[0].message.content
    assert biased == "A" * 24 != text
    penalized = (
        chat(client, frequency_penalty=2.0, logit_bias={"65": 12}).choices[0].message.content
    )
    assert penalized.count("A") < 24
    banned = chat(client, logit_bias={"65": 100}, extra_body={"bad_words": ["A"]})
    assert "A" not in banned.choices[0].message.content


def test_a_repeated_prompt_is_cached_and_usage_counts_it(client, server):
    prompt = [11, *range(100, 180)]
    hits = server.read_metric("l4jax:prefix_cache_hits_total")
    answers = [client.completions.create(model=MODEL, prompt=prompt, **GREEDY) for _ in range(2)]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert cached[0] == 0 and 32 <= cached[1] < len(prompt)
    assert server.read_metric("l4jax:prefix_cache_hits_total") == hits + cached[1]
    assert answers[0].choices[0].text == answers[1].choices[0].text


def test_a_failed_step_fails_its_requests_only(client, llm, monkeypatch):
    before = chat(client).choices[0].message.content

    def fail(_plan):
        monkeypatch.undo()
        raise RuntimeError("the device failed")

    monkeypatch.setattr(llm.engine.runner, "dispatch", fail)
    with pytest.raises(openai.InternalServerError, match="ask again"):
        chat(client)
    monkeypatch.setattr(llm.engine.runner, "dispatch", fail)
    with pytest.raises(openai.APIError, match="ask again"):
        list(chat(client, stream=True))
    assert chat(client).choices[0].message.content == before


def test_models_are_listed_and_retrieved_by_every_served_name(client):
    assert [model.id for model in client.models.list()] == [MODEL, "other"]
    assert client.models.retrieve("other").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="'nobody' is not served here") as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"
    other = client.chat.completions.create(model="other", messages=ASK, max_tokens=1)
    assert other.model == "other"


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"model": "nobody"}, "model", "is not served here"),
        ({"temperature": -1.0}, "temperature", "at least 0"),
        ({"top_p": 7.0}, "top_p", "top_p is 7.0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "many"}, "max_tokens", "valid integer"),
        ({"temperature": 1e300}, "temperature", "at most 1e6"),
        ({"presence_penalty": 1e300}, "presence_penalty", "from -2 to 2"),
        ({"frequency_penalty": -1e300}, "frequency_penalty", "from -2 to 2"),
        ({"extra_body": {"repetition_penalty": 1e300}}, "repetition_penalty", "to 1e6"),
        ({"extra_body": {"min_p": -1e300}}, "min_p", "from 0 to 1"),
        ({"extra_body": {"top_k": 2**70}}, "top_k", "less than or equal"),
        ({"extra_body": {"min_tokens": 25}}, "min_tokens", "at most max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens", "less than or equal"),
        ({"logit_bias": {"65": 1e300}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"9" * 400: 1.0}}, "logit_bias", "not the id of a token"),
        ({"logprobs": True, "top_logprobs": 2**70}, "top_logprobs", "less than or equal"),
        ({"extra_body": {"prompt_logprobs": 2**30}}, "prompt_logprobs", "--max-logprobs"),
        ({"seed": 2**63}, "seed", "from -2**63 to 2**63 - 1"),
        ({"n": 2**70}, "n", "at most 16384"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "answers fit"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs", "--max-logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"many": 1.0}}, "logit_bias", "not the id of a token"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", "is not one of"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, "messages", "shorten it"),
        (
            {"messages": ask_about("data:image/png;base64,%%%")},
            "messages[0].content[0].image_url.url",
            "base64",
        ),
        ({"messages": ask_about(*["data:,"] * 11)}, "messages", "11 images"),
        ({"extra_body": {"tempersture": 1}}, "tempersture", "not known"),
        ({"extra_body": {"chat_template": "{{ messages }}"}}, "chat_template", "not run here"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}},
            "structured_outputs",
            "twice",
        ),
    ],
)
def test_invalid_fields_are_refused_with_their_name_and_the_way_out(client, options, param, says):
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, **options)
    assert caught.value.status_code == (404 if param == "model" else 400)
    assert isinstance(caught.value.body, dict) and says in caught.value.body["message"]
    assert caught.value.param == param


@pytest.mark.parametrize("text", ["NaN", "1e999", "-Infinity", '"hot"', "[1]"])
@pytest.mark.parametrize(
    "name",
    [
        *("n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "prompt_logprobs"),
    ],
)
def test_a_number_that_is_none_is_refused(server, name, text):
    body = f'{{"messages": {json.dumps(ASK)}, "{name}": {text}}}'
    answer = server.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 300


def test_negative_seeds_repeat_and_minus_one_is_random(client):
    texts = [
        chat(client, temperature=1.0, seed=seed).choices[0].message.content
        for seed in (-5, -5, -(2**63), -1, -1)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 4


def test_suffix_and_best_of_are_refused_with_a_message(client):
    for option in ({"suffix": "b"}, {"best_of": 3}):
        with pytest.raises(openai.BadRequestError, match="is not supported"):
            client.completions.create(model=MODEL, prompt="a", **option)
