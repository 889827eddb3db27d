"""Prints the scores of the bundled model on the test split, in each format and on each mesh.

    python -m scripts.score_bundled [--model FOLDER] [--count 200] [--reference] [--card]

`--reference` adds a column of answers by Hugging Face's own Llama 4 on the same files, where torch
is installed. `--card` writes the scores into the folder, and the model card that they make.
"""

import argparse
from pathlib import Path

from l4jax import LLM, checkpoint
from l4jax.train import scoring
from l4jax.train.card import write_card
from l4jax.train.documents import Speller

# Name -> what `LLM` is told.
FORMATS = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int4": {"quantization": "int4"},
    "fp8 KV": {"kv_cache_dtype": "fp8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores of the bundled model, in a table.")
    add = parser.add_argument
    add("--model", type=Path, default=checkpoint.BUNDLED, help="(default: the bundled one)")
    add("--count", type=int, default=200, help="questions of each task (default: 200)")
    add("--formats", default=",".join(FORMATS), help="(default: all)")
    # The largest comes first: CPU devices are made once.
    add("--meshes", default="8,1", help="(default: 8 and 1)")
    add("--seqs", type=int, default=16, help="answered together (default: 16)")
    add("--reference", action="store_true", help="transformers' answers, too")
    add("--card", action="store_true", help="write scores.json and README.md into the folder")
    args = parser.parse_args()
    config, speller = checkpoint.load_config(args.model), Speller.from_folder(args.model)
    asked = scoring.list_questions(speller, config.text.chunk, args.count)
    columns = {}
    for mesh in args.meshes.split(","):
        for name in args.formats.split(","):
            llm = LLM(args.model, mesh=mesh, max_num_seqs=args.seqs, quiet=True, **FORMATS[name])
            said = scoring.answer(llm, speller, asked)
            columns[f"{name}, mesh {mesh}"] = scoring.group_scores(asked, said)
            del llm
    if args.reference:
        columns["transformers"] = scoring.group_scores(asked, answer_by_reference(args, asked))
    table = scoring.Table(args.count, columns)
    print(table)
    loads_LE = scoring.count_experts(args.model)
    print(scoring.draw_loads(loads_LE))
    if args.card:
        write_card(args.model, table.counts, table.columns, loads_LE.tolist())


def answer_by_reference(args: argparse.Namespace, asked: list) -> list[str]:
    """What transformers says, greedily, in BF16 on a CPU; the whole prompt again for each token.

    Without a cache there is nothing of the reference's that could go wrong but the model.
    """
    import torch  # pyright: ignore[reportMissingImports] - of the test extra
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation="eager"
    )
    speller, said = Speller.from_folder(args.model), []
    stops = set(checkpoint.load_config(args.model).eos_ids)
    for exchange in asked:
        document = speller(exchange)
        ids, answer = scoring.cut_prompt(document), []
        pixels = scoring.normalize(document, speller)
        more = {} if pixels is None else {"pixel_values": torch.tensor(pixels).bfloat16()}
        while len(answer) < scoring.LONGEST and not stops & set(answer):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids + answer]), use_cache=False, **more)
            answer.append(int(out.logits[0, -1].argmax()))
        said.append(speller.tokenizer.decode(answer))
    return said


if __name__ == "__main__":
    main()
