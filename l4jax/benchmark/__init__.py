"""Cost model, measurements and report of `l4jax.bench`."""
