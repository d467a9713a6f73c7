"""SOCKET masker: keys ranked by soft collisions with the query in random hash tables.

Joshi et al. 2026, "SOCKET: SOft Collision Kernel EsTimator for Sparse Attention" (arXiv
2602.06283): keys fall into buckets by the signs of random projections; a query has a probability
for every bucket of every table, and a key's score is the sum of the probabilities of its buckets,
times the norm of its value. A bucket's probability is the softmax over the corners c of the
hypercube {-1, 1}**K of `sum_i c_i tanh(z_i) / tau`, with z the query's projections; since that sum
has one term per bit, it is the product over bits of `sigmoid(2 c_i tanh(z_i) / tau)`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
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
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.lookup_scores import (  # noqa: E501
    lookup_scores,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_labels import (
    labels_of_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.random_projections import (
    bucket_codes,
    projections_of_layer,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.base import (
    checked_seed,
)

_MOST_BUCKETS = 1 << 18
"""Of all tables: each query head has a probability for every one."""


@dataclass(frozen=True)
class SocketMaskerConfig(TopKMaskerConfig):
    """The hash tables.

    Attributes:
        K: Bits of a table, 1 to 12.
        L: Tables, of 2**18 buckets altogether at most.
        tau: Temperature of the query's bucket probabilities, > 0; towards 0 the query falls into
            one bucket per table.
        seed: Of the projections, an integer in [0, 2**63).
    """

    json_name: ClassVar[str | None] = "socket"

    K: int = 4
    L: int = 1
    tau: float = 0.3
    seed: int = 42

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        super().__post_init__()
        check_integer_field(self, "K", 1, 12)
        check_integer_field(self, "L", 1, _MOST_BUCKETS >> self.K)
        tau: Any = self.tau
        is_number = isinstance(tau, (int, float)) and not isinstance(tau, bool)
        if not is_number or not 0 < tau <= sys.float_info.max:
            raise ValueError(f"tau must be a number > 0, got {tau!r}")
        object.__setattr__(self, "tau", float(tau))
        checked_seed(self.seed)


@MaskerRegistry.register(SocketMaskerConfig)
class SocketMasker(TopKMasker):
    """Ranks keys by the probability of sharing buckets with the query, times the value's norm."""

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="SOCKET, Joshi et al. 2026",
        state="buckets and value norms",
        index_bytes="L · K / 8 + 4",
    )
    needs_layer_idx: ClassVar[bool] = True

    def __init__(self, config: SocketMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.bits = config.K
        self.tables = config.L
        self.tau = config.tau
        self.seed = config.seed

    def scores(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """See `TopKMasker.scores`; in units of value norms, not of dot products."""
        name = ("socket", self.bits, self.tables, self.seed)
        kv_heads, head_size = keys.shape[1], keys.shape[3]
        projections = projections_of_layer(
            sparse_meta_data, self.seed, layer_idx, (kv_heads, head_size, self.tables * self.bits)
        ).to(keys.device)

        def buckets(part: torch.Tensor) -> torch.Tensor:
            return bucket_codes(part, projections, self.bits)

        codes = labels_of_keys(sparse_meta_data, (*name, "codes"), layer_idx, keys, buckets)
        norms = labels_of_keys(
            sparse_meta_data,
            (*name, "norms"),
            layer_idx,
            values,
            lambda part: part.float().norm(dim=-1, keepdim=True),
        )
        scores = lookup_scores(self._bucket_probabilities(queries, projections), codes)
        group = queries.shape[1] // kv_heads
        return scores * norms.transpose(2, 3).repeat_interleave(group, dim=1)

    def _bucket_probabilities(
        self, queries: torch.Tensor, projections: torch.Tensor
    ) -> torch.Tensor:
        """`(B, H, Q, L, 2**K)`; bucket r has the bits of r, the first projection the highest."""
        batch, heads, num_queries, head_size = queries.shape
        rows = queries.float().reshape(batch, projections.shape[0], -1, head_size)
        projected = (rows @ projections).view(batch, heads, num_queries, self.tables, self.bits)
        logits = 2 * projected.tanh() / self.tau
        # One bit after the other: the tables double.
        tables = torch.ones(*logits.shape[:-1], 1, device=logits.device)
        for bit in range(self.bits):
            is_set = logits[..., bit].sigmoid().unsqueeze(-1)
            tables = torch.stack([tables * (1 - is_set), tables * is_set], dim=-1).flatten(-2)
        return tables

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> SocketMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, SocketMaskerConfig))
