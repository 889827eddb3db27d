"""`LLM` with the tiny random model, from disk to text."""

import base64
import dataclasses
import io
import re

import jax
import numpy as np
import pytest
from PIL import Image

from l4jax import LLM, SamplingParams, checkpoint
from l4jax.checkpoint.orbax_writer import convert_folder
from l4jax.config import TINY
from l4jax.engine.engine import RequestUpdate
from l4jax.engine.request import StructuredOutputsParams, TokenLogprobs
from l4jax.outputs import CompletionBuilder
from l4jax.testing import write_model
from l4jax.text.chat import PromptError
from tests.engine.engines import assert_all_free

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
ASK = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32", max_model_len=8192, max_num_seqs=4, quiet=True)


@pytest.fixture(autouse=True)
def no_request_is_left(request):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert_all_free(llm.engine)
        assert not llm._updates


def make_image(width: int = 400, height: int = 300, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def format_data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_generate_returns_outputs_in_order_equal_to_batch_size_1(llm):
    prompts = ["The sky", "Light in the air is", "a", "one two three four five six"] * 2
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        assert output.prompt_token_ids[0] == llm.tokenizer.bos_id
        assert len(answer.token_ids) == 24 and answer.finish_reason == "length"
        assert answer.text == llm.tokenizer.decode(answer.token_ids)
        single = llm.generate(prompt, GREEDY)[0].outputs[0]
        assert single.token_ids == answer.token_ids


def test_each_prompt_may_have_its_own_sampling_params(llm):
    each = [GREEDY.replace(max_tokens=n) for n in (1, 5, 9)]
    outputs = llm.generate(["a", "b", "c"], each)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 9]
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", each[:2])


