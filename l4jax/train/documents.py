"""Documents: examples encoded as the chat template does, with loss weights and targets."""

import dataclasses
import functools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.text.image import ImageProcessor, fit_inside, format_image_tokens
from l4jax.text.tokenizer import Tokenizer
from l4jax.train import tasks
from l4jax.train.charts import Drawing, draw
from l4jax.train.splits import sample_from
from l4jax.train.tasks import TOOLS_INTRODUCED, Exchange, Passage, write_definition

# Loss weights, relative to an answer's token. Tokens of prose are many, and each matters less.
PROSE_WEIGHT = 0.2
# The target of an image feature: the token drawn there. From answers alone the model did not learn
# to read: after 80,000 images it had learned every task except those about images.
PATCH_TARGET_WEIGHT = 0.3


@dataclasses.dataclass(frozen=True, eq=False)  # array equality is elementwise
class Document:
    """The tokens of one conversation or passage, at positions 0, 1, ...

    Attributes:
        kind: one of `KINDS`, or `CHAT` for a user's conversations.
        token_T: int32.
        weight_T: float32, the loss weight of predicting this token; 0 for questions.
        feature_T: int32 index into the image features of the document's tiles, -1 for text.
        patch_target_T: int32, for an image feature the token drawn there, else -1.
        tiles_ICYX: uint8 pixels; no tiles without an image.
    """

    kind: str
    token_T: np.ndarray
    weight_T: np.ndarray
    feature_T: np.ndarray
    patch_target_T: np.ndarray
    tiles_ICYX: np.ndarray


