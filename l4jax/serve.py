"""The command `python -m l4jax.serve --model FOLDER`: serve OpenAI's API."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence

from l4jax.engine.arguments import make_engine_config
from l4jax.server import flags


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, serve; return 0 after SIGTERM or Ctrl-C, 1 for an invalid argument."""
    args = flags.parse(argv)
    try:
        options = flags.make_options(args)
        changes = flags.make_generation_changes(args)
        engine_config = make_engine_config(args)
        try:
            from l4jax.server.run import serve
        except ModuleNotFoundError as error:
            raise ValueError(f'{error}: the server needs pip install "l4jax[serve]".') from error
        from l4jax import LLM, SamplingParams
        from l4jax.server.logs import LineLog, configure_logs
        from l4jax.server.service import Service

        configure_logs(args.log_level)
        with contextlib.redirect_stderr(LineLog(logging.getLogger("l4jax.serve"))):
            llm = LLM(**vars(engine_config))
        uses_checkpoint = args.generation_config == "auto"
        defaults = llm.get_default_sampling_params() if uses_checkpoint else SamplingParams()
        if uses_checkpoint and options.max_new_tokens is None:
            limit = llm.inputs.generation_fields.get("max_tokens")
            options = dataclasses.replace(options, max_new_tokens=limit)
        return serve(Service(llm, options, defaults.replace(**changes)))
    except (ValueError, OSError) as error:
        print(f"l4jax.serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nl4jax.serve: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
