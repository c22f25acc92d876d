"""Downloads of images: what is public, redirects, sizes and times."""

import asyncio
import http.server
import threading

import pytest

from metamorph_hf.serving import remote_images


ADDRESSES = {
    "93.184.216.34": True,
    "2606:2800:220:1:248:1893:25c8:1946": True,
    "127.0.0.1": False,
    "10.1.2.3": False,
    "172.16.0.1": False,
    "192.168.1.1": False,
    "100.64.0.1": False,
    "169.254.169.254": False,
    "0.0.0.0": False,
    "224.0.0.1": False,
    "::1": False,
    "::": False,
    "fe80::1%eth0": False,
    "fc00::1": False,
    "::ffff:127.0.0.1": False,
    "64:ff9b::7f00:1": False,
    "2002:7f00:1::": False,
    "2001:0:7f00:1::": False,
    "fec0::1": False,
    "::127.0.0.1": False,
    "64:ff9b:1::7f00:1": False,
    "::ffff:0:127.0.0.1": False,
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_is_public(address):
    assert remote_images.is_public(address) == ADDRESSES[address]


class Handler(http.server.BaseHTTPRequestHandler):
    hosts: list[str] = []

    def do_GET(self):
        self.hosts.append(self.headers["Host"])
        if self.path == "/image":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 1000)
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/slow":
            threading.Event().wait(2)
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def port():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def resolver(monkeypatch):
    """Names for 127.0.0.1; all of them but those with `private` in their name pass for public ones."""

    async def find(host: str, port: int) -> str:
        if host.endswith(".test"):
            return "127.0.0.1"
        return await real(host, port)

    real = remote_images.find_public_address
    monkeypatch.setattr(remote_images, "find_public_address", find)


def get(url: str, max_bytes: int = 5000) -> bytes:
    return asyncio.run(remote_images.download(url, max_bytes))


def test_download_goes_to_the_checked_address(port, resolver):
    """The name exists nowhere, so that a second look-up would fail; the host still learns it."""
    assert get(f"http://image.test:{port}/image") == b"x" * 1000
    assert Handler.hosts[-1] == f"image.test:{port}"
    assert get(f"http://image.test:{port}/to/http://other.test:{port}/image") == b"x" * 1000


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "169.254.169.254"])
def test_private_hosts(port, host):
    with pytest.raises(ValueError, match="not on the public internet|not known"):
        get(f"http://{host}:{port}/image")


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("/to/http://127.0.0.1:{port}/image", "not on the public internet"),
        ("/to/file:///etc/passwd", "must begin with http"),
        ("/to//to//to//to//image", "redirects more than 3 times"),
        ("/to/http://image.test:99999/image", "port 99999, but ports are 1 to 65535"),
        ("/missing", "status 404"),
        ("/slow", "not downloaded within"),
    ],
)
def test_refused_on_the_way(port, resolver, monkeypatch, path, sentence):
    monkeypatch.setattr(remote_images, "DOWNLOAD_SECONDS", 1.0)
    with pytest.raises(ValueError, match=sentence):
        get(f"http://image.test:{port}{path.format(port=port)}")


def test_size(port, resolver):
    with pytest.raises(ValueError, match="larger than the 999 bytes"):
        get(f"http://image.test:{port}/image", max_bytes=999)


@pytest.mark.parametrize("url", ["ftp://image.test/x", "http://user:password@image.test/x", "http://"])
def test_addresses(url, resolver):
    with pytest.raises(ValueError, match="must begin with http"):
        get(url)


def test_data_uri():
    assert remote_images.decode_data_uri("data:image/png;base64,aGVsbG8=") == b"hello"
    for uri in ("data:image/png,hello", "data:image/png;base64", "data:image/png;base64,a"):
        with pytest.raises(ValueError, match="data URI"):
            remote_images.decode_data_uri(uri)
