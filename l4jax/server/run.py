"""Serve until a signal; then finish or abort the requests in flight, and return."""

import asyncio
import logging
import os
import signal
import socket
import sys

import uvicorn

from l4jax.server.app import build_app
from l4jax.server.service import Service

# Seconds between aborting the remaining requests and closing their connections.
ABORT_GRACE_SECONDS = 3.0
# Keep-alive of idle connections, in seconds: longer than that of clients and proxies. A connection
# that the server closes just as the client reuses it loses a request.
KEEP_ALIVE_SECONDS = 75

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn with a shutdown that drains the engine first."""

    def __init__(self, service: Service):
        options = service.options
        super().__init__(
            uvicorn.Config(
                build_app(service),
                host=options.host,
                port=options.port,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                ssl_keyfile=options.ssl_keyfile,
                ssl_certfile=options.ssl_certfile,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(options.shutdown_timeout + ABORT_GRACE_SECONDS) + 1,
            )
        )
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log it."""
        await super().startup(sockets)
        options = self._service.options
        fields = {"host": options.host, "port": options.port, "pid": os.getpid()}
        logger.info("listening", extra=fields | {"models": options.served_model_names})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain: wait for requests in flight up to `shutdown_timeout`, then abort them."""
        loop, seconds = self._service.loop, self._service.options.shutdown_timeout
        loop.drain()
        in_flight = loop.count_in_flight()
        logger.info("shutting down", extra={"in_flight": in_flight, "seconds": seconds})
        timer = asyncio.get_running_loop().call_later(seconds, loop.abort_all)
        await super().shutdown(sockets)
        timer.cancel()


def serve(service: Service) -> int:
    """Serve until SIGTERM or Ctrl-C; return 0, or 1 if the server cannot start."""
    server = Server(service)
    # After its shutdown uvicorn raises the signals again, which would change the exit code.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit:  # uvicorn has logged that it cannot listen
        return 1
    logger.info("stopped")
    if service.loop.is_running or service.loop.is_compiling:
        # XLA compiles, perhaps for minutes, and Python cannot exit before it has finished.
        sys.stderr.flush()
        os._exit(0)
    return 0
