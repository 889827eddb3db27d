"""Laws of `l4jax.testing`: its models load in each scheme, and generate."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams, checkpoint
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.safetensors import Index
from l4jax.config import TINY
from l4jax.kernels.formats import dequantize
from l4jax.testing import SCHEMES, Scheme, write_model
from tests import quantized
from tests.checkpoint.published import arrange, place_on_one

MAVERICK = dataclasses.replace(
    TINY, text=dataclasses.replace(TINY.text, moe_interval=2, has_qk_norm=False, rope_scaling=None)
)


def read(folder) -> dict[str, np.ndarray]:
    index = Index.open(folder)
    return {name: np.array(index.view(name)) for name in index.specs}


@pytest.mark.parametrize("config", [TINY, MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_model_of_each_scheme_is_loaded_with_its_decoded_weights(scheme: Scheme, config, tmp_path):
    """They equal the unquantized model's weights within rounding."""
    written = write_model(tmp_path / "quantized", config, quantization=scheme)
    assert checkpoint.load_config(tmp_path / "quantized") == written
    assert write_model(tmp_path / "plain", config) == written
    wanted = arrange(quantized.decode_tensors(read(tmp_path / "quantized"), scheme), written)
    plain = arrange(read(tmp_path / "plain"), written)
    params = checkpoint.load(
        tmp_path / "quantized", written, "float32", place_on_one, progress=False
    )
    found = flatten(params)
    assert set(found) == set(wanted) == set(plain)
    changed = 0
    for path, weight in found.items():
        values = np.asarray(dequantize(weight, jnp.float32))
        np.testing.assert_array_equal(values, wanted[path], err_msg=path)
        off = np.linalg.norm(values - plain[path].astype(np.float32)) / np.linalg.norm(values)
        assert off < (0.15 if "4" in scheme else 0.04), path
        changed += off > 0
    assert changed >= 4


@pytest.mark.parametrize("scheme", ["fp8-dynamic", pytest.param("w4a16", marks=pytest.mark.slow)])
def test_quantized_model_generates(scheme: Scheme, tmp_path):
    write_model(tmp_path / "tiny", quantization=scheme)
    llm = LLM(tmp_path / "tiny", mesh="2", max_model_len=64, quiet=True)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    assert len(llm.generate("The sky", params)[0].outputs[0].token_ids) == 5


def test_written_bytes_are_deterministic(tmp_path):
    for name in "ab":
        write_model(tmp_path / name, quantization="w4a16", group_size=16)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_unsuitable_scheme_is_refused_and_leaves_no_files(tmp_path):
    with pytest.raises(ValueError, match="quantization is 'gptq': checkpoints are maverick-fp8, "):
        write_model(tmp_path / "x", quantization="gptq")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64 wide, which groups of 128 do not divide"):
        write_model(tmp_path / "x", quantization="w4a16", group_size=128)
    with pytest.raises(TypeError, match="group_size: only for a quantization"):
        write_model(tmp_path / "x", group_size=128)
    assert list(tmp_path.iterdir()) == []
