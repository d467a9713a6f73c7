"""What steps cost on the GPU that is not there, by a formula instead of a clock."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock


@contextlib.contextmanager
def measuring(costs: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Engines that are built inside measure what is given here.

    Args:
        costs: `dense` and `sparse`: seconds of a step, per row of it and per key; `least_keys`: in
            place of `CUDA_LEAST_KEYS`, since the models here are small. `rank_1`: another `sparse`,
            that the second rank measures.

    Yields:
        What each engine has found (`StepCosts`, as mappings).
    """
    from vllm_sparse_plugin import measure_costs
    from vllm_sparse_plugin.compat import hooks
    from vllm_sparse_plugin.row_table import row_table

    sparse = costs.get("rank_1", costs["sparse"]) if os.environ.get("RANK") == "1" else None
    formulas = {True: sparse or costs["sparse"], False: costs["dense"]}

    class DryClock(measure_costs.DeviceClock):
        """It runs some of the steps, as a real one would, to see that they run."""

        def seconds(self, step: measure_costs.AttentionStep, in_graph: bool) -> float:
            if step.rows == 1 and step.keys > 100:
                super().seconds(step, in_graph)
            constant, per_row, per_key = formulas[step.is_sparse]
            return float(constant + per_row * step.rows + per_key * step.keys)

    found: list[dict[str, Any]] = []
    measure = measure_costs.measure_engine

    def measure_engine(vllm_config: Any) -> None:
        measure(vllm_config)
        table = row_table(vllm_config)
        assert table.costs is not None
        found.append(asdict(table.costs))
        for builder in table.builders.values():
            assert not builder._reads.values.any()
        for layer in vllm_config.compilation_config.static_forward_context.values():
            held = layer.kv_cache  # recurrent layers have several states
            assert not any(part.any() for part in (held if isinstance(held, tuple) else (held,)))

    with (
        mock.patch.object(measure_costs, "DeviceClock", DryClock),
        mock.patch.object(measure_costs, "_REPETITIONS", 1),
        mock.patch.object(measure_costs, "measure_engine", measure_engine),
        mock.patch.object(hooks, "CUDA_LEAST_KEYS", costs["least_keys"]),
    ):
        yield found
