"""A training step: the loss of a batch, its gradients, and the optimizer's update."""

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
from l4jax.train.batches import PackedBatch
from l4jax.train.documents import KINDS
from l4jax.train.kernels import make_empty_pool, make_training_kernels

jax.tree_util.register_dataclass(PackedBatch)
_TOKENS = (axes.TOKENS,)
# Every token of the batch indexes the segments, so each device has all of them.
PACKED_AXES = PackedBatch(
    *(_TOKENS, _TOKENS, _TOKENS, (axes.LIST, axes.TABLE), _TOKENS, _TOKENS, _TOKENS, _TOKENS),
    tiles_ICYX=(axes.TILES, axes.CHANNELS, axes.PIXELS_Y, axes.PIXELS_X),
)


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Loss, optimizer and precision of a training run.

    Attributes:
        steps: of the whole run.
        rate: peak learning rate, after `warmup` steps; a cosine decays it to a hundredth.
        warmup: steps of linear warmup.
        decay: weight decay, of matrices only.
        clip: limit on the global norm of the gradients.
        balance: weight of the experts' load-balancing loss.
        dtype: of the forward and backward pass; weights and their sums are float32.
        attention: implementation of attention, "xla" or on a GPU "cudnn".
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
        """Make the learning rate schedule: step -> learning rate."""
        warmup = min(self.warmup, self.steps // 2)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.rate, warmup, self.steps, end_value=self.rate / 100
        )

    def make_optimizer(self) -> optax.GradientTransformation:
        """Make AdamW, preceded by gradient clipping."""
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
class TrainState:
    """The training state: float32 weights, the optimizer state, and the number of steps done."""

    params: Parameters
    moments: Any  # the optimizer state
    step: Array  # int32


def initialize(config: Config, hparams: Hyperparameters, seed: int) -> TrainState:
    """Make the initial state with random weights, sharded by the enclosing jit."""
    shapes, _ = declare_parameters(config, jnp.float32)
    depth = 2 * config.text.layers

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        name = "/".join(key.key for key in path)
        if name.endswith("/scale"):
            return jnp.ones(leaf.shape)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        std = compute_init_std(name, leaf.shape, depth)
        weight = std * jax.random.truncated_normal(key, -2, 2, leaf.shape)
        # White background is 1 in every pixel. Zero-mean patch weights map it to 0, so that ink
        # stands out.
        return weight - weight.mean(-1, keepdims=True) if name == "vision/patch" else weight

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    moments = hparams.make_optimizer().init(params)
    return TrainState(params, moments, jnp.int32(0))


def compute_init_std(name: str, shape: tuple[int, ...], depth: int) -> float:
    """Compute the standard deviation of a weight's initial values; it preserves the signal's size.

    Weights that write to the residual stream get a smaller one: the stream sums `depth` of them.
    """
    if name.endswith("embedding"):
        # Vision position embeddings are added to patches with values near 1. With 0.02 a mark looks
        # alike at any position; with 0.5 the model did not learn to read.
        return 0.02 if name.startswith("vision/") else 0.1
    # The last axis of a weight is contracted; attention's output contracts the heads too.
    summed = int(np.prod(shape[1:])) if name.endswith("/out") else shape[-1]
    is_residual = name.endswith(("/out", "/down"))
    return summed**-0.5 * (depth**-0.5 if is_residual else 1.0)


