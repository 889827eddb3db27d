"""Adapters on disk, as PEFT lays them out: `adapter_config.json`, `adapter_model.safetensors`.

A matrix `[out, in]` has `lora_A.weight` [Q, in] and `lora_B.weight` [out, Q] under its module's
name. Fused experts, a parameter `[E, in, out]`, have all their factors in two matrices. PEFT takes
such a parameter as [E, out, in] unless its module says otherwise, which Llama 4's does not: so A
ends in what is `out` in truth, [E * Q, out], and B begins with `in`, [in, Q * E]. Before 0.19.1 it
was the other way round. Where both parameters of a module are adapted, the module is wrapped twice,
and the first one's names have a `base_layer` more.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from l4jax.checkpoint.adapter import Adapter, Factors, find_box, shape_factors
from l4jax.checkpoint.errors import CheckpointError, list_few
from l4jax.checkpoint.names import FUSED, find_published, forget_prefix
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.recipe import Part, Recipe
from l4jax.checkpoint.rules import Shape
from l4jax.checkpoint.safetensors import Index, read_header, write_safetensors
from l4jax.config import Config
from l4jax.model import declare_parameters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULE, _INSIDE = "base_model.model.", ".base_layer"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TURNED = (0, 19, 1)  # since this version A ends in `out` for fused experts
_FLOATS = ("BF16", "F16", "F32", "F64")
# Keys of the config that are read; and those that do not change what a finished adapter adds: the
# tensors tell what it adapts.
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "peft_version")
_FREE = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
)
# How the factors began, where the weights that they are added to stayed as they were.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_WAY_OUT = (
    "train the adapter without it, or merge it in PEFT (merge_and_unload) and load what that saves"
)


def read_adapter(folder: str | Path, config: Config) -> Adapter:
    """Read an adapter for a model, whichever matrices it adapts.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        config: of the model.

    Raises:
        CheckpointError: there is no adapter; it does more than add two factors; it is damaged, or
            belongs to another model.
    """
    folder = Path(folder).expanduser()
    about = _read_config(folder)
    rank = about["r"]
    alpha = about["lora_alpha"] * (rank**0.5 if about.get("use_rslora") else 1.0)
    pairs = _Pairs(folder)
    factors: dict[str, Factors] = {}
    for path, recipe, shapes in _list_adaptable(config, rank, is_whole=False):
        found = {name: np.zeros(size, np.float32) for name, size in shapes.items()}
        taken = [
            _take_fused(pairs, found, part, about)
            if recipe.order
            else _take_matrix(pairs, found, recipe, part)
            for part in recipe.parts
        ]
        if any(taken):
            factors[path] = found
    pairs.check_empty()
    if not factors:
        raise CheckpointError(f"{folder / WEIGHTS} holds no factors: it is no adapter of LoRA.")
    return Adapter(rank, alpha, factors, str(folder))


def write_adapter(folder: str | Path, adapter: Adapter, config: Config, model: str) -> None:
    """Write an adapter of a model, in float32. Parts that are nothing are written, too.

    Args:
        folder: made if it is not there; files of the same names are replaced.
        config: of the model.
        model: what PEFT is to find the model by: a name on the hub, or a folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    parameters: list[str] = []
    adapted = [
        (recipe, {name: np.asarray(x, np.float32) for name, x in adapter.factors[path].items()})
        for path, recipe, _ in _list_adaptable(
            config, adapter.rank, is_whole=config.vision is not None
        )
        if path in adapter.factors
    ]
    fused = [recipe.parts[0].name for recipe, _ in adapted if recipe.order]
    for recipe, factors in adapted:
        for part in recipe.parts:
            if recipe.order:
                parameters.append(part.name)
                module = _wrap(part.name, fused)
                a, b = _turn(factors)
            else:
                module = part.name.removesuffix(".weight")
                modules.append(module)
                first, second = find_box(factors, recipe, part)
                a, b = first.reshape(adapter.rank, -1), second.reshape(-1, adapter.rank)
            tensors |= {_MODULE + module + _A: a, _MODULE + module + _B: b}
    write_safetensors(folder / WEIGHTS, {name: tensors[name] for name in sorted(tensors)})
    about = {
        "base_model_name_or_path": model,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "peft_version": ".".join(map(str, _TURNED)),  # whose layout this is
        "r": adapter.rank,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _list_adaptable(
    config: Config, rank: int, *, is_whole: bool
) -> Iterator[tuple[str, Recipe, dict[str, Shape]]]:
    """What can be adapted: the path of each, what it is published as, the shapes of factors."""
    declared, _ = declare_parameters(config, jnp.float32)
    for path, leaf in flatten(declared).items():
        shapes = shape_factors(path, leaf.shape, rank)
        if shapes is not None:
            recipe = find_published(path, leaf.shape, is_whole=is_whole)
            yield path, recipe, {"first": shapes[0], "second": shapes[1]}


def _read_config(folder: Path) -> dict[str, Any]:
    """What is told of an adapter, if it is one that can be merged."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"lora is {str(folder)!r}, which holds no {CONFIG}: pass the folder that PEFT, or "
            "python -m scripts.finetune, saved an adapter in."
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = about["peft_type"], about["r"], about["lora_alpha"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is not the config of an adapter, JSON with peft_type, r and lora_alpha."
        ) from None
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}, and l4jax merges LORA alone.")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise CheckpointError(
            f"{path}: r is {rank!r} and lora_alpha {alpha!r}: they must be numbers, r at least 1."
        )
    refused = {
        key: value
        for key, value in about.items()
        if key not in (*_READ, *_FREE) and value not in (None, False, [], {})
    }
    if about.get("bias", "none") != "none":
        refused["bias"] = about["bias"]
    if about.get("init_lora_weights") not in _BEGINNINGS:
        refused["init_lora_weights"] = about["init_lora_weights"]  # it changed the weights, too
    if refused:
        key, value = next(iter(refused.items()))
        raise CheckpointError(f"{path}: {key} is {value!r}, which is not merged: {_WAY_OUT}.")
    return about


class _Pairs:
    """The factors of a file by module; what is taken is gone."""

    def __init__(self, folder: Path):
        self.path = folder / WEIGHTS
        if not self.path.is_file():
            raise CheckpointError(
                f"{folder} holds no {WEIGHTS}: save the adapter as safetensors, PEFT's default."
            )
        self._index = Index(folder, read_header(self.path))
        self._left = {
            forget_prefix(name.removeprefix(_MODULE)): name for name in self._index.tensors
        }
        # Modules that are wrapped twice, since both of their parameters are adapted.
        self.nested = {
            name.removesuffix(_INSIDE + _A) for name in self._left if name.endswith(_INSIDE + _A)
        }

    def __contains__(self, module: str) -> bool:
        return module + _A in self._left or module + _B in self._left

    def take(self, module: str, *wanted: tuple[Shape, Shape]) -> list[np.ndarray]:
        """A and B of a module, float32, of one of the pairs of shapes that are wanted."""
        lacking = [key for key in (module + _A, module + _B) if key not in self._left]
        if lacking:
            raise CheckpointError(f"{self.path} lacks {lacking[0]}: save the adapter again.")
        names = [self._left.pop(module + key) for key in (_A, _B)]
        tensors = [self._index.tensors[name] for name in names]
        if tuple(tensor.shape for tensor in tensors) not in wanted:
            wrong = zip(names, tensors, wanted[0], strict=True)
            name, shape, right = next((n, x.shape, y) for n, x, y in wrong if x.shape != y)
            raise CheckpointError(
                f"{self.path} has {name} {list(shape)} instead of {list(right)}: the adapter "
                f"belongs to another model, or r in {CONFIG} is another."
            )
        odd = [name for name, x in zip(names, tensors, strict=True) if x.dtype not in _FLOATS]
        if odd:
            raise CheckpointError(
                f"{self.path} has {odd[0]} in another dtype than {', '.join(_FLOATS)}: save the "
                "adapter in one of these."
            )
        return [np.asarray(self._index.view(name)).astype(np.float32) for name in names]

    def check_empty(self) -> None:
        """Refuse what nobody took."""
        if self._left:
            raise CheckpointError(
                f"{self.path} has {list_few(sorted(self._left.values()))}, which are no factors of "
                f"a matrix of this model: {_WAY_OUT}."
            )


def _take_matrix(pairs: _Pairs, factors: Factors, recipe: Recipe, part: Part) -> bool:
    """Fill in the factors of one stored matrix, if there are any."""
    module = part.name.removesuffix(".weight")
    if module not in pairs:
        return False
    first, second = find_box(factors, recipe, part)
    rank = second.shape[-1]
    a, b = pairs.take(module, ((rank, part.stored[1]), (part.stored[0], rank)))
    first[...], second[...] = a.reshape(first.shape), b.reshape(second.shape)
    return True


def _take_fused(pairs: _Pairs, factors: Factors, part: Part, about: Mapping[str, Any]) -> bool:
    """Fill in the factors of fused experts, if there are any, in either of PEFT's layouts."""
    module, _, parameter = part.name.rpartition(".")
    if module in pairs.nested:
        module += _INSIDE if parameter == FUSED[0] else ""
    elif not any(str(name).endswith(parameter) for name in about.get("target_parameters") or ()):
        return False
    if module not in pairs:
        return False
    first, second = factors["first"], factors["second"]
    experts, rank = second.shape[0], second.shape[-1]
    ins, outs = first.shape[-1], second[0].size // rank
    both = experts * rank
    turned, straight = ((both, outs), (ins, both)), ((both, ins), (outs, both))
    a, b = pairs.take(module, turned, straight)
    is_turned = (a.shape, b.shape) == turned
    if turned == straight:
        is_turned = _read_version(about) >= _TURNED
    by_expert = a.reshape(experts, rank, -1)  # [E, Q, out or in]
    across = b.reshape(-1, rank, experts).transpose(2, 1, 0)  # [E, Q, in or out]
    to_rank, from_rank = (across, by_expert) if is_turned else (by_expert, across)
    first[...] = to_rank.reshape(first.shape)
    second[...] = from_rank.swapaxes(1, 2).reshape(second.shape)
    return True


def _turn(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """A and B of fused experts, in the layout since 0.19.1."""
    first, second = factors["first"], factors["second"]
    experts, rank = second.shape[0], second.shape[-1]
    a = second.reshape(experts, -1, rank).swapaxes(1, 2).reshape(experts * rank, -1)
    b = first.reshape(experts, rank, -1).transpose(2, 1, 0).reshape(-1, rank * experts)
    return a, b


def _wrap(name: str, fused: list[str]) -> str:
    """The module under which PEFT keeps the factors of a fused parameter, beside which others are
    adapted."""
    module, _, parameter = name.rpartition(".")
    is_inside = parameter == FUSED[0] and f"{module}.{FUSED[1]}" in fused
    return module + _INSIDE if is_inside else module


def _read_version(about: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the PEFT that wrote a config; older ones do not say."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", about.get("peft_version") or "")
    return tuple(map(int, found.groups())) if found else (0, 0, 0)
