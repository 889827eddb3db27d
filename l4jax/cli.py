"""The console command: ``l4jax generate ...`` opens the door ``python -m l4jax.generate ...``.

Nothing is imported before it is known which door is meant, so ``l4jax --help`` answers at once.
"""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": ("l4jax.generate", "answer a prompt, with or without pictures"),
    "serve": ("l4jax.serve", "answer over HTTP as OpenAI's API does"),
    "convert": ("l4jax.convert", "turn a checkpoint into another format"),
    "bench": ("l4jax.bench", "measure a model of random weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Opens the door that the first word names and hands it the rest.

    Args:
      argv: the words after the command; those of the process if None.

    Returns:
      The exit code: the door's own (0 if it returns none), 2 for a door that does not exist or
      none at all.
    """
    words = sys.argv[1:] if argv is None else argv
    door, *rest = words or [""]
    if door in ("-h", "--help"):
        print(_help())
        return 0
    if door not in COMMANDS:
        problem = f"there is no door {door!r}" if door else "no door named"
        print(f"l4jax: {problem}; the doors are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[door]
    sys.argv = [f"l4jax {door}", *rest]  # the name that the door's own --help shows
    return importlib.import_module(module).main() or 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    doors = [f"  {door:{width}}  {purpose}" for door, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: l4jax DOOR ...",
            "",
            "Llama 4 in JAX. `l4jax DOOR ...` is `python -m l4jax.DOOR ...`.",
            "",
            *doors,
            "",
            "`l4jax DOOR --help` says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