def compute_loss(
    params: Parameters,
    packed: PackedBatch,
    config: Config,
    hparams: Hyperparameters,
    levels_C256: np.ndarray,
    kernels: Kernels | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Compute the weighted cross-entropy of the target tokens plus the load-balancing loss.

    Args:
        params: float32; cast to `hparams.dtype` for the computation.
        packed: the batch.
        config, hparams: static.
        levels_C256: the image processor's normalized value of every level of each channel.
        kernels: replace those of `make_training_kernels` for the model's own chunk.

    Returns:
        The loss, and metrics: `words`, the cross-entropy; `balance`, the load-balancing loss;
        `right`, the accuracy on answers' tokens; `right_KIND`, the same for each of
        `documents.KINDS`; `right_seen`, the accuracy on image features' targets; `load_LE`, int32
        [layers, E], the tokens of each expert of each layer.
    """
    dtype = jnp.dtype(hparams.dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    kernels = kernels or make_training_kernels(config.text.chunk, hparams.attention)
    features_IND = None
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
    model = Llama4(config.text, kernels)
    variables = {"params": params["text"]}
    batch = make_model_batch(packed, config.text)
    (x_TD, _), kept = model.apply(
        variables, batch, make_empty_pool(config.text), features_IND, mutable=["intermediates"]
    )
    logits_TV: Any = model.apply(variables, x_TD, method="compute_logits")
    loss_T = optax.softmax_cross_entropy_with_integer_labels(logits_TV, packed.target_T)
    total = jnp.maximum(packed.weight_T.sum(), 1.0)
    cross_entropy = (loss_T * packed.weight_T).sum() / total
    is_correct_T = logits_TV.argmax(-1) == packed.target_T
    scores = list_router_scores(kept["intermediates"])
    is_real_T = packed.position_T >= 0
    balances, loads = zip(
        *(compute_load_balancing(score_TE, is_real_T) for score_TE in scores), strict=True
    )
    balance = jnp.stack(balances).mean()
    metrics = {"words": cross_entropy, "balance": balance, "load_LE": jnp.stack(loads)}
    metrics |= compute_accuracies(packed, is_correct_T)
    return cross_entropy + hparams.balance * balance, metrics


def compute_accuracies(packed: PackedBatch, is_correct_T: Array) -> dict[str, Array]:
    """Compute the accuracy of the likeliest tokens: on answers, per kind, on image features."""
    is_answer_T = packed.weight_T == 1
    is_kind_KT = packed.kind_T == jnp.arange(len(KINDS))[:, None]
    answers_K = (is_kind_KT & is_answer_T).sum(-1)
    correct_K = (is_kind_KT & is_answer_T & is_correct_T).sum(-1)
    is_target_T = (packed.feature_T >= 0) & (packed.weight_T > 0)
    correct = (is_answer_T & is_correct_T).sum() / jnp.maximum(is_answer_T.sum(), 1)
    accuracies = {"right": correct}
    accuracies["right_seen"] = (is_target_T & is_correct_T).sum() / is_target_T.sum()
    return accuracies | {
        f"right_{kind}": correct_K[k] / answers_K[k] for k, kind in enumerate(KINDS)
    }


def make_model_batch(packed: PackedBatch, config: TextConfig) -> Batch:
    """Make the model's batch, with the tables that `l4jax.train.kernels` reads."""
    segments = packed.first_RB.shape[0]
    own_GRB = jnp.tile(
        jnp.arange(segments, dtype=jnp.int32)[:, None], (config.nope_interval - 1, 1, 1)
    )
    tables = PageTables(packed.first_RB, own_GRB)
    return Batch(packed.token_T, packed.position_T, packed.segment_T, tables, packed.feature_T)


def list_router_scores(kept: Mapping[str, Any]) -> list[Array]:
    """List the router scores [T, E] of the layers that have experts, in the layers' order."""
    layers = sorted((int(name.removeprefix("layer_")), kept[name]) for name in kept)
    return [layer["feed_forward"]["score_TE"][0] for _, layer in layers]


def compute_load_balancing(score_TE: Array, is_real_T: Array) -> tuple[Array, Array]:
    """Compute the load-balancing loss of a router, and the tokens of each expert.

    The auxiliary loss of the Switch Transformer (arXiv:2101.03961, equations 4 to 6): E times the
    sum over experts of an expert's share of the tokens times its mean softmax probability. It is 1
    if both are uniform.

    Returns:
        The loss, float32; and int32 [E] tokens. Padding counts in neither.
    """
    experts = score_TE.shape[-1]
    real_T1 = is_real_T[:, None].astype(jnp.float32)
    chosen_TE = jax.nn.one_hot(score_TE.argmax(-1), experts) * real_T1
    probability_TE = jax.nn.softmax(score_TE.astype(jnp.float32), axis=-1) * real_T1
    tokens = jnp.maximum(is_real_T.sum(), 1).astype(jnp.float32)
    loss = experts * (chosen_TE.sum(0) / tokens * (probability_TE.sum(0) / tokens)).sum()
    return loss, chosen_TE.sum(0).astype(jnp.int32)


def make_train_step(
    config: Config, hparams: Hyperparameters, levels_C256: np.ndarray
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, Array]]]:
    """Make a training step, to be jitted: state and batch -> new state and metrics."""
    loss = functools.partial(compute_loss, config=config, hparams=hparams, levels_C256=levels_C256)
    return make_step(loss, hparams)


def make_step(
    compute: Callable[..., tuple[Array, dict[str, Array]]], hparams: Hyperparameters
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Make a training step for any loss.

    Args:
        compute: trainable parameters, a batch and constants -> the loss and metrics.
        hparams: the optimizer.
    """
    optimizer = hparams.make_optimizer()

    def train_step(
        state: TrainState, packed: PackedBatch, *constants: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        value_and_grad = jax.value_and_grad(compute, has_aux=True)
        (loss, metrics), gradients = value_and_grad(state.params, packed, *constants)
        updates, moments = optimizer.update(gradients, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"loss": loss, "norm": optax.tree.norm(gradients)}
        return TrainState(params, moments, state.step + 1), metrics  # type: ignore[arg-type]

    return train_step
