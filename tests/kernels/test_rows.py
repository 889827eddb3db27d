"""Rows as wide as those that several warpgroups share, and as small ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.kernels import formats, reference, rows
from l4jax.kernels.slots import assign_at_once
from tests import tiers
from tests.kernels import laws

if jax.__version_info__ < (0, 12):
    pytest.skip("jax interprets the kernels from 0.12 on", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

INTERPRET = plgpu.InterpretGPUParams()
WIDTHS = [128, 2048, 5120]
SIZES = [*((3, width) for width in WIDTHS), (70, 2048)]  # few rows and many are cut differently


def make_rows(*shape):
    """Large and small ones, of which the last is zero."""
    rng = np.random.default_rng(5)
    x = laws.make_tokens(rng, *shape) * 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    return x.astype(jnp.bfloat16).at[..., -1, :].set(0)


def assert_rounded(found, wide_SU, norm=None):
    """As the definition rounds: what lies between two values may go the other way. Behind a norm
    sums are in another order, and of a row of zeros any scale is right."""
    wanted, wanted_S = formats.quantize_tokens(wide_SU, (1,))
    data, scale_S = found
    counts_S = np.asarray(wide_SU).any(axis=1) | (norm is None)
    rtol = 1e-6 if norm is None else 1e-5
    np.testing.assert_allclose(scale_S[counts_S], wanted_S[counts_S], rtol=rtol)
    assert np.isfinite(scale_S).all()
    laws.assert_close(data.astype(jnp.float32), wanted.astype(jnp.float32), laws.BOUND["fp8"])


def define_norm(x_TU, norm):
    """In float32: what is rounded in between is rounded once less than by two launches."""
    return reference.normalize(*laws.widen((x_TU, norm)))


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_of_a_wide_row_equals_its_definition(size):
    x_TU, norm = make_rows(*size), reference.Norm(make_rows(2, size[1])[0], 1e-5)
    found = rows.normalize_rows(x_TU, norm, interpret=INTERPRET)
    laws.assert_close(found, reference.normalize(x_TU, norm), laws.BOUND["bfloat16"])


@pytest.mark.parametrize(("size", "has_leading"), tiers.pairs(SIZES, [False, True]))
def test_tokens_are_rounded_in_their_slots_as_their_definition(size, has_leading):
    x_TU, tokens = make_rows(*size), size[0]
    leading = tokens + 1 if has_leading else 0
    slot_T = leading + jnp.roll(2 * jnp.arange(tokens, dtype=jnp.int32), 1)
    places = {"slots": leading + 2 * tokens, "has_leading": has_leading, "interpret": INTERPRET}
    for norm in (None, reference.Norm(make_rows(2, size[1])[0], 1e-5)):
        wide_TU = define_norm(x_TU, norm)
        data_SU, scale_T = rows.round_rows(x_TU, norm, slot_T, **places)
        assert_rounded((data_SU[slot_T], scale_T), wide_TU, norm)
        if has_leading:
            assert_rounded((data_SU[:tokens], scale_T), wide_TU, norm)
        data_SU, scale_T = rows.round_rows(x_TU, norm, slots=tokens + 5, interpret=INTERPRET)
        assert_rounded((data_SU[:tokens], scale_T), wide_TU, norm)


@pytest.mark.parametrize("largest", [1e-37, 1e-36, 1e-30, 1e38])
def test_no_reciprocal_of_a_scale_is_infinite(largest):
    x_TU = jnp.full((1, 128), largest, jnp.bfloat16)
    (data,), (scale,) = rows.round_rows(x_TU, slots=1, interpret=INTERPRET)
    np.testing.assert_allclose(data.astype(jnp.float32) * scale, x_TU[0], rtol=0.07)


@pytest.mark.parametrize(("size", "is_rounded"), tiers.pairs(SIZES, [False, True]))
def test_wide_rows_are_activated_as_their_definition(size, is_rounded):
    slots, width = size
    parts_PSO, scale_O = make_rows(2, slots, 2 * width), jnp.linspace(0.1, 2.0, 2 * width)
    scale_T, gate_T = jnp.linspace(0.5, 3.0, slots), jnp.linspace(0.2, 0.9, slots)
    two, one = jnp.asarray([2, 0], jnp.int32), jnp.asarray([2], jnp.int32)

    def check(slot_S, factor_S, **case):
        slot_S = np.asarray(slot_S)
        case = {"is_rounded": is_rounded, "interpret": INTERPRET, **case}
        found = rows.activate_rows(parts_PSO, **case)
        sum_SO = parts_PSO.astype(jnp.float32).sum(0)[slot_S] * jnp.asarray(factor_S)[:, None]
        gate_SU, up_SU = jnp.split(sum_SO * case.get("scale_O", 1), 2, axis=1)
        wanted = (jax.nn.silu(gate_SU) * up_SU).astype(jnp.bfloat16)
        if is_rounded:
            assert_rounded([part[slot_S] for part in found], wanted)
        else:
            laws.assert_close(found[slot_S], wanted, laws.BOUND["bfloat16"])

    check(range(slots), scale_T, scale_T=scale_T)
    check(range(slots), scale_T, scale_T=scale_T, scale_O=scale_O)
    check([2, 0], scale_T[:2] * gate_T[:2], scale_T=scale_T[:2], gate_T=gate_T[:2], slot_T=two)
    check([2, 0], gate_T[:2], gate_T=gate_T[:2], slot_T=two)
    alone = {"scale_T": scale_T[1:2], "gate_T": gate_T[1:2]}  # times the gate in its slot only
    gated = scale_T[1] * gate_T[1]
    check([0, 2], [scale_T[1], gated], **alone, slot_T=one, has_leading=True)


@pytest.mark.parametrize(("experts", "leading"), [(5, 3), (16, 0)])
@pytest.mark.parametrize("tokens", [4, 20, pytest.param(136, marks=pytest.mark.slow)])
def test_in_one_launch_tokens_go_where_the_definition_puts_them(tokens, experts, leading):
    case = {"experts": experts, "leading": leading, "interpret": INTERPRET}
    laws.check_slots(assign_at_once, tokens, **case)


def test_in_one_launch_tokens_keep_their_order_as_the_definition_does():
    laws.check_order(assign_at_once, 8, experts=5, leading=1, interpret=INTERPRET)
