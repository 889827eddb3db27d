"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`.

A matrix `[out, in]` has `lora_A.weight` [Q, in] and `lora_B.weight` [out, Q] under its module's
name. Fused experts, a parameter `[E, in, out]`, have the factors of all experts in two matrices.
PEFT takes such a parameter for [E, out, in] unless its module declares otherwise, which Llama 4's
does not: so A is [E * Q, out] and B is [in, Q * E], with `in` and `out` exchanged. Before 0.19.1
PEFT did not exchange them. If both parameters of a module are adapted, PEFT wraps the module twice,
and the names of the first one contain an additional `base_layer`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from l4jax.checkpoint.adapter import Adapter, Factors, shape_factors, slice_factors
from l4jax.checkpoint.errors import CheckpointError, list_few
from l4jax.checkpoint.layouts import Shape
from l4jax.checkpoint.names import EMBEDDINGS, FUSED_EXPERTS, make_published_recipe, strip_prefix
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.recipe import Recipe, Source
from l4jax.checkpoint.safetensors import Index, read_header, write_safetensors
from l4jax.config import Config
from l4jax.json_file import quote, read_object
from l4jax.model import declare_parameters

MAX_RANK = 65536  # beyond the width of any matrix
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULE, _INSIDE = "base_model.model.", ".base_layer"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EXCHANGED_SINCE = (0, 19, 1)  # PEFT's version: `in` and `out` of fused experts
_FLOATS = ("BF16", "F16", "F32", "F64")
# Keys of the config that are read; and keys that do not change a trained adapter: the names of the
# tensors show the adapted matrices.
_READ = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("bias", "init_lora_weights", "peft_version"),
)
_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
)
# Initializations of the factors that leave the base weights unchanged.
_SUPPORTED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_WAY_OUT = (
    "train the adapter without it, or merge it in PEFT (merge_and_unload) and load what that saves"
)


def read_adapter(folder: str | Path, config: Config) -> Adapter:
    """Read an adapter for a model.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        config: of the model.

    Raises:
        CheckpointError: there is no adapter; it is more than a product of two factors; it is
            damaged, or belongs to another model.
    """
    folder = Path(folder).expanduser()
    settings = _read_config(folder)
    scales = _Scales(settings, str(folder / CONFIG))
    rank = scales.largest_rank
    tensors = _FactorTensors(folder, scales)
    factors: dict[str, Factors] = {}
    for path, recipe, shapes in _list_adaptable(config, rank, has_vision=False):
        read = {name: np.zeros(size, np.float32) for name, size in shapes.items()}
        is_adapted = [
            _read_fused(tensors, read, source, settings)
            if recipe.permutation
            else _read_matrix(tensors, read, recipe, source)
            for source in recipe.sources
        ]
        if any(is_adapted):
            factors[path] = read
    copies = tensors.take_copies()
    tensors.check_empty()
    if not factors:
        raise CheckpointError(f"{folder / WEIGHTS} holds no factors: it is no LoRA adapter.")
    return Adapter(rank, scales.common * rank, factors, str(folder), copies)


def check_copies(adapter: Adapter, index: Index | None) -> None:
    """Refuse an adapter that stores weights of the model which differ from the model's.

    PEFT stores the head beside its factors. A copy of the model's head adds nothing; another one,
    such as a trained or resized head, is no product of factors.

    Args:
        adapter: as read.
        index: of the base model; None if it is not stored as safetensors.
    """
    stored = {strip_prefix(name): name for name in index.tensors} if index else {}
    for name, copy in adapter.copies.items():
        base = index.view(stored[name]) if index and name in stored else None
        if base is None or base.shape != copy.shape or not _are_equal(base, copy):
            problem = "cannot be compared with" if base is None else "differs from"
            raise CheckpointError(
                f"{Path(adapter.origin) / WEIGHTS} has {name}, which {problem} the base model's: "
                "save the adapter with save_embedding_layers=False, or merge it in PEFT "
                "(merge_and_unload) and load what that saves."
            )


