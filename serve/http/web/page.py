"""Build the page at `/` of the server: images in, captions out, in a browser.

serve/http/web/ holds its markup, style and script; they are sent as one document that loads nothing else, so that it
works offline. The content security policy names style and script by their hashes: no other script runs, whatever a
caption or a file name contains."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

_WEB = files("serve.http.web")


def _hashed(name: str) -> tuple[str, str]:
    text = _WEB.joinpath(name).read_text(encoding="utf-8")
    return text, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


(_STYLE, _style), (_SCRIPT, _script) = _hashed("style.css"), _hashed("app.js")
PAGE = _hashed("index.html")[0].replace("/*STYLE*/", _STYLE).replace("/*SCRIPT*/", _SCRIPT)
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_style}'; script-src 'sha256-{_script}'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