def test_chat_equals_generate_on_the_rendered_template(llm):
    output = llm.chat(ASK, GREEDY)[0]
    text = llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
    assert text.endswith(
        "<|header_start|>user<|header_end|>\n\nWhy is the sky blue?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    again = llm.generate({"prompt_token_ids": output.prompt_token_ids}, GREEDY)[0]
    assert again.outputs[0].token_ids == output.outputs[0].token_ids
    many = llm.chat([ASK, ASK], GREEDY)
    assert [m.outputs[0].token_ids for m in many] == [output.outputs[0].token_ids] * 2


def test_stream_deltas_concatenate_to_the_output(llm):
    whole = llm.chat(ASK, GREEDY.replace(logprobs=2))[0].outputs[0]
    pieces = list(llm.stream(ASK, GREEDY.replace(logprobs=2)))
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [entry for piece in pieces for entry in piece.logprobs] == whole.logprobs
    assert [piece.finish_reason for piece in pieces][-1] == "length"
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert whole.cumulative_logprob == pytest.approx(sum(x.chosen for x in whole.logprobs or []))


def test_streams_run_concurrently_and_closing_one_aborts_it(llm):
    wanted = llm.chat(ASK, GREEDY)[0].outputs[0].text
    first, second, third = (llm.stream(ASK, GREEDY) for _ in range(3))
    found = [next(first).text, next(second).text]
    next(third)
    third.close()  # aborts
    found[1] += "".join(piece.text for piece in second)
    found[0] += "".join(piece.text for piece in first)
    assert found == [wanted, wanted]
    never_begun = llm.stream(ASK, GREEDY)
    assert never_begun is not None  # the fixture finds no request of it


def test_all_image_sources_give_the_same_output_and_images_change_it(llm, tmp_path):
    image = make_image()
    image.save(tmp_path / "image.png")
    ways = [
        {"type": "image", "image": tmp_path / "image.png"},
        {"type": "image", "image": image},
        {"type": "image_url", "image_url": {"url": format_data_uri(image)}},
    ]
    text = {"type": "text", "text": "What is it?"}
    answers = [
        llm.chat([{"role": "user", "content": [way, text]}], GREEDY)[0].outputs[0].token_ids
        for way in ways
    ]
    assert answers[0] == answers[1] == answers[2]
    other = {"type": "image", "image": make_image(seed=1)}
    changed = llm.chat([{"role": "user", "content": [other, text]}], GREEDY)[0]
    assert changed.outputs[0].token_ids != answers[0]
    raw = {"prompt": "<|image|>What is it?", "multi_modal_data": {"image": image}}
    assert len(llm.generate(raw, GREEDY)[0].prompt_token_ids) > 144


@pytest.mark.slow
def test_ten_images_are_accepted_and_eleven_are_refused(folder):
    llm = LLM(folder, max_model_len=4096, max_num_seqs=1, quiet=True)
    images = [{"type": "image", "image": make_image(200, 200, seed)} for seed in range(11)]
    ask = {"type": "text", "text": "Compare."}
    output = llm.chat([{"role": "user", "content": [*images[:10], ask]}], GREEDY)[0]
    assert llm.config.patch_id is not None
    assert output.prompt_token_ids.count(llm.config.patch_id) == 10 * 144
    with pytest.raises(PromptError, match="11 images, more than max_images = 10"):
        llm.chat([{"role": "user", "content": [*images, ask]}], GREEDY)
    assert_all_free(llm.engine)


def test_an_invalid_prompt_leaves_no_request_in_the_engine(llm):
    with pytest.raises(PromptError, match="fit: shorten it"):
        llm.generate(["a", {"prompt_token_ids": [5] * 9000}], GREEDY)
    with pytest.raises(PromptError, match="give 'prompt' or 'prompt_token_ids'"):
        llm.generate({"text": "a"}, GREEDY)
    with pytest.raises(PromptError, match=r"messages\[0\].role"):
        llm.chat([{"role": "robot", "content": "a"}], GREEDY)
    with pytest.raises(PromptError, match=r"1 <\|image\|> in the text for 0 images"):
        llm.generate("<|image|>", GREEDY)


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = llm.generate("The sky", GREEDY)[0].outputs[0]
    stop = whole.text[5:8]
    params = GREEDY.replace(stop=stop)
    output = llm.generate("The sky", params)[0].outputs[0]
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.finish_reason == "stop" and output.stop_reason == stop
    assert len(output.token_ids) < len(whole.token_ids)
    assert "".join(piece.text for piece in llm.stream("The sky", params)) == output.text
    kept = llm.generate("The sky", params.replace(include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == output.text + stop


def test_a_possible_beginning_of_a_stop_string_is_held_back(llm):
    tokens = [llm.tokenizer.encode(char, add_special_tokens=False)[0] for char in "abcXYZd"]
    answer = CompletionBuilder(llm.tokenizer, SamplingParams(stop=["XYZ", "cQ"]))
    texts = [answer.add(RequestUpdate(0, [token], [], None)).text for token in tokens[:5]]
    assert texts == ["a", "b", "", "c", ""]  # "c" may begin "cQ", and "XY" may begin "XYZ"
    last = answer.add(RequestUpdate(0, tokens[5:], [], None))
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "XYZ")
    assert last.token_ids == tokens[5:6]  # tokens after the stop string are not counted
    short = CompletionBuilder(llm.tokenizer, SamplingParams(stop="XYZ"))
    assert short.add(RequestUpdate(0, tokens[3:5], [], "length")).text == "XY"


def test_a_stop_string_counts_only_after_min_tokens(llm):
    tokens = [llm.tokenizer.encode(char, add_special_tokens=False)[0] for char in "abXYabXYcXYd"]

    def build(min_tokens: int, size: int, stop, reason=None) -> tuple[str, str, str | None]:
        """Add tokens in updates of a size; return the streamed text, the whole, the reason."""
        params = SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=99)
        builder = CompletionBuilder(llm.tokenizer, params)
        streamed = ""
        for start in range(0, len(tokens), size):
            is_last = start + size >= len(tokens)
            update = RequestUpdate(
                0, tokens[start : start + size], [], "length" if is_last else None
            )
            streamed += builder.add(update).text
            if builder.finish_reason is not None:
                break
        answer = builder.build()
        return streamed, answer.text, answer.finish_reason

    for size in (1, 2, 3, 5, 12):
        for min_tokens, text in ((0, "ab"), (3, "ab"), (4, "abXYab"), (7, "abXYab")):
            assert build(min_tokens, size, "XY") == (text, text, "stop")
        assert build(8, size, "XY") == ("abXYabXYc", "abXYabXYc", "stop")
        assert build(12, size, ["XYd", "d"]) == ("abXYabXYcXYd", "abXYabXYcXYd", "length")
        # "bXY" is the beginning of a longer stop string, and holds one that ended too early.
        assert build(4, size, ["XY", "bXYab"]) == ("a", "a", "stop")
    whole = llm.generate("The sky", GREEDY)[0].outputs[0]
    stop = whole.text[1:3]
    later = GREEDY.replace(stop=stop, min_tokens=20)
    output = llm.generate("The sky", later)[0].outputs[0]
    assert len(output.token_ids) > 20 and output.token_ids[:20] == whole.token_ids[:20]
    assert "".join(piece.text for piece in llm.stream("The sky", later)) == output.text


def test_a_stop_token_ends_the_output_and_is_the_stop_reason(llm):
    whole = llm.generate("The sky", GREEDY)[0].outputs[0]
    token = whole.token_ids[6]
    output = llm.generate("The sky", GREEDY.replace(stop_token_ids=[token]))[0].outputs[0]
    assert output.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)


