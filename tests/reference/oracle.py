"""The reference: Hugging Face's Llama 4 in torch, float32, with eager attention.

It computes tiny models whose weights come from ``tests.weights``: in the tests of this folder (on
Python 3.11, which has torch), and for the goldens (``scripts/write_goldens.py``). Arguments and
results are numpy arrays without a batch axis.

Never call ``model.to(dtype)`` on the result of ``build``: it silently makes the complex RoPE table
of the vision tower real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.utils import logging

from tests import weights

# transformers warns about low_freq_factor == high_freq_factor, as in Scout's published config.
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # for tiny matrices, threads cost more than they save

Model = Llama4ForConditionalGeneration


class Greedy(NamedTuple):
    """Greedily decoded tokens with their logits."""

    tokens: np.ndarray  # int32 [steps]: the tokens chosen after the prompt
    margins: np.ndarray  # float32 [steps]: best logit minus second best
    logits: np.ndarray  # float32 [steps, V]: the logits of each token


@dataclasses.dataclass(frozen=True)
class Case:
    """Input and output of a submodule in a forward of the model."""

    module: str  # its name in the model, a prefix of its tensors' names
    input: np.ndarray  # float32
    output: np.ndarray  # float32


def tiny_config(kind: weights.Kind, **overrides: Any) -> Llama4Config:
    """Make a Hugging Face config of ``tests.weights.tiny_config``, with the same overrides."""
    return as_hf_config(weights.tiny_config(kind, **overrides))


def as_hf_config(config: Mapping[str, Any]) -> Llama4Config:
    """Parse a ``config.json`` of either style with Hugging Face."""
    return Llama4Config.from_dict(dict(config))


def build(config: Mapping[str, Any] | Llama4Config, seed: int) -> Model:
    """Build the model with ``weights.random_tensors(..., seed)``: float32, eager, eval.

    Every parameter is assigned (a missing or unknown one raises): Hugging Face leaves the experts'
    down_proj uninitialized.
    """
    hf_config = config if isinstance(config, Llama4Config) else as_hf_config(config)
    hf_config._attn_implementation = "eager"
    hf_config.dtype = torch.float32
    model = Model(hf_config).eval()
    tensors = weights.random_tensors(shapes(model), seed)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()}, strict=True)
    return model.requires_grad_(False)


def load(folder: Path | str) -> Model:
    """Load with ``from_pretrained`` in float32 with eager attention; all tensors must match."""
    loaded: Any = Model.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    if problems := {key: value for key, value in info.items() if value}:
        raise ValueError(f"{folder} does not hold this model: {problems}")
    return model.eval().requires_grad_(False)


def save(model: Model, folder: Path | str, *, sharded: bool = False) -> None:
    """Save with ``save_pretrained``: ``config.json`` in the style of transformers 5, safetensors.

    With ``sharded``, there are several files of at most 200 kB and an index.
    """
    model.save_pretrained(folder, max_shard_size="200KB" if sharded else "5GB")


def shapes(model: Model) -> weights.Shapes:
    """Compute name -> shape of every tensor that the model saves."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model: Model, ids: np.ndarray, pixels: np.ndarray | None = None) -> np.ndarray:
    """Compute logits, float32 ``[T, V]``, of one forward over the prompt, without cache.

    Args:
      model: from ``build`` or ``load``.
      ids: ``[T]``, including the ids of the image's patches.
      pixels: ``[I, C, image_size, image_size]`` in [-1, 1], or None if the prompt has no image.
    """
    return _forward(model, ids, pixels).logits[0].numpy()


@torch.no_grad()
def image_features(model: Model, pixels: np.ndarray) -> np.ndarray:
    """Compute image features, float32 ``[I * tokens_per_tile, D]``, that replace embeddings."""
    out: Any = model.get_image_features(pixel_values=torch.from_numpy(pixels))
    return model.multi_modal_projector(out.last_hidden_state.flatten(0, 1)).numpy()


@torch.no_grad()
def decode(
    model: Model, ids: np.ndarray, steps: int, pixels: np.ndarray | None = None
) -> np.ndarray:
    """Compute logits, float32 ``[T, V]``, decoding the last ``steps`` tokens with the cache one by
    one."""
    split = len(ids) - steps
    out = _forward(model, ids[:split], pixels, use_cache=True)
    rows = [out.logits[0]]
    for token in ids[split:]:
        out = _forward(model, [token], use_cache=True, past_key_values=out.past_key_values)
        rows.append(out.logits[0])
    return torch.cat(rows).numpy()


