"""The folder of a model: a local one, or a download from the Hugging Face hub."""

from importlib import resources
from pathlib import Path

from l4jax.checkpoint.errors import CheckpointError

# Without Meta's `original/*.pth`, which would double the download.
_ALLOWED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


BUNDLED = Path(str(resources.files("l4jax").joinpath("bundled")))
SAMPLE = BUNDLED / "chart.png"  # an image for questions to the bundled model


def find_bundled(folder: Path = BUNDLED) -> Path:
    """Find the folder of the trained model that comes with the package.

    Raises:
        CheckpointError: its weights are missing.
    """
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder} has no model.safetensors, the weights that come with l4jax: "
            "install l4jax again, or name a model with --model."
        )
    return folder


def find_folder(model: str | Path, *, revision: str | None = None) -> Path:
    """Find the folder of a model; download a name like meta-llama/Llama-4-Scout-17B-16E-Instruct.

    Args:
        model: a folder, or `owner/name` on the hub.
        revision: branch, tag or commit on the hub; the main branch if None.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be downloaded.
    """
    text = str(model)
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return folder
    if text and folder.exists():
        raise CheckpointError(f"{text} is a file: pass the folder that holds it.")
    owner, _, name = text.partition("/")
    if text[:1] in ("", ".", "/", "~") or not owner or not name or "/" in name or "\\" in text:
        raise CheckpointError(
            f"there is no folder {text!r}: pass one that exists, "
            "or a name on the Hugging Face hub, owner/name."
        )
    return _download(text, revision)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{name} at revision {revision}" if revision else name
    folder_instead = "or pass a folder that holds the checkpoint"
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_ALLOWED)
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{at} is gated: accept its license on https://huggingface.co/{name}, "
            f"log in with `hf auth login`, {folder_instead}."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{name} has no revision {revision}: see https://huggingface.co/{name}/commits."
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is neither a folder {name!r} nor such a repository on the Hugging Face hub; "
            f"if it is private, log in with `hf auth login`, {folder_instead}."
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is no name on the Hugging Face hub: {_first_line(error)}"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{at} is not in the local cache and the Hugging Face hub cannot be reached: "
            f"go online (and unset HF_HUB_OFFLINE), {folder_instead}."
        ) from None
    except errors.HfHubHTTPError as error:
        raise CheckpointError(
            f"the Hugging Face hub refuses {at} ({_first_line(error)}): "
            f"log in with `hf auth login`, try again later, {folder_instead}."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{at} could not be downloaded ({_first_line(error)}): "
            f"check network and disk, {folder_instead}."
        ) from None
    return Path(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
