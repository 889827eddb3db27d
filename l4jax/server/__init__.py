"""The OpenAI-compatible server: HTTP in, engine requests out, and tokens back as they come."""
