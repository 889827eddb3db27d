"""Training: the bundled model's data, training on a mesh, scores; and LoRA on any checkpoint.

Data, without jax: `charts` and `tasks` generate examples, `documents` encodes them as tokens,
`batches` packs them into batches, `data_loader` runs workers. `conversations` reads a chat dataset.
Training: `kernels` runs `l4jax.model` without a page pool, `train_step` computes loss and update,
`saved_state` saves and restores, `trainer` is the loop, `lora` trains adapters.
The bundled model: `bundle` is its config and export, `tokenizer` its tokenizer, `scoring` its
scores, `card` its model card.
"""
