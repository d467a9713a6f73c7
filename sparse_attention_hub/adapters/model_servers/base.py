"""`ModelServer`: loads each model and tokenizer once, for all adapters of the process."""

from __future__ import annotations

import gc
import logging
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Self

from sparse_attention_hub.adapters.model_servers.shared import SharedResources
from sparse_attention_hub.adapters.utils.config import ModelServerConfig
from sparse_attention_hub.adapters.utils.exceptions import (
    ModelCreationError,
    TokenizerCreationError,
)
from sparse_attention_hub.adapters.utils.key_generation import (
    generate_model_key,
    generate_tokenizer_key,
)

logger = logging.getLogger(__name__)


@dataclass
class ModelEntry:
    """A loaded model.

    Attributes:
        model: The model.
        reference_count: Its users.
        gpu_id: Where it was asked to be.
        model_kwargs: It was loaded with.
        creation_time: When it was loaded.
        last_access_time: When it was last handed out.
    """

    model: Any
    reference_count: int
    gpu_id: Any
    model_kwargs: dict[str, Any]
    creation_time: datetime = field(default_factory=datetime.now)
    last_access_time: datetime = field(default_factory=datetime.now)


@dataclass
class TokenizerEntry:
    """A loaded tokenizer; attributes as in `ModelEntry`."""

    tokenizer: Any
    reference_count: int
    tokenizer_kwargs: dict[str, Any]
    creation_time: datetime = field(default_factory=datetime.now)
    last_access_time: datetime = field(default_factory=datetime.now)


