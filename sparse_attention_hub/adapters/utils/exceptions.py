"""Errors of model servers, in process and over HTTP."""

from __future__ import annotations


class ModelServerError(Exception):
    """Base of all errors of model servers.

    Attributes:
        message: What happened.
        details: `key=value` pairs about it.
    """

    def __init__(self, message: str, details: str = "") -> None:
        """Keeps both parts."""
        super().__init__(f"{message}: {details}" if details else message)
        self.message = message
        self.details = details


def _pairs(**values: object) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


class ModelCreationError(ModelServerError):
    """A model could not be loaded."""

    def __init__(
        self,
        model_name: str,
        gpu_id: object = None,
        original_error: BaseException | None = None,
    ) -> None:
        """Keeps what was asked for, and why it failed."""
        details = _pairs(gpu_id=gpu_id, original_error=original_error)
        super().__init__(f"cannot load the model {model_name!r}", details)
        self.model_name = model_name
        self.gpu_id = gpu_id
        self.original_error = original_error


class TokenizerCreationError(ModelServerError):
    """A tokenizer could not be loaded."""

    def __init__(self, tokenizer_name: str, original_error: BaseException | None = None) -> None:
        """Keeps what was asked for, and why it failed."""
        details = _pairs(original_error=original_error)
        super().__init__(f"cannot load the tokenizer {tokenizer_name!r}", details)
        self.tokenizer_name = tokenizer_name
        self.original_error = original_error


class ReferenceCountError(ModelServerError):
    """Something was released more often than it was taken."""

    def __init__(self, resource_key: str, operation: str, current_count: int) -> None:
        """Keeps the resource and its count before the operation."""
        details = _pairs(
            resource_key=resource_key, operation=operation, current_count=current_count
        )
        super().__init__("reference count out of order", details)
        self.resource_key = resource_key
        self.operation = operation
        self.current_count = current_count


class ResourceCleanupError(ModelServerError):
    """A model or tokenizer could not be freed."""

    def __init__(
        self,
        resource_key: str,
        resource_type: str,
        original_error: BaseException | None = None,
    ) -> None:
        """Keeps the resource, and why it failed."""
        details = _pairs(resource_key=resource_key, original_error=original_error)
        super().__init__(f"cannot free the {resource_type}", details)
        self.resource_key = resource_key
        self.resource_type = resource_type
        self.original_error = original_error


class ServerRequestError(ModelServerError):
    """A server over HTTP refused a request, or failed at it.

    Attributes:
        status_code: HTTP status; None when there was none.
        original_error: Of the client.
    """

    def __init__(
        self,
        message: str,
        details: str = "",
        status_code: int | None = None,
        original_error: BaseException | None = None,
    ) -> None:
        """Keeps what happened; `details` hold the server's words, and its log if it is ours."""
        super().__init__(message, details)
        self.status_code = status_code
        self.original_error = original_error


class ServerTimeoutError(ServerRequestError):
    """A server was silent for longer than it may be."""


class ServerConnectionError(ServerRequestError):
    """A server cannot be reached, or went away in the middle of an answer."""