def test_the_same_seed_gives_the_same_output_in_any_batch(llm):
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
    single = llm.generate("The sky", params)[0].outputs[0].token_ids
    mixed = llm.generate(["a", "The sky", "b c"], [GREEDY, params, params.replace(seed=8)])
    assert mixed[1].outputs[0].token_ids == single
    without = params.replace(seed=None)
    first, second = (llm.generate("The sky", without)[0].outputs[0].token_ids for _ in range(2))
    assert first != second


def test_n_completions_equal_n_requests_with_consecutive_seeds(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=8, ignore_eos=True)
    outputs = llm.generate(["The sky", "a"], [params, GREEDY])
    assert [len(output.outputs) for output in outputs] == [3, 1]
    assert [answer.index for answer in outputs[0].outputs] == [0, 1, 2]
    for answer in outputs[0].outputs:
        single = llm.generate("The sky", params.replace(n=1, seed=7 + answer.index))
        assert single[0].outputs[0].token_ids == answer.token_ids
    assert len({tuple(answer.token_ids) for answer in outputs[0].outputs}) == 3


def test_a_repeated_prompt_is_cached_and_gives_the_same_output(llm):
    prompt = "A prompt of no other test, and long enough for a page of " + "words " * 64
    first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 64
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_prompt_logprobs_are_part_of_the_output(llm):
    output = llm.generate("The sky", GREEDY.replace(prompt_logprobs=2, max_tokens=2))[0]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    assert all(len(entry.top) == 2 for entry in output.prompt_logprobs[1:] if entry)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[a-c]{3} [0-9]{2}"}, "[a-c]{3} [0-9]{2}"),
        ({"choice": ["yes", "no, never"]}, "yes|no, never"),
        ({"json": {"type": "object", "properties": {"a": {"type": "boolean"}},
                   "required": ["a"], "additionalProperties": False}},
         r'\{\s*"a"\s*:\s*(true|false)\s*\}'),
    ],
    ids=str,
)  # fmt: skip
def test_structured_outputs_match_their_constraint(llm, wanted, pattern):
    form = StructuredOutputsParams(**wanted)
    params = SamplingParams(temperature=1.0, max_tokens=200, structured_outputs=form)
    for output in llm.generate(["The sky"] * 3, [params.replace(seed=n) for n in range(3)]):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop" and re.fullmatch(pattern, answer.text)


def test_an_invalid_constraint_is_refused_with_its_field(llm):
    params = GREEDY.replace(structured_outputs=StructuredOutputsParams(regex="(a"))
    with pytest.raises(ValueError, match=r"structured_outputs\.regex: "):
        llm.generate("The sky", params)


def test_a_bad_word_is_not_generated(llm):
    said = llm.generate("The sky", GREEDY)[0].outputs[0].text
    word = said.split()[0][:4]
    other = llm.generate("The sky", GREEDY.replace(bad_words=[word]))[0].outputs[0].text
    assert word in said and other != said


def test_speculative_decoding_changes_no_output(folder, llm):
    fast = LLM(
        folder,
        dtype="float32",
        max_model_len=8192,
        max_num_seqs=4,
        quiet=True,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
    )
    prompts = ["one two three one two three one two", "The sky"]
    answers = [[output.outputs[0].token_ids for output in each.generate(prompts, GREEDY)]
               for each in (llm, fast)]  # fmt: skip
    assert answers[0] == answers[1]


def test_defaults_come_from_generation_config(folder, llm):
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_p=0.9)
    assert len(llm.generate("The sky")[0].outputs[0].token_ids) <= 16


@pytest.mark.parametrize("mesh", [pytest.param("8", marks=pytest.mark.slow), "2x4"])
def test_a_mesh_gives_the_same_outputs(folder, llm, mesh):
    content = [{"type": "image", "image": make_image()}, {"type": "text", "text": "What is it?"}]
    conversations = [ASK, [{"role": "user", "content": content}], ASK]
    wanted = [output.outputs[0].token_ids for output in llm.chat(conversations, GREEDY)]
    sharded = LLM(
        folder, mesh=mesh, dtype="float32", max_model_len=8192, max_num_seqs=4, quiet=True
    )
    found = [output.outputs[0].token_ids for output in sharded.chat(conversations, GREEDY)]
    assert found == wanted
    assert_all_free(sharded.engine)


