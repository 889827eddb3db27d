"""Laws of finding a model: folders are used, names are downloaded, errors give the way out."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from l4jax import checkpoint
from l4jax.checkpoint import CheckpointError, find_folder

SCOUT = "meta-llama/Llama-4-Scout-17B-16E-Instruct"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The calls of the hub's download, which returns a folder."""
    found: list[Any] = []

    def download(name: str, **kwargs: Any) -> str:
        found.append((name, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return found


def test_existing_folder_is_used(tmp_path: Path, downloads: list[Any]) -> None:
    assert find_folder(tmp_path) == find_folder(str(tmp_path)) == tmp_path
    assert downloads == []


def test_existing_folder_precedes_a_hub_name(
    tmp_path: Path, downloads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / SCOUT).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder(SCOUT) == Path(SCOUT)
    assert downloads == []


def test_hub_name_is_downloaded_without_pickles(tmp_path: Path, downloads: list[Any]) -> None:
    assert find_folder(SCOUT, revision="abc") == tmp_path
    [(name, kwargs)] = downloads
    assert (name, kwargs["revision"]) == (SCOUT, "abc")
    wanted = [Path("x" + pattern.removeprefix("*")).suffix for pattern in kwargs["allow_patterns"]]
    assert {".safetensors", ".json", ".jinja"} <= set(wanted)
    assert not {".pth", ".bin", ".pt"} & set(wanted)


@pytest.mark.parametrize("text", ["./x", "/no/x", "~/no/such", "", "scout", "a/b/c", "a/", "/x"])
def test_local_path_is_never_downloaded(text: str, downloads: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        find_folder(text)
    assert downloads == []


def test_file_is_refused_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file: pass the folder"):
        find_folder(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        (errors.GatedRepoError, rf"gated: accept its license on https://.*{SCOUT}.*hf auth login"),
        (
            errors.RepositoryNotFoundError,
            r"neither a folder .* nor such a repository.*hf auth login",
        ),
        (errors.RevisionNotFoundError, r"no revision main2"),
        (errors.LocalEntryNotFoundError, r"cannot be reached: go online.*pass a folder"),
        (errors.HfHubHTTPError, r"refuses .*401 Unauthorized.*hf auth login"),
        (errors.HFValidationError, r"is no name on the Hugging Face hub"),
        (OSError, r"could not be downloaded \(401 Unauthorized\): check network and disk"),
    ],
)
def test_hub_errors_give_the_way_out(
    kind: type[Exception], way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        error = kind.__new__(kind)  # without the HTTP response that its constructor needs
        error.args = ("401 Unauthorized\nand much more",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=way_out) as caught:
        find_folder(SCOUT, revision="main2")
    assert "\n" not in str(caught.value)


def test_bundled_model_has_weights_or_is_refused(tmp_path):
    assert checkpoint.find_bundled() == checkpoint.BUNDLED and checkpoint.SAMPLE.is_file()
    with pytest.raises(CheckpointError, match=r"model\.safetensors, .* with --model"):
        checkpoint.find_bundled(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert checkpoint.find_bundled(tmp_path) == tmp_path
