"""`ResearchAttention`: maskers applied one after the other, then attention under their mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_attention_hub.metric_logging import MicroMetricLogger
from sparse_attention_hub.sparse_attention.base import SparseAttention, SparseAttentionConfig
from sparse_attention_hub.sparse_attention.density import count_read_keys
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    ResearchMasker,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_labels import start_anew
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.base import (
    SamplingMasker,
    SamplingMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import accumulation_dtype
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
    get_true_attention_output,
)


@dataclass(frozen=True)
class ResearchAttentionConfig(SparseAttentionConfig):
    """A list of maskers.

    Attributes:
        masker_configs: Applied in this order; each adds to what the ones before it selected.
            No maskers = dense attention.
        dense_layers: Indices of layers that read every key.
        layer_masker_configs: Layers with a masker list of their own, instead of `masker_configs`.
    """

    masker_configs: list[MaskerConfig]
    dense_layers: tuple[int, ...] = ()
    layer_masker_configs: dict[int, list[MaskerConfig]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Copies what could change, so that the caller's stays the caller's.

        Raises:
            ValueError: A field is no list, an element not a masker's configuration, more than one
                of a list samples, or a layer is no index or named twice.
        """
        _check_maskers("masker_configs", self.masker_configs)
        if not isinstance(self.dense_layers, (list, tuple)):
            raise ValueError(f"dense_layers must be layer indices, got {self.dense_layers!r}")
        for layer in (*self.dense_layers, *self.layer_masker_configs):
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"a layer must be an integer >= 0, got {layer!r}")
        for layer, maskers in self.layer_masker_configs.items():
            _check_maskers(f"layer_masker_configs[{layer}]", maskers)
            if layer in self.dense_layers:
                raise ValueError(f"layer {layer} is in dense_layers and in layer_masker_configs")
        object.__setattr__(self, "masker_configs", list(self.masker_configs))
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        by_layer = sorted(self.layer_masker_configs.items())
        object.__setattr__(self, "layer_masker_configs", {key: list(v) for key, v in by_layer})

    @property
    def is_dense(self) -> bool:
        """Whether no layer has maskers."""
        return not self.masker_configs and not any(self.layer_masker_configs.values())

    def all_masker_configs(self) -> list[MaskerConfig]:
        """Those of every layer."""
        return [
            *self.masker_configs,
            *(config for maskers in self.layer_masker_configs.values() for config in maskers),
        ]

    def __hash__(self) -> int:
        """Of the maskers; a list has no hash of its own."""
        return hash((repr(self.masker_configs), self.dense_layers, repr(self.layer_masker_configs)))


def _check_maskers(name: str, configs: Sequence[MaskerConfig]) -> None:
    if not isinstance(configs, (list, tuple)):
        raise ValueError(f"{name} must be a list of MaskerConfig, got {configs!r}")
    for index, config in enumerate(configs):
        if not isinstance(config, MaskerConfig):
            raise ValueError(f"{name}[{index}] must be a MaskerConfig, got {config!r}")
    sampling = [config for config in configs if isinstance(config, SamplingMaskerConfig)]
    if len(sampling) > 1:
        raise ValueError(f"at most one sampling masker is allowed in {name}, got {sampling!r}")


DENSITY = "research_attention_density"
OUTPUT_ERROR = "research_attention_output_error"
for _metric in (DENSITY, OUTPUT_ERROR):
    MicroMetricLogger.register_metric(_metric, float)


