"""Allowed sources of images are read, and all others are refused."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpcore2
import pytest

from l4jax.server.errors import ApiError
from l4jax.server.media import MAX_REDIRECTS, MediaReader, Network, is_public
from l4jax.server.options import MediaRules

IMAGE = b"an image, which this module does not decode"
PUBLIC = "93.184.215.14"  # resolved in tests; connections go to the loopback


class ImageHost(ThreadingHTTPServer):
    """A host with an image, redirects, and slow, missing and large files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ImageHandler)
        self.seen: list[tuple[str, str]] = []
        self.targets: dict[str, str] = {}
        self.stop = threading.Event()


class ImageHandler(BaseHTTPRequestHandler):
    """Handles the requests of an `ImageHost`."""

    server: ImageHost

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))
        name, _, rest = self.path[1:].partition("/")
        if name == "redirect":
            self.send_response(302)
            self.send_header("Location", self.server.targets[rest])
            self.end_headers()
        elif name == "slow":
            self.server.stop.wait(30)
        elif name == "missing":
            self.send_error(404)
        else:
            data = IMAGE if name != "large" else b"x" * 100_000
            self.send_response(200)
            if name != "large":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader disconnects at its limit
                self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def host() -> Iterator[ImageHost]:
    server = ImageHost()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


class FakeNetwork(Network):
    """Resolves hosts to given addresses, and connects to the test's host only."""

    def __init__(self, host: ImageHost, addresses: dict[str, list[str]]):
        self.addresses, self.resolved, self.connected = addresses, [], []
        self._port = host.server_address[1]

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return self.addresses.get(host, [host])

    async def connect(self, address, port, timeout) -> httpcore2.AsyncNetworkStream:
        self.connected.append((address, port))
        return await super().connect("127.0.0.1", self._port, timeout)


RULES = MediaRules(domains=("pictures.example", "other.example"), bytes=10_000, seconds=5)
ADDRESSES = {"pictures.example": [PUBLIC], "other.example": [PUBLIC]}


def fetch(
    host, url: str, addresses=ADDRESSES, rules: MediaRules = RULES
) -> tuple[bytes, FakeNetwork]:
    network = FakeNetwork(host, addresses)
    return asyncio.run(MediaReader(rules, network).fetch(url, "here")), network


def refuse(
    host, url: str, says: str, addresses=ADDRESSES, rules: MediaRules = RULES
) -> FakeNetwork:
    """Require that a URL is refused with a message and its field."""
    network = FakeNetwork(host, addresses)
    with pytest.raises(ApiError, match=says) as caught:
        asyncio.run(MediaReader(rules, network).fetch(url, "here"))
    assert caught.value.param == "here" and caught.value.status_code in (400, 413)
    return network


def test_an_image_is_fetched_from_the_checked_address(host):
    data, network = fetch(host, "http://Pictures.Example:81/a%20b/c.png?size=1&x=ü")
    assert data == IMAGE
    assert network.resolved == ["pictures.example"] and network.connected == [(PUBLIC, 81)]
    assert host.seen == [("/a%20b/c.png?size=1&x=%C3%BC", "pictures.example:81")]


@pytest.mark.parametrize(
    "url",
    [
        "http://stranger.example/a.png",
        "http://127.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://pictures.example@stranger.example/a.png",
        "http://pictures.example.stranger.example/a.png",
        "http:///a.png",
    ],
)
def test_a_host_that_is_not_allowed_is_not_resolved(host, url):
    network = refuse(host, url, "--allowed-media-domains")
    assert network.resolved == [] and network.connected == []


def test_without_any_allowed_host_nothing_is_fetched(host):
    network = refuse(host, "http://pictures.example/", "allowed-media", rules=MediaRules())
    assert network.resolved == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "nonsense",
    ],
)
def test_an_allowed_name_with_a_private_address_is_refused(host, address):
    assert not is_public(address)
    addresses = {"pictures.example": [PUBLIC, address]}  # one private address is enough
    network = refuse(host, "http://pictures.example/", "public network", addresses)
    assert network.connected == []


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_public_addresses_are_public(address):
    assert is_public(address)


