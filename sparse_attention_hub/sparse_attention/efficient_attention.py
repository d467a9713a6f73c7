"""Two published methods by their own names: each is sinks, a window and one label masker.

In the field's API these are other classes than maskers, for speed; here a decode step of the
maskers themselves reads only what is selected (see `row_attention`), so these classes compose them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.base import SparseAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention import (
    ResearchAttention,
    ResearchAttentionConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    DoubleSparsityTopKMaskerConfig,
    HashAttentionTopKMaskerConfig,
    LocalMaskerConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import Size
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import HatWeights
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)


@dataclass(frozen=True)
class EfficientAttentionConfig(SparseAttentionConfig):
    """Base of configurations of one method."""

    def to_research_config(self) -> ResearchAttentionConfig:
        """The same as a list of maskers.

        Raises:
            NotImplementedError: The class is a base.
            ValueError: A field is not allowed; names it.
        """
        raise NotImplementedError(f"{type(self).__name__} describes no attention")


@dataclass(frozen=True)
class ChannelConfig:
    """Where the channels of Double Sparsity come from.

    Attributes:
        sorted_channel_file: See `DoubleSparsityTopKMaskerConfig`.
        channel_selection: Likewise.
    """

    sorted_channel_file: str
    channel_selection: str = "qk_proj"


@dataclass(frozen=True)
class DoubleSparsityConfig(EfficientAttentionConfig):
    """Double Sparsity with sinks and a window; sizes as those of the maskers."""

    heavy_size: Size
    sink_size: Size
    local_size: Size
    ds_channel_config: ChannelConfig
    ds_bits: int
    ds_group_factor: int

    def to_research_config(self) -> ResearchAttentionConfig:
        """See `EfficientAttentionConfig.to_research_config`."""
        return ResearchAttentionConfig(
            [
                SinkMaskerConfig(self.sink_size),
                LocalMaskerConfig(self.local_size),
                DoubleSparsityTopKMaskerConfig(
                    heavy_size=self.heavy_size,
                    sorted_channel_file=self.ds_channel_config.sorted_channel_file,
                    group_factor=self.ds_group_factor,
                    label_bits=self.ds_bits,
                    channel_selection=self.ds_channel_config.channel_selection,
                ),
            ]
        )


@dataclass(frozen=True)
class HashAttentionConfig(EfficientAttentionConfig):
    """HashAttention with sinks and a window; sizes as those of the maskers."""

    heavy_size: Size
    sink_size: Size
    local_size: Size
    hat_weights: HatWeights = field(compare=False, repr=False)
    hat_bits: int
    hat_mlp_layers: int
    hat_mlp_hidden_size: int
    hat_mlp_activation: str = "silu"

    def to_research_config(self) -> ResearchAttentionConfig:
        """See `EfficientAttentionConfig.to_research_config`."""
        return ResearchAttentionConfig(
            [
                SinkMaskerConfig(self.sink_size),
                LocalMaskerConfig(self.local_size),
                HashAttentionTopKMaskerConfig(
                    heavy_size=self.heavy_size,
                    hat_bits=self.hat_bits,
                    hat_mlp_layers=self.hat_mlp_layers,
                    hat_mlp_hidden_size=self.hat_mlp_hidden_size,
                    hat_mlp_activation=self.hat_mlp_activation,
                    hat_weights=self.hat_weights,
                ),
            ]
        )


class EfficientAttention(ResearchAttention):
    """Attention of one method; weights are never materialised."""

    config_type: ClassVar[type[EfficientAttentionConfig]] = EfficientAttentionConfig

    @classmethod
    def create_from_config(cls, config: SparseAttentionConfig) -> EfficientAttention:
        """Builds the attention that a configuration describes.

        Raises:
            TypeError: The configuration is not one of this class.
            ValueError: No attention belongs to it, or a field is not allowed.
        """
        if not isinstance(config, cls.config_type):
            raise TypeError(f"expected a {cls.config_type.__name__}, got {type(config).__name__}")
        table = {DoubleSparsityConfig: DoubleSparsity, HashAttentionConfig: HashAttention}
        attention = table.get(type(config))
        if attention is None:
            raise ValueError(f"no attention belongs to {type(config).__name__}")
        maskers = ResearchAttention.create_from_config(config.to_research_config()).maskers
        return attention(config, maskers)

    def custom_attention(  # type: ignore[override]  # None where there are no weights
        self,
        module: torch.nn.Module | None,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `SparseAttention.custom_attention`.

        Returns:
            The output `(B, Q, H, Dv)`, and None.
        """
        inputs = (queries, keys, values, attention_mask, scaling, dropout)
        sink_logits = kwargs.pop("s_aux", None)
        mask = self.select(*inputs, sparse_meta_data, **kwargs)
        output = get_masked_attention_output(module, *inputs, mask, sink_logits=sink_logits)
        self.log_metrics(module, *inputs, mask, output, kwargs.get("layer_idx"), sink_logits)
        return output, None


class DoubleSparsity(EfficientAttention):
    """See `DoubleSparsityTopKMasker`."""

    config_type = DoubleSparsityConfig


class HashAttention(EfficientAttention):
    """See `HashAttentionTopKMasker`."""

    config_type = HashAttentionConfig
