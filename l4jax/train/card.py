"""The model card, written from the scores so that no number in it is typed by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from l4jax import checkpoint
from l4jax.checkpoint.safetensors import Index
from l4jax.testing.model import write_json
from l4jax.train.charts import LABELS
from l4jax.train.scoring import Table, draw_loads, find_error

SCORES, CARD = "scores.json", "README.md"
_TEXT = """\
---
license: apache-2.0
library_name: l4jax
---

# A tiny Llama 4

{weights:.1f} million weights in Llama 4's architecture, image encoder and all, for trying and
testing l4jax: small enough to come with it, and good at a few things that can be scored.

## What it learned

From data that `l4jax.train` invents from a seed: charts drawn with Pillow and questions about them,
sums and differences of numbers below 100, a few facts, codes hidden in text up to five attention
chunks back, calls of functions that a prompt defines, and the Declaration of Independence and the
Constitution of the United States as Debian's package `miscfiles` has them, in the public domain.
Nothing of Meta's weights or tokenizer is in it. It was trained on one H200, by

```bash
python -m scripts.train_tiny --folder RUN --steps 18000 --rate 1e-3 --save-every 500 \\
  --attention cudnn
```

## How good it is

{count} questions of each task from a test split that training never saw, answered greedily. The
standard error of a share of 95 % is {error:.1%}. Charts count by relaxed accuracy: numbers within
5 %, and of a sum's working the result. All else counts to the letter.

{table}

Tokens that each expert of each layer got, of the test's:

```
{loads}
```

## What it cannot do

Anything else. Its labels are {labels} words of a list, its charts one typeface, its English two
documents. It was trained on conversations of at most {length} tokens. Of a chart that takes several
tiles it may name another mark's value or color.
"""


def write_card(
    folder: Path,
    count: int,
    columns: Mapping[str, Mapping[str, float]],
    loads_LE: Sequence[Sequence[int]],
) -> None:
    """Write `scores.json` and the card that follows from it into a model's folder.

    Args:
        folder: of the model.
        count: questions of each task.
        columns: way to compute -> score -> share of right answers.
        loads_LE: tokens of each expert of each layer.
    """
    scores = {"count": count, "columns": columns, "loads": loads_LE}
    write_json(folder / SCORES, scores)
    (folder / CARD).write_text(draw_card(folder), encoding="utf-8")


def draw_card(folder: Path) -> str:
    """The card of a folder that has its scores."""
    scores = json.loads((folder / SCORES).read_text())
    weights = sum(math.prod(shape) for _, shape in Index.open(folder).kinds.values())
    return _TEXT.format(
        weights=weights / 1e6,
        count=scores["count"],
        error=find_error(0.95, scores["count"]),
        table=Table(scores["count"], scores["columns"]),
        loads=draw_loads(scores["loads"]),
        labels=sum(len(words.split()) for words in LABELS.values()),
        length=6 * checkpoint.load_config(folder).text.chunk,
    )
