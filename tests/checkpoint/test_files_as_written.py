"""Laws of files as other tools write them: configs, sampling defaults, and folders of weights.

`configs_transformers_4_51.json` has what `to_json_string` of transformers 4.51.0 wrote for
`weights.tiny_config("scout")`, with the keys that unsloth and `save_pretrained` add.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4jax.checkpoint import CheckpointError, hf_config, load_config, parse_config
from l4jax.checkpoint.safetensors import INDEX, Index, write_safetensors
from l4jax.config import Config, ConfigError
from l4jax.engine.request import SamplingParams
from l4jax.inputs import read_generation_config
from tests import weights

FILE = Path(__file__).parent.parent / "golden" / "configs_transformers_4_51.json"
WRITTEN: dict[str, Any] = json.loads(FILE.read_text())


def read_text_keys(**keys: Any) -> Config:
    raw = weights.tiny_config("scout")
    return parse_config({**raw, "text_config": raw["text_config"] | keys})


@pytest.mark.parametrize("name", WRITTEN)
def test_config_as_transformers_4_51_wrote_it_is_read_without_a_warning(name, caplog):
    tiny = weights.tiny_config("scout")
    is_text = "CausalLM" in name
    expected = parse_config(weights.text_only(tiny) if is_text else tiny)
    found = parse_config(WRITTEN[name])
    assert (found.text, found.vision, found.patch_id) == (
        expected.text,
        expected.vision,
        expected.patch_id,
    )
    # In a multimodal config, 4.51 left out the ids that equal those of an empty config.
    assert not is_text or found == expected
    assert not caplog.records


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_key_that_is_off_is_ignored(value, caplog):
    assert read_text_keys(sparse_attention=value) == read_text_keys()
    assert not caplog.records


def test_key_of_provenance_is_noted_once(caplog):
    hf_config._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert read_text_keys(merge_date="2025-05-01") == read_text_keys()
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: text_config.merge_date is a key that l4jax does not know, and is ignored."
    ]


def test_key_that_may_matter_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"sparse_attention is 2: .*; remove it if it changes"):
        read_text_keys(sparse_attention=2)


@pytest.mark.parametrize(("value", "is_on"), [(4, True), (1, True), (0, False), (True, True)])
def test_counts_as_flags_are_read_as_transformers_does(value, is_on):
    assert read_text_keys(attn_temperature_tuning=value).text.has_temperature_tuning == is_on


@pytest.mark.parametrize("layers", [100_000, 10**9])
def test_config_with_too_many_layers_is_refused_before_they_are_listed(layers):
    with pytest.raises(ConfigError, match=f"num_hidden_layers is {layers}: .* from 1 to 1024"):
        read_text_keys(num_hidden_layers=layers, no_rope_layers=[1, 1, 1, 0] * 25_000)


def test_error_of_a_config_names_the_file(tmp_path):
    weights.write_checkpoint(tmp_path, weights.tiny_config("scout"), 1)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"silu"', '"relu"'))
    with pytest.raises(ConfigError, match=r"config\.json: text_config\.hidden_act is 'relu'"):
        load_config(tmp_path)


# Sampling defaults.


def read_generation(tmp_path: Path, **raw: Any) -> SamplingParams:
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    return SamplingParams(**read_generation_config(tmp_path))


def test_sampling_defaults_are_those_of_the_file(tmp_path):
    found = read_generation(
        tmp_path,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.2,
        max_new_tokens=77,
        bos_token_id=1,
        transformers_version="4.51.0",
        max_length=20,
    )
    assert found == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, max_tokens=77
    )
    found = read_generation(tmp_path, do_sample=False, temperature=0.5, repetition_penalty=1.2)
    assert found == SamplingParams(temperature=0.0, repetition_penalty=1.2)
    assert read_generation(tmp_path, do_sample=None, temperature=None) == SamplingParams()


def test_setting_that_is_not_applied_is_noted(tmp_path, caplog):
    # The defaults that transformers 4.51 wrote into some files.
    read_generation(tmp_path, max_length=20, length_penalty=1.0, num_beams=1, cache_config=None,
                    early_stopping=False, suppress_tokens=[], assistant_lookbehind=10)  # fmt: skip
    assert not caplog.records
    read_generation(tmp_path, no_repeat_ngram_size=3, temperature=0.5)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].endswith(
        "generation_config.json: no_repeat_ngram_size is 3, which l4jax does not apply."
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_k", float("inf")), ("top_k", 1.5), ("temperature", -1), ("temperature", "1"),
     ("max_new_tokens", 0), ("repetition_penalty", 0), ("do_sample", "no"), ("top_p", [0.9])],
)  # fmt: skip
def test_unusable_sampling_default_is_refused_by_file_and_key(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {key} is "):
        read_generation(tmp_path, **{key: value})


# Folders of weights.


def write_folder(folder: Path, **shards: str) -> None:
    for name, shard in shards.items():
        write_safetensors(folder / shard, {name: np.ones(3, np.float32)})
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def test_single_file_wins_over_a_stale_index(tmp_path):
    write_folder(tmp_path, a="1.safetensors", b="2.safetensors")
    (tmp_path / "2.safetensors").unlink()
    write_safetensors(tmp_path / "model.safetensors", {"c": np.ones(2, np.float32)})
    assert list(Index.open(tmp_path).tensors) == ["c"]


@pytest.mark.parametrize("shard", ["../1.safetensors", "/1.safetensors", "a/1.safetensors", ""])
def test_index_that_names_a_file_outside_its_folder_is_refused(tmp_path, shard):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="a file outside its folder"):
        Index.open(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "1.safetensors"])
def test_fifo_is_refused_and_not_waited_for(tmp_path, name):
    write_folder(tmp_path, a="1.safetensors")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        Index.open(tmp_path)


def test_header_that_is_cut_inside_its_padding_is_refused(tmp_path):
    """A header without its padding is JSON still, and all data would be read 8 bytes early."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.arange(6, dtype=np.float32)})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * 8
    path.write_bytes((length).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(CheckpointError, match="last tensor ends at"):
        Index.open(tmp_path)
