"""Flags of the commands, generated from `EngineConfig`; spellings are vLLM's. No jax."""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from l4jax.engine.config import EngineConfig

_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_SWITCH = {"on": True, "off": False, None: None}


def parse_count(text: str) -> int:
    """Parse a count as vLLM does: 1k is 1000, 1K is 1024, 25.6k is 25600."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    size = float(found[1]) * _MULTIPLES[found[2]] if found else math.nan
    if not size.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count, such as 4096, 128k or 1M")
    return int(size)


def parse_json(kind: type, example: str) -> Callable[[str], Any]:
    """Return a parser of JSON values of a type; its error shows the example."""

    def parse(text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, kind):
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON such as {example}")
        return value

    return parse


parse_object = parse_json(dict, '{"key": 1}')


def parse_image_limit(text: str) -> dict[str, Any]:
    """Parse `image=10`, vLLM's older spelling, or JSON."""
    found = re.fullmatch(r"(\w+)=(\d+)", text)
    return {found[1]: int(found[2])} if found else parse_object(text)


KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "integer": {"type": int, "metavar": "N"},
    "count": {"type": parse_count, "metavar": "N"},
    "share": {"type": float, "metavar": "SHARE"},
    "object": {"type": parse_object, "metavar": "JSON"},
    "image limit": {"type": parse_image_limit, "metavar": "image=N"},
    "switch": {"choices": ("on", "off")},
    "flag": {"action": "store_true"},
    "on by default": {"action": argparse.BooleanOptionalAction},
}


def add_engine_arguments(
    parser: argparse.ArgumentParser,
    names: Iterable[str] | None = None,
    **defaults: Any,
) -> dict[str, argparse._ArgumentGroup]:
    """Add the flags of fields of `EngineConfig` to a parser.

    Args:
        parser: of a command.
        names: of the fields; None is all of them.
        defaults: of this command, where they differ from the fields'.

    Returns:
        The groups of flags by title, for further flags of the command.
    """
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name in fields if names is None else names:
        field, about = fields[name], fields[name].metadata
        group = groups.get(about["group"]) or parser.add_argument_group(about["group"])
        groups[about["group"]] = group
        options = dict(KINDS[about.get("kind", "text")])
        options |= {key: about[key] for key in ("choices", "metavar") if key in about}
        default = defaults.get(name, field.default)
        is_usual = default == field.default and "default_help" in about
        shown = about["default_help"] if is_usual else {True: "on"}.get(default, default)
        group.add_argument(
            "--" + name.replace("_", "-"),
            *about.get("aliases", ()),
            default=default,
            help=f"{about['help']} (default: {shown})",
            **options,
        )
    return groups


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line that has the flags of a mesh; refuse two spellings of it."""
    args = parser.parse_args(argv)
    sizes = [getattr(args, f"{kind}_parallel_size", None) for kind in ("tensor", "data")]
    if args.mesh is not None and any(size is not None for size in sizes):
        parser.error("--mesh and the parallel sizes are two spellings of one thing: give one")
    return args


def make_engine_config(
    args: argparse.Namespace, names: Iterable[str] | None = None, **changes: Any
) -> EngineConfig:
    """Make the configuration of parsed flags.

    Args:
        args: of a parser with the flags of `add_engine_arguments`.
        names: of the fields, as there.
        changes: fields of the command that are no flags.

    Raises:
        ValueError: as `EngineConfig` does, and for a template that cannot be read.
    """
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    values = {name: getattr(args, name) for name in (fields if names is None else names)}
    for name, value in values.items():
        if fields[name].metadata.get("kind") == "switch":
            values[name] = _SWITCH[value]
    values |= changes
    if values.get("chat_template") is not None:
        values["chat_template"] = read_template(values["chat_template"])
    return EngineConfig(**values)


def read_template(value: str) -> str:
    """Return a chat template, given as text or as the name of a file."""
    if "{" in value or "\n" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"--chat-template {value!r} cannot be read: {cause}.") from error
