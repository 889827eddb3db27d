"""Writes tests/golden/*.npz: the reference's results, for machines without torch.

Run from the root of the repository, with the `test` extra on Python 3.11:

    python -m scripts.write_goldens

The weights are not stored: tests/weights.py makes them from the seed. A file that would change in
the last bits only is kept, so that rewriting on another machine shows real changes only.
"""

import argparse
import json

import numpy as np

from tests import weights
from tests.reference import oracle

WEIGHTS_SEED = 0
PIXELS_SEED = 7
STEPS = 64
SMALLEST_MARGIN = 0.03  # 1000 times float32's error; prompt seeds with less are replaced
LAYERS = {"scout-8": 8, "scout-32": 5, "maverick-8": 5, "maverick-32": 8}
PROMPT_SEEDS = {  # chosen for large margins of greedy tokens
    "scout-8-text": 10,
    "scout-8-image": 11,
    "scout-32-text": 4,
    "scout-32-image": 5,
    "maverick-8-text": 11,
    "maverick-8-image": 1,
    "maverick-32-text": 2,
    "maverick-32-image": 7,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=weights.GOLDENS, help="default: all of them")
    for name in parser.parse_args().names:
        golden = compute(name, PROMPT_SEEDS[name])
        margin = golden["greedy_margins"].min()
        if margin < SMALLEST_MARGIN:
            raise SystemExit(f"{name}: smallest margin {margin:.4f}; choose another PROMPT_SEEDS")
        path = weights.GOLDEN_FOLDER / f"{name}.npz"
        verdict = "unchanged"
        if not path.exists() or not is_same(golden, dict(np.load(path))):
            np.savez_compressed(path, allow_pickle=False, **golden)
            verdict = "written"
        print(f"{name}: {verdict}, {path.stat().st_size} bytes, smallest margin {margin:.4f}")


def compute(name: str, prompt_seed: int) -> dict[str, np.ndarray]:
    """Compute the arrays of one file: see ``weights.Golden``."""
    kind, chunk, prompt = name.split("-")
    config = weights.tiny_config(
        "scout" if kind == "scout" else "maverick",
        attention_chunk_size=int(chunk),
        num_hidden_layers=LAYERS[f"{kind}-{chunk}"],
    )
    model = oracle.build(config, WEIGHTS_SEED)
    ids, tiles, pixels, features = weights.random_ids(3 * int(chunk) + 5, prompt_seed), 0, None, []
    if prompt == "image":
        # It begins at 24, so that its second tile (30 .. 33) crosses the chunk boundary at 32.
        ids = np.concatenate([ids[:24], weights.image_ids(1, 2), ids[24:]])
        tiles, pixels = 3, weights.random_pixels(3, PIXELS_SEED)
        features = oracle.image_features(model, pixels)
    rows = [t for t in range(len(ids)) if t < 4 or (t + 2) % int(chunk) < 4 or t == len(ids) - 1]
    greedy = oracle.greedy(model, ids, STEPS, pixels)
    tensors = weights.random_tensors(oracle.shapes(model), WEIGHTS_SEED)
    return {
        "config": np.array(json.dumps(config)),
        "weights_seed": np.array(WEIGHTS_SEED),
        "weights_checksum": np.array(weights.checksum(tensors)),
        "ids": ids,
        "tiles": np.array(tiles),
        "pixels_seed": np.array(PIXELS_SEED),
        "image_features": np.array(features, np.float32),
        "rows": np.array(rows, np.int32),
        "logits": oracle.logits(model, ids, pixels)[rows],
        "greedy_tokens": greedy.tokens,
        "greedy_margins": greedy.margins,
        "greedy_last_logits": greedy.logits[-1],
    }


def is_same(new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> bool:
    """Whether all differences are within float32's rounding of sums in another order."""
    if new.keys() != old.keys():
        return False
    return all(
        np.allclose(array, old[key], atol=1e-3, rtol=0)
        if array.dtype == np.float32 and array.shape == old[key].shape
        else np.array_equal(array, old[key])
        for key, array in new.items()
    )


if __name__ == "__main__":
    main()
