"""An OpenAI-compatible server whose answers the test chooses, and a feature net trained here."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Scripted(ThreadingHTTPServer):
    """`answer(body) -> text`, (status, text or error[, headers]), a whole body as a dict or as bytes.

    `asked` has each request's path, headers and body.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked = lambda body: "", []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that stops leaves its other requests
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers, body))
        answer = self.server.answer(body)
        status, text, *headers = answer if isinstance(answer, tuple) else (200, answer)
        message = {"role": "assistant", "content": text}
        content = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }  # fmt: skip
        if status != 200:
            content = {"error": text if isinstance(text, dict) else {"message": text, "type": "invalid_request_error"}}
        whole = isinstance(answer, dict | bytes)
        data = answer if isinstance(answer, bytes) else json.dumps(answer if whole else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    scripted = Scripted()
    thread = threading.Thread(target=scripted.serve_forever, args=(0.02,))
    thread.start()
    yield scripted
    scripted.shutdown()
    thread.join()
    scripted.server_close()


@pytest.fixture(scope="session")
def scene_net(tmp_path_factory):
    """A transformers folder with a small ResNet that a few steps on scenes have trained."""
    from vlv.evaluate.synthetic import scene_net

    folder = tmp_path_factory.mktemp("scene-net")
    scene_net.save(scene_net.train(steps=30, batch=32), folder)
    return folder
