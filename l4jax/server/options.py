"""What the server is built for, apart from the model."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class MediaRules:
    """Where pictures may come from. `data:` URIs always may.

    Attributes:
        domains: hosts that http and https URLs may name; none, and nothing is fetched.
        folder: `file:` URLs may name what lies in it, once links are followed.
        bytes: of a picture's file, at most.
        seconds: for fetching a picture, redirects and all.
    """

    domains: tuple[str, ...] = ()
    folder: Path | None = None
    bytes: int = 32 * 2**20
    seconds: float = 5.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the server; each is a flag of `l4jax.serve`, and described there."""

    host: str = "0.0.0.0"
    port: int = 8000
    served_model_names: tuple[str, ...] = ("l4jax",)
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 256
    max_request_bytes: int = 64 * 2**20
    request_timeout: float | None = None
    shutdown_timeout: float = 30.0
    max_logprobs: int = 20
    max_new_tokens: int | None = None
    trusts_request_templates: bool = False
    logs_requests: bool = False
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    media: MediaRules = MediaRules()