def _are_equal(base: np.ndarray, copy: np.ndarray, rows: int = 4096) -> bool:
    """Compare in the dtype of the copy; some thousand rows are converted at a time."""
    starts = range(0, len(base), rows)
    return all(
        np.array_equal(base[i : i + rows].astype(copy.dtype), copy[i : i + rows]) for i in starts
    )


def write_adapter(folder: str | Path, adapter: Adapter, config: Config, model: str) -> None:
    """Write an adapter of a model, in float32. Factors that are zero are written, too.

    Args:
        folder: made if it does not exist; files of the same names are replaced.
        config: of the model.
        model: the base model for PEFT: a name on the hub, or a folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    parameters: list[str] = []
    adapted = [
        (recipe, {name: np.asarray(x, np.float32) for name, x in adapter.factors[path].items()})
        for path, recipe, _ in _list_adaptable(
            config, adapter.rank, has_vision=config.vision is not None
        )
        if path in adapter.factors
    ]
    fused = [recipe.sources[0].name for recipe, _ in adapted if recipe.permutation]
    for recipe, factors in adapted:
        for source in recipe.sources:
            if recipe.permutation:
                parameters.append(source.name)
                module = _name_fused_module(source.name, fused)
                a, b = _fuse_factors(factors)
            else:
                module = source.name.removesuffix(".weight")
                modules.append(module)
                first, second = slice_factors(factors, recipe, source)
                a, b = first.reshape(adapter.rank, -1), second.reshape(-1, adapter.rank)
            tensors |= {_MODULE + module + _A: a, _MODULE + module + _B: b}
    write_safetensors(folder / WEIGHTS, {name: tensors[name] for name in sorted(tensors)})
    settings = {
        "base_model_name_or_path": model,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "peft_version": ".".join(map(str, _EXCHANGED_SINCE)),  # the version of this layout
        "r": adapter.rank,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _list_adaptable(
    config: Config, rank: int, *, has_vision: bool
) -> Iterator[tuple[str, Recipe, dict[str, Shape]]]:
    """List the matrices of a model: path, recipe in the published layout, shapes of factors."""
    declared, _ = declare_parameters(config, jnp.float32)
    for path, leaf in flatten(declared).items():
        shapes = shape_factors(path, leaf.shape, rank)
        if shapes is not None:
            recipe = make_published_recipe(path, leaf.shape, has_vision=has_vision)
            yield path, recipe, {"first": shapes[0], "second": shapes[1]}


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the config of an adapter, and refuse one that cannot be merged."""
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(
            f"lora is {str(folder)!r}, which holds no {CONFIG}: pass the folder that PEFT, or "
            "python -m scripts.finetune, saved an adapter in."
        )
    try:
        settings = read_object(path, CheckpointError)
        peft_type, rank, alpha = (settings[key] for key in ("peft_type", "r", "lora_alpha"))
    except KeyError:
        raise CheckpointError(
            f"{path} is not the config of an adapter, JSON with peft_type, r and lora_alpha."
        ) from None
    if peft_type != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {quote(peft_type)}, and l4jax merges LORA only."
        )
    is_number = type(alpha) in (int, float) and math.isfinite(alpha)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK or not is_number:
        raise CheckpointError(
            f"{path}: r is {quote(rank)} and lora_alpha {quote(alpha)}: they must be numbers, "
            f"r from 1 to {MAX_RANK}."
        )
    refused = {
        key: value
        for key, value in settings.items()
        if key not in (*_READ, *_IGNORED) and value not in (None, False, [], {})
    }
    if settings.get("bias", "none") != "none":
        refused["bias"] = settings["bias"]
    if settings.get("init_lora_weights") not in _SUPPORTED_INITS:
        refused["init_lora_weights"] = settings["init_lora_weights"]  # it changed the base, too
    if refused:
        key, value = next(iter(refused.items()))
        raise CheckpointError(f"{path}: {key} is {quote(value)}, which is not merged: {_WAY_OUT}.")
    return settings


