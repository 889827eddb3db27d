"""Laws of writing compressed-tensors checkpoints: values equal numpy's rounding."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from l4jax import checkpoint, convert
from l4jax.checkpoint import CheckpointError, orbax_writer
from l4jax.checkpoint import compressed_tensors_writer as writer
from l4jax.checkpoint.names import list_linears
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.safetensors import Index
from l4jax.kernels.formats import Quantized
from tests import quantized, weights
from tests.checkpoint.published import place_on_mesh, place_on_one, read_published

# Widths that groups of 128 divide, on one device and on each of four.
WIDTHS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "intermediate_size_mlp": 1024,
}
RAW = weights.tiny_config("maverick", num_hidden_layers=2, **WIDTHS)
STORED: dict[str, quantized.Scheme] = {"fp8": "fp8-dynamic", "int4": "w4a16"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint with weights and other files."""
    folder = tmp_path_factory.mktemp("published")
    weights.write_checkpoint(folder, RAW, 5, dtype="BF16", shards=2)
    (folder / "tokenizer.json").write_text("tokenizer")
    return folder


@pytest.fixture(scope="module", params=["fp8", "int4"])
def written(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The source quantized by the command, in a folder named after the format."""
    folder = tmp_path_factory.mktemp("converted") / request.param
    words = ["--quantization", request.param, str(source), str(folder), "--quiet"]
    assert convert.main(words) == 0
    return folder


def _read(folder: Path) -> dict[str, np.ndarray]:
    index = Index.open(folder)
    return {name: np.array(index.view(name)) for name in index.tensors}


def _load(folder: Path, place: Any) -> dict[str, Any]:
    config = checkpoint.load_config(folder)
    return flatten(checkpoint.load(folder, config, "bfloat16", place, progress=False))


def _same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, values in found.items():
        assert values.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(values, wanted[name], err_msg=name)


def _expect(raw: dict[str, Any], format: str) -> dict[str, np.ndarray]:
    """Quantize with `tests.quantized`, but multiply by reciprocals, with int4's scales amax / 7."""
    tensors = weights.random_tensors(weights.tensor_shapes(raw), 5)
    found, _ = quantized.quantize_tensors(tensors, STORED[format], group_size=128)
    for name, values in weights.unfuse_experts(dict(tensors)).items():
        if name + "_scale" not in found:
            continue
        groups = values.reshape(len(values), -1, values.shape[1] if format == "fp8" else 128)
        top = np.float32(1 / (448 if format == "fp8" else 7))
        scale = (np.abs(groups).max(-1) * top).astype(ml_dtypes.bfloat16)
        steps = (groups * (1 / scale.astype(np.float32))[..., None]).reshape(values.shape)
        found[name + "_scale"] = scale
        if format == "fp8":
            found[name] = np.clip(steps, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        else:
            found[name + "_packed"] = _pack(np.clip(np.rint(steps), -7, 7).astype(np.int64))
    return found


def _pack(steps: np.ndarray) -> np.ndarray:
    """Pack eight values per word as digits of base 16, the first one lowest."""
    digits = (steps + 8).reshape(len(steps), -1, 8)
    return (digits * 16 ** np.arange(8)).sum(-1).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
@pytest.mark.parametrize("layout", [{}, {"fused": False}, {"shards": 3}], ids=str)
def test_written_matrices_are_quantized_with_numpys_rounding(
    kind: weights.Kind, layout: dict[str, Any], quantization: str, tmp_path: Path
) -> None:
    raw = weights.tiny_config(kind, num_hidden_layers=2, **WIDTHS)
    raw = weights.text_only(raw) if "fused" in layout else raw
    weights.write_checkpoint(tmp_path / "source", raw, 5, dtype="BF16", **layout)
    writer.quantize_folder(tmp_path / "source", tmp_path / "x", quantization, progress=False)
    found, wanted = _read(tmp_path / "x"), _expect(raw, quantization)
    if "fused" in layout:
        wanted = {name.removeprefix("language_model."): x for name, x in wanted.items()}
        found = {name.removeprefix("language_model."): x for name, x in found.items()}
    _same(found, wanted)


def test_dequantized_weights_are_within_half_a_step(written: Path) -> None:
    format, stored = written.name, _read(written)
    decoded = quantized.decode_tensors(stored, STORED[format])
    source_tensors = weights.random_tensors(weights.tensor_shapes(RAW), 5)
    for name, values in weights.unfuse_experts(dict(source_tensors)).items():
        if name + "_scale" not in stored:
            np.testing.assert_array_equal(decoded[name], values, err_msg=name)
            continue
        size = 128 if format == "int4" else values.shape[-1]
        groups = np.abs(values).reshape(-1, size)
        largest = np.repeat(groups.max(-1), size).reshape(values.shape)
        # fp8: half a mantissa step of 2^-3, or half a subnormal step. int4: half of amax / 7. The
        # scale's rounding to BF16 clips amax by half of 2^-8 at most.
        bound = np.maximum(np.abs(values) / 16, largest * 2.0**-18)
        bound = bound if format == "fp8" else largest * (1 / 14 + 2.0**-8)
        assert (np.abs(decoded[name] - values) <= 1.0001 * bound).all(), name


@pytest.mark.parametrize(
    "place", [place_on_one, place_on_mesh(experts="data", hidden="model", kv_heads="model")]
)
def test_written_checkpoint_is_loaded_with_the_same_values(
    place: Any, written: Path, tmp_path: Path
) -> None:
    # The expected tensors, written by the safetensors library.
    from safetensors.numpy import save_file

    save_file(_expect(RAW, written.name), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    found, wanted = _load(written, place), _load(tmp_path, place)
    assert set(found) == set(wanted)
    for path, array in found.items():
        assert isinstance(array, Quantized) == ("feed_forward/" in path and "router" not in path)
        pairs = zip(jax.tree.leaves(array), jax.tree.leaves(wanted[path]), strict=True)
        for left, right in pairs:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=path)


def test_config_has_the_scheme_and_the_ignored_modules(source: Path, written: Path) -> None:
    raw = json.loads((written / "config.json").read_text())
    described = raw.pop("quantization_config")
    assert raw == json.loads((source / "config.json").read_text())
    tensors = weights.random_tensors(weights.tensor_shapes(RAW), 5)
    _, wanted = quantized.quantize_tensors(tensors, STORED[written.name], group_size=128)
    assert sorted(described.pop("ignore")) == sorted(wanted.pop("ignore"))
    assert described == wanted
    assert sorted(path.name for path in written.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_ignored_modules_of_published_scout_are_counted() -> None:
    specs = read_published()["scout-instruct-fp8-dynamic"]
    ignored = [name for name in list_linears(specs) if specs[f"{name}.weight"][0] != "F8_E4M3"]
    assert len(ignored) == 449  # as its config.json lists


def test_shards_are_filled_up_to_the_limit(
    source: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 200_000
    monkeypatch.setattr(writer, "SHARD_BYTES", limit)
    total = writer.quantize_folder(source, tmp_path / "x", written.name, progress=False)
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    sizes = [
        sum(x.nbytes for x in Index.open(tmp_path / "x").tensors.values() if x.path == file)
        for file in files
    ]
    assert max(sizes) <= limit
    assert sum(sizes) == total
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    _same(_read(tmp_path / "x"), _read(written))


def test_failed_conversion_leaves_no_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = writer.read_box

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError("no more")
        return original(*arguments)

    monkeypatch.setattr(writer, "read_box", fail)
    with pytest.raises(OSError, match="no more"):
        writer.quantize_folder(source, tmp_path / "model", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_unsuitable_source_folder_or_option_is_refused(
    source: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(message: str, *words: str) -> None:
        assert convert.main(["--quantization", "fp8", *words]) == 1
        assert message in capsys.readouterr().err

    refuse("quantized already", str(written), str(tmp_path / "x"))
    refuse("leave one of the two out", str(source), str(tmp_path / "x"), "--dtype", "float32")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    refuse("not empty", str(source), str(tmp_path / "taken"))
    with pytest.raises(CheckpointError, match="Orbax's layout does not hold"):
        orbax_writer.convert_folder(written, tmp_path / "x", progress=False)


def test_widths_not_divided_by_int4_groups_are_refused(tmp_path: Path) -> None:
    raw = weights.tiny_config("scout", num_hidden_layers=1, hidden_size=128, intermediate_size=96)
    weights.write_checkpoint(tmp_path / "source", raw, 5, dtype="BF16")
    says = r"down_proj\.weight has 96 columns, which groups of 128 do not divide"
    with pytest.raises(CheckpointError, match=says):
        writer.quantize_folder(tmp_path / "source", tmp_path / "x", "int4", progress=False)
    with pytest.raises(
        CheckpointError, match="quantization is 'int3': weights are quantized to fp8 or"
    ):
        writer.quantize_folder(tmp_path / "source", tmp_path / "x", "int3", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_host_memory_holds_few_matrices(format: str, tmp_path: Path) -> None:
    raw = weights.text_only(
        weights.tiny_config(
            "scout",
            num_hidden_layers=2,
            hidden_size=128,
            intermediate_size=4096,
            num_local_experts=16,
        )
    )
    weights.write_checkpoint(tmp_path / "source", raw, 3, dtype="BF16")
    writer.quantize_folder(tmp_path / "source", tmp_path / "first", format, progress=False)
    tracemalloc.start()
    writer.quantize_folder(tmp_path / "source", tmp_path / "written", format, progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 4096 * 128 * 2 < 16 * 4096 * 128 * 2  # a matrix; a layer's experts
