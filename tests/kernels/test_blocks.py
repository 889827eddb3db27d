"""What the kernel over blocks does on a GPU only, where the interpreter does plain arithmetic."""

import jax.numpy as jnp
import numpy as np

from l4jax.kernels.blocks import GROUP, permute_columns


def test_words_of_int4_are_widened_in_the_order_of_permuted_columns():
    row_U = np.random.default_rng(0).integers(-8, 8, GROUP)
    low, high = row_U[0::2] & 15, row_U[1::2] & 15
    words_tw = (low | high << 4).astype(np.uint8).view("<u4").reshape(4, 4)
    pairs_wpt = np.stack([words_tw.T >> 4 * place for place in range(4)], axis=1) & 0x000F000F
    wide = np.ascontiguousarray(pairs_wpt ^ 0x43084308).astype("<u4").view(jnp.bfloat16)
    wanted = permute_columns(jnp.asarray(row_U[None], jnp.float32))
    np.testing.assert_array_equal(wide.reshape(1, GROUP).astype(np.float32) - 136, wanted)
