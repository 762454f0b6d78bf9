"""Build the documents of the server: the page at `/`, the API's description, and the page at `/docs` made from it.

The markup, style and script of the page are sent as one document that loads nothing else, so that it works offline. The
content security policy names style and script by their hashes: no other script runs, whatever a caption or a file name
contains.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator
from importlib.resources import files

_WEB = files("serve.http.web")


def _read(name: str) -> str:
    return _WEB.joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _docs(api: dict) -> str:
    """Return the API's description as HTML: for each route its request's fields."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>API</title>", f"<style>{_STYLE}</style>"]
    parts.append(f"<h1>{html.escape(api['info']['title'])}</h1><p>{html.escape(api['info']['description'])}")
    parts.append('<p><a href="openapi.json">openapi.json</a>')
    for path, methods in api["paths"].items():
        for method, about in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(about['summary'])}"
            )
            for kind, content in about.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<p>{html.escape(kind)}<ul>{''.join(_fields(content['schema']))}</ul>")
    return "\n".join(parts)


def _fields(schema: dict) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        limits = {key: field[key] for key in ("minimum", "maximum", "default", "enum") if key in field}
        notes = ", ".join(f"{key} {json.dumps(value)}" for key, value in limits.items())
        needed = " (required)" if name in schema.get("required", ()) else ""
        text = " ".join(filter(None, [field.get("type", ""), field.get("description", ""), notes]))
        yield f"<li><code>{html.escape(name)}</code>{needed}: {html.escape(str(text))}"


_STYLE, _SCRIPT = _read("style.css"), _read("app.js")
PAGE = _read("index.html").replace("/*STYLE*/", _STYLE).replace("/*SCRIPT*/", _SCRIPT)
OPENAPI = json.loads(_read("openapi.json"))
DOCS = _docs(OPENAPI)
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_hash(_STYLE)}'; "
    f"script-src 'sha256-{_hash(_SCRIPT)}'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# of a page that loads an encoder from this server, which is JavaScript and WebAssembly
HEADERS_WITH_ENCODER = {
    **HEADERS,
    "Content-Security-Policy": HEADERS["Content-Security-Policy"].replace(
        "script-src", "script-src 'self' 'wasm-unsafe-eval'"
    ),
}
