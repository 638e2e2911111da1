"""The errors of the endpoint. A client gets them as OpenAI's error object."""

from __future__ import annotations

import json

_TYPES = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
_MAX_SHOWN_CHARS = 80


class RequestError(Exception):
    """A request that can't be served with ReGrad."""

    def __init__(
        self, status: int, message: str, param: str | None = None, *, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status  # HTTP status
        self.message = message
        self.param = param  # the field at fault
        self.retry_after_ms = retry_after_ms  # for the header Retry-After

    @classmethod
    def bad(cls, field: str, rule: str, got: object) -> RequestError:
        """The error with status 400 for a field that breaks a rule: ``field`` must be ``rule``."""
        return cls(400, f"{field} must be {rule}, got {shown(got)}", field)

    def as_json(self) -> dict[str, object]:
        """The answer's body."""
        kind = _TYPES.get(self.status, "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def shown(value: object) -> str:
    """A value as JSON, cut to a length that fits a message."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError):  # an integer with more digits than Python prints
        text = type(value).__name__
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"
