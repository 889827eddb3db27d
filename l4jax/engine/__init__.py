"""The engine: scheduler, KV cache, programs and their runner. Scheduling does not import jax."""
