"""Print the scores of the bundled model on the test split, in each format and on each mesh.

    python -m scripts.score_bundled [--model FOLDER] [--count 200] [--reference] [--card]

`--reference` adds a column for Hugging Face's Llama 4 on the same files; it needs torch. `--card`
writes the scores and the model card into the folder.
"""

import argparse
from pathlib import Path

from l4jax import LLM, checkpoint
from l4jax.train import scoring
from l4jax.train.card import write_card
from l4jax.train.documents import ExampleEncoder

# Format -> arguments of `LLM`.
FORMATS = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int4": {"quantization": "int4"},
    "fp8 KV": {"kv_cache_dtype": "fp8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the bundled model.")
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=checkpoint.BUNDLED,
        help="folder of the model (default: the bundled one)",
    )
    add("--count", type=int, default=200, help="questions per task (default: 200)")
    add("--formats", default=",".join(FORMATS), help="comma-separated (default: all)")
    # The largest mesh first: the number of CPU devices is fixed at the first use.
    add("--meshes", default="8,1", help="comma-separated (default: 8,1)")
    add("--seqs", type=int, default=16, help="requests per batch (default: 16)")
    add("--reference", action="store_true", help="also score transformers")
    add("--card", action="store_true", help="write scores.json and README.md into the folder")
    args = parser.parse_args()
    config, encoder = checkpoint.load_config(args.model), ExampleEncoder.from_folder(args.model)
    questions = scoring.list_questions(encoder, config.text.chunk, args.count)
    columns = {}
    for mesh in args.meshes.split(","):
        for name in args.formats.split(","):
            llm = LLM(args.model, mesh=mesh, max_num_seqs=args.seqs, quiet=True, **FORMATS[name])
            answers = scoring.generate_answers(llm, encoder, questions)
            columns[f"{name}, mesh {mesh}"] = scoring.group_scores(questions, answers)
            del llm
    if args.reference:
        columns["transformers"] = scoring.group_scores(
            questions, answer_by_reference(args, questions)
        )
    table = scoring.Table(args.count, columns)
    print(table)
    loads_LE = scoring.count_experts(args.model)
    print(scoring.format_loads(loads_LE))
    if args.card:
        write_card(args.model, table.counts, table.columns, loads_LE.tolist())


def answer_by_reference(args: argparse.Namespace, questions: list) -> list[str]:
    """Generate transformers' greedy answers, in BF16 on a CPU.

    It runs without a KV cache, one forward of all tokens per new token, so that only the model
    itself is compared.
    """
    import torch  # pyright: ignore[reportMissingImports] - of the test extra
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation="eager"
    )
    encoder, answers = ExampleEncoder.from_folder(args.model), []
    stops = set(checkpoint.load_config(args.model).eos_ids)
    for exchange in questions:
        document = encoder(exchange)
        ids, answer = scoring.take_prompt(document), []
        pixels = scoring.normalize(document, encoder)
        more = {} if pixels is None else {"pixel_values": torch.tensor(pixels).bfloat16()}
        while len(answer) < scoring.MAX_ANSWER_TOKENS and not stops & set(answer):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids + answer]), use_cache=False, **more)
            answer.append(int(out.logits[0, -1].argmax()))
        answers.append(encoder.tokenizer.decode(answer))
    return answers


if __name__ == "__main__":
    main()
