"""Laws of damaged checkpoints: an error that names the file, or the undamaged model.

Bits are flipped in JSON files and in headers of weights. No loader can see a flip that turns a
finite weight, a digit of a config or a token's text into another one.
"""

import dataclasses
import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from l4jax import checkpoint, generate
from l4jax.checkpoint import orbax_writer, peft
from l4jax.checkpoint.safetensors import INDEX, Index, write_safetensors
from l4jax.config import TINY, Config
from l4jax.engine.config import EngineConfig
from l4jax.engine.request import SamplingParams
from l4jax.inputs import InputProcessor
from l4jax.testing import write_model
from tests.adapters import make_adapter
from tests.tiers import every

TEXT = "Why is the sky blue?<|eot|>"
SMALL = TINY.replace_text(layers=2, experts=2).replace_vision(layers=1)
CONFIGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json", INDEX),
)
SHARDS = ("model-1.safetensors", "model-2.safetensors")
FILES = (*CONFIGS, *SHARDS, "tokenizer.json", "chat_template.jinja")
NUMBERS = ("-1", "0", "1e999", "NaN", '"8"', "[8]")


class Loaded(NamedTuple):
    """What answers depend on."""

    config: Config
    params: SamplingParams
    ids: list[int]
    template: str | None
    pixels: tuple[Any, ...]
    weights: Any


def load(folder: Path) -> Loaded:
    """Load a checkpoint in the order of `LLM`, without programs."""
    config = dataclasses.replace(checkpoint.load_config(folder), pad_id=None)  # nothing is padded
    inputs = InputProcessor.from_folder(folder, config, EngineConfig(model=folder))
    dtype = checkpoint.choose_dtype(folder)
    here = SingleDeviceSharding(jax.devices()[0])
    weights = checkpoint.load(folder, config, dtype, lambda names: here, progress=False)
    image = inputs.image_processor
    assert image is not None
    pixels = (image.tile, image.patch, image.max_tiles, image.rescale, image.mean, image.std)
    ids = inputs.tokenizer.encode(TEXT)
    return Loaded(
        config, inputs.default_params, ids, inputs.tokenizer.chat_template, pixels, weights
    )


