"""Rules of the repository: levels, sizes, commands and names."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from l4jax import cli

ROOT = Path(__file__).parent.parent
LINES_OF_MODEL = 700
LINES_OF_SCRIPT = 100

# Importable without jax, so that --help and tokenizing are fast.
JAX_FREE = [
    "l4jax",
    "l4jax.cli",
    "l4jax.bench",
    "l4jax.config",
    "l4jax.engine.arguments",
    "l4jax.engine.config",
    "l4jax.engine.pages",
    "l4jax.engine.request",
    "l4jax.engine.scheduler",
    "l4jax.generate",
    "l4jax.serve",
    "l4jax.server.flags",
    "l4jax.text",
]

# Folders of a personal machine, and host names of private networks.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(?:root|work|home/\w+|Users/\w+|tmp/v)\b|\b[\w-]+\.(?:internal|corp)\b"
)


def test_imports_respect_levels() -> None:
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    result = _run(sys.executable, "-c", lint)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", JAX_FREE)
def test_imports_no_jax(module: str) -> None:
    loaded = f"import sys, {module}; print(*{{'jax', 'flax', 'torch'}} & set(sys.modules))"
    result = _run(sys.executable, "-c", loaded)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_model_has_at_most_700_lines() -> None:
    lines = {path.name: _count_lines(path) for path in (ROOT / "l4jax/model").rglob("*.py")}
    assert sum(lines.values()) <= LINES_OF_MODEL, lines


def test_scripts_are_short_and_end_in_main() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        text = path.read_text()
        assert 'if __name__ == "__main__":' in text, path.name
        main = text.index("\ndef main(")
        assert text.count("\n", main) <= LINES_OF_SCRIPT, path.name


def test_console_command_has_exactly_the_modules_with_a_main() -> None:
    commands = {
        path.stem
        for path in (ROOT / "l4jax").glob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert set(cli.COMMANDS) == commands - {"cli", "__main__"}
    assert all(module == f"l4jax.{name}" for name, (module, _) in cli.COMMANDS.items())


def test_console_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize(("words", "named"), [(["genrate"], "'genrate'"), ([], "no command")])
def test_console_command_refuses_unknown_commands_with_a_message(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "generate" in error


def _readme_commands() -> list[str]:
    """List the commands in the README's bash blocks, with continuation lines joined."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in commands if re.match(r"(python -m l4jax\.|l4jax )\w", line)]


@pytest.mark.parametrize("command", _readme_commands())
def test_readme_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command up to the end of its argument parsing."""
    words = shlex.split(command, comments=True)
    stops = [i for i, word in enumerate(words) if word in ("|", ">", "&&", "&", ";")]
    words = words[: stops[0]] if stops else words
    if words[0] == "python":
        module, rest = words[2], words[3:]
    else:
        module, rest = "l4jax.cli", words[1:]

    class ParsedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *rest])
    try:
        importlib.import_module(module).main()
    except ParsedError:
        return
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            return
        pytest.fail(f"{command}: refused with exit code {stop.code}")
    assert module == "l4jax.cli" or not rest, f"{module} never parsed its arguments"


def test_no_file_names_a_machine() -> None:
    found = []
    for path in _text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def _text_files() -> list[Path]:
    """List the text files of a clone, without those that tools leave."""
    binary = {".npz", ".png", ".jpg", ".safetensors", ".pyc"}
    made = {"__pycache__", "build", "dist", "node_modules", "venv"}
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in made
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name in (".ci", ".github"))
        ]
        # In a worktree .git is a file, and names a folder of this machine.
        names = [name for name in names if name != ".git" and Path(name).suffix not in binary]
        files += [Path(folder, name) for name in names]
    return files


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