@torch.no_grad()
def greedy(model: Model, ids: np.ndarray, steps: int, pixels: np.ndarray | None = None) -> Greedy:
    """Decode greedily with the cache, ignoring stop ids.

    Raises:
      AssertionError: one forward without cache over prompt and output differs in a token, or by
        more than 1e-3 in a logit.
    """
    out = _forward(model, ids, pixels, use_cache=True)
    rows, tokens = [], []
    for step in range(steps):
        rows.append(out.logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
        if step < steps - 1:
            out = _forward(model, tokens[-1:], use_cache=True, past_key_values=out.past_key_values)
    chosen_from = torch.stack(rows)
    expected = _continued_logits(model, ids, tokens[:-1], pixels)
    assert expected.argmax(-1).tolist() == tokens, (
        "decoding with the cache differs from the forward without it"
    )
    np.testing.assert_allclose(chosen_from.numpy(), expected, atol=1e-3, rtol=0)
    best = chosen_from.topk(2, dim=-1).values
    margins = (best[:, 0] - best[:, 1]).numpy()
    return Greedy(np.array(tokens, np.int32), margins, chosen_from.numpy())


def submodule_cases(
    model: Model, ids: np.ndarray, pixels: np.ndarray | None = None
) -> dict[str, Case]:
    """Record inputs and outputs of submodules in one forward, at positions 0 .. T-1.

    Names (of the model's submodules; vision only with ``pixels``):
      ``attention_local``   layer 0: norm'd ``[T, D]`` -> ``[T, D]`` (before the residual is added)
      ``attention_global``  layer 3: the same, NoPE, with temperature tuning
      ``norm``              the final RMSNorm, ``[T, D]``
      ``moe``               the last MoE layer's feed-forward, shared expert included, ``[T, D]``
      ``router``            its router: ``[T, D]`` -> raw scores ``[T, E]``
      ``dense``             the first dense MLP (maverick), ``[T, D]``
      ``layer``             layer 0, with residuals, ``[T, D]``
      ``vision_patches``    pixels ``[I, C, Y, X]`` -> ``[I, patches, W]``
      ``vision_attention``  layer 0: ``[I, patches + 1, W]``, class token last
      ``vision_layer``      layer 0
      ``vision_adapter``    pixel shuffle and MLP: ``[I, patches, W]`` -> ``[I, patches / 4, ...]``
      ``vision``            pixels -> the adapter's output
      ``projector``         ``[I * patches / 4, ...]`` -> ``[I * patches / 4, D]``
    """
    text, vision = "language_model.model.", "vision_model."
    modules = {
        "attention_local": text + "layers.0.self_attn",
        "attention_global": text + "layers.3.self_attn",
        "norm": text + "norm",
        "layer": text + "layers.0",
    }
    text_config: Any = model.config.text_config
    moe_layers = text_config.moe_layers
    modules["moe"] = f"{text}layers.{moe_layers[-1]}.feed_forward"
    modules["router"] = modules["moe"] + ".router"
    dense_layers = sorted(set(range(text_config.num_hidden_layers)) - set(moe_layers))
    if dense_layers:
        modules["dense"] = f"{text}layers.{dense_layers[0]}.feed_forward"
    if pixels is not None:
        modules |= {
            "vision_patches": vision + "patch_embedding",
            "vision_attention": vision + "model.layers.0.self_attn",
            "vision_layer": vision + "model.layers.0",
            "vision_adapter": vision + "vision_adapter",
            "vision": "vision_model",
            "projector": "multi_modal_projector",
        }
    cases: dict[str, Case] = {}

    def record(name: str, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
        if hidden is None:
            hidden = kwargs["pixel_values"]
        if name == "router":
            output = output[1]  # (sigmoid of the chosen, raw scores)
        elif not isinstance(output, torch.Tensor):
            output = output[0]
        is_batched = name in ("attention_local", "attention_global", "norm", "layer", "dense")
        is_batched |= name == "moe"
        arrays = [hidden, output]
        if is_batched:  # the MoE layer flattens [1, T, D] itself
            arrays = [x.reshape(-1, x.shape[-1]) for x in arrays]
        cases[name] = Case(modules[name], *(x.clone().numpy() for x in arrays))

    hooks = [
        model.get_submodule(module).register_forward_hook(
            lambda _, args, kwargs, output, name=name: record(name, args, kwargs, output),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    try:
        logits(model, ids, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return cases


def _continued_logits(
    model: Model, ids: np.ndarray, answer: list[int], pixels: np.ndarray | None
) -> np.ndarray:
    """Compute logits of one forward over prompt and output, from the prompt's last position on.

    Embeddings are computed here because a random model may output the patch id, for which Hugging
    Face requires an image; in an output it is an ordinary token.
    """
    embed = model.get_input_embeddings()
    embeddings = embed(torch.tensor([*ids.tolist(), *answer]))
    if pixels is not None:
        is_patch = torch.tensor(np.append(ids == weights.PATCH_ID, [False] * len(answer)))
        embeddings[is_patch] = torch.from_numpy(image_features(model, pixels))
    out = model(inputs_embeds=embeddings[None], use_cache=False)
    return out.logits[0, len(ids) - 1 :].numpy()


def _forward(model: Model, ids: Any, pixels: np.ndarray | None = None, **kwargs: Any) -> Any:
    if pixels is not None:
        kwargs["pixel_values"] = torch.from_numpy(pixels)
    input_ids = torch.tensor(np.asarray(ids, np.int64))[None]
    return model(input_ids=input_ids, **{"use_cache": False, **kwargs})
