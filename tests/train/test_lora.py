"""Laws of LoRA training: adapters are trained on conversations; the weights stay frozen."""

import base64
import dataclasses
import functools
import io
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from l4jax import LLM, SamplingParams, checkpoint, generate
from l4jax.config import Config
from l4jax.testing import write_model
from l4jax.text.tokenizer import Tokenizer
from l4jax.train import lora, saved_state
from l4jax.train.batches import DataConfig, PackedBatch
from l4jax.train.conversations import (
    DataError,
    count_tiles,
    encode_conversation,
    iterate_placements,
    make_batches,
    read_documents,
)
from l4jax.train.documents import CHAT, Document
from l4jax.train.kernels import make_remat_kernels, make_training_kernels
from l4jax.train.lora import TARGETS, LoraConfig, make_processor, train_adapter
from l4jax.train.metrics import read_lines
from l4jax.train.train_step import Hyperparameters, compute_loss
from l4jax.train.trainer import TrainingConfig
from scripts import finetune
from tests.checkpoint.published import place_on_one
from tests.train import tiny

ANSWERS = {
    "sky": "It is blue.",
    "light": "It is fast.",
    "water": "It is wet.",
    "air": "It is thin.",
}
LENGTH = 2 * tiny.CHUNK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, tiny.CONFIG, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_lines(path, *({"messages": [*ask(name), say(text)]} for name, text in ANSWERS.items()))
    return path


def ask(name: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": name}]


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def read(model: Path, path: Path, longest: int = 2048) -> list[Document]:
    processor = make_processor(checkpoint.load_config(model), model)
    return read_documents(path, Tokenizer.from_folder(model), processor, longest)


def make_data_config(
    model: Path, documents: list[Document], steps: int, **changes: Any
) -> DataConfig:
    rows = changes.pop("rows", 2)
    tiles = count_tiles(documents, rows)
    return DataConfig(
        **{
            **dict(folder=model, seed=0, steps=steps, rows=rows, length=LENGTH),
            **dict(chunk=tiny.CHUNK, tiles=tiles, features=144, **changes),
        }
    )


def make_lora_config(
    model: Path, documents: list[Document], steps: int, **changes: Any
) -> LoraConfig:
    hparams = Hyperparameters(
        steps=steps, rate=2e-2, warmup=2, decay=0.0, balance=0.0, dtype="float32"
    )
    data_config = make_data_config(model, documents, steps)
    training = TrainingConfig(
        checkpoint.load_config(model), data_config, hparams, save_every=8, note_every=1
    )
    return LoraConfig(training, "digest", 4, 8.0, changes.pop("targets", tuple(TARGETS)[:3]))


def read_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder)]


