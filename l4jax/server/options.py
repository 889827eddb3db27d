"""Options of the server, apart from the model and its engine. No jax."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class MediaRules:
    """Allowed sources of images. `data:` URIs are always allowed.

    Attributes:
        domains: hosts of http and https URLs; without any, nothing is fetched.
        folder: of `file:` URLs; their paths must lie in it after links are resolved.
        bytes: of an image file, at most.
        seconds: for fetching an image, including redirects.
    """

    domains: tuple[str, ...] = ()
    folder: Path | None = None
    bytes: int = 32 * 2**20
    seconds: float = 5.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the server; `l4jax.serve --help` describes each as a flag."""

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
