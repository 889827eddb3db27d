"""The syntax of a mesh, and the errors of what is no mesh."""

import os
import subprocess
import sys

import jax
import pytest

import sharding.mesh
from sharding import MeshError, make_mesh, prepare_devices
from sharding.mesh import parse_mesh


@pytest.mark.parametrize(
    ("text", "data", "seq", "model"),
    [
        ("8", 1, 1, 8),
        (8, 1, 1, 8),
        ("2x4", 2, 1, 4),
        (" 2X4 ", 2, 1, 4),
        ("data=2,model=4", 2, 1, 4),
        ("data=2,seq=2,model=2", 2, 2, 2),
        ("seq=8", 1, 8, 1),
        ("model=4, data=2", 2, 1, 4),
        ("data=8", 8, 1, 1),
        ("1", 1, 1, 1),
    ],
)
def test_a_mesh_can_be_written_in_several_ways(text, data, seq, model):
    assert parse_mesh(text) == {"data": data, "seq": seq, "model": model}
    mesh = make_mesh(text)
    assert dict(mesh.shape) == {"data": data, "seq": seq, "model": model}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write 8, 2x4"),
        ("eight", "write 8, 2x4"),
        ("2x", "write 8, 2x4"),
        ("-3", "write 8, 2x4"),
        ("0", "at least one device"),
        ("data=0,model=8", "at least one device"),
        ("depth=2", "no axis 'depth'; the axes are data, seq, model"),
        ("model=2,model=4", "stands there twice"),
    ],
)
def test_other_syntax_is_refused(text, says):
    with pytest.raises(MeshError, match=says):
        parse_mesh(text)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(MeshError, match=r"--mesh 16: it needs 16 devices and there are 8"):
        prepare_devices("16")


def test_cpu_devices_that_jax_makes_are_reported():
    line = prepare_devices("8")
    assert line == "No accelerator found: the mesh data=1,model=8 is made of 8 CPU devices."
    assert prepare_devices("1") is None


def test_a_mesh_takes_the_first_devices_in_order():
    assert make_mesh("2x2").devices.flatten().tolist() == jax.devices()[:4]


@pytest.mark.parametrize(("asked", "taken"), [(None, "0.97"), ("0.5", "0.5")])
def test_jax_preallocates_97_percent_of_a_gpu_unless_the_environment_sets_a_share(asked, taken):
    """Read from the environment that jax starts with, in a separate process."""
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    environment = {k: v for k, v in os.environ.items() if k != name}
    environment |= {name: asked} if asked else {}
    code = f"import os, sharding; sharding.prepare_devices(1); print(os.environ[{name!r}])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == taken


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_memory_share_of_the_user_is_kept_under_either_name(name, monkeypatch):
    """jaxlib raises if both names are set."""
    for other in sharding.mesh._MEM_FRACTIONS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("NPROC", "16")
    monkeypatch.setenv(name, "0.5")
    monkeypatch.setattr(sharding.mesh, "_has_backend", lambda: False)
    monkeypatch.setattr(sharding.mesh._jax.config, "update", lambda *_: None)
    prepare_devices("1")
    assert os.environ[name] == "0.5"
    assert sum(x in os.environ for x in sharding.mesh._MEM_FRACTIONS) == 1
    assert sharding.mesh.find_gpu_share() == 0.5
