"""Laws of training data: reproducible, correct, in one split each, and encoded as prompts are."""

import collections
import dataclasses
import random
import re

import numpy as np
import pytest

from l4jax import checkpoint
from l4jax.text.chat import render_chat
from l4jax.text.image import choose_canvas
from l4jax.text.tokenizer import Tokenizer
from l4jax.train import charts, tasks
from l4jax.train.batches import DataConfig, make_batch
from l4jax.train.data_loader import stream_batches
from l4jax.train.documents import MIX, ExampleEncoder, sample_example
from l4jax.train.splits import SPLITS, assign_split, sample_from
from l4jax.train.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tests.train import tiny

ENCODER = ExampleEncoder.from_folder(tiny.make_tokenizer_folder())
CHUNK = 256


def draw_many(split: str, seed: int, count: int = 200) -> list:
    rng = random.Random(seed)
    return [sample_example(rng, split, 1.0, ENCODER, CHUNK, 5) for _ in range(count)]


@pytest.fixture(scope="module")
def examples() -> list:
    return draw_many("train", 0, 400)


def make_data_config(**changes) -> DataConfig:
    data_config = tiny.make_training_config(100).data
    return dataclasses.replace(
        data_config, rows=4, length=6 * CHUNK, chunk=CHUNK, tiles=16, **changes
    )


def test_examples_follow_from_the_seed():
    assert draw_many("train", 1, 50) == draw_many("train", 1, 50)
    assert draw_many("train", 1, 50) != draw_many("train", 2, 50)


def test_every_kind_is_sampled(examples):
    kinds = collections.Counter(getattr(example, "kind", "prose") for example in examples)
    assert set(kinds) == set(MIX)


def test_no_example_is_in_two_splits():
    """The split follows from the content of an example, whatever the seed."""
    keys = {}
    for split in SPLITS:
        found = draw_many(split, 3)
        keys[split] = {key for example in found for key in example.key.split(" | ")}
        assert all(assign_split(key) == split for key in keys[split])
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


def test_a_sum_of_the_test_split_is_not_trained_in_the_other_order():
    rng = random.Random(0)
    sums = {split: set() for split in ("train", "test")}
    for split, found in sums.items():
        for _ in range(2000):
            ((question, _),) = sample_from(split, tasks.make_arithmetic, rng).turns
            one, sign, two = re.findall(r"\d+|[+-]", question)
            found.add((sign, frozenset((one, two))))
    assert not sums["train"] & sums["test"]


def test_answers_about_charts_follow_from_the_drawn_values(examples):
    asked = collections.Counter()
    for example in examples:
        if not isinstance(getattr(example, "picture", None), charts.Chart):
            continue
        chart = example.picture
        values = dict(zip(chart.labels, chart.values, strict=True))
        colors = dict(zip(chart.labels, chart.colors, strict=True))
        for question, answer in example.turns:
            named = [label for label in re.findall(r"\w+", question) if label in values]
            numbers = [values[label] for label in named]
            first = question.split()[0:2]
            if "value of" in question:
                wanted = str(values[named[0]])
            elif "largest" in question or "smallest" in question:
                pick = max if "largest" in question else min
                wanted = pick(values, key=values.__getitem__)
            elif "sum" in question:
                wanted = f"{numbers[0]} + {numbers[1]} = {sum(numbers)}"
            elif "difference" in question:
                wanted = (
                    f"{numbers[0]} and {numbers[1]}: {max(numbers)} - {min(numbers)} = "
                    f"{abs(numbers[0] - numbers[1])}"
                )
            elif first == ["How", "many"]:
                wanted = str(len(values))
            elif "color" in question:
                wanted = colors[named[0]] if named else chart.colors[0]
                assert named or len(set(chart.colors)) == 1
            else:
                wanted = ", ".join(f"{label} {value}" for label, value in values.items())
            assert answer == wanted, (chart, question)
            asked[" ".join(first)] += 1
    assert sum(asked.values()) > 100 and len(asked) >= 5


@pytest.mark.parametrize("kind", ["bar", "row"])
def test_a_bar_is_proportional_to_its_value(kind):
    """Measured in pixels."""
    values = (90, 45, 30)
    colors = ("red", "blue", "green")
    chart = charts.Chart(kind, "", ("Rome", "Oslo", "Bern"), values, colors, False, 336, 336, 15)
    pixels_YXC = np.asarray(charts.draw(chart).image)
    lengths = []
    for color in colors:
        is_bar_YX = (pixels_YXC == charts.PALETTE[color]).all(axis=-1)
        lengths.append(is_bar_YX.any(axis=1 if kind == "bar" else 0).sum())
    np.testing.assert_allclose(np.array(lengths) / lengths[0], np.array(values) / 90, atol=0.02)


