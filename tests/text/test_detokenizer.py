"""Laws of the detokenizer: characters are complete, and all pieces join to the decoded text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.text.detokenizer import Detokenizer
from l4jax.text.tokenizer import Tokenizer

EMOJI = "👩‍👩‍👧‍👦"


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push([i]) for i in ids), detokenizer.finish()]


# Ids of the tiny tokenizer: 0 to 255 are bytes, so most sequences are invalid UTF-8. Words, special
# tokens and ids without a token follow. Lead and continuation bytes are frequent.
IDS = st.lists(
    st.one_of(
        st.integers(0, 255),
        st.sampled_from([0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0x80, 0x9F, 0xA0, 0xBF]),
        st.integers(256, 520),
        st.sampled_from([-1, 202_047, 1 << 40]),
    ),
    max_size=60,
)


@settings(max_examples=500, deadline=None)
@given(ids=IDS, skip=st.booleans())
def test_all_pieces_joined_equal_the_decoded_text(
    tiny: Tokenizer, ids: list[int], skip: bool
) -> None:
    pieces = stream(Detokenizer(tiny, skip_special_tokens=skip), ids)
    assert "".join(pieces) == tiny.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(), cuts=st.lists(st.integers(1, 5), min_size=1))
def test_valid_text_never_shows_a_broken_character(
    tiny: Tokenizer, text: str, cuts: list[int]
) -> None:
    ids = list(text.encode())
    detokenizer = Detokenizer(tiny)
    shown = ""
    while ids:
        step = cuts[len(ids) % len(cuts)]
        shown += detokenizer.push(ids[:step])
        assert text.startswith(shown)
        ids = ids[step:]
    assert shown == text
    assert detokenizer.finish() == ""


def test_an_emoji_appears_with_its_last_byte(tiny: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny)
    assert [detokenizer.push([byte]) for byte in "👍".encode()] == ["", "", "", "👍"]


def test_a_character_is_emitted_with_its_last_byte(tiny: Tokenizer) -> None:
    ids = list(f"日本{EMOJI}".encode())
    lengths = [len(piece) for piece in stream(Detokenizer(tiny), ids)]
    assert sum(lengths) == len(f"日本{EMOJI}")
    assert max(lengths) == 1


def test_an_incomplete_character_is_replaced_at_the_end(tiny: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny)
    assert detokenizer.push([0xF0, 0x9F]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_special_tokens_are_skipped_by_default(tiny: Tokenizer) -> None:
    ids = tiny.encode("sky<|eot|>")
    assert "".join(stream(Detokenizer(tiny), ids)) == "sky"
    shown = "".join(stream(Detokenizer(tiny, skip_special_tokens=False), ids))
    assert shown == "<|begin_of_text|>sky<|eot|>"


@pytest.mark.usefixtures("hang_guard")
@pytest.mark.parametrize("byte", [ord("a"), 0xF0])
def test_the_cost_of_a_token_does_not_grow_with_the_text(tiny: Tokenizer, byte: int) -> None:
    """A detokenizer that decoded all ids again would take hours."""
    detokenizer = Detokenizer(tiny)
    for _ in range(100_000):
        detokenizer.push([byte])


def test_the_real_tokenizer_streams_split_characters(real: Tokenizer) -> None:
    text = f"naïve 日本語 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 {EMOJI} 🫠 ok"
    ids = real.encode(text)
    pieces = stream(Detokenizer(real), ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces[1:-1]  # at least one character is split
