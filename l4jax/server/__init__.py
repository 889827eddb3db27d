"""The OpenAI-compatible server.

A request takes one direction: `app` parses the body, `chat` or `completions` has `preprocess`
encode the prompts, a `RequestHandle` submits them to the `EngineLoop`, and the reply builder turns
its deltas into a response or a stream.
"""
