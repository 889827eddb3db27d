"""int4 dequantization as a GPU does it: the interpreter does plain arithmetic instead."""

import jax.numpy as jnp
import numpy as np

from l4jax.config import INT4_GROUP
from l4jax.kernels.hopper.int4 import permute_columns


def test_int4_words_dequantize_in_the_order_of_permuted_columns():
    row_U = np.random.default_rng(0).integers(-8, 8, INT4_GROUP)
    low, high = row_U[0::2] & 15, row_U[1::2] & 15
    words_tw = (low | high << 4).astype(np.uint8).view("<u4").reshape(4, 4)
    pairs_wpt = np.stack([words_tw.T >> 4 * place for place in range(4)], axis=1) & 0x000F000F
    dequantized = np.ascontiguousarray(pairs_wpt ^ 0x43084308).astype("<u4").view(jnp.bfloat16)
    wanted = permute_columns(jnp.asarray(row_U[None], jnp.float32))
    np.testing.assert_array_equal(
        dequantized.reshape(1, INT4_GROUP).astype(np.float32) - 136, wanted
    )
