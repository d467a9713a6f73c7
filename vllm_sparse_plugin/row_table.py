"""Of an engine: which rows of its batch are sparse, what CUDA graphs hold, what steps cost.

Written by `row_parameters` and `compat`'s hooks, read by what plans the steps.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.statistics import Statistics

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sparse_plugin.paged.device.cost_model import StepCosts
    from vllm_sparse_plugin.paged.device.sequences import SequenceStates


@dataclass(frozen=True)
class Row:
    """One request of the batch that is sparse, or dense with a tag.

    Attributes:
        parameters: Resolved at admission.
        dense_prefix_tokens: Leading tokens whose queries attend densely.
        asked_prefix_tokens: Those of them that the request wanted; the rest is dense because so
            few keys are not worth a masker.
    """

    parameters: RequestParameters
    dense_prefix_tokens: int
    asked_prefix_tokens: int


@dataclass
class GraphState:
    """What CUDA graphs of decode steps hold, and which step is about to run.

    Attributes:
        captured: By first layer of each KV cache group whose layers have maskers: the maskers that
            its graphs hold; None: dense steps alone.
        is_always_dense: Whether no request attends sparsely, whatever it asks for (speculation).
        captures_sparse: Whether graphs that are captured now have maskers in them.
        has_dense_graphs: Whether there are graphs without maskers besides.
        step_is_sparse: Whether the step that was planned last takes a graph with maskers.
        is_dummy: Whether the batch that is prepared holds no request at all (runner V2).
        sequences: By first layer of each KV cache group whose graphs make codes with something
            learned: what was learned so far.
    """

    captured: dict[str, str | None] = field(default_factory=dict)
    is_always_dense: bool = False
    captures_sparse: bool = True
    has_dense_graphs: bool = False
    step_is_sparse: bool = False
    is_dummy: bool = False
    sequences: dict[str, SequenceStates] = field(default_factory=dict)

    @property
    def config_json(self) -> str | None:
        """The maskers that graphs hold in all groups; None: there are no such graphs."""
        found = set(self.captured.values())
        return found.pop() if len(found) == 1 else None


@dataclass
class RowTable:
    """The rows of one engine's running batch that are not plain dense ones.

    Attributes:
        rows: By batch row (runner V1) or request slot (runner V2).
        has_slots: Whether they are by slot.
        statistics: What the rows' attention has read so far.
        counter: First layer of the KV cache group whose plans count queries: each is counted once,
            however many groups there are.
        graphs: What this engine's CUDA graphs hold.
        costs: What steps cost, dense and sparse, for rows that are automatic; None: not measured,
            and all of them are sparse.
        builders: What plans the steps on CUDA, by the first layer of each KV cache group.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    has_slots: bool = False
    statistics: Statistics = field(default_factory=Statistics)
    counter: str | None = None
    graphs: GraphState = field(default_factory=GraphState)
    costs: StepCosts | None = None
    # Not those themselves, which hold the engine's configuration.
    builders: MutableMapping[str, Any] = field(default_factory=weakref.WeakValueDictionary)


_TABLES: dict[int, RowTable] = {}


def row_table(vllm_config: VllmConfig) -> RowTable:
    """The table that an engine's processor writes and its metadata builders read.

    vLLM creates the two independently; `compat.identity` is what their configurations share. A
    table lives as long as that object.
    """
    owner = compat.identity(vllm_config)
    if id(owner) not in _TABLES:
        _TABLES[id(owner)] = RowTable()
        weakref.finalize(owner, _TABLES.pop, id(owner), None)
    return _TABLES[id(owner)]