class ModelServer(ABC):
    """One per process: the first construction fixes its class and configuration.

    Attributes:
        config: How long things are kept.
    """

    _instance: ClassVar[ModelServer | None] = None
    _lock: ClassVar[threading.RLock] = threading.RLock()
    _initialized: bool

    def __new__(cls, config: ModelServerConfig | None = None) -> Self:
        """The process's server.

        Raises:
            ValueError: It is of another class, or has another configuration than asked for.
        """
        with ModelServer._lock:
            existing = ModelServer._instance
            if existing is None:
                created = super().__new__(cls)
                created._initialized = False
                ModelServer._instance = created
                return created
            if type(existing) is not cls:
                raise ValueError(
                    f"this process has a {type(existing).__name__}; cannot make a {cls.__name__}"
                )
            if config is not None and existing._initialized and config != existing.config:
                raise ValueError(
                    f"this process's {cls.__name__} has {existing.config}, asked for {config}"
                )
            return existing

    def __init__(self, config: ModelServerConfig | None = None) -> None:
        """Starts empty, the first time.

        Args:
            config: Default: `ModelServerConfig()`, or what the server already has.
        """
        with ModelServer._lock:
            if self._initialized:
                return
            self.config = config or ModelServerConfig()
            self._models: SharedResources[ModelEntry] = SharedResources(
                "model",
                lambda entry: self._delete_model(entry.model, entry.gpu_id),
                self._reclaim_memory,
            )
            self._tokenizers: SharedResources[TokenizerEntry] = SharedResources(
                "tokenizer", lambda entry: self._delete_tokenizer(entry.tokenizer)
            )
            self._initialized = True

    @abstractmethod
    def _create_model(self, model_name: str, gpu_id: Any, model_kwargs: dict[str, Any]) -> Any:
        """Loads a model."""

    @abstractmethod
    def _create_tokenizer(self, tokenizer_name: str, tokenizer_kwargs: dict[str, Any]) -> Any:
        """Loads a tokenizer."""

    @abstractmethod
    def _delete_model(self, model: Any, gpu_id: Any) -> None:
        """Frees what a model holds beyond Python's own references."""

    @abstractmethod
    def _delete_tokenizer(self, tokenizer: Any) -> None:
        """Frees what a tokenizer holds beyond Python's own references."""

    def _model_key(self, model_name: str, gpu: Any, model_kwargs: dict[str, Any]) -> str:
        """What is the same for equal models."""
        return generate_model_key(model_name, gpu, model_kwargs)

    def _reclaim_memory(self) -> None:
        """Called after a model was let go: breaks reference cycles, so that it dies at once."""
        gc.collect()

    def _log(self, what: str, key: str) -> None:
        if self.config.enable_stats_logging:
            logger.info("%s %s", what, key)

    def get_model(self, model_name: str, gpu: Any, model_kwargs: dict[str, Any]) -> Any:
        """The model, loaded on first use, with one user more.

        Args:
            model_name: Or folder.
            gpu: Device: None = CPU, a CUDA index, a name, or a `torch.device`.
            model_kwargs: For the loader.

        Raises:
            ModelCreationError: It cannot be loaded.
        """
        key = self._model_key(model_name, gpu, model_kwargs)

        def create() -> ModelEntry:
            self._log("loading model", key)
            try:
                model = self._create_model(model_name, gpu, model_kwargs)
            except ModelCreationError:
                raise
            except Exception as error:
                raise ModelCreationError(model_name, gpu, error) from error
            return ModelEntry(model, 0, gpu, dict(model_kwargs))

        return self._models.acquire(key, create).model

    def clear_model(self, model_name: str, gpu: Any, model_kwargs: dict[str, Any]) -> bool:
        """One user less; frees the model at zero if so configured. False for an unknown one.

        Raises:
            ReferenceCountError: It has no users.
        """
        key = self._model_key(model_name, gpu, model_kwargs)
        return self._models.release(key, self.config.delete_on_zero_reference)

    def release_memory_and_clean(
        self, model_name: str, gpu: Any, model_kwargs: dict[str, Any], force_delete: bool = False
    ) -> bool:
        """Frees a model; one in use only with `force_delete`. False when it was not freed."""
        return self._models.free(self._model_key(model_name, gpu, model_kwargs), force_delete)

    def release_memory_and_clean_all(self, force_delete: bool = False) -> dict[str, int]:
        """Frees all models; returns the numbers "deleted" and "skipped"."""
        return self._models.free_all(force_delete)

    def get_tokenizer(self, tokenizer_name: str, tokenizer_kwargs: dict[str, Any]) -> Any:
        """The tokenizer, loaded on first use, with one user more.

        Raises:
            TokenizerCreationError: It cannot be loaded.
        """
        key = generate_tokenizer_key(tokenizer_name, tokenizer_kwargs)

        def create() -> TokenizerEntry:
            self._log("loading tokenizer", key)
            try:
                tokenizer = self._create_tokenizer(tokenizer_name, tokenizer_kwargs)
            except TokenizerCreationError:
                raise
            except Exception as error:
                raise TokenizerCreationError(tokenizer_name, error) from error
            return TokenizerEntry(tokenizer, 0, dict(tokenizer_kwargs))

        return self._tokenizers.acquire(key, create).tokenizer

    def clear_tokenizer(self, tokenizer_name: str, tokenizer_kwargs: dict[str, Any]) -> bool:
        """As `clear_model`."""
        key = generate_tokenizer_key(tokenizer_name, tokenizer_kwargs)
        return self._tokenizers.release(key, self.config.delete_on_zero_reference)

    def release_tokenizer_and_clean(
        self, tokenizer_name: str, tokenizer_kwargs: dict[str, Any], force_delete: bool = False
    ) -> bool:
        """As `release_memory_and_clean`."""
        key = generate_tokenizer_key(tokenizer_name, tokenizer_kwargs)
        return self._tokenizers.free(key, force_delete)

    def release_tokenizers_and_clean_all(self, force_delete: bool = False) -> dict[str, int]:
        """As `release_memory_and_clean_all`."""
        return self._tokenizers.free_all(force_delete)

    def cleanup_unused(self) -> dict[str, dict[str, int]]:
        """Frees what has no users; returns "deleted" and "skipped" of "models" and "tokenizers"."""
        return {
            "models": self._models.free_unused(),
            "tokenizers": self._tokenizers.free_unused(),
        }

    def get_model_stats(self) -> dict[str, Any]:
        """What is loaded: total_models, total_references, zero_reference_models, model_keys."""
        total, references, unused, keys = self._models.stats()
        return {
            "total_models": total,
            "total_references": references,
            "zero_reference_models": unused,
            "model_keys": keys,
        }

    def get_tokenizer_stats(self) -> dict[str, Any]:
        """As `get_model_stats`, of tokenizers."""
        total, references, unused, keys = self._tokenizers.stats()
        return {
            "total_tokenizers": total,
            "total_references": references,
            "zero_reference_tokenizers": unused,
            "tokenizer_keys": keys,
        }
