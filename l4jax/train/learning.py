"""What training computes: the loss of a batch, and the step that makes it smaller."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from l4jax import axes
from l4jax.cache import Batch, PageTables
from l4jax.config import Config, TextConfig
from l4jax.kernels import Kernels
from l4jax.model import Llama4, Parameters, VisionTower, declare_parameters
from l4jax.train.batches import Packed
from l4jax.train.documents import KINDS
from l4jax.train.kernels import make_no_pool, make_training_kernels

jax.tree_util.register_dataclass(Packed)
_TOKENS = (axes.TOKENS,)
# Runs are looked up by every token of the batch: each device has all of them.
PACKED_AXES = Packed(
    *(_TOKENS, _TOKENS, _TOKENS, (axes.LIST, axes.TABLE), _TOKENS, _TOKENS, _TOKENS, _TOKENS),
    tiles_ICYX=(axes.TILES, axes.CHANNELS, axes.PIXELS_Y, axes.PIXELS_X),
)


@dataclasses.dataclass(frozen=True)
class Teaching:
    """How a model learns.

    Attributes:
        rate: the largest learning rate, after `warmup` steps; a cosine takes it to a hundredth.
        warmup, steps: of the whole training.
        decay: of weights, matrices alone.
        clip: the largest norm of all gradients.
        balance: weight of the experts' load balancing in the loss.
        dtype: of the forward and backward pass; weights and sums of them are float32.
        attention: what computes it, "xla" or on a GPU "cudnn".
    """

    steps: int
    rate: float = 8e-4
    warmup: int = 1000
    decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.02
    dtype: str = "bfloat16"
    attention: str = "xla"

    def make_schedule(self) -> optax.Schedule:
        """Steps to learning rate."""
        warmup = min(self.warmup, self.steps // 2)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.rate, warmup, self.steps, end_value=self.rate / 100
        )

    def make_optimizer(self) -> optax.GradientTransformation:
        """AdamW behind clipping."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                self.make_schedule(),
                b1=0.9,
                b2=0.98,
                weight_decay=self.decay,
                mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
            ),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learned:
    """What training has come to: float32 weights, the optimizer's state, steps done."""

    params: Parameters
    moments: Any
    step: Array  # int32


def initialize(config: Config, teaching: Teaching, seed: int) -> Learned:
    """Random weights, on one device or wherever jit places them."""
    shapes, _ = declare_parameters(config, jnp.float32)
    depth = 2 * config.text.layers

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        name = "/".join(key.key for key in path)
        if name.endswith("/scale"):
            return jnp.ones(leaf.shape)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        size = find_size(name, leaf.shape, depth)
        weight = size * jax.random.truncated_normal(key, -2, 2, leaf.shape)
        # White paper is 1 in every pixel. Patches of it begin as nothing, so that ink stands out.
        return weight - weight.mean(-1, keepdims=True) if name == "vision/patch" else weight

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    moments = teaching.make_optimizer().init(params)
    return Learned(params, moments, jnp.int32(0))


def find_size(name: str, shape: tuple[int, ...], depth: int) -> float:
    """The deviation of a weight's first numbers: what passes through keeps its size.

    What is added to the residual stream is smaller, since there are `depth` such sums.
    """
    if name.endswith("embedding"):
        # Of vision, beside patches whose numbers are near 1: what is drawn looks alike anywhere.
        # With 0.5 nothing was read of what 0.02 reads.
        return 0.02 if name.startswith("vision/") else 0.1
    # Weights end in what they sum over; attention's output sums over heads too.
    summed = int(np.prod(shape[1:])) if name.endswith("/out") else shape[-1]
    is_added = name.endswith(("/out", "/down"))
    return summed**-0.5 * (depth**-0.5 if is_added else 1.0)


