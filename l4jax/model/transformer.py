"""Decoder: embedding; residual layers of attention and feed-forward; the head."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from l4jax import axes
from l4jax.cache import Batch, PagePool, PageTables, make_pool
from l4jax.config import Config, TextConfig
from l4jax.kernels import Kernels
from l4jax.model.attention import Attention, Positions
from l4jax.model.layers import GatedMLP, RMSNorm, constrain, declare
from l4jax.model.moe import MixtureOfExperts
from l4jax.model.vision import VisionTower

Parameters = dict[str, Any]


@nn.jit  # layers of one kind are traced and lowered once, not once each
class Layer(nn.Module):
    """One decoder layer, with local or global attention and a dense or an expert block."""

    config: TextConfig
    is_nope: bool
    is_moe: bool
    kernels: Kernels

    @nn.compact
    def __call__(
        self,
        x_TD: Array,
        k_PKZH: Array,
        v_PKZH: Array,
        positions: Positions,
        scales: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        c = self.config
        attention = Attention(c, self.is_nope, self.kernels, name="attention")
        norm = RMSNorm(c.width, c.norm_eps, name="attention_norm")()
        y_TD, k_PKZH, v_PKZH = attention(x_TD, norm, k_PKZH, v_PKZH, positions, scales)
        x_TD = constrain(x_TD + y_TD, axes.TOKENS, axes.WIDTH)
        norm = RMSNorm(c.width, c.norm_eps, name="feed_forward_norm")()
        if self.is_moe:
            y_TD = MixtureOfExperts(c, self.kernels, name="feed_forward")(x_TD, norm)
        else:
            y_TD = GatedMLP(c.width, c.dense_width, self.kernels, name="feed_forward")(x_TD, norm)
        return constrain(x_TD + y_TD, axes.TOKENS, axes.WIDTH), k_PKZH, v_PKZH


class Llama4(nn.Module):
    """Text model over a flat list of tokens: prefill, decode and mixes are the same call."""

    config: TextConfig
    kernels: Kernels = Kernels()

    def setup(self) -> None:
        c = self.config
        names = (axes.VOCAB, axes.WIDTH)
        self.embedding_VD = declare(self, "embedding", (c.vocab, c.width), names)
        self.layers = [
            Layer(c, c.is_nope(i), c.is_moe(i), self.kernels, name=f"layer_{i}")
            for i in range(c.layers)
        ]
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.head_VD = declare(self, "head", (c.vocab, c.width), names)

    def __call__(
        self, batch: Batch, pool: PagePool, features_IND: Array | None = None
    ) -> tuple[Array, PagePool]:
        """Run the tokens of a step.

        Args:
            batch: the tokens and their tables.
            pool: keys and values of earlier tokens.
            features_IND: image features of each slot; `batch.feature_T` indexes all of them.

        Returns:
            [T, D] normed hidden states, for `compute_logits`; and the pool with the step's tokens.
        """
        x_TD = self.kernels.embed(batch.token_T, self.embedding_VD)
        x_TD = constrain(x_TD, axes.TOKENS, axes.WIDTH)
        if features_IND is not None and batch.feature_T is not None:
            features_MD = features_IND.reshape(-1, features_IND.shape[-1])
            is_image_T = batch.feature_T >= 0
            x_TD = jnp.where(
                is_image_T[:, None], features_MD[batch.feature_T].astype(x_TD.dtype), x_TD
            )
        k, v = list(pool.k), list(pool.v)
        for i, layer in enumerate(self.layers):
            repetition, group = divmod(i, self.config.nope_interval)
            positions = Positions.of(batch, self.config, group)
            x_TD, k[repetition], v[repetition] = layer(
                x_TD, k[repetition], v[repetition], positions, pool.find_scales(i)
            )
        x_TD = self.kernels.normalize(x_TD, self.norm())
        return x_TD, dataclasses.replace(pool, k=tuple(k), v=tuple(v))

    def compute_logits(self, x_RD: Array) -> Array:
        """Compute float32 logits [R, V] of hidden states [R, D]."""
        logits_RV = self.kernels.multiply("RD,VD->RV", x_RD, self.head_VD)
        return constrain(logits_RV.astype(jnp.float32), axes.ROWS, axes.VOCAB)


def declare_parameters(config: Config, dtype: Any) -> tuple[Parameters, Parameters]:
    """Declare every parameter of a model, without allocating one.

    Returns:
        A tree of `jax.ShapeDtypeStruct` in `dtype`, and the same tree of tuples of logical axis
        names. The top level is "text" and, for a model with vision, "vision".
    """
    text = config.text

    def initialize() -> Parameters:
        one, page = jnp.zeros(1, jnp.int32), 1
        tables = PageTables(
            jnp.zeros((1, 1), jnp.int32), jnp.zeros((text.nope_interval - 1, 1, 1), jnp.int32)
        )
        key = jax.random.key(0)

        def touch(model: Llama4) -> None:
            x_TD, _ = model(Batch(one, one, one, tables), make_pool(text, 1, page, jnp.float32))
            model.compute_logits(x_TD)

        trees = {"text": nn.init(touch, Llama4(text))(key)["params"]}
        if config.vision is not None:
            v = config.vision
            pixels = jnp.zeros((1, v.channels, v.tile, v.tile), jnp.float32)
            trees["vision"] = VisionTower(v, text.width).init(key, pixels)["params"]
        return trees

    boxed = jax.eval_shape(initialize)

    def map_boxes(change: Callable[[Any], Any]) -> Parameters:
        return jax.tree.map(change, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))

    shapes = map_boxes(lambda x: jax.ShapeDtypeStruct(x.value.shape, dtype))
    return shapes, map_boxes(lambda x: x.names)
