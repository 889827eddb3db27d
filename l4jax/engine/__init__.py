"""The engine: requests in, tokens out. Bookkeeping (request, pages, scheduler) knows no jax; the
runner does.
"""
