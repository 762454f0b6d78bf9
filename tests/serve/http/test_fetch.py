"""Test images by URL: what is fetched, and each way in which a URL may lead to a private address."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import ipaddress
import socket
import threading
import time

import pytest

from serve.http.errors import ApiError
from serve.http.fetch import Fetcher, is_public

IMAGE = b"\x89PNG" + bytes(5000)


class Host(http.server.BaseHTTPRequestHandler):
    """Serve images, and answers that must be refused."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(301)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif self.path == "/endless":  # without a Content-Length
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(bytes(100_000))
        elif self.path == "/gzip":
            assert self.headers["Accept-Encoding"] == "identity"
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"bomb")
        elif self.path == "/image":
            self.send_response(200)
            self.send_header("Content-Length", str(len(IMAGE)))
            self.end_headers()
            self.wfile.write(IMAGE)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the client has left
            super().handle()


@pytest.fixture(scope="module")
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def get(url: str, *hosts: str, private: bool = True, **options):
    """Return the content, or the error's message."""

    async def fetch():
        fetcher = Fetcher(hosts, **{"max_bytes": 1 << 20, "seconds": 1, **options}, private=private)
        try:
            return await fetcher.get(url)
        except ApiError as error:
            assert error.status == 400
            return str(error)
        finally:
            await fetcher.close()

    return asyncio.run(fetch())


def test_fetches_from_hosts_on_the_list(host):
    assert get(f"http://{host}/image", host) == IMAGE
    assert get(f"http://{host}/to//image", host) == IMAGE
    assert get(f"http://{host}/gzip", host) == b"bomb"  # as it came: nothing is decompressed here
    port = host.partition(":")[2]
    assert get(f"http://localhost:{port}/image", f"localhost:{port}") == IMAGE
    assert get("data:image/png;base64,aGVsbG8=") == b"hello" and get("data:,a%20b") == b"a b"


@pytest.mark.parametrize(
    ("url", "content"),
    [
        # cases of WHATWG's forgiving-base64 decode, as browsers take them
        ("data:image/png;base64,aGVs\r\nbG8=\n", b"hello"),  # line breaks, as MIME and base64(1) write them
        ("data:image/png;base64,aGVsbG8", b"hello"),  # without padding
        ("data:image/png;base64, aG Vs\tbG8 = ", b"hello"),
        ("data:;base64,YQ", b"a"),
        ("data:;base64,YQ%3D%3D", b"a"),
        ("data:;base64,YWI%0A", b"ab"),
        ("data:;BASE64,YWJj", b"abc"),
        ("data:text/plain; base64 ,YWJj#fragment", b"abc"),
        (" data:;base64,YWJj\n", b"abc"),
        ("data:text/plain;base64;x=y,YWJj", b"YWJj"),  # base64 must be the last word
    ],
)
def test_data_urls_as_browsers_take_them(url, content):
    assert get(url) == content


@pytest.mark.parametrize("payload", ["YQ=", "Y", "YWJj=", "YWJjZ", "YW=Jj", "Y===", "YWJj====", "YW-_", "YW!j"])
def test_data_urls_that_browsers_refuse(payload):
    assert "no base64" in get(f"data:;base64,{payload}")


def test_refuses_other_hosts(host):
    assert "fetches no images from 127.0.0.1" in get(f"http://{host}/image")
    assert "fetches no images from evil.org" in get("http://evil.org/", "images.org", "*.images.org")
    assert "fetches no images from evilimages.org" in get("http://evilimages.org/", "*.images.org")
    assert "fetches no images" in get("http://images.org:8080/", "images.org")
    assert "no credentials" in get("http://images.org@evil.org/", "images.org")
    for url in ("ftp://images.org/x", "file:///etc/passwd", "http:///x", "gopher://images.org", "//images.org/x"):
        assert "images come as data: URLs" in get(url, "images.org")
    for url in ("http://[::1", "http://images.org:99999/"):
        assert "cannot be read" in get(url, "images.org")


def test_redirects_are_checked_like_the_first_url(host):
    assert "fetches no images from example.org" in get(f"http://{host}/to/http://example.org/", host)
    assert "images come as" in get(f"http://{host}/to/file:///etc/passwd", host)
    assert "more than 3 redirects" in get(f"http://{host}/loop", host)


def test_private_addresses_are_refused(host):
    """Even for a host on the list, as a number, as a name, and as a name that changes its answer."""
    assert "no public address" in get(f"http://{host}/image", host, private=False)
    port = host.partition(":")[2]
    assert "no public address" in get(f"http://localhost:{port}/image", f"localhost:{port}", private=False)
    # other spellings of 127.0.0.1: as numbers they go through the resolver
    for name in ("2130706433", "0x7f.1", "127.1", "0"):
        told = get(f"http://{name}/", name, private=False)
        assert "no public address" in told or "InvalidUrl" in told, (name, told)


def test_a_name_that_changes_its_answer(host, monkeypatch):
    """The address that was checked is the one that is connected to: a second answer is never asked for."""
    port, asked = int(host.partition(":")[2]), []

    async def answer(self, name, *_, **__):
        asked.append(name)
        address = "93.184.215.14" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", answer)
    # nothing listens, or nothing is reached, at the public address; the loopback one would answer
    told = get(f"http://images.org:{port}/image", f"images.org:{port}", private=False, seconds=0.5)
    assert "did not arrive" in told or "cannot be fetched" in told
    assert asked in (["images.org"], ["images.org"] * 2) and told != IMAGE


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
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "2002:7f00:1::",
        "::ffff:169.254.169.254",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


def test_addresses_that_are_public():
    assert all(is_public(ipaddress.ip_address(a)) for a in ("93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8"))


def test_size_and_time(host):
    assert "more than 1 MiB" in get(f"http://{host}/endless", host)
    assert "more than 0 MiB" in get(f"http://{host}/image", host, max_bytes=1000)
    assert "did not arrive within 1 s" in get(f"http://{host}/slow", host)
    assert "answers 404" in get(f"http://{host}/absent", host)
    assert "more than 1 MiB" in get("data:;base64," + "A" * (2 << 20))
