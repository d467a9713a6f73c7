"""HashAttention masker: keys ranked by the agreement of learned bit signatures.

Desai et al. 2024, "HashAttention: Semantic Sparsity for Faster Inference", section 4: small learned
networks map queries and keys to bits; a key's score is how many bits agree with the query's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerFacts,
    MaskerRegistry,
    require_config,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import (
    TopKMasker,
    TopKMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    check_integer_field,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_labels import (
    labels_of_keys,
)
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import (
    HatWeights,
    checked_hat_weights,
    load_hat_weights,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import split_channels

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
}
_WORD = 32


def _search_space() -> dict[str, Any]:
    return {"heavy_size": {"grid_search": [step / 100 for step in range(1, 11)]}}


@dataclass(frozen=True)
class HashAttentionTopKMaskerConfig(TopKMaskerConfig):
    """The networks that make signatures.

    Attributes:
        hat_bits: Bits of a signature: the width of the networks' last layer.
        hat_mlp_layers: Linear layers of a network.
        hat_mlp_hidden_size: Width of its hidden layers.
        hat_mlp_activation: Between them: "relu", "silu", "gelu" or "tanh".
        hat_weights: See `hashattention_utils`; in process only. Either these or the file.
        hat_weight_file: Safetensors or a torch file of tensors.
        search_space: For tuners; no part of what the masker does.
    """

    json_name: ClassVar[str | None] = "hash_attention_top_k"

    hat_bits: int
    hat_mlp_layers: int
    hat_mlp_hidden_size: int
    hat_mlp_activation: str
    hat_weights: HatWeights | None = field(default=None, compare=False, repr=False)
    hat_weight_file: str | None = None
    search_space: dict[str, Any] = field(default_factory=_search_space, compare=False)

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        super().__post_init__()
        for name in ("hat_bits", "hat_mlp_layers", "hat_mlp_hidden_size"):
            check_integer_field(self, name, 1)
        if self.hat_mlp_activation not in list(ACTIVATIONS):  # which may be of any type
            raise ValueError(
                f"hat_mlp_activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.hat_mlp_activation!r}"
            )
        if (self.hat_weights is None) == (self.hat_weight_file is None):
            raise ValueError(
                "exactly one of hat_weights and hat_weight_file must be given, got "
                + ("neither" if self.hat_weights is None else "both")
            )
        path: object = self.hat_weight_file
        if path is not None and not (isinstance(path, str) and Path(path).is_file()):
            raise ValueError(f"hat_weight_file must be an existing file, got {path!r}")


@MaskerRegistry.register(HashAttentionTopKMaskerConfig)
class HashAttentionTopKMasker(TopKMasker):
    """Ranks keys by `bits - 2 * (bits that differ)`, the dot product of signs.

    A network's output of exactly 0 counts as positive. Weights have one network per query head, or
    one per KV head.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="HashAttention, Desai et al. 2024",
        state="bit signatures",
        index_bytes="hat_bits / 8",
        is_paged=True,
    )
    needs_layer_idx: ClassVar[bool] = True

    def __init__(self, config: HashAttentionTopKMaskerConfig) -> None:
        """Reads and checks the weights.

        Args:
            config: Of this masker.

        Raises:
            ValueError: The weights cannot be read safely, or are not of the configured shape.
        """
        super().__init__(config)
        # A cache holds this object, so that no masker to come can have the same.
        self._name = ("hash_attention", object())
        self.hat_bits = config.hat_bits
        self.hat_mlp_activation = config.hat_mlp_activation
        if config.hat_weight_file is not None:
            self._weights = load_hat_weights(config.hat_weight_file)
        else:
            self._weights = checked_hat_weights(config.hat_weights)
        widths = [config.hat_mlp_hidden_size] * (config.hat_mlp_layers - 1) + [config.hat_bits]
        for layer, parts in self._weights.items():
            for side in ("query_matrix", "key_matrix"):
                found = [matrix.shape[2] for matrix in parts[side]]
                if found != widths:
                    raise ValueError(f"layer {layer}: {side} has the widths {found}, not {widths}")

    def scores(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """See `TopKMasker.scores`; in bits.

        Raises:
            ValueError: There are no weights for the layer, or they do not fit its heads.
        """
        if layer_idx not in self._weights:
            raise ValueError(f"the weights have no layer {layer_idx}")
        heads = queries.shape[1]

        def label(part: torch.Tensor) -> torch.Tensor:
            return self._signatures(part, layer_idx, "key", heads)

        stored = labels_of_keys(sparse_meta_data, self._name, layer_idx, keys, label)
        own = self._signatures(queries, layer_idx, "query", heads)
        if stored.shape[1] < heads:
            stored = stored.repeat_interleave(heads // stored.shape[1], dim=1)
        differing = torch.zeros(
            *queries.shape[:3], keys.shape[2], dtype=torch.int32, device=keys.device
        )
        for word in range(own.shape[-1]):
            differing += _bit_count(own[..., word].unsqueeze(-1) ^ stored[..., word].unsqueeze(-2))
        return (self.hat_bits - 2 * differing).float()

    def _signatures(
        self, tensor: torch.Tensor, layer_idx: int, side: str, num_heads: int
    ) -> torch.Tensor:
        """Signs of the networks' outputs, packed: int32 `(B, heads, n, ceil(bits / 32))`."""
        parts = self._weights[layer_idx]
        matrices, biases = parts[f"{side}_matrix"], parts[f"{side}_bias"]
        heads, networks, size = tensor.shape[1], matrices[0].shape[0], tensor.shape[3]
        if networks not in (num_heads, heads) and not (side == "query" and heads % networks == 0):
            raise ValueError(f"layer {layer_idx} has {networks} networks for {heads} heads")
        if matrices[0].shape[1] != size:
            raise ValueError(
                f"layer {layer_idx}: the {side} network takes {matrices[0].shape[1]} channels, "
                f"the head has {size}"
            )
        outputs = tensor.float()
        if networks > heads:
            outputs = outputs.repeat_interleave(networks // heads, dim=1)
        for index, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            if index:
                outputs = ACTIVATIONS[self.hat_mlp_activation](outputs)
            if networks < heads:
                matrix = matrix.repeat_interleave(heads // networks, dim=0)
                bias = bias.repeat_interleave(heads // networks, dim=0)
            device = outputs.device
            outputs = outputs @ matrix.float().to(device) + bias.float().to(device).unsqueeze(1)
        bits = functional.pad((outputs >= 0).long(), (0, -self.hat_bits % _WORD))
        places = torch.arange(_WORD, device=bits.device)
        words: torch.Tensor = (split_channels(bits, _WORD) << places).sum(dim=-1)
        return words.to(torch.int32)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> HashAttentionTopKMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, HashAttentionTopKMaskerConfig))


def _bit_count(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each int32, by adding up neighbours in parallel (torch has no such operation)."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F
