"""What `l4jax.bench` measures: how much must be moved and computed, and how long it takes."""
