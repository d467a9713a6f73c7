"""Double Sparsity masker: keys ranked by the few channels that matter most.

Yang et al. 2024, "Post-Training Sparse Attention with Double Sparsity", section 3: calibration
finds each head's most important channels once (`calibrate_channels`); approximate scores are dot
products over these channels alone, taken from a small, quantised label cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

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
    pseudo_quantize,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    PROJECTIONS,
    extract_layer_channels,
    load_sorted_channels_from_file,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_labels import (
    labels_of_keys,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import grouped_scores


@dataclass(frozen=True)
class DoubleSparsityTopKMaskerConfig(TopKMaskerConfig):
    """Which channels are compared, and how precisely.

    Attributes:
        sorted_channel_file: JSON that `calibrate_channels` writes: per layer and head, channels
            from the most to the least important.
        group_factor: One in this many channels is kept, `head_size // group_factor`.
        label_bits: Of each stored channel, 1 to 16; 16 = as the keys are.
        channel_selection: Whose channels: "qk_proj" (of the products), "q_proj" or "k_proj".
        search_space: For tuners; no part of what the masker does.
    """

    sorted_channel_file: str
    group_factor: int = 16
    label_bits: int = 4
    channel_selection: str = "qk_proj"
    search_space: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        super().__post_init__()
        if (
            not isinstance(self.sorted_channel_file, str)
            or not Path(self.sorted_channel_file).is_file()
        ):
            raise ValueError(
                f"sorted_channel_file must be an existing file, got {self.sorted_channel_file!r}"
            )
        check_integer_field(self, "group_factor", 1)
        check_integer_field(self, "label_bits", 1, 16)
        if self.channel_selection not in PROJECTIONS:
            raise ValueError(
                f"channel_selection must be one of {', '.join(PROJECTIONS)}, "
                f"got {self.channel_selection!r}"
            )


@MaskerRegistry.register(DoubleSparsityTopKMaskerConfig)
class DoubleSparsityTopKMasker(TopKMasker):
    """Ranks keys by the dot product over each layer's and head's own most important channels.

    With less than 16 bits, the kept channels of query and key are quantised, as in the paper. The
    file has one row of channels per query head, or per KV head.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="Double Sparsity, Yang et al. 2024",
        state="labels: the kept channels",
        index_bytes="head size / group_factor · label_bits / 8 + 4",
        is_paged=True,
    )
    needs_layer_idx: ClassVar[bool] = True

    def __init__(self, config: DoubleSparsityTopKMaskerConfig) -> None:
        """Reads the channel file.

        Args:
            config: Of this masker.

        Raises:
            ValueError: The file is not as `calibrate_channels` writes it.
        """
        super().__init__(config)
        self.group_factor = config.group_factor
        self.label_bits = config.label_bits
        self.channel_selection = config.channel_selection
        self._channels = load_sorted_channels_from_file(config.sorted_channel_file)
        self._name = ("double_sparsity", config)

    def scores(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """See `TopKMasker.scores`.

        Raises:
            ValueError: The file has nothing for this layer, or does not fit its heads.
        """
        channels = self._kept_channels(layer_idx, queries, keys)

        def label(part: torch.Tensor) -> torch.Tensor:
            return self._picked(part, channels)

        labels = labels_of_keys(sparse_meta_data, self._name, layer_idx, keys, label)
        # As large as scores over all channels on average, for additive biases' sake.
        scale: float = self.group_factor**0.5
        return grouped_scores(self._picked(queries, channels), labels) * scale

    def _kept_channels(
        self, layer_idx: int, queries: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """The compared channels, `(rows, C)`: one row per query head or per KV head."""
        heads, kv_heads, head_size = queries.shape[1], keys.shape[1], keys.shape[3]
        count = head_size // self.group_factor
        if count == 0:
            raise ValueError(
                f"group_factor must be at most the head size {head_size}, got {self.group_factor}"
            )
        channels = extract_layer_channels(
            self._channels, layer_idx, self.channel_selection, keys.device
        )
        if channels.shape[0] not in (heads, kv_heads) or channels.shape[1] != head_size:
            raise ValueError(
                f"the channel file has {tuple(channels.shape)} (heads, channels) for layer "
                f"{layer_idx}, but the layer has {heads} query heads, {kv_heads} KV heads and "
                f"{head_size} channels"
            )
        return channels[:, :count]

    def _picked(self, tensor: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        """The kept channels, quantised, of `(B, heads, n, D)`; of as many heads as either has."""
        heads, rows = tensor.shape[1], channels.shape[0]
        if rows > heads:
            owner = torch.arange(rows, device=tensor.device) // (rows // heads)
            picked = torch.stack(
                [tensor[:, int(head), :, channels[row]] for row, head in enumerate(owner)], dim=1
            )
        else:
            per_head = channels.repeat_interleave(heads // rows, dim=0)
            index = per_head[None, :, None, :].expand(*tensor.shape[:3], -1)
            picked = tensor.gather(-1, index)
        # Labels are codes and a scale: what they stand for need not be of the model's type.
        return picked if self.label_bits == 16 else pseudo_quantize(picked.float(), self.label_bits)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> DoubleSparsityTopKMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, DoubleSparsityTopKMaskerConfig))
