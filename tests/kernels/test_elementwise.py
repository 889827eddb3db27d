"""Row kernels, on rows that several warpgroups share and on short rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.kernels import formats, reference
from l4jax.kernels.hopper import elementwise, linear, moe
from l4jax.kernels.hopper.dispatch import Hopper
from l4jax.kernels.hopper.mosaic import THREADS
from l4jax.kernels.hopper.slot_assignment import assign_slots_in_kernel
from tests import tiers
from tests.kernels import laws

if jax.__version_info__ < (0, 12):
    pytest.skip("jax interprets the kernels from 0.12 on", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

INTERPRET = plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
WIDTHS = [128, 2048, 5120]
SIZES = [*((3, width) for width in WIDTHS), (70, 2048)]  # few rows and many have different tilings


def make_rows(*shape):
    """Make large and small rows; the last one is zero."""
    rng = np.random.default_rng(5)
    x = laws.make_tokens(rng, *shape) * 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    return x.astype(jnp.bfloat16).at[..., -1, :].set(0)


def assert_quantized(found, x32_SU, norm=None):
    """Compare with the definition; a value between two e4m3 values may round the other way.

    After a norm the sums have another order, and any scale is right for a row of zeros.
    """
    wanted, wanted_S = formats.quantize_tokens(x32_SU, (1,))
    data, scale_S = found
    counts_S = np.asarray(x32_SU).any(axis=1) | (norm is None)
    rtol = 1e-6 if norm is None else 1e-5
    np.testing.assert_allclose(scale_S[counts_S], wanted_S[counts_S], rtol=rtol)
    assert np.isfinite(scale_S).all()
    laws.assert_close(data.astype(jnp.float32), wanted.astype(jnp.float32), laws.BOUND["fp8"])


def define_norm(x_TU, norm):
    """Define the norm in float32: one launch rounds once less than two launches."""
    return reference.normalize(*laws.upcast((x_TU, norm)))


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_of_a_wide_row_equals_its_definition(size):
    x_TU, norm = make_rows(*size), reference.Norm(make_rows(2, size[1])[0], 1e-5)
    found = elementwise.normalize_rows(x_TU, norm, interpret=INTERPRET)
    laws.assert_close(found, reference.normalize(x_TU, norm), laws.BOUND["bfloat16"])


@pytest.mark.parametrize(("size", "has_shared"), tiers.pairs(SIZES, [False, True]))
def test_tokens_are_quantized_in_their_slots_as_by_definition(size, has_shared):
    x_TU, tokens = make_rows(*size), size[0]
    shared = tokens + 1 if has_shared else 0
    slot_T = shared + jnp.roll(2 * jnp.arange(tokens, dtype=jnp.int32), 1)
    options = {"slots": shared + 2 * tokens, "has_shared": has_shared, "interpret": INTERPRET}
    for norm in (None, reference.Norm(make_rows(2, size[1])[0], 1e-5)):
        x32_TU = define_norm(x_TU, norm)
        data_SU, scale_T = elementwise.quantize_rows(x_TU, norm, slot_T, **options)
        assert_quantized((data_SU[slot_T], scale_T), x32_TU, norm)
        if has_shared:
            assert_quantized((data_SU[:tokens], scale_T), x32_TU, norm)
        data_SU, scale_T = elementwise.quantize_rows(
            x_TU, norm, slots=tokens + 5, interpret=INTERPRET
        )
        assert_quantized((data_SU[:tokens], scale_T), x32_TU, norm)


@pytest.mark.parametrize("largest", [1e-37, 1e-36, 1e-30, 1e38])
def test_no_reciprocal_of_a_scale_is_infinite(largest):
    x_TU = jnp.full((1, 128), largest, jnp.bfloat16)
    (data,), (scale,) = elementwise.quantize_rows(x_TU, slots=1, interpret=INTERPRET)
    np.testing.assert_allclose(data.astype(jnp.float32) * scale, x_TU[0], rtol=0.07)


@pytest.mark.parametrize(("size", "is_quantized"), tiers.pairs(SIZES, [False, True]))
def test_wide_rows_are_activated_as_by_definition(size, is_quantized):
    slots, width = size
    parts_PSO, scale_O = make_rows(2, slots, 2 * width), jnp.linspace(0.1, 2.0, 2 * width)
    scale_T, gate_T = jnp.linspace(0.5, 3.0, slots), jnp.linspace(0.2, 0.9, slots)
    two, one = jnp.asarray([2, 0], jnp.int32), jnp.asarray([2], jnp.int32)

    def check(slot_S, factor_S, **case):
        slot_S = np.asarray(slot_S)
        case = {"is_quantized": is_quantized, "interpret": INTERPRET, **case}
        found = elementwise.activate_rows(parts_PSO, **case)
        sum_SO = parts_PSO.astype(jnp.float32).sum(0)[slot_S] * jnp.asarray(factor_S)[:, None]
        gate_SU, up_SU = jnp.split(sum_SO * case.get("scale_O", 1), 2, axis=1)
        wanted = (jax.nn.silu(gate_SU) * up_SU).astype(jnp.bfloat16)
        if is_quantized:
            assert_quantized([part[slot_S] for part in found], wanted)
        else:
            laws.assert_close(found[slot_S], wanted, laws.BOUND["bfloat16"])

    check(range(slots), scale_T, scale_T=scale_T)
    check(range(slots), scale_T, scale_T=scale_T, scale_O=scale_O)
    check([2, 0], scale_T[:2] * gate_T[:2], scale_T=scale_T[:2], gate_T=gate_T[:2], slot_T=two)
    check([2, 0], gate_T[:2], gate_T=gate_T[:2], slot_T=two)
    single = {
        "scale_T": scale_T[1:2],
        "gate_T": gate_T[1:2],
    }  # the gate applies in the token's own slot only
    gated = scale_T[1] * gate_T[1]
    check([0, 2], [scale_T[1], gated], **single, slot_T=one, has_shared=True)


@pytest.mark.parametrize(("experts", "shared_blocks"), [(5, 3), (16, 0)])
@pytest.mark.parametrize("tokens", [4, 20, pytest.param(136, marks=pytest.mark.slow)])
def test_one_launch_assigns_the_slots_of_the_definition(tokens, experts, shared_blocks):
    case = {"experts": experts, "shared_blocks": shared_blocks, "interpret": INTERPRET}
    laws.check_slots(assign_slots_in_kernel, tokens, **case)


def test_one_launch_keeps_the_token_order_of_the_definition():
    laws.check_order(assign_slots_in_kernel, 8, experts=5, shared_blocks=1, interpret=INTERPRET)


@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
@pytest.mark.parametrize(("width", "hidden"), [(256, 64), (64, 128), (256, 192), (256, 128)])
def test_each_thread_has_equally_many_elements_of_a_row(monkeypatch, form, width, hidden):
    # The interpreter takes any width; the compiler does not.
    def assert_even(kernel, parts):
        def run(x, *rest, **options):
            assert x.shape[-1] // parts % THREADS == 0
            return kernel(x, *rest, **options)

        return run

    for module, name, parts in (
        (moe, "activate_rows", 2),
        (linear, "quantize_rows", 1),
        (linear, "normalize_rows", 1),
    ):
        monkeypatch.setattr(module, name, assert_even(getattr(module, name), parts))
    rng = np.random.default_rng(0)
    up = laws.make_weight(rng, form, 2, 2, hidden, width)
    down = laws.make_weight(rng, form, 2, width, hidden)
    out = laws.make_weight(rng, form, 256, width)
    kernels, norm = Hopper(132, INTERPRET), laws.make_norm(rng, width)
    for tokens in (1, 64, 256):
        x_TD = laws.make_tokens(rng, tokens, width)
        expert_T = jnp.zeros(tokens, jnp.int32)
        y_TD = jax.eval_shape(kernels.run_experts, x_TD, norm, expert_T, up, down)
        assert y_TD.shape == x_TD.shape
        y_TV = jax.eval_shape(functools.partial(kernels.multiply, "TD,VD->TV"), x_TD, out)
        assert y_TV.shape == (tokens, 256)
