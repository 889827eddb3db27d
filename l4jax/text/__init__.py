"""Prompt preprocessing and detokenization on the host, without jax and torch.

`tokenizer` encodes and decodes text; `chat` renders messages with the chat template; `image`
splits images into tiles (`image_io` opens them, `resample` resizes them); `grammar` computes token
bitmasks for structured outputs; `tools` parses tool calls; `detokenizer` decodes a stream of ids.
"""
