"""The tensors of the published checkpoints, from the golden table; and expected parameters."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from l4jax.checkpoint import Place
from l4jax.config import Config

_TABLE = Path(__file__).parents[1] / "golden" / "checkpoints.tsv"
_RANGE = re.compile(r"\{([\d:]+)\}")


@functools.cache
def read_published() -> Mapping[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Read checkpoint -> tensor -> (dtype, shape)."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    owners: list[str] = []
    for line in _TABLE.read_text().splitlines():
        if line.startswith("["):
            owners = line.strip("[]").split()
        elif not line.startswith("#"):
            pattern, dtype, shape = line.split("\t")
            spec = dtype, tuple(int(size) for size in shape.split("x"))
            for owner, name in itertools.product(owners, _expand(pattern)):
                found.setdefault(owner, {})[name] = spec
    return found


def _expand(pattern: str) -> Iterator[str]:
    ranges = [range(*map(int, text.split(":"))) for text in _RANGE.findall(pattern)]
    template = _RANGE.sub("{}", pattern)
    return (template.format(*numbers) for numbers in itertools.product(*ranges))


def arrange(tensors: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Make path -> parameter from the published tensors, fused or not, without recipes.

    Names may have the prefix `language_model.` or not.
    """
    tensors = {name.removeprefix("language_model."): x for name, x in tensors.items()}
    c = config.text
    found = {
        "text/embedding": tensors["model.embed_tokens.weight"],
        "text/head": tensors["lm_head.weight"],
        "text/norm/scale": tensors["model.norm.weight"],
    }
    for i in range(c.layers):
        path, prefix = f"text/layer_{i}/", f"model.layers.{i}."
        q, k, v, o = (tensors[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkvo")
        q = q.reshape(c.kv_heads, c.queries, c.head_dim, c.width)
        k, v = (x.reshape(c.kv_heads, c.head_dim, c.width) for x in (k, v))
        rows = [np.stack([*q[j], k[j], v[j]]) for j in range(c.kv_heads)]
        found[path + "attention/qkv"] = np.stack(rows)
        found[path + "attention/out"] = o.reshape(c.width, c.kv_heads, c.queries, c.head_dim)
        for norm, name in (("attention", "input"), ("feed_forward", "post_attention")):
            found[f"{path}{norm}_norm/scale"] = tensors[f"{prefix}{name}_layernorm.weight"]
        feed, mlp = prefix + "feed_forward.", "feed_forward/"
        if c.is_moe(i):
            found[path + "feed_forward/router"] = tensors[feed + "router.weight"]
            gates, ups, downs = _find_experts(tensors, feed + "experts.", c.experts)
            pairs = [np.stack(pair) for pair in zip(gates, ups, strict=True)]
            found[path + "feed_forward/gate_up"] = np.stack(pairs)
            found[path + "feed_forward/down"] = np.stack(downs)
            feed, mlp = feed + "shared_expert.", "feed_forward/shared/"
        gate, up = tensors[feed + "gate_proj.weight"], tensors[feed + "up_proj.weight"]
        found[path + mlp + "gate_up"] = np.stack([gate, up])
        found[path + mlp + "down"] = tensors[feed + "down_proj.weight"]
    return found | (_arrange_vision(tensors, config) if config.vision else {})


def _find_experts(tensors: Mapping[str, np.ndarray], at: str, experts: int) -> Any:
    if at + "down_proj" not in tensors:
        return [
            [tensors[f"{at}{e}.{x}_proj.weight"] for e in range(experts)]
            for x in ("gate", "up", "down")
        ]
    fused, down = tensors[at + "gate_up_proj"], tensors[at + "down_proj"]
    half = fused.shape[-1] // 2
    gates, ups = [x[:, :half].T for x in fused], [x[:, half:].T for x in fused]
    return gates, ups, [x.T for x in down]


def _arrange_vision(tensors: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    assert config.vision is not None
    width, heads = config.vision.width, config.vision.heads
    start = "vision_model."
    stored = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
    found = {
        "patch": stored["patch_embedding.linear.weight"],
        "class_embedding": stored["class_embedding"],
        "position_embedding": stored["positional_embedding_vlm"],
        "adapter/first": stored["vision_adapter.mlp.fc1.weight"],
        "adapter/second": stored["vision_adapter.mlp.fc2.weight"],
        "projector": tensors["multi_modal_projector.linear_1.weight"],
    }
    norms = {"norm_before": "layernorm_pre", "norm_after": "layernorm_post"}
    for i in range(config.vision.layers):
        path, prefix = f"layer_{i}/", f"model.layers.{i}."
        norms[path + "attention_norm"] = prefix + "input_layernorm"
        norms[path + "mlp_norm"] = prefix + "post_attention_layernorm"
        for end, bias in (("weight", ""), ("bias", "_bias")):
            qkv = [stored[f"{prefix}self_attn.{x}_proj.{end}"] for x in "qkv"]
            split = [x.reshape(heads, width // heads, *x.shape[1:]) for x in qkv]
            found[f"{path}qkv{bias}"] = np.stack(split)
            found[f"{path}up{bias}"] = stored[f"{prefix}mlp.fc1.{end}"]
            found[f"{path}down{bias}"] = stored[f"{prefix}mlp.fc2.{end}"]
        out = stored[prefix + "self_attn.o_proj.weight"]
        found[path + "out"] = out.reshape(width, heads, width // heads)
        found[path + "out_bias"] = stored[prefix + "self_attn.o_proj.bias"]
    for path, module in norms.items():
        found[path + "/scale"], found[path + "/bias"] = (
            stored[f"{module}.weight"],
            stored[f"{module}.bias"],
        )
    return {f"vision/{path}": x for path, x in found.items()}


def place_on_one(names: tuple[str, ...]) -> SingleDeviceSharding:
    """Place an array on the first device."""
    return SingleDeviceSharding(jax.devices()[0])


def place_on_mesh(**rules: str) -> Place:
    """Place arrays on a (2, 4) mesh of the axes data and model.

    Args:
        rules: logical axis -> mesh axis; other axes are replicated.
    """

    def place(names: tuple[str, ...]) -> NamedSharding:
        # Made when an array is placed: where tests are only collected, there may be one device.
        mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
        return NamedSharding(mesh, PartitionSpec(*(rules.get(name) for name in names)))

    return place