class _Scales:
    """Rank and scale of each module: the config's, or those of a pattern that its name matches."""

    def __init__(self, settings: Mapping[str, Any], where: str):
        self._rank, self._alpha = settings["r"], settings["lora_alpha"]
        self._is_stabilized = bool(settings.get("use_rslora"))
        self._ranks, self._alphas = (
            _read_pattern(settings, key, where) for key in ("rank_pattern", "alpha_pattern")
        )
        self.largest_rank = max(self._rank, *self._ranks.values(), 1)
        # The scale of all factors; that of a module with another one is multiplied into its B.
        self.common = self._divide(self._alpha, self._rank) or 1.0

    def find(self, module: str) -> tuple[int, float]:
        """Find the rank of a module, and its scale in units of the common one."""
        rank, alpha = _match(self._ranks, module), _match(self._alphas, module)
        rank = self._rank if rank is None else rank
        scale = self._divide(self._alpha if alpha is None else alpha, rank)
        return rank, scale / self.common

    def _divide(self, alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if self._is_stabilized else rank)


def _read_pattern(settings: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Read a pattern of modules' names -> rank or alpha."""
    pattern = settings.get(key) or {}
    kinds = (int,) if key == "rank_pattern" else (int, float)
    is_right = isinstance(pattern, dict) and all(
        type(value) in kinds
        and math.isfinite(value)
        and (1 <= value <= MAX_RANK or kinds != (int,))
        for value in pattern.values()
    )
    try:
        for name in pattern:
            re.compile(name)
    except re.error:
        is_right = False
    if not is_right:
        raise CheckpointError(
            f"{where}: {key} is {quote(pattern)}: it must map patterns of module names to numbers."
        )
    return dict(pattern)


def _match(pattern: Mapping[str, Any], module: str) -> Any:
    """Return the value of the first key that matches, as in PEFT; None if there is none."""
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, None)


class _FactorTensors:
    """The tensors of an adapter by module, without those that were taken."""

    def __init__(self, folder: Path, scales: _Scales):
        self._scales = scales
        self.path = folder / WEIGHTS
        if not self.path.is_file():
            raise CheckpointError(
                f"{folder} holds no {WEIGHTS}: save the adapter as safetensors, PEFT's default."
            )
        self._index = Index(folder, read_header(self.path))
        self._left = {
            strip_prefix(name.removeprefix(_MODULE)): name for name in self._index.tensors
        }
        # Modules wrapped twice, both of whose parameters are adapted.
        self.nested = {
            name.removesuffix(_INSIDE + _A) for name in self._left if name.endswith(_INSIDE + _A)
        }

    def __contains__(self, module: str) -> bool:
        return module + _A in self._left or module + _B in self._left

    def find_scale(self, module: str, parameter: str = "") -> tuple[int, float]:
        """Find the rank and the relative scale of a module, or of a parameter inside it."""
        name = self._left.get(module + _A) or self._left.get(module + _B, "")
        stored = name.removeprefix(_MODULE).removesuffix(_A).removesuffix(_B)
        return self._scales.find(stored.removesuffix(_INSIDE) + parameter)

    def take_copies(self) -> dict[str, np.ndarray]:
        """Take the embedding and the head, which PEFT may store, too: name -> values."""
        copies = {}
        for name in EMBEDDINGS:
            for stored in (name, name.replace(".weight", f"{_INSIDE}.weight")):
                if stored in self._left:
                    copies[name] = self._index.view(self._left.pop(stored))
        return copies

    def take(self, module: str, *allowed: tuple[Shape, Shape]) -> list[np.ndarray]:
        """Take A and B of a module, float32, of one of the allowed pairs of shapes."""
        lacking = [key for key in (module + _A, module + _B) if key not in self._left]
        if lacking:
            raise CheckpointError(f"{self.path} lacks {lacking[0]}: save the adapter again.")
        names = [self._left.pop(module + key) for key in (_A, _B)]
        tensors = [self._index.tensors[name] for name in names]
        if tuple(tensor.shape for tensor in tensors) not in allowed:
            wrong = zip(names, tensors, allowed[0], strict=True)
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
        """Refuse tensors that were not taken."""
        if self._left:
            raise CheckpointError(
                f"{self.path} has {list_few(sorted(self._left.values()))}, which are no factors of "
                f"a matrix of this model: {_WAY_OUT}."
            )


