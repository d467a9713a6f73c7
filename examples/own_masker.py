"""A masker of one's own in one file, run in process and served by vLLM.

    python -m examples.own_masker [--model NAME]

The class below is all there is to it. In process, importing this file makes it usable; a server is
told to import it: `"imports": ["examples.own_masker"]`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerRegistry,
    ResearchMasker,
    add_selected,
    require_config,
    unselected_keys,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask


@dataclass(frozen=True)
class StridedMaskerConfig(MaskerConfig):
    """Which keys are read.

    Attributes:
        stride: Every key at a multiple of this position.
    """

    stride: int

    def __post_init__(self) -> None:
        """Checks the stride.

        Raises:
            ValueError: It is not an integer >= 1.
        """
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride must be an integer >= 1, got {self.stride!r}")


@MaskerRegistry.register(StridedMaskerConfig)
class StridedMasker(ResearchMasker):
    """Reads every n-th key that the query may see (Child et al. 2019, the strided pattern)."""

    def add_mask(
        self,
        keys: torch.Tensor,
        queries: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        previous_mask: Mask,
        **kwargs: Any,
    ) -> Mask:
        """See `ResearchMasker.add_mask`."""
        if previous_mask.is_full_mask():
            return previous_mask
        config = require_config(self.config, StridedMaskerConfig)
        strided = torch.arange(keys.shape[2], device=keys.device) % config.stride == 0
        return add_selected(previous_mask, unselected_keys(previous_mask, attention_mask) & strided)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> StridedMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, StridedMaskerConfig))


def main(arguments: list[str] | None = None) -> None:
    """Prints the answer in process and the answer of a server."""
    from examples.documents import LONG_DOCUMENT
    from examples.small_model import ensure_small_model
    from sparse_attention_hub import ModelAdapterHF, ModelAdapterVLLM, Request
    from sparse_attention_hub.adapters import ModelServerVLLM
    from sparse_attention_hub.sparse_attention.serialization import config_from_dict

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="left out = a small real model")
    options = parser.parse_args(arguments)
    model = options.model or str(ensure_small_model())
    maskers = {
        "maskers": [
            {"type": "sink", "sink_size": 4},
            {"type": "local", "window_size": 256},
            {"type": "strided", "stride": 4},
        ]
    }
    config = config_from_dict(maskers)
    request = Request(LONG_DOCUMENT.text, list(LONG_DOCUMENT.questions[:1]))
    generation = {"max_new_tokens": 16}
    with ModelAdapterHF(
        model, config, model_kwargs={"dtype": torch.float32}, sparse_by_default=True
    ) as adapter:
        answers = {"in process": adapter.process_request(request, generation)}
    with ModelServerVLLM(
        model,
        {**maskers, "imports": ["examples.own_masker"]},
        arguments=["--dtype", "float32", "--enforce-eager"],
    ) as server:
        served = ModelAdapterVLLM(model, config, base_url=server.base_url, sparse_by_default=True)
        answers["served"] = served.process_request(request, generation)
    for name, response in answers.items():
        detail = response.details[0]
        print(f"{name}, density {detail.density:.3f}: {response.responses[0]!r}")


if __name__ == "__main__":
    # As the server imports it, so that the masker is registered once, under one name.
    from examples.own_masker import main as run

    run()
