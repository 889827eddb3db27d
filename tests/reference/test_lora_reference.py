"""Adapters are exchanged with PEFT: l4jax merges PEFT's, and PEFT applies l4jax's."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from l4jax import checkpoint
from l4jax.checkpoint import peft as ours
from tests import models, tiers, weights
from tests.adapters import make_adapter
from tests.checkpoint.published import place_on_one
from tests.reference import oracle
from tests.test_model import assert_close

# PEFT uses a name that transformers deprecates.
# It applies patterns to parameters, too, and warns that they match no module.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
SEED = 5
ATTENTION = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
]  # of vision, too: PEFT matches suffixes
# Different widths, so that both layouts of fused experts have different shapes.
SIZES: dict[str, Any] = {"num_hidden_layers": 4, "intermediate_size": 48}


KINDS = ["scout", "maverick"]


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    weights.write_checkpoint(folder, weights.tiny_config(request.param, **SIZES), SEED)
    return folder


def run_ours(base: Path, lora: Path | None, ids: np.ndarray, pixels: Any = None) -> np.ndarray:
    config = checkpoint.load_config(base)
    adapter = checkpoint.read_adapter(lora, config) if lora else None
    params = checkpoint.load(base, config, np.float32, place_on_one, lora=adapter, progress=False)
    tiny = models.Tiny(config, params)
    features = None if pixels is None else tiny.encode(pixels)
    return models.run_in_pieces(tiny, ids, [9], features_MD=features)


def fill(model: Any) -> None:
    """Fill factors with random values: PEFT initializes B with zeros."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            size = 0.3 if "lora_B" in name else parameter.shape[-1] ** -0.5
            values = size * torch.randn(parameter.shape, generator=generator)
            parameter.data = values


def adapt(base: Path, **targets: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **targets)
    model = peft.get_peft_model(oracle.load(base), config)
    fill(model)
    return model.eval()


FEED = "feed_forward."
CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "query and value, rank-stabilized": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
    },
    "shared expert or dense": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "experts": {
        "target_modules": [],
        "target_parameters": [FEED + "experts.gate_up_proj", FEED + "experts.down_proj"],
    },
    "half of the experts": {
        "target_modules": [],
        "target_parameters": [FEED + "experts.down_proj"],
    },
    "every linear": {"target_modules": "all-linear"},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "target_parameters": [FEED + "experts.down_proj"],
        "rank_pattern": {"q_proj": 2, r".*layers\.1\.self_attn\.o_proj": 5, "experts.down_proj": 4},
        "alpha_pattern": {
            "v_proj": 1,
            r"layers\.2\.self_attn\.q_proj": 12.5,
            "experts.down_proj": 2,
        },
    },
    "head and router": {"target_modules": ["lm_head", "router"]},
}


@pytest.mark.parametrize(("case", "base"), tiers.pairs(list(CASES), KINDS), indirect=["base"])
def test_adapter_saved_by_peft_is_merged(case: str, base: Path, tmp_path: Path) -> None:
    model = adapt(base, **CASES[case])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = np.concatenate(
        [weights.random_ids(30, 1), weights.image_ids(1, 1), weights.random_ids(5, 2)]
    )
    pixels = weights.random_pixels(1, 3)
    if any("router" in name for name, _ in model.named_parameters() if "lora_A" in name):
        # PEFT cannot apply factors of a router, whose output is a tuple.
        model = model.merge_and_unload()
    wanted = oracle.logits(model, ids, pixels)
    found = run_ours(base, tmp_path, ids, pixels)
    assert_close(found, wanted)
    plain = run_ours(base, None, ids, pixels)
    assert np.abs(found - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("base", KINDS[:1], indirect=True)
def test_adapter_of_the_head_as_peft_saves_it_by_default_is_merged(
    base: Path, tmp_path: Path
) -> None:
    """PEFT stores the head's own weight, too, and warns about it."""
    model = adapt(base, target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    assert any("base_layer" in name for name in load_file(tmp_path / ours.WEIGHTS))
    ids = weights.random_ids(30, 1)
    assert_close(run_ours(base, tmp_path, ids), oracle.logits(model, ids))


PATTERNS = {
    "attention": r"text/.*/attention/.*",
    "shared expert": r"text/.*/shared/.*",
    "experts and dense layers": r"text/.*/feed_forward/(gate_up|down)",
    "up of experts": r"text/.*/feed_forward/gate_up",
    "all": r"text/layer.*/(attention|feed_forward)/(?!router).*",
}


@pytest.mark.parametrize(("case", "base"), tiers.pairs(list(PATTERNS), KINDS), indirect=["base"])
def test_written_adapter_is_applied_by_peft(case: str, base: Path, tmp_path: Path) -> None:
    config = checkpoint.load_config(base)
    adapter = make_adapter(config, PATTERNS[case])
    ours.write_adapter(tmp_path, adapter, config, str(base))
    model: Any = peft.PeftModel.from_pretrained(oracle.load(base), tmp_path).eval()
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in adapted} == set(
        load_file(tmp_path / ours.WEIGHTS)
    )
    ids = weights.random_ids(40, 1)
    assert_close(run_ours(base, tmp_path, ids), oracle.logits(model, ids))
