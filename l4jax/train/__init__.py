"""How the bundled model is made: its data, its training on a mesh, its scores. And LoRA.

`charts` and `tasks` invent examples, `documents` spells them as tokens, `batches` packs them and
`stream` keeps workers at it: no jax in these. `kernels` lets the model of `l4jax.model` train
without a page pool; `learning` is a step, `state` what outlives a process, `run` the loop.
`conversations` reads what an adapter of any checkpoint learns from, and `tuning` learns it.
"""
