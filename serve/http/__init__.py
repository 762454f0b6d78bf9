"""Serve captions over HTTP: routes, OpenAI's API, authentication, admission, the page."""
