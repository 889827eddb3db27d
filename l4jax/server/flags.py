"""The flags of `l4jax.serve`, spelled as in vLLM where the thing is the same. No jax."""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from l4jax.server.options import MediaRules, Options

EXAMPLES = """examples:
  python -m l4jax.serve
  python -m l4jax.serve --model FOLDER --tensor-parallel-size 8 --max-model-len 128K
  python -m l4jax.serve FOLDER -tp 8 --kv-cache-dtype fp8 --limit-mm-per-prompt image=10
"""
MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
OPTIONS = Options()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="l4jax.serve",
        description="Serve Llama 4 behind OpenAI's API, with a page to chat on at /.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    _add_devices(parser)
    _add_engine(parser)
    _add_answers(parser)
    _add_http(parser)
    _add_limits(parser)
    args = parser.parse_args(argv)
    if args.model_tag is not None and args.model is not None:
        parser.error("the model is named twice: as an argument and as --model")
    sizes = args.tensor_parallel_size is not None or args.data_parallel_size is not None
    if args.mesh is not None and sizes:
        parser.error("--mesh and the parallel sizes are two spellings of one thing: give one")
    return args


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("model_tag", nargs="?", metavar="MODEL", help="folder or Hugging Face name; or --model")
    add("--model", help="(default: the tiny trained one that comes with l4jax)")
    add("--served-model-name", nargs="+", metavar="NAME", help="in requests (default: the model's)")
    add("--revision", help="branch, tag or commit on the hub (default: main)")
    add("--load-format", default="auto", choices=["auto", "dummy"], help="(default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="(default: auto)")
    add(
        "--quantization",
        "-q",
        choices=["fp8", "int4"],
        help="of the weights, while they are loaded (default: as they are stored)",
    )
    add("--lora", metavar="FOLDER", help="an adapter as PEFT saves it, merged into the weights")
    add("--chat-template", metavar="FILE", help="Jinja: a file, or itself (default: the model's)")
    add("--seed", type=int, default=0, help="for requests without one (default: %(default)s)")


def _add_devices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    add = group.add_argument
    add("--mesh", help="8, 2x4 or data=2,model=4 (default: 1)")
    add(
        "--kernels",
        default="auto",
        choices=["portable", "hopper", "auto"],
        help="hopper: faster, on an H100 or an H200 (default: auto, hopper where it runs)",
    )
    add(
        "--tensor-parallel-size", "-tp", type=int, metavar="N", help="devices that share each layer"
    )
    add("--data-parallel-size", "-dp", type=int, metavar="N", help="groups of them (default: 1)")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of an accelerator's memory, for weights and cache (default: %(default)s)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the engine")
    add = group.add_argument
    add(
        "--max-model-len",
        type=read_size,
        metavar="N",
        help="tokens, 128k or 1M (default: what fits)",
    )
    add("--max-num-seqs", type=int, default=64, metavar="N", help="that run (default: %(default)s)")
    add(
        "--max-num-batched-tokens",
        type=read_size,
        default=2048,
        metavar="N",
        help="of a step (default: %(default)s)",
    )
    add("--block-size", type=int, metavar="N", help="positions of a page (default: 128)")
    add(
        "--kv-cache-dtype",
        default="auto",
        choices=["auto", "fp8", "fp8_e4m3"],
        help="of cached keys and values (default: that of the weights)",
    )
    add(
        "--calculate-kv-scales",
        action="store_true",
        help="of an fp8 cache, where the checkpoint has none (default: 1)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the pages of prompts for those that begin alike (default: on)",
    )
    add(
        "--speculative-config",
        type=_read_object,
        metavar="JSON",
        help='{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4} '
        "(default: off)",
    )


def _add_answers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    add = group.add_argument
    add(
        "--generation-config",
        default="auto",
        choices=["auto", "vllm"],
        help="sampling defaults: the model's, or none (default: %(default)s)",
    )
    add(
        "--override-generation-config",
        type=_read_object,
        default={},
        metavar="JSON",
        help=f"sampling defaults on top: {', '.join(GENERATION_KEYS)}",
    )
    add("--max-logprobs", type=int, default=20, metavar="N", help="(default: %(default)s)")
    add("--enable-auto-tool-choice", action="store_true", help="taken, and always on")
    add(
        "--tool-call-parser",
        default="auto",
        choices=["auto", "llama4_pythonic", "llama4_json"],
        help="taken: one parser reads both forms (default: %(default)s)",
    )
    add(
        "--trust-request-chat-template",
        action="store_true",
        help="run chat templates that requests bring (default: refuse them)",
    )


def _add_http(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    add = group.add_argument
    add("--host", default=OPTIONS.host, help="to listen on (default: %(default)s)")
    add("--port", type=int, default=OPTIONS.port, help="(default: %(default)s)")
    add(
        "--api-key",
        nargs="+",
        default=os.environ.get("L4JAX_API_KEY", "").split(),
        metavar="KEY",
        help="one of these must be sent (default: L4JAX_API_KEY; none, and nobody is asked)",
    )
    add("--root-path", default="", help="where a proxy puts the server (default: /)")
    add("--ssl-keyfile", metavar="FILE", help="for https")
    add("--ssl-certfile", metavar="FILE", help="for https")
    add(
        "--allowed-origins",
        type=_read_strings,
        default=[],
        metavar="JSON",
        help='web sites that may call, such as ["https://a.example"] or ["*"] (default: none)',
    )
    add(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error", "critical"],
        help="(default: %(default)s)",
    )
    add(
        "--enable-log-requests",
        action="store_true",
        help="log the bodies of requests, prompts and all (default: never)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    add = group.add_argument
    add(
        "--max-waiting",
        type=int,
        default=OPTIONS.max_waiting,
        metavar="N",
        help="requests beyond those that run; more are refused, 429 (default: %(default)s)",
    )
    add(
        "--max-request-bytes",
        type=read_size,
        default=OPTIONS.max_request_bytes,
        metavar="N",
        help="of a body (default: %(default)s)",
    )
    add("--request-timeout", type=float, metavar="SECONDS", help="of an answer (default: none)")
    add(
        "--shutdown-timeout",
        type=float,
        default=OPTIONS.shutdown_timeout,
        metavar="SECONDS",
        help="for answers in flight once SIGTERM came (default: %(default)g)",
    )
    add(
        "--limit-mm-per-prompt",
        type=_read_limits,
        default={"image": 10},
        metavar="image=N",
        help='or {"image": N} (default: image=10)',
    )
    add(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="that pictures may be fetched from (default: none)",
    )
    add(
        "--allowed-local-media-path",
        type=Path,
        metavar="FOLDER",
        help="that file: URLs of pictures may name files in (default: none)",
    )


def read_size(text: str) -> int:
    """A count as vLLM takes it: 1k is 1000, 1K is 1024, 25.6k is 25600."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    size = float(found[1]) * MULTIPLES[found[2]] if found else math.nan
    if not size.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count, such as 4096, 128k or 1M")
    return int(size)


def make_options(args: argparse.Namespace) -> Options:
    """What of the flags is the server's. Raises `ValueError` for what cannot be."""
    for name in ("max_waiting", "shutdown_timeout", "max_logprobs"):
        if getattr(args, name) < 0:
            raise ValueError(f"{_spell(name)} is {getattr(args, name)}: it must be at least 0.")
    for name in ("max_request_bytes", "request_timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"{_spell(name)} is {value}: it must be above 0.")
    if (args.ssl_keyfile is None) != (args.ssl_certfile is None):
        raise ValueError("--ssl-keyfile and --ssl-certfile come together.")
    if not all(args.api_key):
        raise ValueError("--api-key is empty, and would let everybody in: give a key, or no flag.")
    folder = args.allowed_local_media_path
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allowed-local-media-path is {str(folder)!r}: there is no such folder.")
    model = args.model or args.model_tag or "l4jax-tiny"
    same = {field.name for field in dataclasses.fields(Options)} & set(vars(args))
    return Options(
        **{name: getattr(args, name) for name in same - {"allowed_origins"}},
        served_model_names=tuple(args.served_model_name or [model]),
        api_keys=tuple(args.api_key),
        max_new_tokens=args.override_generation_config.get("max_new_tokens"),
        trusts_request_templates=args.trust_request_chat_template,
        logs_requests=args.enable_log_requests,
        allowed_origins=tuple(args.allowed_origins),
        media=MediaRules(
            domains=tuple(domain.lower().rstrip(".") for domain in args.allowed_media_domains),
            folder=folder,
        ),
    )


def make_engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What of the flags is `LLM`'s, as its arguments."""
    mesh = args.mesh
    if mesh is None:
        mesh = f"{args.data_parallel_size or 1}x{args.tensor_parallel_size or 1}"
    names = (
        "revision load_format dtype kernels quantization lora seed gpu_memory_utilization "
        "max_model_len max_num_seqs max_num_batched_tokens block_size kv_cache_dtype "
        "calculate_kv_scales enable_prefix_caching speculative_config limit_mm_per_prompt"
    )
    return {
        "model": args.model or args.model_tag,
        "mesh": mesh,
        "chat_template": read_template(args.chat_template),
        **{name: getattr(args, name) for name in names.split()},
    }


def make_generation_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling defaults that the flags put in place of the model's."""
    changes = dict(args.override_generation_config)
    strange = [key for key in changes if key not in GENERATION_KEYS]
    if strange:
        raise ValueError(
            f"--override-generation-config has {strange[0]!r}: "
            f"it takes {', '.join(GENERATION_KEYS)}."
        )
    limit = changes.pop("max_new_tokens", None)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(
            f"--override-generation-config: max_new_tokens is {limit!r}: it must be at least 1."
        )
    return changes


def read_template(value: str | None) -> str | None:
    """A chat template, from a file or given outright."""
    if value is None or "{" in value or "\n" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--chat-template {value!r} cannot be read: {error.strerror}.") from error


def _read_json(kind: type, example: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, kind):
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON such as {example}")
        return value

    return read


_read_object = _read_json(dict, '{"key": 1}')
_read_list = _read_json(list, '["a"]')


def _read_strings(text: str) -> list[str]:
    values = _read_list(text)
    if not all(isinstance(value, str) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of strings")
    return values


def _read_limits(text: str) -> dict[str, Any]:
    """`image=10`, vLLM's older spelling, or JSON."""
    found = re.fullmatch(r"(\w+)=(\d+)", text)
    return {found[1]: int(found[2])} if found else _read_object(text)


def _spell(name: str) -> str:
    return "--" + name.replace("_", "-")
