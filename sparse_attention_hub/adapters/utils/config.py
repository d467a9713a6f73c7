"""Configuration of model servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelServerConfig:
    """How a model server keeps what it loaded.

    Attributes:
        delete_on_zero_reference: Whether a model or tokenizer is freed when its last user lets go.
        enable_stats_logging: Whether loads and releases are logged.
    """

    delete_on_zero_reference: bool = False
    enable_stats_logging: bool = True

    def __post_init__(self) -> None:
        """Checks the types.

        Raises:
            ValueError: A field is not True or False.
        """
        for name in ("delete_on_zero_reference", "enable_stats_logging"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