def test_a_line_and_a_pie_show_their_values():
    colors = ("red", "blue", "green")
    chart = charts.Chart(
        "pie", "", ("Tea", "Milk", "Juice"), (60, 30, 10), colors, False, 336, 336, 15
    )
    pixels_YXC = np.asarray(charts.draw(chart).image)[:, :230]
    areas = np.array([(pixels_YXC == charts.PALETTE[c]).all(axis=-1).sum() for c in colors])
    np.testing.assert_allclose(areas / areas.sum(), [0.6, 0.3, 0.1], atol=0.02)
    line = dataclasses.replace(chart, kind="line")
    pixels_YXC = np.asarray(charts.draw(line).image)
    heights = [
        336 - np.flatnonzero((pixels_YXC == charts.PALETTE[c]).all(axis=-1).any(axis=1)).mean()
        for c in colors
    ]
    floor = (heights[2] * 60 - heights[0] * 10) / 50  # height of a value of 0
    assert abs((heights[1] - floor) / (heights[0] - floor) - 0.5) < 0.02


def test_images_need_one_to_four_tiles_and_texts_do_not_overlap():
    rng, seen = random.Random(0), collections.Counter()
    for _ in range(400):
        chart = charts.make_chart(rng, 1.0)
        rows, columns = choose_canvas(chart.height, chart.width)
        seen[rows, columns] += 1
        assert charts.draw(chart).image.size == (chart.width, chart.height)
        if chart.kind in ("bar", "line"):
            step = (chart.width - 20) / len(chart.labels)
            font = charts.ImageFont.load_default(chart.text)
            assert max(font.getlength(label) for label in chart.labels) < step, chart
    assert set(seen) == set(charts.CANVASES)
    assert {rows * columns for rows, columns in seen} == {1, 2, 3, 4}


@pytest.mark.slow
def test_every_chart_can_be_drawn_and_a_pie_has_space_for_its_disk():
    """In an image four tiles high the letters are large, and a legend is as wide as the image."""
    rng = random.Random(0)
    for chart in (charts.make_chart(rng, 1.0) for _ in range(800)):
        if chart.kind == "pie":
            pixels = np.asarray(charts.draw(chart).image).reshape(-1, 3)
            drawn = [(pixels == charts.PALETTE[color]).all(-1).sum() for color in chart.colors]
            # Each mark of the legend has less than text**2 pixels.
            assert sum(drawn) > (4 + len(drawn)) * chart.text**2, chart


def test_the_target_of_an_image_feature_is_the_token_centered_in_it():
    """Each feature with a target shows ink, and most written tokens are targets."""
    rng, encode = random.Random(2), ENCODER.tokenizer.encode
    for picture in (charts.make_sign(rng), charts.make_chart(rng, 0.0)):
        drawing = charts.draw(picture)
        document = ENCODER(tasks.Exchange("sign", "", (("Read.", "-"),), picture=picture))
        patch_target_F = document.patch_target_T[document.feature_T >= 0]
        cells = (
            document.tiles_ICYX[0].min(0).reshape(12, 28, 12, 28).swapaxes(1, 2).reshape(144, -1)
        )
        assert (cells[patch_target_F >= 0] < 250).any(1).all()
        shown = [x.text for x in [*drawing.texts, *drawing.marks]]
        written = [token for text in shown for token in encode(text, add_special_tokens=False)]
        found = patch_target_F[patch_target_F >= 0].tolist()
        assert set(found) <= set(written) and len(found) > len(written) / 2


def test_targets_of_a_larger_image_are_in_tile_order():
    """Targets follow the tiles of the image, and the global tile has none."""
    word = charts.Sign(("Oslo",), 1, 2 * 336, 336, 18)
    document = ENCODER(tasks.Exchange("sign", "", (("Read.", "Oslo"),), picture=word))
    at = np.flatnonzero(document.patch_target_T >= 0)
    assert "Oslo".startswith(ENCODER.tokenizer.decode(document.patch_target_T[at].tolist()))
    left, top, right, bottom = charts.draw(word).texts[0].box
    tile, column = divmod(int((left + right) / 2 / 28), 12)
    row = int((top + bottom) / 2 / 28)
    first, last = tile * 144 + row * 12, tile * 144 + row * 12 + 11
    assert ((document.feature_T[at] >= first) & (document.feature_T[at] <= last)).all()
    assert abs(document.feature_T[at] - first - column).max() <= 1


