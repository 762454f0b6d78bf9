"""Drive a headless Chromium over its DevTools protocol: as much of it as the tests of a page need.

with Browser("/usr/bin/chromium", folder) as browser:
    browser.open("http://127.0.0.1:8000/")
    browser.upload("#files", [image])
    browser.wait("document.querySelectorAll('article').length === 1")
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1200,900",
]
WITHOUT_GPU = ["--disable-gpu"]
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
KEYS = {"Tab": 9, "Escape": 27, "ArrowRight": 39, " ": 32, "/": 191}


def chromium() -> str | None:
    """The browser's path, where one is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of one browser process; `problems` holds what the page has thrown or been forbidden."""

    def __init__(self, path: str, folder: Path, flags: list[str] = WITHOUT_GPU):
        self._folder = folder
        self._process = subprocess.Popen(
            [path, *FLAGS, *flags, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._loop, self._count, self.problems, self.requests = asyncio.new_event_loop(), 0, [], []

    def __enter__(self) -> Browser:
        self._run(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self._run(self._session.close())
        self._process.terminate()
        self._process.wait(20)
        self._loop.close()

    def _run(self, work):
        return self._loop.run_until_complete(asyncio.wait_for(work, 60))

    async def _connect(self) -> None:
        file, deadline = self._folder / "DevToolsActivePort", time.monotonic() + 40
        while not (file.exists() and file.read_text().count("\n")):
            assert self._process.poll() is None and time.monotonic() < deadline, "the browser does not start"
            await asyncio.sleep(0.05)
        port = file.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=64 << 20)

    async def _call(self, method: str, fields: dict) -> dict:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": fields})
        while True:
            message = json.loads((await self._socket.receive()).data)
            self._note(message)
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict) -> None:
        fields = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(fields["exceptionDetails"]["exception"].get("description"))
        elif message.get("method") == "Log.entryAdded" and fields["entry"]["source"] == "security":
            self.problems.append(fields["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(fields["request"]["url"])

    def call(self, method: str, **fields) -> dict:
        """One command of the protocol; its result."""
        return self._run(self._call(method, fields))

    def open(self, url: str) -> None:
        """Load a page."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str):
        """An expression's value, awaited where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}; {self.problems}"
            time.sleep(0.03)

    def upload(self, selector: str, files: list[Path]) -> None:
        """Choose files in an <input type=file>."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        node = found["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], objectId=node)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        text = {"text": key} if len(key) == 1 else {}
        named = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def screenshot(self) -> bytes:
        """The page as it is shown, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
