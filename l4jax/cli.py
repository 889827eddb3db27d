"""The console command: ``l4jax generate ...`` runs ``python -m l4jax.generate ...``.

Only the module of the named command is imported, so ``l4jax --help`` is fast.
"""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": ("l4jax.generate", "complete a prompt, with or without images"),
    "serve": ("l4jax.serve", "serve OpenAI's API over HTTP"),
    "convert": ("l4jax.convert", "convert a checkpoint to another format"),
    "bench": ("l4jax.bench", "measure a model of random weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, with the other words.

    Args:
      argv: the words after `l4jax`; None is the process's.

    Returns:
      The command's exit code (0 if it returns None); 2 for an unknown command or none.
    """
    words = sys.argv[1:] if argv is None else argv
    command, *rest = words or [""]
    if command in ("-h", "--help"):
        print(_format_help())
        return 0
    if command not in COMMANDS:
        problem = f"there is no command {command!r}" if command else "no command given"
        print(f"l4jax: {problem}; the commands are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[command]
    sys.argv = [f"l4jax {command}", *rest]  # the program's name in error messages
    return importlib.import_module(module).main() or 0


def _format_help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {purpose}" for command, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: l4jax COMMAND ...",
            "",
            "Llama 4 in JAX. `l4jax COMMAND ...` is `python -m l4jax.COMMAND ...`.",
            "",
            *lines,
            "",
            "`l4jax COMMAND --help` lists the flags of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
