"""Emulators of S3 and Google Cloud Storage on this machine, behind a proxy that counts the bytes they send.

with emulator("s3") as cloud:           # sets the environment that s3fs and gcsfs read
    fsspec.open(f"{cloud.bucket}/a.tar")
"""

from __future__ import annotations

import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from unittest.mock import patch

INSTALL = 'pip install s3fs "moto[server]" gcsfs gcp-storage-emulator'
CLIENTS = {"s3": ("s3fs", "moto"), "gs": ("gcsfs", "gcp_storage_emulator")}
PROGRAMS = {
    "s3": "import sys; from moto.server import main; main(['-p', sys.argv[1]])",
    "gs": "import sys; from gcp_storage_emulator.__main__ import main;"
    " main(['start', '--in-memory', '--port', sys.argv[1]])",
}
BUCKET = "vlv-test"
START_SECONDS = 60


class _Proxy(socketserver.ThreadingTCPServer):
    """Forwards connections to a port of this machine and counts what comes back."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: int):
        self.target, self.sent, self._lock = target, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), _Connection)

    def count(self, size: int) -> None:
        with self._lock:
            self.sent += size


class _Connection(socketserver.BaseRequestHandler):
    server: _Proxy

    def handle(self) -> None:
        try:
            with socket.create_connection(("127.0.0.1", self.server.target)) as upstream:
                threading.Thread(target=self._copy, args=(self.request, upstream), daemon=True).start()
                self._copy(upstream, self.request, self.server.count)
        except OSError:  # either side went away
            pass

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, count=lambda size: None) -> None:
        try:
            while part := source.recv(1 << 16):
                target.sendall(part)
                count(len(part))
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@dataclass(frozen=True)
class Cloud:
    """An emulator with an empty bucket."""

    bucket: str  # its URL
    proxy: _Proxy

    def take(self) -> dict[str, int]:
        """Return the bytes that it has sent since the last call, headers of HTTP included."""
        found = {"bytes": self.proxy.sent}
        self.proxy.sent = 0
        return found


def missing(kind: str) -> bool:
    """Return True if the client or the emulator of "s3" or "gs" is not installed: INSTALL says how."""
    return not all(map(find_spec, CLIENTS[kind]))


@contextmanager
def emulator(kind: str) -> Iterator[Cloud]:
    """Run an emulator of "s3" or "gs"; meanwhile fsspec's clients, those of child processes too, talk to it."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    proxy = _Proxy(port)
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    environment = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url, "FSSPEC_S3_ENDPOINT_URL": url, "STORAGE_EMULATOR_HOST": url,
        "FSSPEC_GS_TOKEN": "anon", "FSSPEC_GS_PROJECT": "test", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAMS[kind], str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        with patch.dict(os.environ, environment), patch.dict(fsspec.config.conf):
            fsspec.config.set_conf_env(fsspec.config.conf)
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"http://127.0.0.1:{port}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the emulator of {kind} did not start")
                time.sleep(0.1)
            system, _ = fsspec.core.url_to_fs(f"{kind}://{BUCKET}/x")
            system.mkdir(BUCKET)
            cloud = Cloud(f"{kind}://{BUCKET}", proxy)
            cloud.take()
            yield cloud
            system.clear_instance_cache()
    finally:
        process.terminate()
        process.wait()
        proxy.shutdown()
        proxy.server_close()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
