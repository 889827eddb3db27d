"""Adapters with random factors, none of them zero."""

import math
import re

import jax.numpy as jnp
import numpy as np

from l4jax.checkpoint import Adapter
from l4jax.checkpoint.adapter import shape_factors
from l4jax.checkpoint.parameters import flatten
from l4jax.config import Config
from l4jax.model import declare_parameters

TEXT = r"text/layer_\d+/(attention|feed_forward)/(?!router).*"


def make_adapter(config: Config, pattern: str = TEXT, *, rank: int = 3, seed: int = 0) -> Adapter:
    """Make an adapter of all matrices whose path matches a pattern; alpha is 2 * rank."""
    rng = np.random.default_rng(seed)
    factors = {}
    for path, leaf in flatten(declare_parameters(config, jnp.float32)[0]).items():
        shapes = shape_factors(path, leaf.shape, rank)
        if shapes is not None and re.fullmatch(pattern, path):
            first, second = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
            size = math.prod(shapes[0][len(shapes[1]) :])  # inputs of the matrix
            factors[path] = {"first": first * size**-0.5, "second": 0.3 * second}
    return Adapter(rank, 2.0 * rank, factors)
