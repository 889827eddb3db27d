"""Laws of the tokenizer, on the tiny one and on Llama 4's own."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.testing import SPECIAL_TOKENS, make_split_pattern, write_tokenizer
from l4jax.text.tokenizer import Tokenizer, TokenizerError

HELLO = [{"role": "user", "content": "hello"}]

TEXTS = [
    "Why is the sky blue?",
    "",
    " ",
    "  two spaces\tand a tab \n\n\n and lines\r\n",
    "I'll say it's 1234567 o'clock; DON'T.",
    "def f(x):\n    return {'a': x ** 2}  # naïve café\n",
    "日本語のテキストと中文文本，한국어도。",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 👍🏽 and e\u0301 combining",
    "Привет, мир! مرحبا بالعالم नमस्ते",
    "<|eot|> in the middle <|image|><|patch|> and <|not a token|>",
    "zero\x00byte and \ufeff mark",
    "<|begin_of_text|>already there",
]


# The tiny tokenizer.


def test_writing_the_tiny_tokenizer_twice_gives_the_same_files(tmp_path: Path) -> None:
    ids = [write_tokenizer(tmp_path / name) for name in "ab"]
    assert ids[0] == ids[1]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("vocab_size", [256 + len(SPECIAL_TOKENS), 300, 512, 4096])
def test_the_tiny_vocabulary_fits_and_puts_special_tokens_last(
    tmp_path: Path, vocab_size: int
) -> None:
    ids = write_tokenizer(tmp_path, vocab_size=vocab_size)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size <= vocab_size
    last = range(tokenizer.vocab_size - len(SPECIAL_TOKENS), tokenizer.vocab_size)
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(last)
    assert ids["bos"] == tokenizer.bos_id
    assert ids["eos"] == [tokenizer.token_id(f"<|{t}|>") for t in ("end_of_text", "eom", "eot")]
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size = 270 is too small"):
        write_tokenizer(tmp_path, vocab_size=270)


def test_common_english_takes_one_token_a_word(tiny: Tokenizer) -> None:
    assert len(tiny.encode(" the water is blue", add_special_tokens=False)) == 4


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers_on_the_tiny_tokenizer(
    tiny: Tokenizer, tiny_folder: Path, text: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    assert tiny.encode(text) == reference.encode(text)
    assert tiny.chat_template == reference.chat_template
    assert tiny.bos_id == reference.bos_token_id


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_round_trip(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text, add_special_tokens=False, parse_special=False)
    assert tiny.decode(ids) == text
    assert b"".join(map(tiny.token_bytes, ids)) == text.encode()


def test_bos_is_added_once_and_only_on_request(tiny: Tokenizer) -> None:
    assert tiny.encode("sky") == [tiny.bos_id, *tiny.encode("sky", add_special_tokens=False)]
    assert tiny.encode("") == [tiny.bos_id]


def test_parse_special_encodes_special_tokens_as_tokens_or_characters(tiny: Tokenizer) -> None:
    text = "a<|eot|>b"
    eot = tiny.token_id("<|eot|>")
    parsed = tiny.encode(text, add_special_tokens=False)
    plain = tiny.encode(text, add_special_tokens=False, parse_special=False)
    assert parsed.count(eot) == 1
    assert eot not in plain
    assert tiny.decode(plain) == text
    assert tiny.decode(parsed) == "ab"
    assert tiny.decode(parsed, skip_special_tokens=False) == text


def test_ids_without_a_token_decode_to_nothing(tiny: Tokenizer) -> None:
    sky = tiny.encode("sky", add_special_tokens=False)
    strange = [-1, tiny.vocab_size, 511, 202047, 1 << 32, 1 << 70]
    assert tiny.decode([*strange, *sky, *strange]) == "sky"
    assert all(tiny.token_bytes(i) == b"" for i in strange)


def test_half_a_surrogate_pair_is_refused_with_a_message(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="half of a surrogate pair"):
        tiny.encode("bad \ud83d")


def test_an_absent_token_is_refused_by_name(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"<\|audio\|>"):
        tiny.token_id("<|audio|>")


# Folders.


def test_a_folder_without_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json and tokenizer_config\.json"
    ) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_tokenizer_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordPiece()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="byte-level"):
        Tokenizer.from_folder(tmp_path)


def test_the_template_file_takes_precedence_over_the_configuration(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config_file, jinja_file = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    config = json.loads(config_file.read_text())
    config["chat_template"] = "from the configuration"
    config_file.write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).chat_template == jinja_file.read_text()
    jinja_file.unlink()
    assert Tokenizer.from_folder(tmp_path).chat_template == "from the configuration"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config_file.write_text(json.dumps(config | {"chat_template": named}))
    assert Tokenizer.from_folder(tmp_path).chat_template == "yes"
    del config["chat_template"]
    config_file.write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).chat_template is None


def test_special_tokens_may_be_objects_in_the_configuration(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config_file = tmp_path / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["bos_token"] = {"content": "<|begin_of_text|>", "lstrip": False}
    config_file.write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render(HELLO, template="{{ bos_token }}") == "<|begin_of_text|>"


def test_many_threads_may_render_first(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server's first requests do: the renderer is constructed once, and used only complete."""
    tokenizer, made = Tokenizer.from_folder(tiny_folder), []

    def make_slowly() -> tokenizers.models.BPE:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return BPE()

    BPE = tokenizers.models.BPE
    monkeypatch.setattr(tokenizers.models, "BPE", make_slowly)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: tokenizer.render(HELLO, template="hello"), range(8)))
    assert found == ["hello"] * 8 and len(made) == 1