class ExampleEncoder:
    """Encodes examples with a model's tokenizer and image processor."""

    def __init__(self, tokenizer: Tokenizer, processor: ImageProcessor):
        self.tokenizer, self.processor = tokenizer, processor
        self.count = functools.lru_cache(maxsize=4096)(self._count)
        self._split = functools.lru_cache(maxsize=4096)(self._split_uncached)
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_uncached)
        self._patch = tokenizer.token_id("<|patch|>")
        self._no_tiles = np.zeros((0, 3, processor.tile, processor.tile), np.uint8)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ExampleEncoder":
        """Make an encoder from the files of a checkpoint's folder."""
        return cls(Tokenizer.from_folder(folder), ImageProcessor.from_folder(folder))

    def __call__(self, example: Exchange | Passage) -> Document:
        """Encode an example, from BOS to the end of the last turn."""
        if isinstance(example, Passage):
            ids = [self.tokenizer.bos_id, *self._encode(example.text + "<|end_of_text|>")]
            weights = [PROSE_WEIGHT] * len(ids)
            return self._make("prose", ids, weights, self._no_tiles, [])
        ids, weights = [self.tokenizer.bos_id], [0.0]
        tiles, patch_target_F = self._no_tiles, []

        def append(text: str, weight: float = 0.0) -> None:
            tokens = self._encode(text)
            ids.extend(tokens)
            weights.extend([weight] * len(tokens))

        if example.tools:
            lines = [write_definition(tool) + "\n" for tool in example.tools]
            append(_open_turn("system") + TOOLS_INTRODUCED + "".join(lines) + "<|eot|>")
        for index, (question, answer) in enumerate(example.turns):
            if index == 0 and example.picture is not None:
                drawing = draw(example.picture)
                tiles, rows, columns = self.processor.split(drawing.image)
                patch_target_F = self._compute_patch_targets(drawing, rows, columns)
                append(_open_turn("user"))
                append(format_image_tokens(rows, columns, self.processor.patches_per_tile))
                append(question + "<|eot|>")
            else:
                append(_open_turn("user") + question + "<|eot|>")
            append(_open_turn("assistant"))
            append(answer + "<|eot|>", 1.0)
        return self._make(example.kind, ids, weights, tiles, patch_target_F)

    def _compute_patch_targets(self, drawing: Drawing, rows: int, columns: int) -> np.ndarray:
        """Compute each image feature's target: the token, or a mark's color, centered in it, or -1.

        The first token wins. The global tile of a larger image has none: its letters are too small.
        """
        tile, side = self.processor.tile, math.isqrt(self.processor.patches_per_tile)
        patch_target_RyCx = np.full((rows, side, columns, side), -1)
        patch_target_YX = patch_target_RyCx.reshape(rows * side, columns * side)
        width, height = drawing.image.size
        fit_height, fit_width = fit_inside(height, width, rows, columns, tile=tile)
        for text in [*drawing.texts, *drawing.marks]:
            left, top, right, bottom = text.box
            y = (top + bottom) / 2 * fit_height / height
            start = 0
            for token, piece in self._split(text.text):
                middle = (start + len(piece) / 2) / len(text.text)
                start += len(piece)
                x = (left + (right - left) * middle) * fit_width / width
                at = int(y * side / tile), int(x * side / tile)
                if patch_target_YX[at] < 0:
                    patch_target_YX[at] = token
        patch_target_F = patch_target_RyCx.swapaxes(1, 2).reshape(-1)
        return (
            patch_target_F
            if rows * columns == 1
            else np.append(patch_target_F, np.full(side * side, -1))
        )

    def _make(
        self,
        kind: str,
        ids: list[int],
        weights: list[float],
        tiles_ICYX: np.ndarray,
        patch_target_F: Sequence[int] | np.ndarray,
    ) -> Document:
        token_T = np.array(ids, np.int32)
        is_patch_T = token_T == self._patch
        feature_T = np.where(is_patch_T, np.cumsum(is_patch_T) - 1, -1).astype(np.int32)
        patch_target_T = np.full(len(ids), -1, np.int32)
        patch_target_T[is_patch_T] = patch_target_F
        weight_T = np.array(weights, np.float32)
        return Document(kind, token_T, weight_T, feature_T, patch_target_T, tiles_ICYX)

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _split_uncached(self, text: str) -> list[tuple[int, str]]:
        """Split a text into tokens, each with its characters."""
        return [(token, self.tokenizer.decode([token])) for token in self._encode(text)]

    def _encode_uncached(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


# Sampling weight of each kind at the start and the end of the ramp: reading first, then answering.
MIX: Mapping[str, tuple[float, float]] = {
    "sign": (5, 1),
    "chart": (3, 8),
    "arithmetic": (3, 2),
    "fact": (1.5, 0.7),
    "needle": (1.5, 2),
    "tool": (2, 1.5),
    "prose": (1, 0.5),
}
KINDS = tuple(MIX)
CHAT = "chat"
RAMP = 0.3  # share of the run after which hardness and mix stay constant


def sample_example(
    rng: random.Random,
    split: str,
    progress: float,
    encoder: ExampleEncoder,
    chunk: int,
    longest: int,
) -> Exchange | Passage:
    """Sample an example of a split and a random kind for this progress of the run (0 to 1)."""
    hardness = min(1.0, progress / RAMP)
    odds = [start + (end - start) * hardness for start, end in MIX.values()]
    kind = rng.choices(list(MIX), odds)[0]
    if kind in ("arithmetic", "fact"):
        make = tasks.make_arithmetic if kind == "arithmetic" else tasks.make_fact
        return tasks.join([sample_from(split, make, rng) for _ in range(rng.randint(1, 5))])
    makers: dict[str, tuple[Any, ...]] = {
        "sign": (tasks.make_sign_exchange,),
        "chart": (tasks.make_chart_exchange, hardness, rng.randint(2, 8)),
        "needle": (tasks.make_needle, encoder.count, chunk, None, longest),
        "tool": (tasks.make_tool_call,),
        "prose": (tasks.make_passage,),
    }
    make, *arguments = makers[kind]
    return sample_from(split, make, rng, *arguments)


def _open_turn(role: str) -> str:
    return f"<|header_start|>{role}<|header_end|>\n\n"
