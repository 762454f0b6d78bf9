"""Serve data sets as the Hugging Face hub does, for HF_ENDPOINT: the routes that `datasets` and fsspec's hf:// ask."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# what the hub answers for a data set that may not be read: status, X-Error-Code, message
REFUSED = {
    "someone/absent": (401, "RepoNotFound", "Invalid username or password."),  # also without a token: it may be private
    "someone/gated": (401, "GatedRepo", "Access to dataset someone/gated is restricted. You must be logged in."),
    "someone/asked": (403, "GatedRepo", "Access to dataset someone/asked is restricted and you are not in its list."),
}


class Hub:
    """A server of data sets: their files by id and name. `asked` has the requests."""

    def __init__(self, data_sets: dict[str, dict[str, bytes]]):
        self.data_sets = data_sets
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        parts = parts[1:] if parts[0] == "api" else parts
        name, rest = "/".join(parts[1:3]), parts[3:]
        if parts[0] != "datasets" or (name not in self.data_sets and name not in REFUSED):
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        if name in REFUSED:
            status, code, message = REFUSED[name]
            return status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode()
        files = self.data_sets[name]
        if rest[:1] == ["resolve"]:
            return self._file(files, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            under = "".join(f"{part}/" for part in rest[2:])
            inside = {f: c for f, c in files.items() if f.startswith(under)}
            if not inside:
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            folders = {str(parent) for f in inside for parent in PurePosixPath(f).parents} - {"."}
            found = [self._entry(f, c) for f, c in inside.items()]
            found += [{"type": "directory", "oid": COMMIT, "size": 0, "path": folder} for folder in folders]
            found = [e for e in found if e["path"].startswith(under) and e["path"] != under]
            if "recursive=false" in path:
                found = [e for e in found if "/" not in e["path"].removeprefix(under)]
        elif rest[:1] == ["paths-info"]:
            asked = json.loads(body)["paths"] if body[:1] == b"{" else []
            found = [self._entry(f, files[f]) for f in asked if f in files]
        else:
            siblings = [{"rfilename": f} for f in files]
            found = [{"_id": "1", "id": name, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}]
        content = found if rest[:1] in (["tree"], ["paths-info"]) else found[0]
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def _file(self, files: dict[str, bytes], name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b"Entry not found"
        tag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, files[name]

    @staticmethod
    def _entry(name: str, content: bytes) -> dict:
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, content = hub.answer(self.command, self.path, body)
                asked = self.headers.get("Range", "").removeprefix("bytes=")
                if status == 200 and asked:
                    start, _, end = asked.partition("-")
                    last = min(int(end or len(content)), len(content) - 1)
                    headers = {**headers, "Content-Range": f"bytes {start}-{last}/{len(content)}"}
                    status, content = 206, content[int(start) : last + 1]
                self.send_response(status)
                for header in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(*header)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = reply

            def log_message(self, *_) -> None:
                """Print nothing."""

        return Handler
