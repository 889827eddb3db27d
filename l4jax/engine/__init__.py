"""The engine: requests in, tokens out. Its bookkeeping knows no jax; its runner does."""
