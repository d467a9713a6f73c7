"""`ModelServerHF`: models and tokenizers of transformers."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_attention_hub.adapters.model_servers.base import ModelServer
from sparse_attention_hub.adapters.utils.gpu_utils import (
    cleanup_gpu_memory,
    get_gpu_memory_info,
    validate_gpu_availability,
)
from sparse_attention_hub.adapters.utils.key_generation import generate_model_key
from sparse_attention_hub.adapters.utils.model_utils import (
    device_name,
    loader_arguments,
    resolve_device,
)


class ModelServerHF(ModelServer):
    """Loads with transformers' auto classes."""

    def _model_key(self, model_name: str, gpu: Any, model_kwargs: dict[str, Any]) -> str:
        arguments = loader_arguments(model_kwargs)
        is_placed_by_loader = arguments.get("device_map") is not None
        return generate_model_key(
            model_name, None if is_placed_by_loader else device_name(gpu), arguments
        )

    def _create_model(self, model_name: str, gpu_id: Any, model_kwargs: dict[str, Any]) -> Any:
        arguments = loader_arguments(model_kwargs)
        # With a device_map the loader places it, possibly on several devices.
        is_placed_by_loader = arguments.get("device_map") is not None
        device = None if is_placed_by_loader else resolve_device(gpu_id)
        model: Any = AutoModelForCausalLM.from_pretrained(model_name, **arguments)
        return (model if device is None else model.to(device)).eval()

    def _create_tokenizer(self, tokenizer_name: str, tokenizer_kwargs: dict[str, Any]) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **tokenizer_kwargs)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _delete_model(self, model: Any, gpu_id: Any) -> None:
        """Nothing beyond Python's own references: who still holds the model may still use it."""

    def _reclaim_memory(self) -> None:
        super()._reclaim_memory()
        cleanup_gpu_memory()

    def _delete_tokenizer(self, tokenizer: Any) -> None:
        """Nothing beyond Python's own references."""

    def get_model_with_device_info(
        self, model_name: str, gpu: Any, model_kwargs: dict[str, Any]
    ) -> tuple[Any, str]:
        """The model (see `get_model`), and where it is."""
        model = self.get_model(model_name, gpu, model_kwargs)
        return model, str(model.device)

    @staticmethod
    def validate_gpu_availability(gpu_id: int) -> bool:
        """Whether there is a CUDA device of this index."""
        return validate_gpu_availability(gpu_id)

    @staticmethod
    def get_gpu_memory_info(gpu_id: int | None = None) -> dict[str, float | str]:
        """Memory of a GPU in GiB (see `gpu_utils.get_gpu_memory_info`)."""
        return get_gpu_memory_info(gpu_id)