def write_sharded(folder: Path, config: Config) -> None:
    """Write a model in two shards with an index."""
    write_model(folder, config)
    index = Index.open(folder)
    names = sorted(index.tensors)
    halves = names[::2], names[1::2]
    for shard, half in zip(SHARDS, halves, strict=True):
        write_safetensors(folder / shard, {name: np.array(index.view(name)) for name in half})
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model, and one of other sizes and another vocabulary."""
    root = tmp_path_factory.mktemp("damaged")
    write_sharded(root / "model", SMALL)
    write_sharded(root / "other", SMALL.replace_text(vocab=300, width=32, layers=1))
    return root / "model", root / "other"


@pytest.fixture(scope="module")
def whole(folders: tuple[Path, Path]) -> Loaded:
    return load(folders[0])


@pytest.fixture
def damaged(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the small model, of links, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folders[0].iterdir():
        os.link(file, copy / file.name)
    return copy


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def check(
    damaged: Path, whole: Loaded, file: str, is_meant: Callable[[Loaded], bool] | None = None
) -> None:
    """Check that a damaged folder is refused in one sentence that names the file, or loads whole.

    Args:
        is_meant: another result that the file asks for.
    """
    try:
        found = load(damaged)
    except (ValueError, OSError) as error:
        said = str(error)
        assert said.endswith(".") and "\n" not in said and len(said) < 600, said
        # What one file lacks or contradicts, another may show.
        assert any(Path(name).stem in said or name in said for name in (*FILES, file)), said
        return
    if is_meant is not None and is_meant(found):
        return
    assert found[:-1] == whole[:-1]
    assert jax.tree.all(jax.tree.map(np.array_equal, found.weights, whole.weights))


def truncate(content: bytes) -> list[bytes]:
    return [b"", content[:1], content[: len(content) // 2], content[:-2]]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("file", every(3, FILES))
def test_truncated_file_is_refused(damaged, whole, file, part):
    replace(damaged / file, truncate((damaged / file).read_bytes())[part])
    if file == "chat_template.jinja":  # a shorter template is a template
        check(damaged, whole, file, lambda found: found.template != whole.template)
    else:
        check(damaged, whole, file)


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "list",
        "text",
        "number",
        "null",
        "png",
        "lfs",
        "utf16",
        "folder",
        "fifo",
        "dangling",
        "deep",
        "deep_value",
    ],
)
@pytest.mark.parametrize("file", every(3, FILES))
def test_file_of_another_type_is_refused(damaged, whole, file, kind):
    path = damaged / file
    content = path.read_bytes()
    path.unlink()
    contents = {
        "list": b"[]",
        "text": b'"text"',
        "number": b"3",
        "null": b"null",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "utf16": content.decode(errors="replace").encode("utf-16"),
        "deep": b"[" * 5000 + b"]" * 5000,
        "deep_value": content[:1] + b'"k": ' + b"[" * 5000 + b"]" * 5000 + b", " + content[1:],
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")

    def is_meant(found: Loaded) -> bool:
        # Without these files a model has defaults; any text is a template.
        is_optional = file in ("generation_config.json", "chat_template.jinja")
        is_gone = kind in ("absent", "dangling")
        return is_optional and (is_gone or (file.endswith("jinja") and found.template is not None))

    check(damaged, whole, file, is_meant)


@pytest.mark.parametrize("file", FILES)
def test_file_of_another_model_is_refused(folders, damaged, whole, file):
    replace(damaged / file, (folders[1] / file).read_bytes())
    check(damaged, whole, file)


@pytest.mark.parametrize("change", ["no added tokens", "eos", "deep", "index"])
def test_command_refuses_a_damaged_folder_in_one_line(damaged, change, capsys):
    if change == "no added tokens":
        raw = json.loads((damaged / "tokenizer.json").read_text())
        replace(damaged / "tokenizer.json", json.dumps({**raw, "added_tokens": []}).encode())
    elif change == "eos":
        replace(damaged / "generation_config.json", b'{"eos_token_id": "abc"}')
    elif change == "deep":
        replace(damaged / "config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000)
    else:
        replace(damaged / INDEX, b"[]")
    assert generate.main(["--model", str(damaged), "--prompt", "a", "--max-tokens", "2"]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("l4jax.generate: ")]
    assert len(lines) == 1 and str(damaged) in lines[0] and lines[0].endswith(".")
    assert "Traceback" not in said.err and not said.out


def list_numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List the paths of the numbers in a value of JSON."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else list(enumerate(value))[:1]:
            yield from list_numbers(item, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def set_value(value: Any, path: tuple[Any, ...], item: Any) -> Any:
    """Copy a value of JSON with one item replaced."""
    if not path:
        return item
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = set_value(value[path[0]], path[1:], item)
    return copy


# Values that have a meaning: greedy sampling, and pixels that are not centered.
MEANT = {
    ("generation_config.json", "temperature", "0"): lambda loaded: loaded.params.temperature == 0,
    ("preprocessor_config.json", "image_mean", "0"): lambda loaded: 0 in loaded.pixels[-2],
}


@pytest.mark.parametrize("number", every(3, NUMBERS))
@pytest.mark.parametrize("file", [name for name in CONFIGS if name != "special_tokens_map.json"])
def test_number_at_an_impossible_value_is_refused_by_key(damaged, whole, file, number):
    raw = json.loads((damaged / file).read_text())
    for path in list_numbers(raw):
        text = json.dumps(set_value(raw, path, "HERE")).replace('"HERE"', number)
        replace(damaged / file, text.encode())
        key = next(key for key in reversed(path) if isinstance(key, str))
        try:
            check(damaged, whole, file, MEANT.get((file, key, number)))
        except BaseException as error:
            error.add_note(f"{file}: {path} = {number}")
            raise


@pytest.mark.parametrize("seed", every(10, range(100)))
def test_flipped_bit_is_refused_or_means_what_the_file_says(damaged, whole, seed):
    rng = random.Random(seed)
    file = rng.choice((*CONFIGS, *SHARDS))
    content = bytearray((damaged / file).read_bytes())
    end = len(content) if file in CONFIGS else 8 + int.from_bytes(content[:8], "little")
    # Half of the flips of weights hit the header's length.
    place = rng.randrange(8 if file in SHARDS and seed % 2 else end)
    content[place] ^= 1 << rng.randrange(8)
    replace(damaged / file, bytes(content))
    is_config = file in CONFIGS and file != INDEX
    check(damaged, whole, file, lambda found: is_config and found[:-1] != whole[:-1])


# Adapters.


@pytest.fixture(scope="module")
def lora(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    config = checkpoint.load_config(folders[0])
    adapter = make_adapter(config, r"text/layer_0/(attention|feed_forward)/.*")
    checkpoint.write_adapter(folder, adapter, config, "base")
    path = folder / peft.CONFIG
    more = {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 6.0}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


def damage_adapter(content: bytes, name: str, seed: int) -> list[bytes]:
    """List damaged contents of a file of an adapter."""
    rng = random.Random(seed)
    flipped = bytearray(content)
    end = len(content) if name == peft.CONFIG else 8 + int.from_bytes(content[:8], "little")
    flipped[rng.randrange(end)] ^= 1 << rng.randrange(8)
    cases = [bytes(flipped)]
    if seed == 0:
        cases += [*truncate(content), b"[]", b"\x89PNG\r\n\x1a\n", b"[" * 5000 + b"]" * 5000]
    if seed == 0 and name == peft.CONFIG:
        raw = json.loads(content)
        texts = [json.dumps(set_value(raw, path, "HERE")) for path in list_numbers(raw)]
        cases += [text.replace('"HERE"', x).encode() for text in texts for x in NUMBERS]
    return cases


@pytest.mark.parametrize("seed", every(5, range(20)))
@pytest.mark.parametrize("name", [peft.CONFIG, peft.WEIGHTS])
def test_damaged_adapter_is_refused_or_means_what_its_config_says(
    folders, lora, tmp_path, name, seed
):
    config = checkpoint.load_config(folders[0])
    whole = checkpoint.read_adapter(lora, config)
    shutil.copytree(lora, tmp_path / "lora")
    content = (lora / name).read_bytes()
    for damaged in damage_adapter(content, name, seed):
        replace(tmp_path / "lora" / name, damaged)
        try:
            found = checkpoint.read_adapter(tmp_path / "lora", config)
        except (ValueError, OSError) as error:
            said = str(error)
            assert said.endswith(".") and "\n" not in said and len(said) < 700, said
            assert "adapter_" in said, said
            continue
        if name == peft.CONFIG:  # another scale or layout is another adapter
            meant = ("lora_alpha", "alpha_pattern", "use_rslora", "peft_version")
            before, after = json.loads(content), json.loads(damaged)
            if any(before.get(key) != after.get(key) for key in meant):
                continue
        assert (found.rank, found.alpha) == (whole.rank, whole.alpha)
        assert jax.tree.all(jax.tree.map(np.array_equal, found.factors, whole.factors))


# Orbax.

OCDBT = bytes.fromhex("0cdb")  # the first bytes of its index files


@pytest.fixture(scope="module")
def converted(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "model"
    orbax_writer.convert_folder(folders[0], folder, progress=False)
    return folder


# Orbax abandons the coroutines of other arrays when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", every(6, ["half", "empty", "list", "deep", "absent", "flip"]))
def test_damaged_file_of_orbax_is_refused_or_changes_nothing(
    folders, converted, whole, tmp_path, kind
):
    files = [path for path in (converted / "orbax").rglob("*") if path.is_file()]
    files.sort(key=lambda path: (path.stat().st_size, path.name))  # names are random
    described = [file for file in files if file.parent.name != "d"]
    rest = random.Random(kind).sample([file for file in files if file.parent.name == "d"], 4)
    for number, file in enumerate([*described, *rest]):
        copy = tmp_path / str(number)
        shutil.copytree(converted, copy)
        content = file.read_bytes()
        flipped = bytearray(content)
        if file in described or content.startswith(OCDBT):  # not the data of a weight
            flipped[len(content) // 2] ^= 4
        damaged = copy / file.relative_to(converted)
        damaged.unlink()
        contents = {
            "half": content[: len(content) // 2],
            "empty": b"",
            "list": b"[]",
            "deep": b"[" * 5000 + b"]" * 5000,
            "flip": bytes(flipped),
        }
        if kind in contents:
            damaged.write_bytes(contents[kind])
        try:
            found = load(copy)
        except (ValueError, OSError) as error:
            said = str(error)
            assert said.endswith(".") and "\n" not in said and "orbax" in said, said
            continue
        except BaseException as error:
            error.add_note(str(damaged))
            raise
        assert jax.tree.all(jax.tree.map(np.array_equal, found.weights, whole.weights)), damaged
    gc.collect()  # the coroutines end in this test
