"""Flags of the commands are the fields of `EngineConfig`."""

import argparse
import dataclasses

import pytest

from l4jax.engine.arguments import add_engine_arguments, make_engine_config, parse_arguments
from l4jax.engine.config import EngineConfig


def parse(*words: str, names=None, **defaults) -> EngineConfig:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser, names, **defaults)
    return make_engine_config(parse_arguments(parser, words), names)


def test_without_flags_the_config_is_the_default_one():
    assert parse() == EngineConfig()
    assert parse(max_num_seqs=64) == EngineConfig(max_num_seqs=64)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--model", "a"], "model", "a"),
        (["-tp", "4"], "tensor_parallel_size", 4),
        (["-dp", "2"], "data_parallel_size", 2),
        (["-q", "int4"], "quantization", "int4"),
        (["--quantize-attention", "on"], "quantize_attention", True),
        (["--attn-temperature-tuning", "off"], "attn_temperature_tuning", False),
        (["--max-model-len", "128K"], "max_model_len", 131_072),
        (["--kv-cache-memory-bytes", "1G"], "kv_cache_memory_bytes", 2**30),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--limit-mm-per-prompt", "image=3"], "limit_mm_per_prompt", {"image": 3}),
        (["--chat-template", "{{ messages }}"], "chat_template", "{{ messages }}"),
        (["--loop-steps", "4"], "loop_steps", 4),
    ],
)
def test_a_flag_sets_its_field(words, field, value):
    assert parse(*words) == dataclasses.replace(EngineConfig(), **{field: value})


def test_every_field_is_a_flag_with_a_default_in_its_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("(default: ") == len(dataclasses.fields(EngineConfig))


def test_fields_of_a_command_are_its_only_flags(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--block-size", "8", names=("mesh", "dtype"))
    assert parse("--mesh", "2x4", names=("mesh", "dtype")).mesh_shape == "2x4"


def test_two_spellings_of_a_mesh_are_refused():
    with pytest.raises(ValueError, match="mesh and tensor_parallel_size are two spellings"):
        EngineConfig(mesh="8", tensor_parallel_size=8)
    with pytest.raises(ValueError, match="mesh and data_parallel_size are two spellings"):
        EngineConfig(mesh="8", data_parallel_size=2)
    assert EngineConfig(data_parallel_size=2, tensor_parallel_size=4).mesh_shape == "2x4"
