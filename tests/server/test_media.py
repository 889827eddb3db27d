"""Where pictures may come from: what is allowed is read, and everything else is refused."""

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

PICTURE = b"a picture, as far as anybody here knows"
PUBLIC = "93.184.215.14"  # the rule sees it; the connection goes to the loopback


class Hall(BaseHTTPRequestHandler):
    """A host that has a picture, and traps."""

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
            data = PICTURE if name != "large" else b"x" * 100_000
            self.send_response(200)
            if name != "large":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader hangs up at its limit
                self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hall() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hall)
    server.daemon_threads = True
    server.seen, server.targets, server.stop = [], {}, threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Map(Network):
    """Says where hosts are, and takes every connection to the hall: the rules stay as they are."""

    def __init__(self, hall: ThreadingHTTPServer, addresses: dict[str, list[str]]):
        self.addresses, self.resolved, self.connected = addresses, [], []
        self._port = hall.server_address[1]

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return self.addresses.get(host, [host])

    async def connect(self, address, port, timeout) -> httpcore2.AsyncNetworkStream:
        self.connected.append((address, port))
        return await super().connect("127.0.0.1", self._port, timeout)


RULES = MediaRules(domains=("pictures.example", "other.example"), bytes=10_000, seconds=5)
PLACES = {"pictures.example": [PUBLIC], "other.example": [PUBLIC]}


def fetch(hall, url: str, places=PLACES, rules: MediaRules = RULES) -> tuple[bytes, Map]:
    network = Map(hall, places)
    return asyncio.run(MediaReader(rules, network).fetch(url, "here")), network


def refuse(hall, url: str, says: str, places=PLACES, rules: MediaRules = RULES) -> Map:
    """A URL is refused in words, under the name of its field."""
    network = Map(hall, places)
    with pytest.raises(ApiError, match=says) as caught:
        asyncio.run(MediaReader(rules, network).fetch(url, "here"))
    assert caught.value.param == "here" and caught.value.status_code in (400, 413)
    return network


def test_a_picture_is_fetched_from_the_one_address_that_was_checked(hall):
    data, network = fetch(hall, "http://Pictures.Example:81/a%20b/c.png?size=1&x=ü")
    assert data == PICTURE
    assert network.resolved == ["pictures.example"] and network.connected == [(PUBLIC, 81)]
    assert hall.seen == [("/a%20b/c.png?size=1&x=%C3%BC", "pictures.example:81")]


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
def test_a_host_that_is_not_named_is_not_even_looked_up(hall, url):
    network = refuse(hall, url, "--allowed-media-domains")
    assert network.resolved == [] and network.connected == []


def test_without_any_allowed_host_nothing_is_fetched(hall):
    network = refuse(hall, "http://pictures.example/", "allowed-media", rules=MediaRules())
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
def test_an_allowed_name_that_leads_to_a_private_address_is_refused(hall, address):
    assert not is_public(address)
    places = {"pictures.example": [PUBLIC, address]}  # one bad address among good ones is enough
    network = refuse(hall, "http://pictures.example/", "public network", places)
    assert network.connected == []


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_public_addresses_are_public(address):
    assert is_public(address)


def test_a_redirect_passes_the_same_checks(hall):
    hall.targets.update(
        good="http://other.example/c.png",
        near="/c.png",
        stranger="http://stranger.example/c.png",
        private="http://other.example/c.png",
        file="file:///etc/passwd",
        loop="/redirect/loop",
    )
    assert fetch(hall, "http://pictures.example/redirect/good")[0] == PICTURE
    assert fetch(hall, "http://pictures.example/redirect/near")[0] == PICTURE
    base = "http://pictures.example/redirect/"
    refuse(hall, base + "stranger", "--allowed-media-domains")
    refuse(hall, base + "file", "only http and https")
    inside = {**PLACES, "other.example": ["10.0.0.1"]}
    network = refuse(hall, base + "private", "public network", inside)
    assert len(network.connected) == 1
    network = refuse(hall, base + "loop", "redirects")
    assert len(network.connected) == MAX_REDIRECTS + 1


def test_a_picture_that_is_too_large_or_too_slow_or_not_there_is_refused(hall):
    refuse(hall, "http://pictures.example/large", "more than 10000 bytes")
    refuse(hall, "http://pictures.example/missing", "answers with 404")
    slow = MediaRules(domains=RULES.domains, seconds=0.2)
    refuse(hall, "http://pictures.example/slow", "within 0.2 seconds", rules=slow)
    refuse(hall, "http://pictures.example:99999/", "not a URL")


def test_a_host_that_speaks_no_tls_cannot_be_fetched_by_https(hall):
    network = refuse(hall, "https://pictures.example/a.png", "cannot be fetched")
    assert network.connected == [(PUBLIC, 443)]


def test_a_name_that_is_not_found_tells_nothing_of_the_network(hall):
    class Lost(Map):
        async def resolve(self, host: str, port: int) -> list[str]:
            raise OSError("the name server at 10.0.0.2 does not answer")

    with pytest.raises(ApiError) as caught:
        asyncio.run(MediaReader(RULES, Lost(hall, {})).fetch("http://other.example/", "here"))
    assert "10.0.0.2" not in caught.value.detail


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "open"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.png").write_bytes(PICTURE)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "open-too").mkdir()
    (tmp_path / "open-too" / "c.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "good.png").symlink_to(folder / "sub" / "a b.png")
    return folder


def test_a_file_in_the_folder_is_read_and_links_are_followed_first(folder):
    reader = MediaReader(MediaRules(folder=folder))
    for url in (f"file://{folder}/sub/a%20b.png", f"file://localhost{folder}/good.png"):
        assert reader.read_file(url, "here") == PICTURE


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
def test_a_file_outside_of_the_folder_is_refused_however_it_is_spelled(folder, path):
    reader = MediaReader(MediaRules(folder=folder))
    with pytest.raises(ApiError, match="not in the folder") as caught:
        reader.read_file(f"file://{folder}{path}", "here")
    assert str(folder) not in caught.value.detail


def test_files_of_other_machines_and_without_a_folder_are_refused(folder):
    with pytest.raises(ApiError, match="not in the folder"):
        MediaReader(MediaRules(folder=folder)).read_file(f"file://host{folder}/good.png", "here")
    with pytest.raises(ApiError, match="no local files"):
        MediaReader(MediaRules()).read_file(f"file://{folder}/good.png", "here")


def test_messages_keep_everything_but_where_their_pictures_were(hall, folder):
    rules = MediaRules(domains=RULES.domains, folder=folder)
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "http://pictures.example/a.png"}},
        {"type": "image_url", "image_url": f"file://{folder}/good.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": parts}]
    read = asyncio.run(MediaReader(rules, Map(hall, PLACES)).read_messages(messages))
    assert read[0] == messages[0]
    picture = {"type": "image", "image": PICTURE}
    assert read[1]["content"] == [parts[0], picture, picture, parts[3]]


def test_a_bad_picture_is_named_by_its_place_in_the_messages():
    parts = [{"type": "image_url", "image_url": {"url": "http://pictures.example/a.png"}}]
    with pytest.raises(ApiError) as caught:
        messages = [{"role": "user", "content": parts}]
        asyncio.run(MediaReader(MediaRules()).read_messages(messages))
    assert caught.value.param == "messages[0].content[0].image_url.url"