@pytest.mark.slow
def test_a_converted_checkpoint_gives_the_same_outputs_on_another_mesh(folder, llm, tmp_path):
    convert_folder(folder, tmp_path / "converted", progress=False)
    converted = LLM(
        tmp_path / "converted", mesh="2x4", dtype="float32", max_model_len=8192, quiet=True
    )
    assert converted.chat(ASK, GREEDY)[0].outputs == llm.chat(ASK, GREEDY)[0].outputs


@pytest.mark.slow
def test_dtype_auto_is_the_checkpoints_bfloat16(folder):
    llm = LLM(folder, max_model_len=256, quiet=True)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(llm.engine.runner.params)}
    pool = llm.engine.runner.pool
    assert pool is not None and dtypes == {"bfloat16"} == {pool.k[0].dtype.name}
    assert len(llm.chat(ASK, GREEDY)[0].outputs[0].token_ids) == 24


@pytest.mark.slow
def test_attn_temperature_tuning_overrides_the_config(folder, llm):
    """Beyond the first 32 positions it changes the output of this model."""
    off = LLM(
        folder, dtype="float32", max_model_len=8192, attn_temperature_tuning=False, quiet=True
    )
    assert not off.config.text.has_temperature_tuning and llm.config.text.has_temperature_tuning
    prompt = {"prompt_token_ids": np.random.default_rng(0).integers(0, 255, 400).tolist()}
    params = GREEDY.replace(logprobs=0)
    tuned, plain = (x.generate(prompt, params)[0].outputs[0].logprobs for x in (llm, off))
    assert tuned is not None and plain is not None
    assert isinstance(tuned[0], TokenLogprobs) and abs(tuned[0].chosen - plain[0].chosen) > 1e-4


def test_a_text_only_model_generates_and_refuses_images(tmp_path):
    config = write_model(tmp_path / "text", dataclasses.replace(TINY, vision=None), dtype="float32")
    assert checkpoint.load_config(tmp_path / "text") == config
    llm = LLM(tmp_path / "text", max_model_len=256, quiet=True)
    assert len(llm.chat(ASK, GREEDY)[0].outputs[0].token_ids) == 24
    with pytest.raises(PromptError, match="takes no images"):
        llm.chat([{"role": "user", "content": [{"type": "image", "image": make_image()}]}])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mesh": "16"}, "--mesh 16: it needs 16 devices and there are 8"),
        ({"mesh": "8", "tensor_parallel_size": 8}, "two spellings of one thing"),
        ({"mesh": "data=0"}, "at least one device"),
        ({"dtype": "float16"}, "dtype is 'float16': it is auto, bfloat16 or float32"),
        ({"max_model_len": 10**6}, "max_model_len is 1000000, and the model's is 32768"),
        ({"max_model_len": 0}, "max_model_len is 0: it must be at least 1"),
        ({"kv_cache_memory_bytes": 10**6, "max_model_len": 4096}, "max_model_len of at most"),
        ({"block_size": 12}, "block_size is 12: it must divide the attention chunk of 32"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"load_format": "pt"}, "load_format is 'pt'"),
        ({"seed": 2**63}, "seed is 9223372036854775808: it must be from"),
        ({"kernels": "fast"}, "kernels is 'fast': it is 'portable', 'hopper' or 'auto'"),
        ({"kernels": "hopper"}, "and here is cpu with jax .*: they run on an H100"),
        (
            {"speculative_config": {"num_speculative_tokens": 3, "model": "x"}},
            "has model: it holds",
        ),
        ({"speculative_config": {}}, "has no num_speculative_tokens"),
        ({"limit_mm_per_prompt": {"video": 1}}, "limit_mm_per_prompt"),
    ],
)
def test_invalid_engine_arguments_are_refused_with_a_message(folder, arguments, says):
    with pytest.raises(ValueError, match=says):
        LLM(folder, quiet=True, **arguments)


def test_an_unknown_argument_is_a_type_error_with_its_name(folder):
    with pytest.raises(TypeError, match="'max_model_length'"):
        LLM(folder, quiet=True, max_model_length=64)


def test_a_mesh_that_does_not_divide_the_kv_heads_is_refused_with_a_valid_one(tmp_path):
    three = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, kv_heads=4))
    write_model(tmp_path / "tiny", three)
    with pytest.raises(ValueError, match=r"--mesh 8: 8 devices cannot share 4 kv heads; .*model=4"):
        LLM(tmp_path / "tiny", mesh=8, quiet=True)


def test_dummy_weights_need_no_weight_files(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    llm = LLM(tmp_path, load_format="dummy", dtype="float32", max_model_len=64, quiet=True)
    assert len(llm.generate("The sky", GREEDY)[0].outputs[0].token_ids) == 24