def find_loss(
    params: Parameters,
    packed: Packed,
    config: Config,
    teaching: Teaching,
    levels_C256: np.ndarray,
    kernels: Kernels | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the tokens that are learned, and load balancing.

    Args:
        params: float32; they are computed with in `teaching.dtype`.
        packed: the batch.
        config, teaching: static.
        levels_C256: the normalized value of every level of each channel, as the image processor
            has it.
        kernels: in place of those of `make_training_kernels` for the model's own chunk.

    Returns:
        The loss; and what to note of it: the parts of it, the share of answers' tokens that are
        the likeliest, of all and of each of `documents.KINDS` that has any, and how many tokens
        each expert of each layer got, [layers, E].
    """
    dtype = jnp.dtype(teaching.dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    kernels = kernels or make_training_kernels(config.text.chunk, teaching.attention)
    features_MD = None
    if config.vision is not None and len(packed.tiles_ICYX):
        pixels_ICYX = jnp.stack(
            [
                jnp.asarray(level_256, dtype)[packed.tiles_ICYX[:, channel]]
                for channel, level_256 in enumerate(levels_C256)
            ],
            axis=1,
        )
        tower = VisionTower(config.vision, config.text.width, kernels)
        features_IND = tower.apply({"params": params["vision"]}, pixels_ICYX)
        features_MD = features_IND.reshape(-1, config.text.width)  # type: ignore[union-attr]
    model = Llama4(config.text, kernels)
    variables = {"params": params["text"]}
    batch = make_step(packed, config.text)
    (x_TD, _), kept = model.apply(
        variables, batch, make_no_pool(config.text), features_MD, mutable=["intermediates"]
    )
    logits_TV: Any = model.apply(variables, x_TD, method="compute_logits")
    loss_T = optax.softmax_cross_entropy_with_integer_labels(logits_TV, packed.target_T)
    total = jnp.maximum(packed.weight_T.sum(), 1.0)
    words = (loss_T * packed.weight_T).sum() / total
    is_answer_T = packed.weight_T == 1
    is_right_T = logits_TV.argmax(-1) == packed.target_T
    is_kind_KT = packed.kind_T == jnp.arange(len(KINDS))[:, None]
    answers_K = (is_kind_KT & is_answer_T).sum(-1)
    right_K = (is_kind_KT & is_answer_T & is_right_T).sum(-1)
    right = (is_answer_T & is_right_T).sum() / jnp.maximum(is_answer_T.sum(), 1)
    scores = find_scores(kept["intermediates"])
    is_real_T = packed.position_T >= 0
    balances, loads = zip(*(balance(score_TE, is_real_T) for score_TE in scores), strict=True)
    uneven = jnp.stack(balances).mean()
    notes = {"words": words, "right": right, "balance": uneven, "load_LE": jnp.stack(loads)}
    is_seen_T = (packed.feature_T >= 0) & (packed.weight_T > 0)
    notes["right_seen"] = (is_seen_T & is_right_T).sum() / is_seen_T.sum()
    notes |= {f"right_{kind}": right_K[k] / answers_K[k] for k, kind in enumerate(KINDS)}
    return words + teaching.balance * uneven, notes


def make_step(packed: Packed, config: TextConfig) -> Batch:
    """The batch as the model takes it, with the tables that `l4jax.train.kernels` reads."""
    runs = packed.first_RB.shape[0]
    own_GRB = jnp.tile(jnp.arange(runs, dtype=jnp.int32)[:, None], (config.nope_interval - 1, 1, 1))
    tables = PageTables(packed.first_RB, own_GRB)
    return Batch(packed.token_T, packed.position_T, packed.run_T, tables, packed.feature_T)


def find_scores(kept: Mapping[str, Any]) -> list[Array]:
    """The routers' scores of each layer that has experts, [T, E], in the layers' order."""
    layers = sorted((int(name.removeprefix("layer_")), kept[name]) for name in kept)
    return [layer["feed_forward"]["score_TE"][0] for _, layer in layers]


def balance(score_TE: Array, is_real_T: Array) -> tuple[Array, Array]:
    """How unevenly a router spreads the tokens, and how many each expert gets.

    The auxiliary loss of the Switch Transformer (arXiv:2101.03961, equations 4 to 6): E times the
    sum over experts of the share of tokens that one gets times the mean probability that the
    softmax of the scores gives it. It is 1 where both are even.

    Returns:
        The loss, float32; and int32 [E] tokens. Padding counts in neither.
    """
    experts = score_TE.shape[-1]
    chosen_TE = jax.nn.one_hot(score_TE.argmax(-1), experts) * is_real_T[:, None]
    chance_TE = jax.nn.softmax(score_TE.astype(jnp.float32), axis=-1) * is_real_T[:, None]
    tokens = jnp.maximum(is_real_T.sum(), 1)
    loss = experts * (chosen_TE.sum(0) / tokens * (chance_TE.sum(0) / tokens)).sum()
    return loss, chosen_TE.sum(0).astype(jnp.int32)


def make_advance(
    config: Config, teaching: Teaching, levels_C256: np.ndarray
) -> Callable[[Learned, Packed], tuple[Learned, dict[str, Array]]]:
    """A step of training, to be jitted: what was learned and a batch in, what is learned now and
    notes out.
    """
    find = functools.partial(find_loss, config=config, teaching=teaching, levels_C256=levels_C256)
    return make_update(find, teaching)


def make_update(
    find: Callable[..., tuple[Array, dict[str, Array]]], teaching: Teaching
) -> Callable[..., tuple[Learned, dict[str, Array]]]:
    """A step against any loss.

    Args:
        find: of what is learned, a batch and whatever stays as it is: the loss, and notes.
        teaching: how it is learned.
    """
    optimizer = teaching.make_optimizer()

    def advance(learned: Learned, packed: Packed, *fixed: Any) -> tuple[Learned, dict[str, Array]]:
        find_both = jax.value_and_grad(find, has_aux=True)
        (loss, notes), gradients = find_both(learned.params, packed, *fixed)
        updates, moments = optimizer.update(gradients, learned.moments, learned.params)
        params = optax.apply_updates(learned.params, updates)
        notes |= {"loss": loss, "norm": optax.tree.norm(gradients)}
        return Learned(params, moments, learned.step + 1), notes  # type: ignore[arg-type]

    return advance
