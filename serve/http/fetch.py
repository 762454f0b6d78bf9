"""Fetch the images that a request names by URL: data: URLs, and http(s) from hosts on a list.

A server that fetches any URL can be used to attack its own network (SSRF). Therefore only listed hosts are fetched;
every address of a host name must be public, and the connection uses exactly the addresses that were checked, so that a
later answer of the name server changes nothing; redirects are followed under the same rules; size and time are
limited; nothing is decompressed; no cookie, proxy or credential is used.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import re
import socket
import urllib.parse

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver

from serve.http.errors import ApiError

REDIRECTS = 3


class Fetcher:
    """Fetch images; `await fetcher.get(url)` returns the file's content."""

    def __init__(self, hosts: tuple[str, ...] = (), max_bytes: int = 20 << 20, seconds: float = 10, private=False):
        """Allow `hosts`: `images.example.org`, `*.example.org`, `host:8080`; `private` allows private addresses."""
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._private = private
        self._session: aiohttp.ClientSession | None = None

    async def get(self, url: str) -> bytes:
        """Return the content of a data: or http(s) URL. Raises ApiError 400."""
        url = url.strip()
        if url[:5].lower() == "data:":
            return self._data(url)
        try:
            async with asyncio.timeout(self._seconds):
                return await self._http(url)
        except TimeoutError as error:
            raise _error(f"the image did not arrive within {self._seconds:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _error(f"the image cannot be fetched: {type(error).__name__}") from error

    def _data(self, url: str) -> bytes:
        head, comma, payload = url.partition("#")[0].partition(",")
        if not comma:
            raise _error("the data: URL has no comma between its type and its content")
        content = urllib.parse.unquote_to_bytes(payload)
        if re.search(r";\s*base64\s*$", head, re.IGNORECASE):
            try:
                content = forgiving_base64(content)
            except ValueError as error:
                raise _error("the data: URL's content is no base64") from error
        if len(content) > self._max_bytes:
            raise self._too_large()
        return content

    async def _http(self, url: str) -> bytes:
        for _ in range(REDIRECTS + 1):
            self._check(url)
            async with self._open().get(url, allow_redirects=False, headers={"Accept-Encoding": "identity"}) as answer:
                if answer.status in (301, 302, 303, 307, 308) and (location := answer.headers.get("Location")):
                    url = urllib.parse.urljoin(url, location)
                    continue
                if answer.status != 200:
                    raise _error(f"the image's host answers {answer.status}")
                if (answer.content_length or 0) > self._max_bytes:
                    raise self._too_large()
                content = bytearray()
                async for chunk in answer.content.iter_chunked(1 << 16):
                    content += chunk
                    if len(content) > self._max_bytes:
                        raise self._too_large()
                return bytes(content)
        raise _error(f"more than {REDIRECTS} redirects")

    def _check(self, url: str) -> None:
        """Check scheme, host and port before anything is resolved, with the parser that aiohttp connects by."""
        try:
            parts = yarl.URL(url)
            host = (parts.raw_host or "").rstrip(".").lower()
        except ValueError as error:
            raise _error("the image's URL cannot be read") from error
        if parts.scheme not in ("http", "https") or not host:
            raise _error("images come as data: URLs, or as http(s) URLs of hosts that this server allows")
        if parts.user is not None or parts.password is not None:
            raise _error("an image's URL must hold no credentials")
        address_name = host if parts.is_default_port() else f"{host}:{parts.port}"
        if not any(_matches(entry, address_name) for entry in self._hosts):
            raise _error(f"this server fetches no images from {host}: send a data: URL")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return  # a name: the resolver checks its addresses
        if not self._private and not is_public(address):
            raise _error("the image's host is no public address")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(resolver=PublicResolver(self._private), limit=64, use_dns_cache=False)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, auto_decompress=False
            )
        return self._session

    def _too_large(self) -> ApiError:
        return _error(f"the image file has more than {self._max_bytes >> 20} MiB")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def forgiving_base64(text: bytes) -> bytes:
    """Decode base64 as browsers do (WHATWG Infra, "forgiving-base64 decode"). Raises ValueError.

    ASCII whitespace is removed and padding may be missing.
    """
    text = text.translate(None, b"\t\n\f\r ")
    if len(text) % 4 == 0:
        text = text.removesuffix(b"==") if text.endswith(b"==") else text.removesuffix(b"=")
    if len(text) % 4 == 1 or b"=" in text:
        raise ValueError("wrong length or padding")
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


class PublicResolver(AbstractResolver):
    """Resolve a name only if all its addresses are public; the connection uses exactly these."""

    def __init__(self, private: bool):
        self._private = private

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[dict]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        for *_, address in found:
            if not self._private and not is_public(ipaddress.ip_address(address[0].partition("%")[0])):
                raise _error("the image's host is no public address")
        return [
            {
                "hostname": host,
                "host": address[0],
                "port": port,
                "family": kind,
                "proto": proto,
                "flags": socket.AI_NUMERICHOST,
            }
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        pass


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return True if an address is on the public internet; IPv6 forms that wrap an IPv4 address are unwrapped."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


def _matches(entry: str, host: str) -> bool:
    return host.endswith(entry[1:].lower()) if entry.startswith("*.") else host == entry.lower()


def _error(message: str) -> ApiError:
    return ApiError(400, "image_url", message)
