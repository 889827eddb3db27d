"""Serve until a signal says stop: then finish or cancel what is in flight, and return."""

import asyncio
import logging
import os
import signal
import socket
import sys

import uvicorn

from l4jax.server.app import build_app
from l4jax.server.service import Service

# Between ending the requests that are left and hanging up on their callers, in seconds.
FAREWELL_SECONDS = 3.0
# How long a connection may idle: longer than clients and proxies keep theirs, since one that is
# closed just as its client uses it again is a lost request.
IDLE_SECONDS = 75

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn, whose shutdown tells the engine first."""

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
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=int(options.shutdown_timeout + FAREWELL_SECONDS) + 1,
            )
        )
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        options = self._service.options
        facts = {"host": options.host, "port": options.port, "pid": os.getpid()}
        logger.info("listening", extra=facts | {"models": options.served_model_names})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, wait for what is in flight as long as allowed, then end it."""
        loop, seconds = self._service.loop, self._service.options.shutdown_timeout
        loop.drain()
        logger.info("shutting down", extra={"in_flight": loop.count_flying(), "seconds": seconds})
        timer = asyncio.get_running_loop().call_later(seconds, loop.abort_all)
        await super().shutdown(sockets)
        timer.cancel()


def serve(service: Service) -> int:
    """Serve until SIGTERM or Ctrl-C, both of which are an orderly end: 0. 1 if it cannot start."""
    server = Server(service)
    # uvicorn raises the signals that ended it once more, for whom it may concern: nobody, here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit:  # uvicorn has logged that it cannot listen
        return 1
    logger.info("stopped")
    if service.loop.is_running or service.loop.is_compiling:
        # It compiles, perhaps for minutes, and Python cannot end while it does.
        sys.stderr.flush()
        os._exit(0)
    return 0
