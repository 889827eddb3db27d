"""fp8 logits equal Hugging Face's with the same rounding of activations.

The reference computes with the dequantized weights in float32. The input of each quantized matrix
is rounded to e4m3 by torch, per token, with the scale amax / 448. The remaining tolerance is
float32's error, 1e-5 of the logits' scale.

A value that is a tie between two e4m3 numbers, within float32's error, may be rounded either way:
the reference then takes l4jax's rounding. All other values must agree.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama4 import modeling_llama4

from l4jax import checkpoint
from l4jax.kernels import formats
from tests import models, quantized, weights
from tests.checkpoint.published import place_on_one
from tests.reference import oracle

CASES: list[tuple[quantized.Scheme, weights.Kind]] = [
    ("fp8-dynamic", "scout"),
    ("fp8-dynamic", "maverick"),
    ("maverick-fp8", "maverick"),
    ("modelopt-fp8", "scout"),
]
ERROR = 1e-5  # accumulated float32 error, relative to a token's largest value
QUANTIZE_TOKENS = formats.quantize_tokens
TOKENS = 29  # three chunks of eight and a partial one


@dataclasses.dataclass
class Rounding:
    """The activations that l4jax rounded, in the order of products, for the reference to follow.

    Attributes:
        ours: e4m3 values [.., T, in] as float32, one array per rounding.
        at: the number of roundings that the reference has followed.
        ties: elements that the two sides rounded differently.
    """

    ours: list[np.ndarray] = dataclasses.field(default_factory=list)
    at: int = 0
    ties: int = 0

    def record(self, x: Any, summed: tuple[int, ...]) -> Any:
        """Replace `formats.quantize_tokens`, recording its result."""
        rounded, scale = QUANTIZE_TOKENS(x, summed)

        def take(values: Any) -> None:
            values = np.asarray(values)
            kept = values.ndim - len(summed)  # [E, T] or [T]
            self.ours.append(values.reshape(*values.shape[:kept], -1)[..., :TOKENS, :])

        jax.debug.callback(take, rounded.astype(jnp.float32), ordered=True)
        return rounded, scale

    def round(self, x: torch.Tensor, *, is_same: bool = False) -> torch.Tensor:
        """Round an input of the reference; `is_same` if another matrix reads the previous input."""
        self.at += not is_same
        ours = torch.from_numpy(np.array(self.ours[self.at - 1])).reshape(x.shape)
        amax = x.abs().amax(-1, keepdim=True)
        scale = torch.where(amax > 0, amax / 448, 1.0)
        steps = x / scale
        rounded = steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        differs = rounded != ours
        border = (rounded + ours)[differs] / 2
        assert ((steps[differs] - border).abs() <= 448 * ERROR).all()
        self.ties += 0 if is_same else int(differs.sum())
        return ours * scale


def fuse(decoded: weights.Tensors) -> weights.Tensors:
    """Fuse experts to the reference's layout: `[E, in, out]`, gate first."""
    found = {name: x for name, x in decoded.items() if ".experts." not in name}
    experts: dict[str, list[np.ndarray]] = {}
    numbers = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight")
    parts: list[tuple[Any, np.ndarray]] = [
        (numbers.fullmatch(name), x) for name, x in decoded.items() if ".experts." in name
    ]
    for match, x in sorted(parts, key=lambda part: (int(part[0][2]), part[0][3])):  # gate, up
        if match[3] == "down":
            experts.setdefault(match[1] + ".down_proj", []).append(x.T)
        elif match[3] == "gate":
            experts.setdefault(match[1] + ".gate_up_proj", []).append(x.T)
        else:
            last = experts[match[1] + ".gate_up_proj"]
            last[-1] = np.concatenate([last[-1], x.T], axis=1)
    return found | {name: np.stack(matrices) for name, matrices in experts.items()}


def build_reference(raw: dict[str, Any], decoded: weights.Tensors) -> Any:
    model = oracle.build(raw, 0)
    state = {name: torch.from_numpy(x.copy()) for name, x in fuse(decoded).items()}
    model.load_state_dict(state, strict=True)
    return model


def round_inputs(
    model: Any, linears: set[str], rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round the inputs of the experts and of these modules."""

    def run_experts(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = rounding.round(x.view(self.num_experts, -1, self.hidden_size))
        gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
        hidden = rounding.round(up * self.act_fn(gate))
        return torch.bmm(hidden, self.down_proj).view(-1, self.hidden_size)

    monkeypatch.setattr(modeling_llama4.Llama4TextExperts, "forward", run_experts)
    for name in linears:
        # The second and third module that share an input.
        is_same = name.endswith((".up_proj", ".k_proj", ".v_proj"))

        def hook(_: Any, args: Any, is_same: bool = is_same) -> Any:
            return (rounding.round(args[0], is_same=is_same), *args[1:])

        model.get_submodule(name).register_forward_pre_hook(hook)


@pytest.mark.parametrize(("scheme", "kind"), CASES)
def test_fp8_logits_equal_the_reference_with_rounded_activations(
    scheme: quantized.Scheme, kind: weights.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, ids = weights.tiny_config(kind), weights.random_ids(TOKENS, 3)
    stored = quantized.write_checkpoint(tmp_path, raw, 0, scheme)
    reference = build_reference(raw, quantized.decode_tensors(stored, scheme))
    plain = oracle.logits(reference, ids)

    rounding = Rounding()
    monkeypatch.setattr(formats, "quantize_tokens", rounding.record)
    config = checkpoint.load_config(tmp_path)
    params = checkpoint.load(tmp_path, config, "float32", place_on_one, progress=False)
    jax.clear_caches()  # programs that do not record
    ours = models.run_in_pieces(models.Tiny(config, params), ids, [])
    jax.effects_barrier()
    jax.clear_caches()

    linears = {
        name.removesuffix(".weight")
        for name, x in stored.items()
        if x.dtype.itemsize == 1 and name.endswith(".weight") and ".experts." not in name
    }
    round_inputs(reference, linears, rounding, monkeypatch)
    wanted = oracle.logits(reference, ids)
    assert rounding.at == len(rounding.ours) >= 4
    assert rounding.ties < 1e-3 * sum(x.size for x in rounding.ours)
    top = np.abs(wanted).max()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * top)
    # The rounding matters: without it the reference's logits are far away.
    assert np.abs(plain - wanted).max() > 1e-3 * top
