"""Laws of conversion to Orbax: equal values on any mesh, and complete or absent output."""

import json
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from l4jax import checkpoint, convert
from l4jax.checkpoint import CheckpointError, orbax_writer, output_folder
from l4jax.checkpoint.parameters import flatten
from tests import weights
from tests.checkpoint.published import place_on_mesh, place_on_one

RAW = weights.tiny_config("maverick", num_hidden_layers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint with weights and other files."""
    folder = tmp_path_factory.mktemp("published")
    weights.write_checkpoint(folder, RAW, 5, dtype="BF16", shards=2)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "consolidated.00.pth").touch()
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source converted by the command."""
    folder = tmp_path_factory.mktemp("converted") / "new" / "model"
    assert convert.main([str(source), str(folder), "--quiet"]) == 0
    return folder


def _load(folder: Path, place: Any, dtype: Any = "bfloat16") -> dict[str, jax.Array]:
    config = checkpoint.load_config(folder)
    return flatten(checkpoint.load(folder, config, dtype, place, progress=False))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "place",
    [place_on_one, place_on_mesh(experts="data", hidden="model", kv_heads="model")],
    ids=["one device", "mesh"],
)
def test_converted_parameters_equal_the_published_ones(
    place: Any, dtype: str, source: Path, converted: Path
) -> None:
    wanted, found = _load(source, place, dtype), _load(converted, place, dtype)
    assert set(found) == set(wanted)
    for path, array in found.items():
        assert array.sharding == wanted[path].sharding, path
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted[path]), err_msg=path)


def test_converted_folder_has_the_models_other_files(source: Path, converted: Path) -> None:
    assert sorted(path.name for path in converted.iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "orbax",
        "tokenizer.json",
    ]
    assert checkpoint.load_config(converted) == checkpoint.load_config(source)
    assert checkpoint.choose_dtype(converted) == checkpoint.choose_dtype(source) == "bfloat16"


def test_each_expert_and_head_is_one_chunk(converted: Path) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(converted.absolute() / "orbax").item_metadata.tree
    for path, leaf in flatten(tree).items():
        if path.endswith(("feed_forward/gate_up", "qkv")) and leaf.shape[0] > 3:
            assert leaf.storage.chunk_shape[0] == 1, path


def test_dtype_of_the_conversion_is_configurable(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(source), str(tmp_path / "x"), "--dtype", "float32"]) == 0
    assert checkpoint.choose_dtype(tmp_path / "x") == "float32"
    out, error = capsys.readouterr()
    assert "bytes of parameters in" in out
    assert "converting: 100%" in error


def test_existing_folder_is_refused_and_replaced_with_overwrite(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "precious").touch()
    assert convert.main([str(source), str(folder)]) == 1
    assert "not empty: choose another folder, or --overwrite" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["precious"]
    assert convert.main([str(source), str(folder), "--overwrite", "--quiet"]) == 0
    assert not (folder / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unsuitable_source_or_folder_is_refused(
    source: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(source: Path | str, folder: Path, message: str) -> None:
        assert convert.main([str(source), str(folder)]) == 1
        assert message in capsys.readouterr().err

    refuse(converted, tmp_path / "x", "holds orbax/ already")
    refuse(tmp_path / "absent", tmp_path / "x", "there is no folder")
    with pytest.raises(CheckpointError, match="holds the checkpoint that is to be converted"):
        orbax_writer.convert_folder(source, source.parent, overwrite=True, progress=False)
    assert not (tmp_path / "x").exists()


def test_full_disk_is_refused_before_writing(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    usage = SimpleNamespace(free=9)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="GB free"):
        orbax_writer.convert_folder(source, tmp_path / "x", progress=False)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (orbax_writer, "load_parameter"),
        (output_folder, "_copy_files"),
        (output_folder, "_replace_folder"),
    ],
)
def test_failed_conversion_leaves_no_files(
    module: Any, function: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if function != "load_parameter" or len(calls) == 9:
            raise OSError("no more")
        return original(*arguments)

    original = getattr(module, function)
    monkeypatch.setattr(module, function, fail)
    with pytest.raises(OSError, match="no more"):
        orbax_writer.convert_folder(source, tmp_path / "model", progress=False)
    assert list(tmp_path.iterdir()) == []


KILL = """
import os, signal, sys
from l4jax.checkpoint import orbax_writer, output_folder
source, folder, module, name, left = sys.argv[1:]
module, left = globals()[module], [int(left)]
original = getattr(module, name)
def kill(*arguments):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(module, name, kill)
orbax_writer.convert_folder(source, folder, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["orbax_writer load_parameter 20", "output_folder _copy_files 0"]
)
def test_killed_conversion_leaves_no_loadable_folder(
    moment: str, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    killed = subprocess.run([sys.executable, "-c", KILL, str(source), str(folder), *moment.split()])
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists()
    left = next(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        checkpoint.load_config(left)
    if "load_parameter" in moment:
        config = checkpoint.load_config(source)
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoint.load(left, config, np.float32, place_on_one, progress=False)
    orbax_writer.convert_folder(source, folder, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert set(_load(folder, place_on_one)) == set(_load(source, place_on_one))


def test_damaged_or_foreign_orbax_folder_is_refused(converted: Path, tmp_path: Path) -> None:
    config = checkpoint.load_config(converted)
    (tmp_path / "orbax").mkdir()
    with pytest.raises(CheckpointError, match=r"orbax is not a complete Orbax checkpoint.*convert"):
        checkpoint.load(tmp_path, config, np.float32, place_on_one, progress=False)
    shutil.copytree(converted, tmp_path / "damaged")
    largest = max((tmp_path / "damaged/orbax").rglob("*"), key=lambda path: path.stat().st_size)
    largest.unlink()
    with pytest.raises(CheckpointError, match=r"orbax is damaged \(.*convert"):
        checkpoint.load(tmp_path / "damaged", config, np.float32, place_on_one, progress=False)
    other = config.replace_text(layers=3, vocab=64)
    with pytest.raises(CheckpointError, match=r"lacks text/layer_2/.*has text/embedding \[320"):
        checkpoint.load(converted, other, np.float32, place_on_one, progress=False)


def test_conversion_reads_one_parameter_at_a_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = set(), []
    load_parameter = orbax_writer.load_parameter

    def load_and_count(*arguments: Any) -> np.ndarray:
        most.append(len(alive))
        values = np.array(load_parameter(*arguments))
        alive.add(id(values))
        weakref.finalize(values, alive.discard, id(values))
        return values

    monkeypatch.setattr(orbax_writer, "load_parameter", load_and_count)
    orbax_writer.convert_folder(source, tmp_path / "model", progress=False)
    assert len(most) > 50
    assert max(most) <= 1  # the previous one, which its writer frees shortly after