def test_charts_of_hardness_0_are_small():
    rng = random.Random(0)
    for _ in range(100):
        chart = charts.make_chart(rng, 0.0)
        assert choose_canvas(chart.height, chart.width) == (1, 1) and len(chart.labels) <= 3


@pytest.mark.parametrize("distance", [0, 1, 2, 5])
def test_a_needle_is_the_given_number_of_chunk_boundaries_back(distance):
    """Counted in the model's tokens, for the needle of the answer."""
    rng, depths = random.Random(0), []
    for _ in range(25):
        example = tasks.make_needle(rng, ENCODER.count, CHUNK, distance)
        ((text, code),) = example.turns
        document = ENCODER(example)
        answer_at = int(np.flatnonzero(document.weight_T)[0])
        answer = "".join(ENCODER.tokenizer.decode([i]) for i in document.token_T[answer_at:])
        assert answer.startswith(code)
        (name,) = re.findall(r"What is the code of (\w+)\?$", text)
        assert text.count(f"The code of {name} is {code}.") == 1 and text.count(code) == 1
        prefix = (
            text[: text.index(f"The code of {name} is {code}.")] + f"The code of {name} is {code}."
        )
        needle_at = 5 + ENCODER.count(prefix) - 1
        decoded = ENCODER.tokenizer.decode(document.token_T[needle_at - 3 : needle_at + 1])
        assert decoded == f"{code}."
        assert answer_at // CHUNK - needle_at // CHUNK == distance == example.distance
        assert len(document.token_T) <= 6 * CHUNK
        depths.append(example.depth)
    assert distance == 5 or max(depths) - min(depths) > 0.3


def test_sums_facts_and_calls_are_correct():
    rng = random.Random(0)
    for _ in range(200):
        ((question, answer),) = tasks.make_arithmetic(rng).turns
        one, sign, two = re.findall(r"\d+|[+-]", question)
        assert int(answer) == (int(one) + int(two) if sign == "+" else int(one) - int(two)) >= 0
        exchange = tasks.make_tool_call(rng)
        ((request, call),) = exchange.turns
        ((name, written),) = re.findall(r"^\[(\w+)\((.*)\)\]$", call)
        tool = next(t["function"] for t in exchange.tools if t["function"]["name"] == name)
        arguments = eval(f"dict({written})")  # Python syntax
        assert list(arguments) == tool["parameters"]["required"]
        assert all(str(value) in request for value in arguments.values())
        for parameter, value in arguments.items():
            kind = tool["parameters"]["properties"][parameter]["type"]
            assert isinstance(value, int if kind == "integer" else str)
    ((question, answer),) = next(
        e for e in iter(lambda: tasks.make_fact(rng), None) if "France" in e.key
    ).turns
    assert answer == "Paris"


def make_messages(example: tasks.Exchange) -> list[dict]:
    messages = []
    for place, (question, answer) in enumerate(example.turns):
        content = question
        if place == 0 and example.picture is not None:
            picture = {"type": "image", "image": charts.draw(example.picture).image}
            content = [picture, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def test_examples_are_encoded_as_the_chat_template_encodes_them(examples):
    """And the server's prompt of a question is the document up to its answer."""
    for example in examples[:120]:
        if isinstance(example, tasks.Passage):
            continue
        document, messages = ENCODER(example), make_messages(example)
        rest = (ENCODER.tokenizer, ENCODER.processor)
        tools = list(example.tools) or None
        whole = render_chat(*rest, messages, add_generation_prompt=False, tools=tools)
        assert tuple(document.token_T) == whole.token_ids
        prompt = render_chat(*rest, messages[:1], tools=tools)
        answer_at = int(np.flatnonzero(document.weight_T)[0])
        assert prompt.token_ids == whole.token_ids[:answer_at]
        if whole.images:
            levels_C256 = ENCODER.processor.levels_C256
            shown_ICYX = np.stack([levels_C256[c][document.tiles_ICYX[:, c]] for c in range(3)], 1)
            np.testing.assert_array_equal(shown_ICYX, whole.images[0].pixels_ICHW)


def test_the_template_writes_calls_as_training_does():
    example = tasks.make_tool_call(random.Random(5))
    ((question, call),) = example.turns
    ((name, written),) = re.findall(r"^\[(\w+)\((.*)\)\]$", call)
    function = {"name": name, "arguments": eval(f"dict({written})")}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
    ]
    prompt = render_chat(
        ENCODER.tokenizer, None, messages, add_generation_prompt=False, tools=list(example.tools)
    )
    assert prompt.token_ids == tuple(ENCODER(example).token_T)