def load(model: Path, lora: Any = None) -> Any:
    config = checkpoint.load_config(model)
    return checkpoint.load(model, config, jnp.float32, place_on_one, lora=lora, progress=False)


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def evaluate(params: Any, packed: PackedBatch, config: Config, chunk: int = tiny.CHUNK) -> Any:
    """Compute the loss of a batch."""
    hparams = Hyperparameters(steps=1, dtype="float32", balance=0.0)
    return compute_loss(params, packed, config, hparams, np.zeros(0), make_remat_kernels(chunk))[0]


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Forty uninterrupted steps: the folder, the configuration, the documents, the adapter."""
    folder, documents = tmp_path_factory.mktemp("run"), read(model, data)
    lora_config = make_lora_config(model, documents, 40)
    return (
        folder,
        lora_config,
        documents,
        train_adapter(lora_config, documents, folder, model="base", quiet=True),
    )


def test_only_answers_have_loss_weight(model, tmp_path):
    """Of two turns with a tool call between them, each from the end of its header to its end."""
    call = {"function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [
        {"role": "system", "content": "Be short."},
        *ask("sky"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        say("It is blue.", weight=0),
        *ask("air"),
        say("It is thin. <|eot|>"),
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    path = write_lines(tmp_path / "x.jsonl", {"messages": messages, "tools": [tool]})
    (document,) = read(model, path)
    tokenizer = Tokenizer.from_folder(model)
    text = tokenizer.decode(
        document.token_T[document.weight_T == 1].tolist(), skip_special_tokens=False
    )
    called = '{"name": "look", "parameters": {"at": "sky"}}<|eot|>'
    assert text == called + "It is thin. <|eot|><|eot|>"
    assert set(np.unique(document.weight_T)) == {0, 1} and (document.feature_T == -1).all()


def test_images_come_from_files_and_data_uris(model, tmp_path):
    image = Image.effect_noise((400, 300), 50).convert("RGB")
    image.save(tmp_path / "x.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image", "image": "x.png"}, {"type": "image_url", "image_url": {"url": url}}]
    lines = [
        {"messages": [{"role": "user", "content": [part, *more]}, say("noise")]}
        for part in parts
        for more in ([], [{"type": "text", "text": "What?"}])
    ]
    documents = read(model, write_lines(tmp_path / "x.jsonl", *lines))
    processor = make_processor(tiny.CONFIG, model)
    assert processor is not None
    tiles_ICYX, _, _ = processor.split(image)
    for document in documents:
        np.testing.assert_array_equal(document.tiles_ICYX, tiles_ICYX)
        features = document.feature_T[document.feature_T >= 0]
        np.testing.assert_array_equal(features, np.arange(len(tiles_ICYX) * 144))
    np.testing.assert_array_equal(documents[0].token_T, documents[2].token_T)
    assert count_tiles(documents, 1) == 4 and count_tiles(documents[:1], 2) == 8


LONG = {"messages": [*ask("sky"), say("blue " * 300)]}
BAD = [
    ("{", r"line 2: it is not JSON"),
    ({"prompt": "x"}, r'line 2: it is not like \{"messages"'),
    ({"messages": [*ask("sky"), say("x")], "id": 3}, r"line 2: it has 'id'"),
    ({"messages": ask("sky")}, r"line 2: it has no answer of the assistant"),
    ({"messages": [say("x")]}, r"line 2: it begins with the assistant"),
    ({"messages": [*ask("sky"), say("x", weight=2)]}, r"messages\[1\].weight is 2"),
    ({"messages": [{"role": "poet", "content": "x"}]}, r"line 2: messages\[0\].role"),
    (LONG, r"line 2: it has \d+ tokens, and 8 to 128 are allowed"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words for _, words in BAD])
def test_an_invalid_line_is_refused_by_its_number(line, words, model, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"messages": [*ask("sky"), say("x")]}, line)
    if line == "{":
        path.write_text("\n{")
    with pytest.raises(DataError, match=words):
        read(model, path, 128)


def test_a_template_that_does_not_delimit_answers_is_refused(model):
    tokenizer = Tokenizer.from_folder(model)
    tokenizer.chat_template = (
        "{{ messages[-1].content }}{% if add_generation_prompt %} So:{% endif %}"
    )
    with pytest.raises(DataError, match=r"messages\[1\]: its first token cannot be determined"):
        encode_conversation({"messages": [*ask("sky"), say("x")]}, tokenizer, None)


def test_a_file_without_conversations_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read(model, tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no conversation"):
        read(model, tmp_path / "x.jsonl")


def make_documents(*lengths: int) -> list[Document]:
    """Make texts without images, with full loss weight."""
    tiles = np.zeros((0, 3, 1, 1), np.uint8)
    return [
        Document(
            kind=CHAT,
            token_T=np.arange(length, dtype=np.int32),
            weight_T=np.ones(length, np.float32),
            feature_T=np.full(length, -1, np.int32),
            patch_target_T=np.full(length, -1, np.int32),
            tiles_ICYX=tiles,
        )
        for length in lengths
    ]


def test_each_epoch_has_each_document_once(model):
    documents = make_documents(*np.random.default_rng(0).integers(8, LENGTH + 1, 40).tolist())
    batches = iterate_placements(documents, make_data_config(model, documents, 1))
    seen, epochs = [], []
    while len(epochs) < 3:
        placements = next(batches)
        assert placements
        seen += [id(document) for _, document in placements]
        if len(seen) == len(documents):
            epochs.append(seen)
            seen = []
    assert all(sorted(lora_config) == sorted(map(id, documents)) for lora_config in epochs)
    assert epochs[0] != epochs[1]


def test_batches_do_not_depend_on_the_first_step(model):
    documents = make_documents(*np.random.default_rng(1).integers(8, LENGTH + 1, 20).tolist())
    data_config = make_data_config(model, documents, 9)
    whole, later = (
        list(make_batches(documents, data_config, 0)),
        make_batches(documents, data_config, 5),
    )
    assert len(whole) == 9
    for ours, wanted in zip(later, whole[5:], strict=True):
        for name, array in vars(wanted).items():
            np.testing.assert_array_equal(getattr(ours, name), array)


def test_rows_shorter_than_a_chunk_give_the_same_loss(model, data):
    documents = read(model, data)
    base, config = load(model), checkpoint.load_config(model)
    losses = []
    for length, rows in ((LENGTH, 2), (48, 4)):
        chunk = min(length, tiny.CHUNK)
        data_config = make_data_config(model, documents, 1, rows=rows)
        data_config = dataclasses.replace(data_config, length=length, chunk=chunk)
        (packed,) = make_batches(documents, data_config, 0)
        losses.append(float(evaluate(base, packed, config, chunk)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_rematerialized_kernels_have_the_same_gradients(model, data):
    documents = read(model, data)
    lora_config = make_lora_config(model, documents, 1)
    base, factors = load(model), randomize(lora_config)
    (packed,) = make_batches(documents, lora_config.training.data, 0)
    found = []

    def compute_adapted(factors, kernels):
        training, params = lora_config.training, lora.apply_adapter(base, factors, 2.0)
        return compute_loss(params, packed, training.model, training.hparams, np.zeros(0), kernels)[
            0
        ]

    for make in (make_training_kernels, make_remat_kernels):
        kernels = make(tiny.CHUNK)
        found.append(
            jax.jit(jax.grad(functools.partial(compute_adapted, kernels=kernels)))(factors)
        )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *found)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def randomize(lora_config: LoraConfig) -> Any:
    """Make factors without zeros."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lora_config.initialize).params
    return jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), shapes
    )


