"""What the prefix cache may share: keys of blocks with sparsely attending tokens.

vLLM finds cached blocks by a hash chain over their tokens. The keys and values of a token that
attended sparsely are not those of a dense pass, so from the first block that holds such a token
on, the chain carries the sparse configuration; blocks before it stay shared by everybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_sparse_plugin.request_parameters import RequestParameters

FIXED, AUTOMATIC = "sparse_attention", "sparse_attention_auto"
"""Of tokens that attended sparsely, and of those that may have (`automatic_rows`)."""

HashKey = tuple[str, str, int]


def sparse_hash_keys(
    extra_args: Mapping[str, Any] | None, num_prompt_tokens: int, start: int, end: int
) -> tuple[HashKey, ...]:
    """The extra hash keys of one block.

    Args:
        extra_args: The request's `SamplingParams.extra_args`, after admission.
        num_prompt_tokens: Of the request.
        start: Position of the block's first token.
        end: Position after the block's last token.

    Returns:
        Nothing for a block of densely attending tokens; else one key: the configuration's
        fingerprint and how many of the block's tokens are dense, since two requests may leave
        the dense prefix at different places of the same block.
    """
    parameters = RequestParameters.from_extra_args(extra_args)
    if parameters is None or parameters.config_json is None:
        return ()
    dense_prefix = parameters.dense_prefix_tokens(num_prompt_tokens)
    if end <= dense_prefix:
        return ()
    kind = AUTOMATIC if parameters.is_automatic else FIXED
    return ((kind, parameters.fingerprint, max(0, dense_prefix - start)),)