def test_only_answers_have_full_loss_weight_and_prose_a_small_one():
    tokenizer = ENCODER.tokenizer
    example = tasks.make_arithmetic(random.Random(0))
    document = ENCODER(example)
    state = tokenizer.decode(document.token_T[document.weight_T > 0], skip_special_tokens=False)
    assert state == example.turns[0][1] + "<|eot|>"
    passage = ENCODER(tasks.make_passage(random.Random(0)))
    assert (passage.weight_T > 0).all() and passage.weight_T.max() < 1


def test_each_digit_is_a_token():
    tokenizer = ENCODER.tokenizer
    ids = tokenizer.encode("Rome 2047, 33 + 5", add_special_tokens=False)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("2047335")


@pytest.fixture(scope="module")
def packed():
    return make_batch(make_data_config(), 60)


def test_workers_make_the_same_batches(packed):
    with stream_batches(make_data_config(), 60, workers=2) as batches:
        streamed = [next(batches), next(batches)]
    for name, array in vars(packed).items():
        np.testing.assert_array_equal(getattr(streamed[0], name), array, err_msg=name)
    assert not np.array_equal(streamed[1].token_T, packed.token_T)


def test_a_document_is_contiguous_and_its_chunks_are_aligned_to_blocks(packed):
    start_T = np.flatnonzero(packed.position_T == 0)
    assert len(start_T) > 8
    for start in start_T:
        rest = packed.position_T[start:]
        count = int(np.argmax(np.append(rest[1:], -1) != np.arange(1, len(rest) + 1))) + 1
        at = np.arange(start, start + count)
        # Inside one block, or from the start of a block; never across rows.
        assert start % CHUNK == 0 or start // CHUNK == at[-1] // CHUNK
        assert start // (6 * CHUNK) == at[-1] // (6 * CHUNK)
        assert packed.token_T[start] == ENCODER.tokenizer.bos_id
        # The target is the next token; for image features it is the token drawn there.
        text = at[:-1][packed.feature_T[at[:-1]] < 0]
        np.testing.assert_array_equal(packed.target_T[text], packed.token_T[text + 1])
        assert packed.weight_T[at[-1]] == 0
        segments = packed.segment_T[at]
        np.testing.assert_array_equal(segments - segments[0], np.arange(count) // CHUNK)
        assert (packed.first_RB[segments] == segments[0]).all()


def test_each_image_keeps_its_features(packed):
    order_T = packed.feature_T[packed.feature_T >= 0]
    np.testing.assert_array_equal(np.sort(order_T), np.arange(len(order_T)))
    assert len(order_T) % 144 == 0 and len(order_T) >= 144
    is_patch_T = packed.token_T == ENCODER.tokenizer.token_id("<|patch|>")
    np.testing.assert_array_equal(is_patch_T, packed.feature_T >= 0)


def test_a_length_that_is_not_a_multiple_of_the_chunk_is_refused():
    with pytest.raises(ValueError, match="length is 100: it must be a multiple of the chunk, 64"):
        dataclasses.replace(tiny.make_training_config(1).data, length=100)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'dev': it is one of train, validation, test"):
        sample_from("dev", tasks.make_fact, random.Random(0))


def test_the_bundled_tokenizer_equals_a_newly_trained_one(tmp_path):
    """Byte for byte: it follows from the training data; it has Llama 4's special tokens."""
    train_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert (checkpoint.BUNDLED / path.name).read_bytes() == path.read_bytes(), path.name
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert set(SPECIAL_TOKENS) == set(tokenizer.special_ids) and tokenizer.vocab_size == 2048
    labels = [word for group in charts.LABELS.values() for word in group.split() if word.isalpha()]
    assert all(len(tokenizer.encode(f" {w}", add_special_tokens=False)) == 1 for w in labels)
