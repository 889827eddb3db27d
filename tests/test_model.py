"""The model equals the reference for every split of a prompt; compared with goldens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import cache
from l4jax.config import MAVERICK, SCOUT, RopeScaling
from l4jax.kernels import PORTABLE, REFERENCE
from l4jax.kernels.reference import rotate
from l4jax.model import declare_parameters
from l4jax.model.attention import Attention, Positions, compute_temperature
from l4jax.model.rope import compute_angles, scale_frequencies
from tests import models, tiers, weights

TOLERANCE = 1e-4  # of the logits' scale


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error <= TOLERANCE, f"off by {error:.2e} of the largest value"


@functools.cache
def find_features(name: str) -> np.ndarray | None:
    tiny, golden = models.load_golden(name)
    return None if golden.pixels is None else tiny.encode(golden.pixels)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *(pytest.param(name, PORTABLE, id=f"{name}-portable") for name in weights.GOLDENS),
        pytest.param("scout-8-image", REFERENCE, id="scout-8-image-reference"),
        pytest.param("maverick-32-image", REFERENCE, id="maverick-32-image-reference"),
    ],
)
def test_prefill_at_once_equals_the_reference(name, kernels):
    tiny, golden = models.load_golden(name)
    features = find_features(name)
    logits = models.run_in_pieces(tiny, golden.ids, [], kernels, features)
    assert_close(logits[golden.rows], golden.logits)


@pytest.mark.parametrize(("name", "cut"), tiers.pairs(weights.GOLDENS, [-2, -1, 0, 1]))
def test_prefill_split_around_every_boundary_equals_the_reference(name, cut):
    tiny, golden = models.load_golden(name)
    chunk = tiny.config.text.chunk
    cuts = [boundary + cut for boundary in range(chunk, len(golden.ids), chunk)]
    features = find_features(name)
    logits = models.run_in_pieces(tiny, golden.ids, cuts, features_MD=features)
    assert_close(logits[golden.rows], golden.logits)


@pytest.mark.parametrize("name", tiers.every(2, weights.GOLDENS[::-1]))
def test_prefill_then_decode_equals_one_forward(name):
    """One token at a time from the last token of the first chunk on, across the boundaries."""
    tiny, golden = models.load_golden(name)
    start = tiny.config.text.chunk - 1
    features = find_features(name)
    cuts = list(range(start, len(golden.ids)))
    logits = models.run_in_pieces(tiny, golden.ids, cuts, features_MD=features)
    assert_close(logits[golden.rows], golden.logits)


@pytest.mark.parametrize("name", [n for n in weights.GOLDENS if n.endswith("image")])
def test_image_features_equal_the_reference(name):
    tiny, golden = models.load_golden(name)
    assert golden.pixels is not None and golden.image_features is not None
    assert_close(tiny.encode(golden.pixels), golden.image_features)


def test_an_image_lies_across_a_chunk_boundary_in_the_goldens():
    for name in weights.GOLDENS:
        tiny, golden = models.load_golden(name)
        if golden.pixels is not None:
            at = np.flatnonzero(golden.ids == tiny.config.patch_id)
            tiles = at.reshape(len(golden.pixels), -1)
            chunks = tiles // tiny.config.text.chunk
            assert (chunks.min(axis=1) != chunks.max(axis=1)).any(), name


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(SCOUT, 108_641_793_536), (MAVERICK, 401_583_781_376)],
    ids=["scout", "maverick"],
)
def test_the_published_models_have_their_published_size(config, parameters):
    shapes, names = declare_parameters(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    named = jax.tree.leaves(names, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert [leaf.ndim for leaf in jax.tree.leaves(shapes)] == [len(names) for names in named]


def test_rope_scaling_keeps_short_wavelengths_and_divides_long_ones():
    """With Scout's factors, low == high == 1, the blend between them would be 0 / 0."""
    plain = scale_frequencies(128, 500000.0, None)
    scaled = scale_frequencies(128, 500000.0, SCOUT.text.rope_scaling)
    is_short = 2 * np.pi / plain < 8192
    assert is_short.any() and not is_short.all()
    np.testing.assert_array_equal(scaled[is_short], plain[is_short])
    np.testing.assert_allclose(scaled[~is_short], plain[~is_short] / 16, rtol=1e-6)


def test_rope_scaling_blends_between_two_factors():
    scaled = scale_frequencies(128, 500000.0, RopeScaling(8.0, 1.0, 4.0, 8192))
    plain = scale_frequencies(128, 500000.0, None)
    rotations = 8192 * plain.astype(np.float64) / (2 * np.pi)
    between = (rotations > 1) & (rotations < 4)
    assert between.any()
    smooth = (rotations[between] - 1) / 3
    wanted = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    np.testing.assert_allclose(scaled[between], wanted, rtol=1e-5)


@pytest.mark.parametrize("position", [1_000_003, 9_999_999])
def test_positions_within_the_chunk_give_the_exact_scores_at_any_length(position):
    """Compared with float64 at absolute positions; float32 at absolute positions is far off."""
    rng = np.random.default_rng(0)
    q_H, k_H = rng.standard_normal((2, 128))
    frequency_H = scale_frequencies(128, 500000.0, SCOUT.text.rope_scaling)
    back = 100  # both in one chunk

    def score(at_q: float, at_k: float, kind: type) -> float:
        def rotate_head(x_H: np.ndarray, at: float) -> Any:
            angle_H = kind(at) * frequency_H.astype(kind)
            return (x_H[::2] + 1j * x_H[1::2]) * np.exp(1j * angle_H)

        return float((rotate_head(q_H, at_q) * rotate_head(k_H, at_k).conj()).real.sum())

    assert position // 8192 == (position - back) // 8192
    exact = score(position, position - back, np.float64)
    within = jnp.array([position % 8192, (position - back) % 8192])
    rotated = rotate(jnp.array([q_H, k_H], jnp.float32), compute_angles(within, frequency_H))
    ours = float(rotated[0] @ rotated[1])
    scale = np.linalg.norm(q_H) * np.linalg.norm(k_H)
    assert abs(ours - exact) / scale < 1e-5
    assert abs(score(position, position - back, np.float32) - exact) / scale > 1e-4


def test_a_local_layer_computes_the_same_in_every_chunk():
    """Bit for bit at any distance: its only input is the position within the chunk."""
    tiny, _ = models.load_golden("scout-8-text")
    text, rng = tiny.config.text, np.random.default_rng(0)
    module: Any = Attention(text, False, PORTABLE)
    params = tiny.params["text"]["layer_0"]["attention"]
    x_TD = rng.standard_normal((text.chunk, text.width)).astype(np.float32)
    pool = cache.make_pool(text, 2, 4, jnp.float32)
    found = []
    for start in (0, text.chunk, 1_250_000 * text.chunk):
        at_T = np.arange(start, start + text.chunk, dtype=np.int32)
        tables = cache.PageTables(np.zeros((1, 1), np.int32), np.array([[[1, 0]]] * 3, np.int32))
        batch = cache.Batch(np.zeros_like(at_T), at_T, np.zeros_like(at_T), tables)
        positions = Positions.of(batch, text, 0)
        y_TD, _, _ = module.apply({"params": params}, x_TD, None, pool.k[0], pool.v[0], positions)
        found.append(np.asarray(y_TD))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_temperature_is_one_up_to_the_last_position_of_the_first_interval():
    found = compute_temperature(jnp.array([0, 8190, 8191, 16382, 16383]), 8192, 0.1)
    wanted = 1 + 0.1 * np.log1p(np.array([0, 0, 1, 1, 2]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
