"""The configuration of a model and its engine: one for the Python API and for all commands. No jax.

`LLM(model, **engine_args)` makes one from its keywords, `arguments.make_engine_config` from flags.
Each field's metadata describes its flag.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from l4jax.engine.ngram_proposer import SpeculativeConfig

DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "float": "float32"}
MODEL, DEVICES, ENGINE = "model", "devices", "engine"  # groups of flags in --help
IMAGES_PER_PROMPT = 10


class CapacityError(ValueError):
    """A requested size that does not fit in memory, or that is not a size."""


def _flag(group: str, help: str, **more: Any) -> dict[str, Any]:
    """Describe the flag of a field.

    Args:
        group: of flags, in which `--help` shows it.
        help: text of `--help`, without the default.
        more: `kind` (a key of `arguments.KINDS`), `choices`, `metavar`, `aliases`, and
            `default_help` where words describe the default.
    """
    return {"group": group, "help": help, **more}


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Arguments of `LLM` and of every command; names as in vLLM's `EngineArgs`.

    Attributes:
        model: a folder with a Hugging Face checkpoint or a converted one, or a name on the Hugging
            Face hub. None is the bundled tiny Llama 4, trained to read charts, add small numbers,
            find a fact in a text and call functions.
        revision: branch, tag or commit on the hub.
        load_format: "auto" reads the checkpoint's weights; "dummy" makes random ones.
        dtype: "auto" (the checkpoint's), "bfloat16" or "float32".
        quantization: "fp8" or "int4" quantizes the weights of a BF16 checkpoint while they are
            loaded; None keeps the stored format.
        quantize_attention: also quantize the attention projections; None is True for fp8 and False
            for int4.
        lora: the folder of an adapter in PEFT's layout. It is merged into the weights while they
            are loaded, before they are quantized; it applies to all requests at no cost.
        chat_template: a Jinja template that replaces the checkpoint's.
        seed: seeds requests that have no seed of their own, and random weights.
        attn_temperature_tuning: True or False overrides the model's config.
        mesh: "8" is eight devices that share each layer, "2x4" two groups of four,
            "data=2,model=4" the same. "seq=2,model=4" is context parallelism: the positions of a
            request's global layers are spread over two groups of four.
        tensor_parallel_size: devices that share each layer; `2x4` has 4.
        data_parallel_size: groups of devices, each with its own requests; `2x4` has 2.
        decode_context_parallel_size: groups into which the devices of `tensor_parallel_size` are
            divided, each with a part of every request's positions; 8 and 2 are the mesh
            "seq=2,model=4".
        enable_expert_parallel: give each device whole experts, instead of a part of every expert.
        kernels: "portable" runs everywhere; "hopper" is faster, on an H100 or an H200; "auto" is
            "hopper" where it runs.
        gpu_memory_utilization: share of an accelerator's memory for weights and page pool.
        max_model_len: tokens of prompt and output of a request; None is as many as fit, up to the
            model's maximum.
        max_num_seqs: requests that run together, over all data shards.
        max_num_batched_tokens: tokens of a step, over all data shards.
        block_size: positions of a page of the KV cache; None is 128, or its greatest common
            divisor with the attention chunk.
        kv_cache_dtype: dtype of cached keys and values: "auto" (the weights') or "fp8" (E4M3, half
            the bytes).
        calculate_kv_scales: calibrate an fp8 cache whose checkpoint has no scales. Before the first
            request, 512 random tokens run once. Each layer gets one scale for its keys and one for
            its values: the least power of two that keeps twice the largest value within e4m3's 448.
            They stay. Without calibration the scales are 1.
        kv_cache_memory_bytes: bytes of the page pool, over all devices of a data shard; None is the
            free memory of an accelerator, and 256 MiB on a CPU.
        enable_prefix_caching: share pages between prompts that begin with the same tokens.
        speculative_config: `{"method": "ngram", "num_speculative_tokens": 4}` drafts tokens from
            earlier text of the request; the outputs are the same.
        limit_mm_per_prompt: `{"image": 10}` allows ten images per prompt.
        loop_steps: decode steps per device call.

    Raises:
        ValueError: the message names the argument, its value and the valid values.
    """

    model: str | Path | None = field(
        default=None,
        metadata=_flag(MODEL, "folder or Hugging Face name", default_help="the bundled tiny model"),
    )
    revision: str | None = field(
        default=None, metadata=_flag(MODEL, "branch, tag or commit on the hub", default_help="main")
    )
    load_format: str = field(
        default="auto", metadata=_flag(MODEL, "dummy: random weights", choices=("auto", "dummy"))
    )
    dtype: str = field(
        default="auto",
        metadata=_flag(MODEL, "dtype of the weights", choices=("auto", "bfloat16", "float32")),
    )
    quantization: str | None = field(
        default=None,
        metadata=_flag(
            MODEL,
            "quantize the weights while loading",
            choices=("fp8", "int4"),
            aliases=("-q",),
            default_help="the stored format",
        ),
    )
    quantize_attention: bool | None = field(
        default=None,
        metadata=_flag(
            MODEL,
            "quantize the attention projections, too",
            kind="switch",
            default_help="on for fp8, off for int4",
        ),
    )
    lora: str | Path | None = field(
        default=None,
        metadata=_flag(
            MODEL,
            "an adapter in PEFT's layout, merged into the weights",
            metavar="FOLDER",
            default_help="none",
        ),
    )
    chat_template: str | None = field(
        default=None,
        metadata=_flag(
            MODEL, "Jinja: a file or the text", metavar="FILE", default_help="the model's"
        ),
    )
    seed: int = field(
        default=0,
        metadata=_flag(
            MODEL, "seed of requests without one, and of random weights", kind="integer"
        ),
    )
    attn_temperature_tuning: bool | None = field(
        default=None,
        metadata=_flag(
            MODEL,
            "temperature of global layers beyond the first chunk",
            kind="switch",
            default_help="the model's",
        ),
    )

    mesh: str | int | None = field(
        default=None, metadata=_flag(DEVICES, "8, 2x4 or data=2,model=4", default_help="1")
    )
    tensor_parallel_size: int | None = field(
        default=None,
        metadata=_flag(
            DEVICES,
            "devices that share each layer",
            kind="integer",
            aliases=("-tp",),
            default_help="1",
        ),
    )
    data_parallel_size: int | None = field(
        default=None,
        metadata=_flag(
            DEVICES,
            "groups of devices, each with its own requests",
            kind="integer",
            aliases=("-dp",),
            default_help="1",
        ),
    )
    decode_context_parallel_size: int | None = field(
        default=None,
        metadata=_flag(
            DEVICES,
            "groups of the tensor-parallel devices, each with a part of a request's positions",
            kind="integer",
            aliases=("-dcp",),
            default_help="1",
        ),
    )
    enable_expert_parallel: bool = field(
        default=False,
        metadata=_flag(
            DEVICES,
            "give each device whole experts",
            kind="flag",
            default_help="a part of every expert",
        ),
    )
    kernels: str = field(
        default="auto",
        metadata=_flag(
            DEVICES,
            "hopper: faster, on an H100 or an H200",
            choices=("portable", "hopper", "auto"),
            default_help="auto, hopper where it runs",
        ),
    )
    gpu_memory_utilization: float = field(
        default=0.9,
        metadata=_flag(
            DEVICES, "share of an accelerator's memory for weights and cache", kind="share"
        ),
    )

    max_model_len: int | None = field(
        default=None,
        metadata=_flag(
            ENGINE,
            "tokens of prompt and output of a request, such as 4096, 128k or 1M",
            kind="count",
            default_help="what fits",
        ),
    )
    max_num_seqs: int = field(
        default=8, metadata=_flag(ENGINE, "requests that run together", kind="integer")
    )
    max_num_batched_tokens: int = field(
        default=2048, metadata=_flag(ENGINE, "tokens of a step", kind="count")
    )
    block_size: int | None = field(
        default=None,
        metadata=_flag(ENGINE, "positions of a page", kind="integer", default_help="128"),
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata=_flag(
            ENGINE,
            "dtype of cached keys and values",
            choices=("auto", "fp8", "fp8_e4m3"),
            default_help="the weights'",
        ),
    )
    calculate_kv_scales: bool = field(
        default=False,
        metadata=_flag(
            ENGINE,
            "calibrate an fp8 cache on 512 random tokens if the checkpoint has no scales",
            kind="flag",
            default_help="scales of 1",
        ),
    )
    kv_cache_memory_bytes: int | None = field(
        default=None,
        metadata=_flag(
            ENGINE,
            "bytes of a data shard's page pool, such as 40G",
            kind="count",
            default_help="the free memory",
        ),
    )
    enable_prefix_caching: bool = field(
        default=True,
        metadata=_flag(
            ENGINE, "share pages between prompts with a common beginning", kind="on by default"
        ),
    )
    speculative_config: Mapping[str, Any] | None = field(
        default=None,
        metadata=_flag(
            ENGINE,
            '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}',
            kind="object",
            default_help="off",
        ),
    )
    limit_mm_per_prompt: Mapping[str, int] | None = field(
        default=None,
        metadata=_flag(
            ENGINE,
            'images of a prompt, at most; or {"image": N}',
            kind="image limit",
            default_help=f"image={IMAGES_PER_PROMPT}",
        ),
    )
    loop_steps: int = field(
        default=8, metadata=_flag(ENGINE, "decode steps per device call", kind="integer")
    )

    def __post_init__(self) -> None:
        names = ("tensor_parallel_size", "data_parallel_size", "decode_context_parallel_size")
        for name in names:
            if self.mesh is not None and getattr(self, name) is not None:
                raise ValueError(f"mesh and {name} are two spellings of one thing: give one.")
        tensor, seq = self.tensor_parallel_size or 1, self.decode_context_parallel_size
        if seq is not None and (seq < 1 or tensor % seq):
            raise ValueError(
                f"decode_context_parallel_size is {seq}: "
                f"it must divide tensor_parallel_size, which is {tensor}."
            )
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format is {self.load_format!r}: it is 'auto' or 'dummy'.")
        if self.lora is not None and self.load_format == "dummy":
            raise ValueError("lora is for a checkpoint's weights: load_format 'dummy' has none.")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype is {self.dtype!r}: it is auto, bfloat16 or float32 "
                "(float16 cannot hold the range of Llama 4's activations)."
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(
                f"seed is {str(self.seed)[:100]}: it must be from -2**63 to 2**63 - 1."
            )
        self._check_sizes()
        _read_images_per_prompt(self.limit_mm_per_prompt)
        _read_speculation(self.speculative_config)

    def _check_sizes(self) -> None:
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
        for name in (*sizes, "loop_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CapacityError(f"{name} is {value}: it must be at least 1.")
        if self.kv_cache_dtype not in ("auto", "fp8", "fp8_e4m3"):
            raise CapacityError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}: it is auto or fp8 (e4m3)."
            )
        if self.calculate_kv_scales and self.kv_cache_dtype == "auto":
            raise CapacityError(
                "calculate_kv_scales is for an fp8 cache, and kv_cache_dtype is 'auto': "
                "make it fp8, or leave calculate_kv_scales out."
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise CapacityError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}: "
                "it is a share, above 0 and at most 1."
            )

    @property
    def mesh_shape(self) -> str | int:
        """The mesh in the syntax of `sharding.parse_mesh`; without `mesh`, data x tensor size."""
        if self.mesh is not None:
            return self.mesh
        sizes = (self.data_parallel_size, self.tensor_parallel_size)
        data, tensor = (1 if size is None else size for size in sizes)
        seq = self.decode_context_parallel_size or 1
        if seq == 1:
            return f"{data}x{tensor}"
        return f"data={data},seq={seq},model={tensor // seq}"

    @property
    def max_images(self) -> int:
        """Images of a prompt, at most."""
        return _read_images_per_prompt(self.limit_mm_per_prompt)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, checked; None drafts nothing."""
        return _read_speculation(self.speculative_config)

    def divide(self, shards: int) -> tuple[int, int]:
        """Return the requests, and the tokens of a step, of each of `shards` data shards."""
        requests = -(-self.max_num_seqs // shards)
        return requests, max(-(-self.max_num_batched_tokens // shards), requests)


def _read_images_per_prompt(limits: Mapping[str, object] | None) -> int:
    limits = dict(limits or {})
    images = limits.pop("image", IMAGES_PER_PROMPT)
    if limits or not isinstance(images, int) or images < 0:
        raise ValueError(
            'limit_mm_per_prompt is like {"image": 10}: a count of images and nothing else.'
        )
    return images


def _read_speculation(config: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    if config is None:
        return None
    known = [field.name for field in dataclasses.fields(SpeculativeConfig)]
    unknown = sorted(set(config) - set(known))
    if unknown or "num_speculative_tokens" not in config:
        problem = f"has {', '.join(unknown)}" if unknown else "has no num_speculative_tokens"
        raise ValueError(f"speculative_config {problem}: it holds {', '.join(known)}.")
    return SpeculativeConfig(**config)
