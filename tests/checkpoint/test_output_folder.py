"""Conversions keep their source and the links to their target."""

import os
from pathlib import Path

import pytest

from l4jax.checkpoint import CheckpointError
from l4jax.checkpoint.output_folder import _check_folders, write_atomically


def test_a_folder_inside_the_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="inside the checkpoint"):
        _check_folders(tmp_path, tmp_path / "a" / "b", overwrite=False)


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == mount)
    with pytest.raises(CheckpointError, match="is a mount point"):
        _check_folders(tmp_path / "source", mount, overwrite=False)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_to_the_target_stays_a_link(is_there: bool, tmp_path: Path) -> None:
    source, target, link = (tmp_path / name for name in ("source", "disk/target", "link"))
    source.mkdir()
    (source / "config.json").write_text("{}")
    target.parent.mkdir()
    if is_there:
        target.mkdir()
    link.symlink_to(target)
    with write_atomically(source, link, 1) as unfinished:
        assert unfinished.parent == target.parent
        (unfinished / "weights").write_text("new")
    assert link.is_symlink()
    assert (target / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "source"]
