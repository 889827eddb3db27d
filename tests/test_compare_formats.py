"""The table of what fewer bits cost: its command runs, and its figures stay within reason."""

import re
import sys

import pytest

from scripts import compare_formats


@pytest.mark.slow
def test_fewer_bits_cost_something_and_not_much(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_formats", "--tokens", "64", "--prompts", "1"])
    compare_formats.main()
    rows = re.findall(r"^(\S.*?)\s+([\d.]+)\s+([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    table = {name: (float(kl), float(same)) for name, kl, same in rows}
    assert table["bf16"] == (0.0, 100.0)
    assert set(table) == set(compare_formats.FORMATS)
    for name in set(table) - {"bf16"}:
        assert 1e-4 < table[name][0] < 0.1, name
    # 4 bits cost more than 8, and 8 in every weight more than 8 in what is cached.
    assert table["fp8 KV"][0] < table["fp8"][0] < table["int4"][0]
