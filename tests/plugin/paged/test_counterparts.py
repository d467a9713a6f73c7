"""What tables of maskers say about their counterparts is so."""

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerRegistry,
    json_name,
)
from vllm_sparse_plugin.paged import attention  # noqa: F401  # registers the counterparts
from vllm_sparse_plugin.paged.maskers.base import has_counterpart


def test_facts_name_exactly_the_maskers_with_a_counterpart() -> None:
    maskers = MaskerRegistry.get_all_registered_types().items()
    said = {
        json_name(config) for config, masker in maskers if masker.facts and masker.facts.is_paged
    }
    assert said == {json_name(config) for config, _ in maskers if has_counterpart(config)}