def test_a_redirect_passes_the_same_checks(host):
    host.targets.update(
        good="http://other.example/c.png",
        near="/c.png",
        stranger="http://stranger.example/c.png",
        private="http://other.example/c.png",
        file="file:///etc/passwd",
        loop="/redirect/loop",
    )
    assert fetch(host, "http://pictures.example/redirect/good")[0] == IMAGE
    assert fetch(host, "http://pictures.example/redirect/near")[0] == IMAGE
    base = "http://pictures.example/redirect/"
    refuse(host, base + "stranger", "--allowed-media-domains")
    refuse(host, base + "file", "only http and https")
    inside = {**ADDRESSES, "other.example": ["10.0.0.1"]}
    network = refuse(host, base + "private", "public network", inside)
    assert len(network.connected) == 1
    network = refuse(host, base + "loop", "redirects")
    assert len(network.connected) == MAX_REDIRECTS + 1


def test_a_large_slow_or_missing_image_is_refused(host):
    refuse(host, "http://pictures.example/large", "more than 10000 bytes")
    refuse(host, "http://pictures.example/missing", "answers with 404")
    slow = MediaRules(domains=RULES.domains, seconds=0.2)
    refuse(host, "http://pictures.example/slow", "within 0.2 seconds", rules=slow)
    refuse(host, "http://pictures.example:99999/", "not a URL")


def test_https_needs_a_host_with_tls(host):
    network = refuse(host, "https://pictures.example/a.png", "cannot be fetched")
    assert network.connected == [(PUBLIC, 443)]


def test_the_error_of_an_unresolved_name_hides_the_private_network(host):
    class Lost(FakeNetwork):
        async def resolve(self, host: str, port: int) -> list[str]:
            raise OSError("the name server at 10.0.0.2 does not answer")

    with pytest.raises(ApiError) as caught:
        asyncio.run(MediaReader(RULES, Lost(host, {})).fetch("http://other.example/", "here"))
    assert "10.0.0.2" not in caught.value.detail


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "open"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.png").write_bytes(IMAGE)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "open-too").mkdir()
    (tmp_path / "open-too" / "c.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "good.png").symlink_to(folder / "sub" / "a b.png")
    return folder


def test_files_in_the_folder_are_read_after_links_are_resolved(folder):
    reader = MediaReader(MediaRules(folder=folder))
    for url in (f"file://{folder}/sub/a%20b.png", f"file://localhost{folder}/good.png"):
        assert reader.read_file(url, "here") == IMAGE


@pytest.mark.parametrize(
    "path",
    [
        "/link.png",
        "/../secret.png",
        "/%2e%2e/secret.png",
        "/sub/../../secret.png",
        "/../open-too/c.png",
        "/nothing.png",
        "/sub",
        "/a%00.png",
    ],
)
def test_files_outside_the_folder_are_refused_in_every_spelling(folder, path):
    reader = MediaReader(MediaRules(folder=folder))
    with pytest.raises(ApiError, match="not in the folder") as caught:
        reader.read_file(f"file://{folder}{path}", "here")
    assert str(folder) not in caught.value.detail


def test_files_of_other_hosts_or_without_a_folder_are_refused(folder):
    with pytest.raises(ApiError, match="not in the folder"):
        MediaReader(MediaRules(folder=folder)).read_file(f"file://host{folder}/good.png", "here")
    with pytest.raises(ApiError, match="no local files"):
        MediaReader(MediaRules()).read_file(f"file://{folder}/good.png", "here")


def test_only_the_images_of_messages_are_replaced(host, folder):
    rules = MediaRules(domains=RULES.domains, folder=folder)
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "http://pictures.example/a.png"}},
        {"type": "image_url", "image_url": f"file://{folder}/good.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": parts}]
    read = asyncio.run(MediaReader(rules, FakeNetwork(host, ADDRESSES)).read_messages(messages))
    assert read[0] == messages[0]
    image = {"type": "image", "image": IMAGE}
    assert read[1]["content"] == [parts[0], image, image, parts[3]]


def test_an_error_names_the_location_of_the_image():
    parts = [{"type": "image_url", "image_url": {"url": "http://pictures.example/a.png"}}]
    with pytest.raises(ApiError) as caught:
        messages = [{"role": "user", "content": parts}]
        asyncio.run(MediaReader(MediaRules()).read_messages(messages))
    assert caught.value.param == "messages[0].content[0].image_url.url"
