"""Laws of scripts.compare_formats: it runs, and quantization errors are ordered and bounded."""

import re
import sys

import pytest

from scripts import compare_formats


@pytest.mark.slow
def test_kl_divergence_of_each_format_is_bounded(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_formats", "--tokens", "64", "--prompts", "1"])
    compare_formats.main()
    rows = re.findall(r"^(\S.*?)\s+([\d.]+)\s+([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    table = {name: (float(kl), float(same)) for name, kl, same in rows}
    assert table["bf16"] == (0.0, 100.0)
    assert set(table) == set(compare_formats.FORMATS)
    for name in set(table) - {"bf16"}:
        assert 1e-4 < table[name][0] < 0.1, name
    # int4 weights cost more than fp8 weights, and those more than fp8 keys and values.
    assert table["fp8 KV"][0] < table["fp8"][0] < table["int4"][0]