@pytest.mark.slow
def test_the_loss_falls_from_the_loss_of_the_base_model(run, model):
    folder, lora_config, documents, _ = run
    losses = read_losses(folder)
    (packed, *_) = make_batches(documents, lora_config.training.data, 0)
    alone = evaluate(load(model), packed, lora_config.training.model)
    np.testing.assert_allclose(losses[0], alone, rtol=1e-5)
    assert losses[-1] < 0.2 * losses[0], losses


def test_only_adapters_are_trained(run, model):
    """The saved state has only factors of the targets and their moments; all factors change."""
    folder, lora_config, _, adapter = run
    paths = set(lora_config.list_targets())
    assert set(adapter.factors) == paths and len(paths) == 2 * 6
    (saved,) = saved_state.list_saved(folder)
    names = {name for file in saved.glob("*.safetensors") for name in _list(file)}
    assert all(
        "first" in name or "second" in name or "count" in name or name == "step" for name in names
    ), names
    began = jax.device_get(lora_config.initialize().params)
    for path, its_factors in adapter.factors.items():
        for name, values in its_factors.items():
            assert not np.array_equal(values, began[path][name]), (path, name)


def _list(path: Path) -> list[str]:
    from safetensors.numpy import load_file

    return list(load_file(path))


def test_a_merged_adapter_gives_the_trained_loss(run, model, tmp_path):
    """Merged weights, and weights with separate factors, have the same loss."""
    folder, lora_config, documents, adapter = run
    merged = load(model, checkpoint.read_adapter(folder, lora_config.training.model))
    applied = lora.apply_adapter(load(model), adapter.factors, adapter.scale)
    (packed, *_) = make_batches(documents, lora_config.training.data, 0)
    losses = [
        float(evaluate(params, packed, lora_config.training.model)) for params in (merged, applied)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0] < 0.3 * read_losses(folder)[0]


