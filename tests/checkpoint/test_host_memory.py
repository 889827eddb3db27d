"""Loading more than 4 GiB: host memory stays below the weights, the largest shard and 2 GiB.

On a CPU, device memory is host memory. The test measures the peak resident memory of a new process,
with mapped files, Python and jax, minus the bytes of the loaded parameters: the memory that an
accelerator's host would need.
"""

import itertools
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from l4jax.checkpoint.safetensors import TensorSpec, count_bytes
from tests import weights

GIB = 2**30
LAYERS, EXPERTS, WIDTH, VOCAB = 5, 16, 2048, 2**16
# The bytes of 1, the last value of each tensor; all other values are 0.
ONE = {"BF16": b"\x80\x3f", "F8_E4M3": b"\x38"}

CHILD = """
import json, re, sys
import jax, numpy as np
from l4jax import checkpoint
from l4jax.engine.runner import Runner

folder, quantization = sys.argv[1], sys.argv[2] or None
runner = Runner(checkpoint.load_config(folder), "1", "bfloat16")
runner.load(folder, quantization=quantization, progress=False)
status = open("/proc/self/status").read()
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
leaves = jax.tree_util.tree_flatten_with_path(runner.params)[0]
ones = 0
for path, array in leaves:
    if str(path[-1]) != ".scale":
        values = np.asarray(array).reshape(-1)
        ones += int(np.count_nonzero(values.view(f"u{values.itemsize}")))
print(json.dumps({"peak": peak, "params": sum(x.nbytes for _, x in leaves), "ones": ones}))
"""


def list_shards(config: Mapping[str, Any], format: str) -> list[dict[str, TensorSpec]]:
    """List the tensors of each shard: one layer per shard, other tensors in the first one."""
    specs: dict[str, TensorSpec] = {}
    for name, shape in weights.tensor_shapes(config).items():
        if len(shape) < 3 or format == "bf16":
            specs[name] = "BF16", shape
            continue
        at, projection = name.rsplit(".", 1)
        halves = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        matrix = shape[2] // len(halves), shape[1]
        for expert, half in itertools.product(range(shape[0]), halves):
            specs[f"{at}.{expert}.{half}.weight"] = "F8_E4M3", matrix
            specs[f"{at}.{expert}.{half}.weight_scale"] = "BF16", (matrix[0], 1)
    shards: list[dict[str, TensorSpec]] = [{} for _ in range(LAYERS)]
    for name, spec in specs.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        shards[int(layer[1]) if layer else 0][name] = spec
    return shards


def write_hollow(path: Path, specs: Mapping[str, TensorSpec]) -> int:
    """Write a sparse file of zeros, with a 1 at the end of each tensor; return its length."""
    header, end = {}, 0
    for name, spec in specs.items():
        begin, end = end, end + count_bytes(spec)
        header[name] = {"dtype": spec[0], "shape": spec[1], "data_offsets": (begin, end)}
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for name, spec in specs.items():
            file.seek(8 + len(content) + header[name]["data_offsets"][1] - len(ONE[spec[0]]))
            file.write(ONE[spec[0]])
        return file.tell()


@pytest.fixture
def hollow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    """A checkpoint: (folder, bytes of the largest shard, number of tensors without scales)."""
    format = request.param
    config = weights.text_only(
        weights.tiny_config(
            "scout",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=4096 if format == "bf16" else 8192,
            num_local_experts=EXPERTS,
            num_hidden_layers=LAYERS,
        )
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes, weight_map = [], {}
    for number, specs in enumerate(list_shards(config, format), 1):
        name = f"model-{number:05}-of-{LAYERS:05}.safetensors"
        sizes.append(write_hollow(tmp_path / name, specs))
        weight_map |= dict.fromkeys(specs, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sum(sizes) > 4 * GIB
    count = sum(not name.endswith("_scale") for name in weight_map)
    yield tmp_path, max(sizes), count
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hollow", "quantization", "least"),
    [("fp8", "", 4 * GIB), ("bf16", "fp8", 2 * GIB)],
    indirect=["hollow"],
)
def test_host_memory_stays_below_a_shard_and_two_gibibytes(
    hollow: tuple[Path, int, int], quantization: str, least: int
) -> None:
    folder, largest, count = hollow
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), quantization],
        capture_output=True,
        text=True,
        timeout=300,
        # The programs run for seconds: XLA's optimizations pay off.
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ones"] == count  # each tensor was read to its end
    assert found["params"] > least
    over = found["peak"] - found["params"]
    sizes = [f"{size / GIB:.2f}" for size in (over, found["params"], largest)]
    print("GiB in addition to the parameters, of the parameters, of the largest shard:", *sizes)
    assert over < largest + 2 * GIB
