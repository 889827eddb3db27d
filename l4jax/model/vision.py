"""Vision tower: from pixel tiles to features of the text model's embedding width."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from l4jax import axes
from l4jax.config import VisionConfig
from l4jax.kernels import REFERENCE, Kernels
from l4jax.kernels.reference import rotate
from l4jax.model.layers import LayerNorm, constrain, declare, project
from l4jax.model.rope import scale_frequencies


class VisionTower(nn.Module):
    """Encoder, pixel shuffle, adapter and projector."""

    config: VisionConfig
    text_width: int
    kernels: Kernels = REFERENCE

    @nn.compact
    def __call__(self, pixels_ICYX: Array) -> Array:
        """Encode tiles.

        Args:
            pixels_ICYX: [tiles, channels, tile, tile], normalized, in the compute dtype.

        Returns:
            [tiles, features, text width]: 144 features a tile in the published models.
        """
        c = self.config
        patch_WU = declare(
            self, "patch", (c.width, c.channels * c.patch**2), (axes.VISION_WIDTH, axes.PATCH)
        )
        class_W = declare(self, "class_embedding", (c.width,), (axes.VISION_WIDTH,))
        position_NW = declare(
            self, "position_embedding", (c.patches + 1, c.width), (axes.PATCHES, axes.VISION_WIDTH)
        )
        x_INW = project("INU,WU->INW", cut_patches(pixels_ICYX, c.patch), patch_WU)
        # The class embedding comes last, after the patches.
        class_I1W = jnp.broadcast_to(class_W, (x_INW.shape[0], 1, c.width))
        x_INW = jnp.concatenate([x_INW, class_I1W], axis=1) + position_NW
        x_INW = LayerNorm(c.norm_eps, name="norm_before")(x_INW)
        for i in range(c.layers):
            x_INW = VisionLayer(c, self.kernels, name=f"layer_{i}")(x_INW)
        x_INW = LayerNorm(c.norm_eps, name="norm_after")(x_INW)
        y_IND = Adapter(c, name="adapter")(x_INW[:, :-1])
        projector_DA = declare(
            self, "projector", (self.text_width, c.adapter_width), (axes.WIDTH, axes.ADAPTER_WIDTH)
        )
        return constrain(
            project("INA,DA->IND", y_IND, projector_DA), axes.TILES, axes.FEATURES, axes.WIDTH
        )


class VisionLayer(nn.Module):
    """Full attention with 2-D RoPE and an MLP, both pre-norm, with biases throughout."""

    config: VisionConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x_INW: Array) -> Array:
        c = self.config
        y_INW = LayerNorm(c.norm_eps, name="attention_norm")(x_INW)
        x_INW = x_INW + self.attend(y_INW)
        y_INW = LayerNorm(c.norm_eps, name="mlp_norm")(x_INW)
        up_FW = declare(self, "up", (c.hidden, c.width), (axes.VISION_HIDDEN, axes.VISION_WIDTH))
        up_bias_F = declare(self, "up_bias", (c.hidden,), (axes.VISION_HIDDEN,))
        down_WF = declare(
            self, "down", (c.width, c.hidden), (axes.VISION_WIDTH, axes.VISION_HIDDEN)
        )
        down_bias_W = declare(self, "down_bias", (c.width,), (axes.VISION_WIDTH,))
        hidden_INF = jax.nn.gelu(
            project("INW,FW->INF", y_INW, up_FW) + up_bias_F, approximate=False
        )
        return x_INW + project("INF,WF->INW", hidden_INF, down_WF) + down_bias_W

    def attend(self, x_INW: Array) -> Array:
        """Attend from every patch to every patch of its tile."""
        c = self.config
        head_dim = c.width // c.heads
        heads = (axes.VISION_HEADS, axes.VISION_HEAD_DIM)
        shape = (3, c.heads, head_dim)
        qkv_jNHW = declare(self, "qkv", (*shape, c.width), (axes.QKV, *heads, axes.VISION_WIDTH))
        bias_jNH = declare(self, "qkv_bias", shape, (axes.QKV, *heads))
        out_WNH = declare(self, "out", (c.width, *shape[1:]), (axes.VISION_WIDTH, *heads))
        out_bias_W = declare(self, "out_bias", (c.width,), (axes.VISION_WIDTH,))
        qkv_jIPNH = project("IPW,jNHW->jIPNH", x_INW, qkv_jNHW) + bias_jNH[:, None, None]
        q_IPNH, k_IPNH = rotate(qkv_jIPNH[:2], compute_grid_angles(c)[:, None])
        y_IPNH = self.kernels.attend_all(q_IPNH, k_IPNH, qkv_jIPNH[2])
        return project("IPNH,WNH->IPW", y_IPNH, out_WNH) + out_bias_W


class Adapter(nn.Module):
    """Pixel shuffle of four neighboring patches to one feature, then two matrices with GELU."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_INW: Array) -> Array:
        c = self.config
        inside = c.width * c.shuffle**2
        first_AU = declare(
            self, "first", (c.adapter_width, inside), (axes.ADAPTER_HIDDEN, axes.ADAPTER_INPUT)
        )
        second_BA = declare(
            self,
            "second",
            (c.adapter_width, c.adapter_width),
            (axes.ADAPTER_WIDTH, axes.ADAPTER_HIDDEN),
        )
        y_INU = shuffle_pixels(x_INW, c.grid, c.shuffle)
        y_INA = jax.nn.gelu(project("INU,AU->INA", y_INU, first_AU), approximate=False)
        return jax.nn.gelu(project("INA,BA->INB", y_INA, second_BA), approximate=False)


def cut_patches(pixels_ICYX: Array, patch: int) -> Array:
    """Cut pixels [I, C, Y, X] to [I, patches, C * patch * patch], by row, as (channel, y, x)."""
    tiles, channels, height, width = pixels_ICYX.shape
    grid = pixels_ICYX.reshape(tiles, channels, height // patch, patch, width // patch, patch)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(tiles, -1, channels * patch * patch)


def shuffle_pixels(x_INW: Array, grid: int, shuffle: int) -> Array:
    """Merge [I, grid * grid, W] to [I, fewer, shuffle * shuffle * W], as (y, x, channel)."""
    tiles, _, width = x_INW.shape
    coarse = grid // shuffle
    blocks = x_INW.reshape(tiles, coarse, shuffle, coarse, shuffle, width)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(
        tiles, coarse * coarse, shuffle * shuffle * width
    )


def compute_grid_angles(config: VisionConfig) -> np.ndarray:
    """Compute angles of 2-D RoPE, [patches + 1, head_dim / 2]: x in half of a head, y in the other.

    Positions count from 1. The class embedding, last, has angle 0.
    """
    head_dim = config.width // config.heads
    frequency_H = scale_frequencies(head_dim // 2, config.rope_theta, None)
    y_N, x_N = np.divmod(np.arange(config.patches), config.grid)
    angle_NH = np.concatenate(
        [(x_N + 1)[:, None] * frequency_H, (y_N + 1)[:, None] * frequency_H], axis=1
    )
    return np.concatenate([angle_NH, np.zeros((1, head_dim // 2))]).astype(np.float32)
