"""Makes the channel file of Double Sparsity for a model, from any text.

    python -m sparse_attention_hub.adapters.calibrate_channels MODEL --text FILE --output FILE

For each layer and query head, channels in falling order of how much they add to scores: the mean
over all pairs of tokens of |query * key| in that channel, which is the product of the two means.
"q_proj" and "k_proj" rank by one mean alone ("k_proj" per KV head). Queries and keys are taken as
attention sees them, rotated.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparse_attention_hub.adapters.attention_observation import LayerInputs, observed_attention
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    ChannelData,
    channel_key,
)

logger = logging.getLogger(__name__)


def calibrated_channels(
    model: PreTrainedModel, token_ids: list[int], chunk_tokens: int = 2048
) -> ChannelData:
    """Channel orders of every attention layer of a model.

    Args:
        model: Takes its attention from transformers' registry; it is put back as it was.
        token_ids: Of the text; cut into independent chunks.
        chunk_tokens: Of one forward pass.

    Returns:
        What `load_sorted_channels_from_file` reads.

    Raises:
        ValueError: There are no tokens, or the model calls no
            registered attention function.
    """
    if not token_ids:
        raise ValueError("the text has no tokens")
    sums: dict[int, list[torch.Tensor]] = {}

    def observe(inputs: LayerInputs) -> None:
        parts = [part.abs().double().sum(dim=(0, 2)).cpu() for part in (inputs.query, inputs.key)]
        known = sums.setdefault(inputs.layer, [torch.zeros_like(part) for part in parts])
        for total, part in zip(known, parts, strict=True):
            total += part

    with observed_attention(model, observe), torch.inference_mode():
        starts = range(0, len(token_ids), chunk_tokens)
        for start in tqdm(starts, desc="calibrating", disable=None):
            ids = torch.tensor([token_ids[start : start + chunk_tokens]], device=model.device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if not sums:
        raise ValueError(f"{type(model).__name__} does not call a registered attention function")
    data: ChannelData = {}
    for layer, (query, key) in sorted(sums.items()):
        products = query * key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        for name, means in (("qk_proj", products), ("q_proj", query), ("k_proj", key)):
            order = means.sort(dim=-1, descending=True, stable=True).indices
            data[channel_key(layer, name)] = order.tolist()
    return data


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name or folder of a model that transformers can load")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of the text that are used")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # What is known to go wrong is said before minutes of work.
    if options.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {options.max_tokens}")
    if not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")
    try:
        text = options.text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text: {error}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        parser.error(f"model {options.model}: {error}")
    try:
        ids = tokenizer(text)["input_ids"][: options.max_tokens]
        data = calibrated_channels(model, ids)
    except ValueError as error:
        parser.error(str(error))
    options.output.write_text(json.dumps(data))
    logger.info("%d tokens, %d entries written to %s", len(ids), len(data), options.output)


if __name__ == "__main__":
    main()
