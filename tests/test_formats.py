"""Quantized weights: their values, and the error of a product with one."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from l4jax.kernels import reference
from l4jax.kernels.formats import Quantized, dequantize, multiply, quantize_tokens

E4M3 = ml_dtypes.float8_e4m3fn


def make_fp8(rng, shape: tuple[int, ...]) -> Quantized:
    w = rng.standard_normal(shape).astype(np.float32)
    scale = np.abs(w).max(-1) / 448
    return Quantized(jnp.asarray((w / scale[..., None]).astype(E4M3)), jnp.asarray(scale))


def make_int4(rng, shape: tuple[int, ...], group: int) -> Quantized:
    data = rng.integers(-8, 8, shape).astype(ml_dtypes.int4)
    scale = rng.uniform(0.01, 0.1, (*shape[:-1], shape[-1] // group)).astype(np.float32)
    return Quantized(jnp.asarray(data), jnp.asarray(scale))


def test_a_weight_is_its_data_times_its_scale():
    rng = np.random.default_rng(0)
    fp8, int4 = make_fp8(rng, (3, 5, 8)), make_int4(rng, (3, 5, 8), 4)
    wanted = np.asarray(fp8.data).astype(np.float32) * np.asarray(fp8.scale)[..., None]
    np.testing.assert_array_equal(dequantize(fp8, jnp.float32), wanted)
    wanted = np.asarray(int4.data).astype(np.float32) * np.repeat(np.asarray(int4.scale), 4, -1)
    np.testing.assert_array_equal(dequantize(int4, jnp.float32), wanted)
    plain = jnp.ones((2, 3), jnp.bfloat16)
    np.testing.assert_array_equal(dequantize(plain, jnp.bfloat16), plain)


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "w_shape"),
    [
        ("TD,VD->TV", (7, 32), (9, 32)),
        ("TD,KJHD->TKJH", (7, 32), (2, 4, 8, 32)),
        ("TKGH,DKGH->TD", (7, 2, 3, 16), (9, 2, 3, 16)),
        ("ETD,EcFD->EcTF", (4, 7, 32), (4, 2, 5, 32)),
        ("ETF,EDF->ETD", (4, 7, 32), (4, 5, 32)),
    ],
)
def test_a_product_is_that_of_the_dequantized_weight(subscripts, x_shape, w_shape):
    """int4 is exact, and so is fp8 with activations quantized per token.

    Without that quantization fp8 stays within half a step of e4m3's 3 bits: 2 ** -4 of each term.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal(x_shape).astype(np.float32)
    int4 = make_int4(rng, w_shape, 8)
    wanted = np.einsum(subscripts, x, np.asarray(dequantize(int4, jnp.float32)))
    np.testing.assert_allclose(multiply(subscripts, x, int4), wanted, rtol=1e-5, atol=1e-5)

    last = w_shape[:1] if subscripts.startswith("TKGH") else w_shape[:-1]
    flat = make_fp8(rng, (*last, int(np.prod(w_shape[len(last) :]))))
    fp8 = Quantized(flat.data.reshape(w_shape), flat.scale)
    w = np.asarray(dequantize(fp8, jnp.float32))
    found = np.asarray(multiply(subscripts, x, fp8))
    summed = (1, 2, 3) if len(x_shape) == 4 else (-1,)
    scale = np.abs(x).max(axis=summed, keepdims=True) / 448
    rounded = (x / scale).astype(E4M3).astype(np.float32) * scale
    np.testing.assert_allclose(found, np.einsum(subscripts, rounded, w), rtol=1e-4, atol=1e-4)
    bound = np.einsum(subscripts, np.abs(x), np.abs(w)) * 2**-4
    assert (np.abs(found - np.einsum(subscripts, x, w)) <= bound + 1e-4).all()


def test_tokens_are_scaled_one_by_one_and_zeros_stay_zeros():
    x_TD = jnp.array([[1.0, -2.0], [448.0, 3.0], [0.0, 0.0], [1e30, 1.0]])
    fp8_TD, scale_T = quantize_tokens(x_TD, (1,))
    np.testing.assert_allclose(scale_T, [2 / 448, 1, 1, 1e30 / 448], rtol=1e-6)
    assert fp8_TD.dtype == jnp.float8_e4m3fn
    assert np.isfinite(fp8_TD.astype(jnp.float32)).all()
    np.testing.assert_array_equal(fp8_TD[2].astype(jnp.float32), [0, 0])


@pytest.mark.parametrize("make", ["fp8", "int4"])
def test_experts_run_in_every_format(make):
    rng = np.random.default_rng(2)
    T, D, F, E = 9, 16, 24, 4
    up, down = (
        make_fp8(rng, shape) if make == "fp8" else make_int4(rng, shape, 8)
        for shape in ((E, 2, F, D), (E, D, F))
    )
    x_TD = jnp.asarray(rng.standard_normal((T, D)), jnp.float32)
    expert_T = jnp.asarray(rng.integers(0, E, T))
    found = reference.run_experts(x_TD, None, expert_T, up, down)
    plain = [dequantize(weight, jnp.float32) for weight in (up, down)]
    wanted = reference.run_experts(x_TD, None, expert_T, *plain)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < (0.05 if make == "fp8" else 1e-6)


def test_int4_takes_half_a_byte_on_the_device():
    """Compare with a compiled program's argument size: `.nbytes` counts a byte per element."""
    data = jnp.zeros((64, 128), jnp.int4)
    weight = Quantized(data, jnp.ones((64, 1)))
    compiled = jax.jit(lambda w: dequantize(w, jnp.float32)).lower(weight).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == 64 * 128 // 2 + 64 * 4
