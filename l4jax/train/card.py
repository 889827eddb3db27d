"""The model card, generated from the scores so that every number in it is measured."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from l4jax import checkpoint
from l4jax.checkpoint.safetensors import Index
from l4jax.testing.model import write_json
from l4jax.train.charts import LABELS
from l4jax.train.scoring import Table, compute_standard_error, format_loads

SCORES, CARD = "scores.json", "README.md"
_TEXT = """\
---
license: apache-2.0
library_name: l4jax
---

# A tiny Llama 4

A model with {weights:.1f} million weights in Llama 4's architecture, including the image encoder.
It comes with l4jax for trying and testing it, and its few tasks can be scored.

## Training data

`l4jax.train` generates the data from a seed:

- charts drawn with Pillow, and questions about them
- sums and differences of numbers below 100
- a few facts
- codes hidden in text, up to five attention chunks back
- calls of functions that the prompt defines
- the Declaration of Independence and the Constitution of the United States, from Debian's package
  `miscfiles`, in the public domain

The model contains nothing of Meta's weights or tokenizer. It was trained on one H200 with this
command:

```bash
python -m scripts.train_tiny --folder RUN --steps 18000 --rate 1e-3 --save-every 500 \\
  --attention cudnn
```

## Accuracy

The model answered {count} questions per task greedily. They are from the test split, which is
not in the training data. The standard error of an accuracy of 95 % is {error:.1%}.
Charts are scored by relaxed accuracy: numbers may be 5 % off, and for a sum or a difference only
the result counts. All other answers must match exactly.

{table}

Share of the test tokens of each expert, per layer:

```
{loads}
```

## Limitations

The model can do nothing else. Its labels are {labels} words, its charts have one typeface, and its
English is from two documents. It was trained on conversations of at most {length} tokens. For a
chart of several tiles it may answer with another mark's value or color.
"""


def write_card(
    folder: Path,
    count: int,
    columns: Mapping[str, Mapping[str, float]],
    loads_LE: Sequence[Sequence[int]],
) -> None:
    """Write `scores.json` and the model card into a model's folder.

    Args:
        folder: the model's folder.
        count: questions per task.
        columns: format and mesh -> score -> accuracy.
        loads_LE: tokens of each expert of each layer.
    """
    scores = {"count": count, "columns": columns, "loads": loads_LE}
    write_json(folder / SCORES, scores)
    (folder / CARD).write_text(render_card(folder), encoding="utf-8")


def render_card(folder: Path) -> str:
    """Render the model card from a folder's scores."""
    scores = json.loads((folder / SCORES).read_text())
    weights = sum(math.prod(shape) for _, shape in Index.open(folder).specs.values())
    return _TEXT.format(
        weights=weights / 1e6,
        count=scores["count"],
        error=compute_standard_error(0.95, scores["count"]),
        table=Table(scores["count"], scores["columns"]),
        loads=format_loads(scores["loads"]),
        labels=sum(len(words.split()) for words in LABELS.values()),
        length=6 * checkpoint.load_config(folder).text.chunk,
    )