@pytest.mark.slow
def test_serving_with_the_adapter_gives_the_trained_answers(run, model, capsys):
    folder, *_ = run
    params = SamplingParams(temperature=0.0, max_tokens=8)
    messages = [ask(name) for name in ANSWERS]
    for adapter, is_trained in ((folder, True), (None, False)):
        llm = LLM(model, lora=adapter, quiet=True, max_model_len=128, mesh="4" if adapter else "1")
        answers = [output.outputs[0].text for output in llm.chat(messages, params)]
        assert (answers == list(ANSWERS.values())) == is_trained, answers
    words = ["--model", str(model), "--lora", str(folder), "--prompt", "sky"]
    assert generate.main([*words, "--temperature", "0", "--max-model-len", "128"]) == 0
    assert capsys.readouterr().out.strip() == ANSWERS["sky"]


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(run, tmp_path, monkeypatch):
    folder, lora_config, documents, adapter = run
    whole = lora.make_batches
    monkeypatch.setattr(lora, "make_batches", lambda *args: itertools.islice(whole(*args), 10))
    train_adapter(lora_config, documents, tmp_path, model="base", quiet=True)
    assert saved_state.list_saved(tmp_path)[-1].name == "step-00000008"
    monkeypatch.setattr(lora, "make_batches", whole)
    again = train_adapter(lora_config, documents, tmp_path, model="base", quiet=True)
    assert read_losses(tmp_path) == read_losses(folder)
    jax.tree.map(np.testing.assert_array_equal, again.factors, adapter.factors)


@pytest.mark.parametrize("file", ["missing", "older"])
def test_a_run_resumed_at_its_last_step_writes_the_adapter(file, run, tmp_path):
    folder, lora_config, documents, _ = run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    adapter = tmp_path / "adapter_model.safetensors"
    expected = adapter.read_bytes()
    adapter.unlink()
    if file == "older":
        adapter.write_bytes(expected[:100])
    (tmp_path / ".unfinished").mkdir()
    train_adapter(lora_config, documents, tmp_path, model="base", quiet=True)
    assert adapter.read_bytes() == expected
    assert not (tmp_path / ".unfinished").exists()


def test_the_folder_of_another_run_is_refused(run):
    folder, lora_config, documents, _ = run
    other = dataclasses.replace(lora_config, alpha=3.0)
    with pytest.raises(saved_state.StateError, match=r"alpha = 8.0 and this run has 3.0"):
        train_adapter(other, documents, folder, model="base", quiet=True)


@pytest.mark.slow
def test_sharded_lora_training_equals_training_on_one_device(run, model, tmp_path):
    """Losses and gradient norms, up to float32 rounding."""
    _, _, documents, _ = run
    lora_config = make_lora_config(model, documents, 4)
    folders = [tmp_path / mesh for mesh in ("1", "data=2,model=4")]
    one, many = (
        train_adapter(lora_config, documents, x, model="base", mesh=x.name, quiet=True)
        for x in folders
    )
    found, wanted = (
        np.array([(x["loss"], x["norm"]) for x in read_lines(folder)]) for folder in folders[::-1]
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-4)
    for path, factors in one.factors.items():
        for name, values in factors.items():
            error = np.abs(many.factors[path][name] - values)
            # Adam may divide by pure rounding error, and a few factors then move by a full step.
            assert np.mean(error > 1e-4) < 0.02, (path, name)