class ResearchAttention(SparseAttention):
    """Sparse attention as a list of maskers, for any of them: right and plain, not fast.

    Attributes:
        maskers: In the order they are applied.
    """

    def __init__(
        self, sparse_attention_config: SparseAttentionConfig, maskers: Sequence[ResearchMasker]
    ) -> None:
        """Takes the maskers.

        Args:
            sparse_attention_config: They were made from.
            maskers: In the order they are applied.

        Raises:
            ValueError: More than one of them samples.
        """
        super().__init__(sparse_attention_config)
        sampling = [
            type(masker).__name__ for masker in maskers if isinstance(masker, SamplingMasker)
        ]
        if len(sampling) > 1:
            raise ValueError(
                f"at most one sampling masker is allowed in maskers, got {', '.join(sampling)}"
            )
        self.maskers = list(maskers)
        self._of_layer: dict[int, list[ResearchMasker]] = {}
        if isinstance(sparse_attention_config, ResearchAttentionConfig):
            self._of_layer.update({layer: [] for layer in sparse_attention_config.dense_layers})
            for layer, configs in sparse_attention_config.layer_masker_configs.items():
                self._of_layer[layer] = _maskers_of(configs)

    def maskers_of_layer(self, layer_idx: int) -> list[ResearchMasker]:
        """The maskers of a layer, in the order they are applied; none = dense."""
        return self._of_layer.get(layer_idx, self.maskers)

    @classmethod
    def create_from_config(cls, config: SparseAttentionConfig) -> ResearchAttention:
        """Builds the maskers of a configuration.

        Raises:
            TypeError: The configuration is of another type.
        """
        if not isinstance(config, ResearchAttentionConfig):
            raise TypeError(f"expected a ResearchAttentionConfig, got {type(config).__name__}")
        return cls(config, _maskers_of(config.masker_configs))

    def select(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        **kwargs: Any,
    ) -> Mask:
        """What the maskers select; arguments as in `custom_attention`.

        Without `layer_idx`, or with None, nothing is kept in `sparse_meta_data`.

        Returns:
            A mask `(B, H, Q, K)`; full when there are no maskers.

        Raises:
            ValueError: `layer_idx` is missing, and a masker needs it or layers differ in maskers.
        """
        shape = (*queries.shape[:3], keys.shape[2])
        dtype = accumulation_dtype(queries.dtype)
        layer = kwargs.get("layer_idx")
        if layer is None and self._of_layer:
            raise ValueError(
                "layer_idx must be given where dense_layers or layer_masker_configs tell layers "
                "apart; it is missing or None"
            )
        maskers = self.maskers if layer is None else self.maskers_of_layer(int(layer))
        if not maskers:
            return Mask.create_full_mask(shape, dtype, queries.device)
        if layer is not None and sparse_meta_data and queries.shape[2] == keys.shape[2]:
            start_anew(sparse_meta_data, int(layer))
        mask = Mask.create_empty_mask(shape, dtype, queries.device)
        for masker in maskers:
            mask = masker.add_mask(
                keys=keys,
                queries=queries,
                values=values,
                attention_mask=attention_mask,
                scaling=scaling,
                dropout=dropout,
                sparse_meta_data=sparse_meta_data,
                previous_mask=mask,
                **kwargs,
            )
        return mask

    def custom_attention(
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over what the maskers select; see `SparseAttention.custom_attention`.

        Learned attention sinks, `s_aux`, take part in the attention, and not in the selection.

        Returns:
            The output `(B, Q, H, Dv)`, contiguous, and the weights `(B, H, Q, K)`.
        """
        inputs = (queries, keys, values, attention_mask, scaling, dropout)
        sink_logits = kwargs.pop("s_aux", None)
        mask = self.select(*inputs, sparse_meta_data, **kwargs)
        output, weights = get_masked_attention_output(module, *inputs, mask, True, sink_logits)
        self.log_metrics(module, *inputs, mask, output, kwargs.get("layer_idx"), sink_logits)
        return output, weights

    def log_metrics(
        self,
        module: torch.nn.Module | None,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        mask: Mask,
        output: torch.Tensor,
        layer_idx: int | None,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        """Logs density and output error of a call, each if its metric is enabled.

        Density counts visible keys alone; the error is `|dense - sparse| / |dense|` of the whole
        output, for which dense attention is computed.

        Args: as `custom_attention`, with its mask and output.
        """
        metrics = MicroMetricLogger()
        metadata = {"layer_idx": layer_idx}
        if metrics.is_metric_enabled(DENSITY):
            read, visible = count_read_keys(mask, attention_mask)
            metrics.log(DENSITY, read / max(visible, 1), metadata)
        if metrics.is_metric_enabled(OUTPUT_ERROR):
            dense, _ = get_true_attention_output(
                module, queries, keys, values, attention_mask, scaling, dropout, sink_logits
            )
            error = (dense - output).float().norm() / dense.float().norm()
            metrics.log(OUTPUT_ERROR, float(error), metadata)


def _maskers_of(configs: Sequence[MaskerConfig]) -> list[ResearchMasker]:
    return [ResearchMasker.create_masker_from_config(config) for config in configs]
