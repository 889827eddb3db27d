"""Examples as tokens: spelled as the chat template spells them, with what is learned of each."""

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
from l4jax.train.charts import Paper, draw
from l4jax.train.splits import draw_from
from l4jax.train.tasks import TOOLS_INTRODUCED, Exchange, Passage, write_definition

PROSE_WEIGHT = 0.2  # of a token of prose: there are more of them, and less hangs on each
# Of a token that is written where an image feature looks. Answers alone did not teach reading:
# after 80,000 pictures everything else was known, and of these nothing.
SEEN_WEIGHT = 0.3


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no yes-or-no equality
class Document:
    """Tokens of one conversation or passage, at positions 0, 1, ...

    Attributes:
        kind: one of `KINDS`; or what somebody else's conversations are, `CHAT`.
        token_T: int32.
        weight_T: float32, how much the loss counts that this token is foretold; 0 for questions.
        feature_T: int32, which image feature a token is, counted over the document's tiles; -1.
        seen_T: int32, for the token of an image feature: that which is written there; -1.
        tiles_ICYX: uint8 pixels; no tiles where there is no picture.
    """

    kind: str
    token_T: np.ndarray
    weight_T: np.ndarray
    feature_T: np.ndarray
    seen_T: np.ndarray
    tiles_ICYX: np.ndarray


class Speller:
    """Spells examples with a model's tokenizer and image processor."""

    def __init__(self, tokenizer: Tokenizer, processor: ImageProcessor):
        self.tokenizer, self.processor = tokenizer, processor
        self.count = functools.lru_cache(maxsize=4096)(self._count)
        self._cut = functools.lru_cache(maxsize=4096)(self._cut_new)
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_new)
        self._patch = tokenizer.token_id("<|patch|>")
        self._no_tiles = np.zeros((0, 3, processor.tile, processor.tile), np.uint8)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Speller":
        """With the files of a checkpoint's folder."""
        return cls(Tokenizer.from_folder(folder), ImageProcessor.from_folder(folder))

    def __call__(self, example: Exchange | Passage) -> Document:
        """The tokens of an example, from BOS to the last turn's end."""
        if isinstance(example, Passage):
            ids = [self.tokenizer.bos_id, *self._encode(example.text + "<|end_of_text|>")]
            weights = [PROSE_WEIGHT] * len(ids)
            return self._make("prose", ids, weights, self._no_tiles, [])
        ids, weights = [self.tokenizer.bos_id], [0.0]
        tiles, seen_F = self._no_tiles, []

        def say(text: str, weight: float = 0.0) -> None:
            found = self._encode(text)
            ids.extend(found)
            weights.extend([weight] * len(found))

        if example.tools:
            lines = [write_definition(tool) + "\n" for tool in example.tools]
            say(_open("system") + TOOLS_INTRODUCED + "".join(lines) + "<|eot|>")
        for place, (question, answer) in enumerate(example.turns):
            if place == 0 and example.picture is not None:
                paper = draw(example.picture)
                tiles, rows, columns = self.processor.split(paper.image)
                seen_F = self._find_seen(paper, rows, columns)
                say(_open("user"))
                say(format_image_tokens(rows, columns, self.processor.patches_per_tile))
                say(question + "<|eot|>")
            else:
                say(_open("user") + question + "<|eot|>")
            say(_open("assistant"))
            say(answer + "<|eot|>", 1.0)
        return self._make(example.kind, ids, weights, tiles, seen_F)

    def _find_seen(self, paper: Paper, rows: int, columns: int) -> np.ndarray:
        """The token in whose middle each image feature looks, or a mark's color, or -1; of two the
        first.

        In the tile that shows all of a larger picture letters are too small to count.
        """
        tile, side = self.processor.tile, math.isqrt(self.processor.patches_per_tile)
        seen_RyCx = np.full((rows, side, columns, side), -1)
        seen_YX = seen_RyCx.reshape(rows * side, columns * side)
        width, height = paper.image.size
        fit_height, fit_width = fit_inside(height, width, rows, columns, tile=tile)
        for text in [*paper.texts, *paper.marks]:
            left, top, right, bottom = text.box
            y = (top + bottom) / 2 * fit_height / height
            start = 0
            for token, piece in self._cut(text.text):
                middle = (start + len(piece) / 2) / len(text.text)
                start += len(piece)
                x = (left + (right - left) * middle) * fit_width / width
                at = int(y * side / tile), int(x * side / tile)
                if seen_YX[at] < 0:
                    seen_YX[at] = token
        seen_F = seen_RyCx.swapaxes(1, 2).reshape(-1)
        return seen_F if rows * columns == 1 else np.append(seen_F, np.full(side * side, -1))

    def _make(
        self,
        kind: str,
        ids: list[int],
        weights: list[float],
        tiles_ICYX: np.ndarray,
        seen_F: Sequence[int] | np.ndarray,
    ) -> Document:
        token_T = np.array(ids, np.int32)
        is_patch_T = token_T == self._patch
        feature_T = np.where(is_patch_T, np.cumsum(is_patch_T) - 1, -1).astype(np.int32)
        seen_T = np.full(len(ids), -1, np.int32)
        seen_T[is_patch_T] = seen_F
        weight_T = np.array(weights, np.float32)
        return Document(kind, token_T, weight_T, feature_T, seen_T, tiles_ICYX)

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _cut_new(self, text: str) -> list[tuple[int, str]]:
        """The tokens of a text, and the characters that each stands for."""
        return [(token, self.tokenizer.decode([token])) for token in self._encode(text)]

    def _encode_new(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


# How often each kind is drawn, at the beginning and at the end: first to read, then to answer.
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
RAMP = 0.3  # of the training: then charts are as hard, and the mix is what it remains


def draw_example(
    rng: random.Random, split: str, progress: float, speller: Speller, chunk: int, longest: int
) -> Exchange | Passage:
    """An example of a split, of a kind by chance, as it comes at this progress (0 to 1)."""
    hardness = min(1.0, progress / RAMP)
    odds = [start + (end - start) * hardness for start, end in MIX.values()]
    kind = rng.choices(list(MIX), odds)[0]
    if kind in ("arithmetic", "fact"):
        make = tasks.make_arithmetic if kind == "arithmetic" else tasks.make_fact
        return tasks.join([draw_from(split, make, rng) for _ in range(rng.randint(1, 5))])
    makers: dict[str, tuple[Any, ...]] = {
        "sign": (tasks.make_sign_exchange,),
        "chart": (tasks.make_chart_exchange, hardness, rng.randint(2, 8)),
        "needle": (tasks.make_needle, speller.count, chunk, None, longest),
        "tool": (tasks.make_tool_call,),
        "prose": (tasks.make_passage,),
    }
    make, *arguments = makers[kind]
    return draw_from(split, make, rng, *arguments)


def _open(role: str) -> str:
    return f"<|header_start|>{role}<|header_end|>\n\n"
