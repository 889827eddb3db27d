# pyright: strict
"""JSON files of a checkpoint: read with errors that name the file, and values for messages."""

import json
import reprlib
from pathlib import Path
from typing import Any, cast

MAX_BYTES = 1 << 28  # an index of a million tensors takes less
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring = 2, 3, 8, 60


def read_object(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: of the file.
        error: the type of the errors: one sentence that names the file.
    """
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise error(f"{path} {problem}: copy it from the model's Hugging Face repository.")
    if path.stat().st_size > MAX_BYTES:
        raise error(f"{path} has more than {MAX_BYTES} bytes: download it again.")
    try:
        value: Any = json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise error(f"{path} is nested too deeply: download it again.") from None
    except (ValueError, OSError) as cause:
        raise error(f"{path} is not JSON: {cause}; download it again.") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds {quote(value)}, not a JSON object: download it again.")
    return cast(dict[str, Any], value)


def read_object_if_present(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Read the object in a JSON file; a missing file reads as an empty object."""
    return read_object(path, error) if path.exists() else {}


def quote(value: Any) -> str:
    """Format a value for a message, in at most 100 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
