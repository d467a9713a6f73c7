"""Weights of HashAttention: reading them safely, and converting published checkpoints.

Per layer: `query_matrix`, `query_bias`, `key_matrix`, `key_bias`, each a list with one tensor per
linear layer: matrices `(heads, in, out)`, biases `(heads, out)`. Files: safetensors with tensors
named `{layer}.{part}.{index}`, or what torch saves of the same nested dictionary, whatever their
names end in. Pickles that need more than tensors are refused: reading one runs its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LayerWeights = dict[str, list[torch.Tensor]]
HatWeights = dict[int, LayerWeights]
PARTS = ("query_matrix", "query_bias", "key_matrix", "key_bias")


def load_hat_weights(path: str | Path, device: str | torch.device = "cpu") -> HatWeights:
    """Reads a weight file of one of the forms above.

    Raises:
        ValueError: The file cannot be read safely, or is not of such a form.
    """
    if _is_safetensors(path):
        # Imported here: what comes with transformers, and is needed by this alone.
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(str(path), device=str(device))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read weights from {str(path)!r}: {error}") from error
        nested: dict[int, dict[str, dict[int, torch.Tensor]]] = {}
        for name, tensor in tensors.items():
            layer, part, index = _split_name(name, path)
            nested.setdefault(layer, {}).setdefault(part, {})[index] = tensor
        return checked_hat_weights(
            {
                layer: {part: [ts[i] for i in sorted(ts)] for part, ts in parts.items()}
                for layer, parts in nested.items()
            }
        )
    return checked_hat_weights(_load_tensors(path, device))


def _is_safetensors(path: str | Path) -> bool:
    """Whether a file says so by its name, or begins like one: a header's length, and JSON."""
    if Path(path).suffix == ".safetensors":
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        size = Path(path).stat().st_size
    except OSError as error:
        raise ValueError(f"cannot read weights from {str(path)!r}: {error}") from error
    return start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size


def _split_name(name: str, path: str | Path) -> tuple[int, str, int]:
    pieces = name.split(".")
    if len(pieces) != 3 or not (pieces[0].isdigit() and pieces[2].isdigit()):
        raise ValueError(f"{str(path)!r}: {name!r} is not of the form layer.part.index")
    return int(pieces[0]), pieces[1], int(pieces[2])


def _load_tensors(path: str | Path, device: str | torch.device) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read weights from {str(path)!r}: {error}") from error
    except Exception as error:  # of a damaged file, it can be any
        # Without torch's own words: they advise to run what is in the file.
        raise ValueError(
            f"cannot read weights from {str(path)!r} safely ({type(error).__name__}): it is no "
            "safetensors file and no torch file of nothing but tensors, or it is damaged. A pickle "
            "that you trust can be converted: read it with pickle.load, and write what it gives "
            "with save_hat_weights"
        ) from None


def save_hat_weights(weights: HatWeights, path: str | Path) -> None:
    """Writes weights as safetensors.

    Raises:
        ValueError: The weights are not of the form above.
    """
    from safetensors.torch import save_file

    save_file(
        {
            f"{layer}.{part}.{index}": tensor.detach().clone().contiguous()
            for layer, parts in checked_hat_weights(weights).items()
            for part, tensors in parts.items()
            for index, tensor in enumerate(tensors)
        },
        str(path),
    )


def checked_hat_weights(weights: object) -> HatWeights:
    """Checks the form of weights.

    Raises:
        ValueError: Says what does not fit.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"weights must map layers to their parts, got {type(weights).__name__}")
    for layer, parts in weights.items():
        if type(layer) is not int or not isinstance(parts, Mapping) or set(parts) != set(PARTS):
            raise ValueError(f"layer {layer!r} must be an integer with {', '.join(PARTS)}")
        for side in ("query", "key"):
            matrices, biases = parts[f"{side}_matrix"], parts[f"{side}_bias"]
            if not (isinstance(matrices, (list, tuple)) and isinstance(biases, (list, tuple))):
                raise ValueError(f"layer {layer}: {side} matrices and biases must be lists")
            if not matrices or len(matrices) != len(biases):
                raise ValueError(f"layer {layer}: as many {side} matrices as biases, at least one")
            width = None
            for matrix, bias in zip(matrices, biases, strict=True):
                fits = (
                    isinstance(matrix, torch.Tensor)
                    and isinstance(bias, torch.Tensor)
                    and matrix.ndim == 3
                    and tuple(bias.shape) == (matrix.shape[0], matrix.shape[2])
                    and width in (None, matrix.shape[1])
                )
                if not fits:
                    raise ValueError(f"layer {layer}: the {side} weights do not fit each other")
                width = matrix.shape[2]
    return {layer: {part: list(parts[part]) for part in PARTS} for layer, parts in weights.items()}


def convert_usa_weights_to_hash_attention(
    usa_checkpoint_path: str | Path,
    num_layers: int = 32,
    num_heads: int = 32,
    num_mlp_layers: int = 3,
    device: str | torch.device = "cpu",
) -> HatWeights:
    """Reads a published checkpoint: a state dict with one small network per layer and head.

    Its names are `{layer}.learning_to_hash_transformation_{q|k}.{head}.{0, 2, 4, ...}.weight` (and
    `.bias`, taken as 0 where there is none), the activations in between being the odd numbers.

    Raises:
        ValueError: The file cannot be read safely, or a weight is missing.
    """
    state = _load_tensors(usa_checkpoint_path, device)
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint must be a state dict, got a {type(state).__name__}")
    weights: HatWeights = {}
    for layer in range(num_layers):
        parts: LayerWeights = {part: [] for part in PARTS}
        for side, short in (("query", "q"), ("key", "k")):
            for step in range(num_mlp_layers):
                stems = [
                    f"{layer}.learning_to_hash_transformation_{short}.{head}.{2 * step}"
                    for head in range(num_heads)
                ]
                missing = [stem for stem in stems if f"{stem}.weight" not in state]
                if missing:
                    raise ValueError(f"the checkpoint has no {missing[0]}.weight")
                matrices = [state[f"{stem}.weight"].T for stem in stems]
                biases = [
                    state.get(f"{stem}.bias", matrix.new_zeros(matrix.shape[1]))
                    for stem, matrix in zip(stems, matrices, strict=True)
                ]
                if len({matrix.shape for matrix in matrices}) > 1:
                    raise ValueError(f"the heads' weights differ in shape from {stems[0]}.weight")
                parts[f"{side}_matrix"].append(torch.stack(matrices))
                parts[f"{side}_bias"].append(torch.stack(biases))
        weights[layer] = parts
    return checked_hat_weights(weights)


def create_hat_weights_file_from_usa(
    usa_checkpoint_path: str | Path,
    target_path: str | Path,
    num_layers: int = 32,
    num_heads: int = 32,
    num_mlp_layers: int = 3,
    device: str | torch.device = "cpu",
) -> None:
    """Converts a published checkpoint into a safetensors file.

    `load_hat_weights` reads it whatever the name of the target ends in.

    Raises:
        ValueError: As `convert_usa_weights_to_hash_attention`.
    """
    weights = convert_usa_weights_to_hash_attention(
        usa_checkpoint_path, num_layers, num_heads, num_mlp_layers, device
    )
    save_hat_weights(weights, target_path)
