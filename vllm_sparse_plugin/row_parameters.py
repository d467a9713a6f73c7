"""Which parameters the rows of the running batch have, in the worker.

vLLM brings per-request parameters into the worker through logits processors (entry point
`vllm.logits_processors`): runner V1 tells which batch rows came, went and moved before each step,
runner V2 which request slot was filled. This processor never touches logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import Row, row_table

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate


def _row(parameters: SamplingParams, num_prompt_tokens: int) -> Row | None:
    resolved = RequestParameters.from_extra_args(parameters.extra_args)
    if resolved is None:
        return None
    return Row(
        resolved,
        resolved.dense_prefix_tokens(num_prompt_tokens),
        resolved.asked_prefix_tokens(num_prompt_tokens),
    )


class RowParametersProcessor(*compat.processor_bases()):  # type: ignore[misc]
    """Keeps an engine's `RowTable` up to date; implements the interfaces of both runners."""

    def __init__(self, vllm_config: VllmConfig, *runner_arguments: Any) -> None:
        """Joins the engine's table.

        Args:
            vllm_config: Of the engine.
            runner_arguments: Runner V1: the device, and whether memory is pinned. Runner V2: the
                state of its request slots.
        """
        self._table = row_table(vllm_config)
        self._request_state = runner_arguments[0]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Nothing to do: `compat` validates at admission, where the server's defaults are known."""

    def is_argmax_invariant(self) -> bool:
        """True: logits are not touched."""
        return True

    def apply(self, logits: torch.Tensor, *context: Any) -> torch.Tensor:
        """Returns the logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Runner V1: follows the rows of the batch before a step."""
        from vllm.v1.sample.logits_processor import process_dict_updates

        process_dict_updates(
            self._table.rows,
            batch_update,
            lambda parameters, prompt, _output: _row(parameters, len(prompt or ())),
        )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Runner V2: a request enters a slot, which may hold a former request's row.

        Returns:
            False: the request's logits are not touched.
        """
        self._table.has_slots = True
        row = _row(sampling_params, int(self._request_state.prompt_len.np[req_idx]))
        if row is None:
            self._table.rows.pop(req_idx, None)
        else:
            self._table.rows[req_idx] = row
        return False
