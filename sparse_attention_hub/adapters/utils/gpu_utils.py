"""GPU memory, where there is a GPU."""

from __future__ import annotations

import torch


def cleanup_gpu_memory(gpu_id: int | None = None) -> None:
    """Gives memory that torch keeps for reuse back to the GPU; does nothing without one.

    Args:
        gpu_id: CUDA index; None = the current one.
    """
    if not torch.cuda.is_available():
        return
    with torch.cuda.device(gpu_id if gpu_id is not None else torch.cuda.current_device()):
        torch.cuda.empty_cache()


def validate_gpu_availability(gpu_id: int) -> bool:
    """Whether there is a CUDA device of this index."""
    return torch.cuda.is_available() and 0 <= gpu_id < torch.cuda.device_count()


def get_gpu_memory_info(gpu_id: int | None = None) -> dict[str, float | str]:
    """Memory of a GPU in GiB.

    Args:
        gpu_id: CUDA index; None = the current one.

    Returns:
        `allocated_gb`, `reserved_gb`, `total_gb` and `free_gb` (total - allocated); or `error`.
    """
    if not torch.cuda.is_available():
        return {"error": "no CUDA device"}
    index = torch.cuda.current_device() if gpu_id is None else gpu_id
    if not validate_gpu_availability(index):
        return {"error": f"no CUDA device {index}"}
    gib = 1024**3
    total = torch.cuda.get_device_properties(index).total_memory / gib
    allocated = torch.cuda.memory_allocated(index) / gib
    return {
        "allocated_gb": allocated,
        "reserved_gb": torch.cuda.memory_reserved(index) / gib,
        "total_gb": total,
        "free_gb": total - allocated,
    }
