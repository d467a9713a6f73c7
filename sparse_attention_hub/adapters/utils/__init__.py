"""Configuration, errors, keys and GPU memory of model servers (module paths of the field's API)."""

from sparse_attention_hub.adapters.utils.config import ModelServerConfig
from sparse_attention_hub.adapters.utils.exceptions import (
    ModelCreationError,
    ModelServerError,
    ReferenceCountError,
    ResourceCleanupError,
    ServerConnectionError,
    ServerRequestError,
    ServerTimeoutError,
    TokenizerCreationError,
)
from sparse_attention_hub.adapters.utils.gpu_utils import cleanup_gpu_memory
from sparse_attention_hub.adapters.utils.key_generation import (
    generate_model_key,
    generate_tokenizer_key,
    hash_kwargs,
)

__all__ = [
    "ModelCreationError",
    "ModelServerConfig",
    "ModelServerError",
    "ReferenceCountError",
    "ResourceCleanupError",
    "ServerConnectionError",
    "ServerRequestError",
    "ServerTimeoutError",
    "TokenizerCreationError",
    "cleanup_gpu_memory",
    "generate_model_key",
    "generate_tokenizer_key",
    "hash_kwargs",
]