def test_factors_are_sharded_as_their_weights(model, data):
    lora_config = make_lora_config(model, read(model, data), 1)
    names = lora_config.name_factors()
    qkv = names["text/layer_0/attention/qkv"]
    assert qkv["second"] == ("kv_heads", "queries_kv", "head_dim", "rank")
    assert qkv["first"] == ("parts", "parts", "parts", "rank", "width")
    assert names["text/layer_0/feed_forward/down"]["first"] == (
        "experts",
        "parts",
        "rank",
        "expert_hidden",
    )
    out = names["text/layer_0/attention/out"]
    assert out["first"][1:] == ("rank", "kv_heads", "queries", "head_dim")


def test_targets_are_distinguished(model):
    maverick = tiny.CONFIG.replace_text(moe_interval=2)
    lora_config = make_lora_config(model, make_documents(20), 1)
    training = dataclasses.replace(lora_config.training, model=maverick)
    found = {
        name: set(
            dataclasses.replace(lora_config, training=training, targets=(name,)).list_targets()
        )
        for name in TARGETS
    }
    feed = "feed_forward/gate_up", "feed_forward/down"
    assert found["dense"] == {f"text/layer_0/{x}" for x in feed}
    assert found["experts"] == {f"text/layer_1/{x}" for x in feed}
    assert found["shared_expert"] == {f"text/layer_1/{x}".replace("d/", "d/shared/") for x in feed}
    assert len(found["attention"]) == 4
    for changes, words in (
        ({"targets": ("head",)}, "targets has 'head': they are attention, shared_expert"),
        ({"targets": ("dense",)}, r"the model has no such parameters"),
        ({"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(lora_config, **changes)


def test_quantized_checkpoints_and_meshes_that_do_not_fit_are_refused(run, model, tmp_path):
    _, lora_config, documents, _ = run
    write_model(tmp_path / "fp8", tiny.CONFIG, quantization="fp8-dynamic")
    data_config = dataclasses.replace(lora_config.training.data, folder=tmp_path / "fp8")
    quantized = dataclasses.replace(
        lora_config, training=dataclasses.replace(lora_config.training, data=data_config)
    )
    with pytest.raises(ValueError, match=r"is quantized .*adapters are trained on BF16"):
        train_adapter(quantized, documents, tmp_path / "run", model="base", quiet=True)
    with pytest.raises(ValueError, match="devices cannot share 2 rows of a batch"):
        train_adapter(
            lora_config, documents, tmp_path / "run", model="base", mesh="8x1", quiet=True
        )


@pytest.mark.slow
def test_the_command_trains_an_adapter_that_can_be_loaded(
    model, data, tmp_path, monkeypatch, capsys
):
    def call(*words: str) -> None:
        flags = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["finetune", *flags, *words])
        finetune.main()

    monkeypatch.setattr(finetune, "enable_compilation_cache", lambda folder: None)
    small = ("--rows", "2", "--length", "48", "--rank", "2", "--dtype", "bfloat16")
    call("--steps", "2", "--save-every", "2", "--mesh", "2", *small)
    output = capsys.readouterr().out
    assert "4 conversations" in output and "step 2 of 2: loss" in output and "--lora" in output
    adapter = checkpoint.read_adapter(tmp_path / "out", checkpoint.load_config(model))
    assert adapter.rank == 2 and adapter.alpha == 32
    assert not any(path.endswith("feed_forward/down") for path in adapter.factors)
    with pytest.raises(SystemExit, match=r"finetune: .* was trained with rank = 2"):
        call("--steps", "2", "--save-every", "2", *small, "--rank", "3")
    with pytest.raises(SystemExit, match=r"finetune: .*line 1: it has \d+ tokens"):
        call("--length", "16")


def test_an_adapter_needs_weights(model, tmp_path):
    with pytest.raises(ValueError, match="lora is for a checkpoint's weights"):
        LLM(model, lora=tmp_path, load_format="dummy", quiet=True)
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        LLM(model, lora=tmp_path, quiet=True)
