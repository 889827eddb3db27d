"""Laws of the model's configuration."""

import dataclasses

import pytest

from l4jax.config import MAVERICK, SCOUT, TINY


def test_layer_kinds_are_those_of_the_published_models():
    text = SCOUT.text
    assert [i for i in range(48) if text.is_nope(i)] == list(range(3, 48, 4))
    assert all(text.is_moe(i) for i in range(48))
    assert [i for i in range(48) if MAVERICK.text.is_moe(i)] == list(range(1, 48, 2))
    assert text.queries == 5 and SCOUT.vision is not None and SCOUT.vision.features == 144


@pytest.mark.parametrize("changes", [{"kv_heads": 3}, {"head_dim": 15}])
def test_decoder_that_cannot_be_computed_is_no_config(changes):
    with pytest.raises(AssertionError):
        TINY.replace_text(**changes)


@pytest.mark.parametrize("changes", [{"tile": 340}, {"hidden": 64}, {"heads": 16}])
def test_image_encoder_that_cannot_be_computed_is_no_config(changes):
    with pytest.raises(AssertionError):
        TINY.replace_vision(**changes)


def test_config_is_frozen_and_copies_differ_in_the_changed_fields_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.text.layers = 4  # type: ignore[misc]
    changed = TINY.replace_text(layers=4).replace_vision(layers=1)
    assert changed.replace_text(layers=5).replace_vision(layers=2) == TINY
