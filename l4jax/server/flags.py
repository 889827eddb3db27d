"""The flags of `l4jax.serve`; spellings are vLLM's. No jax."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4jax.engine.arguments import (
    add_engine_arguments,
    parse_arguments,
    parse_count,
    parse_json,
    parse_object,
)
from l4jax.engine.config import MODEL
from l4jax.json_file import quote
from l4jax.server.options import MediaRules, Options

EXAMPLES = """examples:
  python -m l4jax.serve
  python -m l4jax.serve --model FOLDER --tensor-parallel-size 8 --max-model-len 128K
  python -m l4jax.serve FOLDER -tp 8 --kv-cache-dtype fp8 --limit-mm-per-prompt image=10
"""
GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
OPTIONS = Options()
TUNING_KEY = "attn_temperature_tuning"  # of --override-generation-config, as in vLLM


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="l4jax.serve",
        description="Serve Llama 4 with OpenAI's API, and a chat page at /.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = add_engine_arguments(parser, max_num_seqs=64)
    add = groups[MODEL].add_argument
    add("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    add("--served-model-name", nargs="+", metavar="NAME", help="in requests (default: the model's)")
    _add_answers(parser)
    _add_http(parser)
    _add_limits(parser)
    args = parse_arguments(parser, argv)
    if args.model_tag is not None and args.model is not None:
        parser.error("the model is named twice: as an argument and as --model")
    args.model = args.model or args.model_tag
    _take_temperature_tuning(parser, args)
    return args


def _take_temperature_tuning(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Take a key of vLLM's that changes the model, and not its sampling defaults."""
    changes = dict(args.override_generation_config)
    value = changes.pop(TUNING_KEY, None)
    if value is None:
        return
    if not isinstance(value, bool):
        parser.error(
            f"--override-generation-config: {TUNING_KEY} is {quote(value)}: it is true or false"
        )
    switch = "on" if value else "off"
    if args.attn_temperature_tuning not in (None, switch):
        parser.error(f"--attn-temperature-tuning and {TUNING_KEY} contradict each other")
    args.attn_temperature_tuning = switch
    args.override_generation_config = changes


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
        type=parse_object,
        default={},
        metavar="JSON",
        help=f"sampling defaults on top: {', '.join(GENERATION_KEYS)}; {TUNING_KEY} as by its flag",
    )
    add("--max-logprobs", type=int, default=20, metavar="N", help="(default: %(default)s)")
    add(
        "--enable-auto-tool-choice",
        action="store_true",
        help="accepted; tool calls are always parsed",
    )
    add(
        "--tool-call-parser",
        default="auto",
        choices=["auto", "llama4_pythonic", "llama4_json"],
        help="accepted: one parser reads both forms (default: %(default)s)",
    )
    add(
        "--trust-request-chat-template",
        action="store_true",
        help="run chat templates of requests (default: refuse them)",
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
        help="one of these keys is required (default: L4JAX_API_KEY; none is required)",
    )
    add("--root-path", default="", help="path of the server behind a proxy (default: /)")
    add("--ssl-keyfile", metavar="FILE", help="for https")
    add("--ssl-certfile", metavar="FILE", help="for https")
    add(
        "--allowed-origins",
        type=_parse_strings,
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
        help="log the bodies of requests, including prompts (default: never)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    add = group.add_argument
    add(
        "--max-waiting",
        type=int,
        default=OPTIONS.max_waiting,
        metavar="N",
        help="waiting requests, at most; more are refused with 429 (default: %(default)s)",
    )
    add(
        "--max-request-bytes",
        type=parse_count,
        default=OPTIONS.max_request_bytes,
        metavar="N",
        help="bytes of a body (default: %(default)s)",
    )
    add("--request-timeout", type=float, metavar="SECONDS", help="of a response (default: none)")
    add(
        "--shutdown-timeout",
        type=float,
        default=OPTIONS.shutdown_timeout,
        metavar="SECONDS",
        help="for responses in flight after SIGTERM (default: %(default)g)",
    )
    add(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts that images may be fetched from (default: none)",
    )
    add(
        "--allowed-local-media-path",
        type=Path,
        metavar="FOLDER",
        help="folder that file: URLs of images may read (default: none)",
    )


def make_options(args: argparse.Namespace) -> Options:
    """Make the server's options of the flags; ValueError for impossible values."""
    for name in ("max_waiting", "shutdown_timeout", "max_logprobs"):
        if getattr(args, name) < 0:
            raise ValueError(
                f"{_format_flag(name)} is {getattr(args, name)}: it must be at least 0."
            )
    for name in ("max_request_bytes", "request_timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"{_format_flag(name)} is {value}: it must be above 0.")
    if (args.ssl_keyfile is None) != (args.ssl_certfile is None):
        raise ValueError("--ssl-keyfile and --ssl-certfile come together.")
    if not all(args.api_key):
        raise ValueError(
            "--api-key is empty, and would accept every request: give a key, or no flag."
        )
    folder = args.allowed_local_media_path
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allowed-local-media-path is {str(folder)!r}: there is no such folder.")
    model = args.model or "l4jax-tiny"
    named = {field.name for field in dataclasses.fields(Options)} & set(vars(args))
    return Options(
        **{name: getattr(args, name) for name in named - {"allowed_origins"}},
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


def make_generation_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Make the changes of `--override-generation-config` to the sampling defaults."""
    changes = dict(args.override_generation_config)
    unknown = [key for key in changes if key not in GENERATION_KEYS]
    if unknown:
        raise ValueError(
            f"--override-generation-config has {unknown[0]!r}: "
            f"it takes {', '.join((*GENERATION_KEYS, TUNING_KEY))}."
        )
    limit = changes.pop("max_new_tokens", None)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(
            f"--override-generation-config: max_new_tokens is {limit!r}: it must be at least 1."
        )
    return changes


def _parse_strings(text: str) -> list[str]:
    values = parse_json(list, '["a"]')(text)
    if not all(isinstance(value, str) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of strings")
    return values


def _format_flag(name: str) -> str:
    return "--" + name.replace("_", "-")