def _read_matrix(tensors: _FactorTensors, factors: Factors, recipe: Recipe, source: Source) -> bool:
    """Read the factors of one stored matrix into `factors`; return whether there are any."""
    module = source.name.removesuffix(".weight")
    if module not in tensors:
        return False
    first, second = slice_factors(factors, recipe, source)
    rank, scale = tensors.find_scale(module)
    rows, columns = source.stored_shape
    a, b = tensors.take(module, ((rank, columns), (rows, rank)))
    # Beyond the rank of this module, factors stay zero.
    first[:rank] = a.reshape(rank, *first.shape[1:])
    second[..., :rank] = (b * np.float32(scale)).reshape(*second.shape[:-1], rank)
    return True


def _read_fused(
    tensors: _FactorTensors, factors: Factors, source: Source, settings: Mapping[str, Any]
) -> bool:
    """Read the factors of fused experts, in either of PEFT's layouts, into `factors`.

    Returns:
        Whether there are any.
    """
    module, _, parameter = source.name.rpartition(".")
    if module in tensors.nested:
        module += _INSIDE if parameter == FUSED_EXPERTS[0] else ""
    elif not any(str(name).endswith(parameter) for name in settings.get("target_parameters") or ()):
        return False
    if module not in tensors:
        return False
    first, second = factors["first"], factors["second"]
    experts, largest = second.shape[0], second.shape[-1]
    ins, outs = first.shape[-1], second[0].size // largest
    rank, scale = tensors.find_scale(module, f".{parameter}")
    ranks = experts * rank
    exchanged, plain = ((ranks, outs), (ins, ranks)), ((ranks, ins), (outs, ranks))
    a, b = tensors.take(module, exchanged, plain)
    is_exchanged = (a.shape, b.shape) == exchanged
    if exchanged == plain:
        is_exchanged = _parse_version(settings) >= _EXCHANGED_SINCE
    a_EQ = a.reshape(experts, rank, -1)  # [E, Q, out or in]
    b_EQ = b.reshape(-1, rank, experts).transpose(2, 1, 0)  # [E, Q, in or out]
    first_EQ, second_EQ = (b_EQ, a_EQ) if is_exchanged else (a_EQ, b_EQ)
    first[..., :rank, :] = first_EQ.reshape(*first.shape[:-2], rank, ins)
    scaled_EQ = second_EQ.swapaxes(1, 2) * np.float32(scale)
    second[..., :rank] = scaled_EQ.reshape(*second.shape[:-1], rank)
    return True


def _fuse_factors(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Make A and B of fused experts, in the layout since 0.19.1."""
    first, second = factors["first"], factors["second"]
    experts, rank = second.shape[0], second.shape[-1]
    a = second.reshape(experts, -1, rank).swapaxes(1, 2).reshape(experts * rank, -1)
    b = first.reshape(experts, rank, -1).transpose(2, 1, 0).reshape(-1, rank * experts)
    return a, b


def _name_fused_module(name: str, fused: list[str]) -> str:
    """Name the module under which PEFT stores the factors of a fused parameter.

    Args:
        name: of the parameter.
        fused: the names of all fused parameters that are adapted.
    """
    module, _, parameter = name.rpartition(".")
    is_inside = parameter == FUSED_EXPERTS[0] and f"{module}.{FUSED_EXPERTS[1]}" in fused
    return module + _INSIDE if is_inside else module


def _parse_version(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Parse the version of PEFT that wrote a config; older ones leave it out."""
    version = settings.get("peft_version")
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version if isinstance(version, str) else "")
    if version is not None and not found:
        raise CheckpointError(
            f"{CONFIG}: peft_version is {quote(version)}, no version, and it decides the layout of "
            "fused experts: save the adapter again."
        )
    return tuple(map(int, found.groups())) if found else (0, 0, 0)
