"""Define the one error that every part of the servers raises for a request it does not answer."""

from __future__ import annotations


class ApiError(Exception):
    """Carry the HTTP status, OpenAI's `code`, one sentence, and the seconds after which a client may try again."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


def invalid_request(message: str) -> ApiError:
    """Return the error for a request whose content is not accepted: HTTP 400."""
    return ApiError(400, "invalid_request", message)
