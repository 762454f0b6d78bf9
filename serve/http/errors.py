"""Define the one error that every part of the servers raises for a request it does not answer."""

from __future__ import annotations


class ApiError(Exception):
    """Carry an HTTP status, one sentence, and OpenAI's `code` and `param` (the field that is wrong).

    `retry_after`: seconds after which the client may try again. `headers`: more of the response's headers.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retry_after: float | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.param = param
        self.headers = headers or {}


def invalid_request(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """Return the error for a request whose content is not accepted: HTTP 400."""
    return ApiError(400, code, message, param=param)


def invalid_value(param: str, message: str) -> ApiError:
    """Return the error for a field with a wrong value: HTTP 400."""
    return invalid_request(message, param, "invalid_value")
