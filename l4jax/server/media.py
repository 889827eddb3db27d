"""Images of messages, fetched and read under `MediaRules`. They are not decoded here.

URLs are untrusted, and the server may reach private hosts that clients do not (SSRF). Therefore
hosts are allowed by name. A name is resolved once, and all its addresses must be public. The
connection goes to a checked address. Each redirect passes the same checks.
"""

import asyncio
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpcore2

from l4jax.server.errors import ApiError
from l4jax.server.options import MediaRules

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Network:
    """Resolves names and opens connections; the only network access of this module."""

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    async def connect(
        self, address: str, port: int, timeout: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """Open a connection to an address."""
        backend: httpcore2.AsyncNetworkBackend = httpcore2.AnyIOBackend()  # type: ignore[assignment]
        return await backend.connect_tcp(address, port, timeout)


class MediaReader:
    """Reads the images of `image_url` parts.

    Args:
        rules: the allowed sources.
        network: for other connections in tests.
    """

    def __init__(self, rules: MediaRules, network: Network | None = None):
        self._rules = rules
        self._network = network or Network()
        self._context: ssl.SSLContext | None = None

    async def read_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replace `http:`, `https:` and `file:` images of messages by their bytes.

        Raises:
            ApiError: names the part, such as `messages[0].content[1].image_url.url`.
        """
        return [await self._read_message(m, f"messages[{n}]") for n, m in enumerate(messages)]

    async def _read_message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts = [
            await self._read_part(part, f"{where}.content[{n}]") for n, part in enumerate(content)
        ]
        return {**message, "content": parts}

    async def _read_part(self, part: Any, where: str) -> Any:
        if not isinstance(part, dict) or part.get("type") != "image_url":
            return part
        value, place = part.get("image_url"), f"{where}.image_url"
        if isinstance(value, dict):
            value, place = value.get("url"), f"{place}.url"
        if not isinstance(value, str):
            return part  # the renderer refuses it with a message
        scheme = value[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            return {"type": "image", "image": await self.fetch(value, place)}
        if scheme == "file":
            data = await asyncio.to_thread(self.read_file, value, place)
            return {"type": "image", "image": data}
        return part

    def read_file(self, url: str, where: str) -> bytes:
        """Read the file of a `file:` URL, if it lies in the folder of the rules."""
        folder = self._rules.folder
        if folder is None:
            raise ApiError(
                400, f"{where}: no local files are read here; send a data: URI.", param=where
            )
        parts = urllib.parse.urlsplit(url)
        refusal = ApiError(
            400,
            f"{where}: the file is not there, or not in the folder that may be read.",
            param=where,
        )
        if parts.netloc not in ("", "localhost"):
            raise refusal
        try:
            path = Path(urllib.parse.unquote(parts.path)).resolve(strict=True)
            if not path.is_relative_to(folder.resolve(strict=True)) or not path.is_file():
                raise refusal
            with path.open("rb") as file:
                data = file.read(self._rules.bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise refusal from error
        self._check_size(len(data), where)
        return data

    async def fetch(self, url: str, where: str) -> bytes:
        """Fetch an image, if the rules allow its URL and each redirect."""
        try:
            async with asyncio.timeout(self._rules.seconds):
                return await self._fetch_through_redirects(url, where)
        except TimeoutError:
            raise ApiError(
                400,
                f"{where}: the image did not come within {self._rules.seconds:g} seconds.",
                param=where,
            ) from None
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.TimeoutException,
            OSError,
        ) as error:
            # Without the reason, which would tell the client about the private network.
            raise ApiError(400, f"{where}: the image cannot be fetched.", param=where) from error

    async def _fetch_through_redirects(self, url: str, where: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._get(url, where)
            if isinstance(found, bytes):
                return found
            url = urllib.parse.urljoin(url, found)
        raise ApiError(
            400, f"{where}: more than {MAX_REDIRECTS} redirects; give the last URL.", param=where
        )

    async def _get(self, url: str, where: str) -> bytes | str:
        """Return the body, or the location of a redirect."""
        scheme, host, port, target = self._split_url(url, where)
        addresses = await self._network.resolve(host, port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise ApiError(
                400, f"{where}: {host!r} is not an address in the public network.", param=where
            )
        backend = _Pinned(self._network, addresses[0])
        context = self._get_context() if scheme == "https" else None
        request_url = httpcore2.URL(
            scheme=scheme.encode(), host=host.encode(), port=port, target=target
        )
        headers = [
            (b"Host", _format_host(scheme, host, port)),
            (b"Accept", b"image/*"),
            (b"User-Agent", b"l4jax"),
        ]
        async with (
            httpcore2.AsyncConnectionPool(context, network_backend=backend) as pool,
            pool.stream("GET", request_url, headers=headers) as response,
        ):
            found = {key.lower(): value for key, value in response.headers}
            if response.status in _REDIRECTS and b"location" in found:
                return found[b"location"].decode("latin-1")
            if response.status != 200:
                status = response.status
                raise ApiError(400, f"{where}: {host!r} answers with {status}.", param=where)
            return await self._read_body(response.aiter_stream(), where)

    async def _read_body(self, stream: Any, where: str) -> bytes:
        data = bytearray()
        async for piece in stream:
            data += piece
            self._check_size(len(data), where)
        return bytes(data)

    def _split_url(self, url: str, where: str) -> tuple[str, str, int, bytes]:
        """Split a URL into scheme, host, port and target; refuse a host that is not allowed."""
        try:
            parts = urllib.parse.urlsplit(url)
            host = (parts.hostname or "").encode("idna").decode().lower().rstrip(".")
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        except ValueError as error:
            raise ApiError(400, f"{where}: not a URL: {error}.", param=where) from error
        if not port:
            raise ApiError(
                400,
                f"{where}: leads to a {parts.scheme}: URL; only http and https are followed.",
                param=where,
            )
        if host not in self._rules.domains:
            raise ApiError(
                400,
                f"{where}: the host {host!r} is not allowed for images "
                "(--allowed-media-domains); send a data: URI.",
                param=where,
            )
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        return parts.scheme, host, port, (path + (f"?{query}" if query else "")).encode("ascii")

    def _check_size(self, size: int, where: str) -> None:
        if size > self._rules.bytes:
            raise ApiError(
                413,
                f"{where}: the image has more than {self._rules.bytes} bytes; shrink it.",
                param=where,
            )

    def _get_context(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context()
        return self._context


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to one checked address, for any host."""

    def __init__(self, network: Network, address: str):
        self._network, self._address = network, address

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        return await self._network.connect(self._address, port, timeout)


def is_public(address: str) -> bool:
    """Is an address public, and any address embedded in it, too?"""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner: Any = None
    if found.version == 6:
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if found in _NAT64:
            inner = ipaddress.ip_address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast and (inner is None or is_public(str(inner)))


def _format_host(scheme: str, host: str, port: int) -> bytes:
    name = f"[{host}]" if ":" in host else host
    is_default = port == {"http": 80, "https": 443}[scheme]
    return (name if is_default else f"{name}:{port}").encode()