def test_templates_render_silently_and_without_torch(tiny_folder: Path) -> None:
    program = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from l4jax.text.tokenizer import Tokenizer
tokenizer = Tokenizer.from_folder({str(tiny_folder)!r})
hello = [{{"role": "user", "content": "hello"}}]
print(tokenizer.render(hello, template="{{{{ bos_token }}}}{{{{ strftime_now('%Y') | length }}}}"))
assert not {{"torch", "jax"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "<|begin_of_text|>4", result.stderr
    assert result.stderr == ""


# Llama 4's own tokenizer.


def test_the_real_vocabulary_is_the_known_one(meta_folder: Path, real: Tokenizer) -> None:
    ranks = (meta_folder / "tokenizer.model").read_bytes()
    known = "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed"
    assert hashlib.sha256(ranks).hexdigest() == known
    assert real.backend.get_vocab_size(with_added_tokens=False) == 200_000
    assert real.vocab_size == 202_048


def test_the_real_special_ids_are_the_known_ones(real: Tokenizer) -> None:
    known = {
        "begin_of_text": 200000,
        "end_of_text": 200001,
        "header_start": 200005,
        "header_end": 200006,
        "eom": 200007,
        "eot": 200008,
        "python_start": 200016,
        "python_end": 200017,
        "finetune_right_pad": 200018,
        "image_start": 200080,
        "image_end": 200081,
        "tile_x_separator": 200084,
        "tile_y_separator": 200085,
        "image": 200090,
        "patch": 200092,
    }
    assert {name: real.token_id(f"<|{name}|>") for name in known} == known
    assert {f"<|{name}|>" for name in known} == set(SPECIAL_TOKENS)
    assert real.bos_id == 200000


def test_our_split_pattern_is_the_real_one(meta_tokens: tuple[str, list[str]]) -> None:
    pattern, _ = meta_tokens
    assert make_split_pattern() == pattern


def test_ids_equal_transformers_on_the_real_tokenizer(real: Tokenizer, real_folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(real_folder)
    for text in TEXTS:
        ids = real.encode(text)
        assert ids == reference.encode(text)
        assert real.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_the_real_tokenizer_survives_round_trips(real: Tokenizer) -> None:
    for text in TEXTS:
        ids = real.encode(text, add_special_tokens=False, parse_special=False)
        assert real.decode(ids) == text
        assert b"".join(map(real.token_bytes, ids)) == text.encode()


def test_the_real_ids_beyond_the_named_tokens_decode(real: Tokenizer) -> None:
    for i in range(201_135, 202_048):
        assert real.decode([5703, i]) == real.decode([5703])
    assert real.decode([5703, 202_048, 300_000]) == real.decode([5703])
