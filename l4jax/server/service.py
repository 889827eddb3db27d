"""The parts of a server: the model, its preprocessor, its engine loop, options and metrics."""

import contextlib
import time
from collections.abc import Iterator

from l4jax.engine.request import SamplingParams
from l4jax.llm import LLM
from l4jax.server.errors import ApiError
from l4jax.server.loop import EngineLoop
from l4jax.server.media import MediaReader
from l4jax.server.metrics import Metrics
from l4jax.server.options import Options
from l4jax.server.preprocess import Preprocessor
from l4jax.text.tokenizer import Tokenizer


class Service:
    """A served model.

    Args:
        llm: from now on only the service uses its engine.
        options: of the server.
        defaults: sampling parameters that a request leaves out.
        media: fetches images; None makes one with the rules of `options.media`.
    """

    def __init__(
        self,
        llm: LLM,
        options: Options,
        defaults: SamplingParams,
        media: MediaReader | None = None,
    ):
        self.options, self.defaults = options, defaults
        self.created = int(time.time())
        self.max_model_len = llm.engine.limits.max_length  # tokens of prompt and output
        self.metrics = Metrics(options.served_model_names[0])
        self.preprocessor = Preprocessor(
            llm.inputs,
            media or MediaReader(options.media),
            trusts_templates=options.trusts_request_templates,
        )
        limits = llm.engine.limits
        self.loop = EngineLoop(
            llm.engine,
            limits.requests * limits.shards + options.max_waiting,
            self.metrics,
            options.request_timeout,
        )
        self.metrics.register_engine(lambda: self.loop.stats)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.preprocessor.inputs.tokenizer

    def get_model(self, name: str | None) -> str:
        """Return the model name of a response: the requested one, or the first served name.

        Raises:
            ApiError: 404 for a name that is not served.
        """
        names = self.options.served_model_names
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"The model {name[:100]!r} is not served here: it is {' or '.join(names)}.",
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    @contextlib.contextmanager
    def reserve_one(self) -> Iterator[None]:
        """Reserve room for a request that needs time and no engine, such as `/tokenize`."""
        handle = self.loop.reserve(1)
        try:
            yield
        finally:
            handle.close()

    def close(self) -> None:
        """Stop the threads of the preprocessor."""
        self.preprocessor.close()
