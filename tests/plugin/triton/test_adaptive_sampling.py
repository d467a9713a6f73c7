"""Adaptive sampling on the device: the numba kernel's keys, budgets and probabilities."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from tests.plugin.paged.paged_rows import paged_attention, shape_of
from tests.plugin.paged.test_adaptive_sampling import adaptive
from tests.plugin.triton.device_rows import PADDING, device_rows
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.unit_flags import ONE_PROGRAM, SPLIT, poisoned
from vllm_sparse_plugin.paged.triton_kernels.adaptive_sampling import (
    AdaptiveWorkspace,
    sample_adaptively,
)

LENGTHS = (1, 3, 33, 600)
SINK_LOCAL = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 12}]
ORACLE = {"type": "oracle_top_k", "heavy_size": 0.1}

CASES = {
    "alone": ([], adaptive(init=0, local=0), 4, 2, ONE_PROGRAM),
    "few base keys, large budgets": (SINK_LOCAL, adaptive(base=2, epsilon=0.02), 4, 2, SPLIT),
    "after the oracle": ([*SINK_LOCAL, ORACLE], adaptive(base=0.1, epsilon=0.1), 3, 1, ONE_PROGRAM),
    "base sample of whole rows": (SINK_LOCAL, adaptive(base=64, seed=2**63 - 1), 2, 2, SPLIT),
    "everything is selected": ([{"type": "sink", "sink_size": 1.0}], adaptive(), 2, 1, SPLIT),
    "groups": (SINK_LOCAL, adaptive(head_granularity="kv_head", epsilon=0.1), 6, 2, ONE_PROGRAM),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_keys_as_numba(name: str) -> None:
    """With a head size of 16 scaled scores are exact; so are budgets, but for last bits of exp."""
    before, config, heads, kv_heads, radix = CASES[name]
    scaling, layer = 0.25, 5
    shape = shape_of(heads, kv_heads, 16)
    rows = device_rows(shape, LENGTHS, layer_index=layer, spare_keys=2)
    # Scores of a few units: otherwise single keys are everything and no budget lies in between.
    rows.host.query /= 16
    rows.query /= 16
    arguments = (rows.host.query.numpy(), rows.host.cache, rows.host.batch, scaling)
    attention, _ = paged_attention([*before, config], shape)
    expected = attention._select(*arguments)
    attention.maskers = attention.maskers[:-1]
    flags = expected.flags.copy()
    expected_probability = expected.probability.copy()
    expected_scored = expected.keys_scored.copy()
    start = attention._select(*arguments)
    for field, is_front in (("init_offset", True), ("local_offset", False)):
        size = config[field]
        assert isinstance(size, int)
        begins = np.zeros(len(LENGTHS), np.int64) if is_front else np.array(LENGTHS) - size
        ends = np.minimum(LENGTHS, size) if is_front else np.array(LENGTHS)
        start.add_range(np.maximum(begins, 0), ends.astype(np.int64))
    units = len(flags) // len(LENGTHS)
    capacity = flags.shape[1]
    padding = np.full((PADDING * units, capacity), 9, np.uint8)
    lengths = np.array(rows.lengths, np.int32)
    own = torch.from_numpy(poisoned(np.concatenate([start.flags, padding]), lengths)).to(DEVICE)
    probability = torch.zeros(len(own), device=DEVICE)
    work = AdaptiveWorkspace.of(len(lengths), heads, kv_heads, units, capacity, DEVICE, 4)
    work.order.fill_(-1)
    base = config["base_rate_sampling"]
    sample_adaptively(
        rows.query,
        rows.kv_cache,
        rows.batch,
        scaling,
        base if isinstance(base, int) else 0,
        base if isinstance(base, float) else 0.0,
        config["epsilon"],
        NormalDist().inv_cdf(1 - config["delta"] / 2),
        config.get("seed", 42),
        layer,
        own,
        probability,
        work,
        radix,
    )
    found = own.cpu().numpy()
    assert (found == poisoned(np.concatenate([flags, padding]), lengths)).all()
    assert (probability.cpu().numpy()[: len(flags)] == expected_probability).all()
    sizes = work.sizes[: len(flags), 0].cpu().numpy().reshape(len(LENGTHS), -1).sum(axis=1)
    selected = work.selected.counts.cpu().numpy().reshape(len(lengths), -1).sum(axis=1)
    assert (sizes + selected[: len(LENGTHS)] == expected_scored).all()
    if "budgets" in name:  # they would say little if each were at one of its ends
        last = flags.reshape(len(LENGTHS), units, -1)[-1, :, : LENGTHS[-1]]
        sampled, certain = (last == 2).sum(axis=1), (last == 1).sum(axis=1)
        assert ((sampled > 2) & (sampled < LENGTHS[-1] - certain)).all()
        assert len(np.unique(sampled)) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_the_batch(dtype: torch.dtype) -> None:
    """Groups' own rows: whoever is beside them, the same keys are drawn."""
    shape = shape_of(4, 2, 32, 16, dtype)
    rows = device_rows(shape, (90, 600), exact=False)
    start = np.zeros((4 * 4, 600), np.uint8)
    start[:, :4] = 1

    def drawn(which: list[int], radix) -> np.ndarray:
        own = torch.from_numpy(start.reshape(4, 4, 600)[which].reshape(-1, 600).copy()).to(DEVICE)
        work = AdaptiveWorkspace.of(len(which), 4, 2, 4, 600, DEVICE, 4)
        batch = type(rows.batch)(
            rows.batch.block_table, rows.batch.rows[which], rows.batch.lengths[which]
        )
        sample_adaptively(
            rows.query[which],
            rows.kv_cache,
            batch,
            0.1,
            0,
            0.05,
            0.05,
            1.3,
            1,
            2,
            own,
            torch.zeros(len(own), device=DEVICE),
            work,
            radix,
        )
        return own.cpu().numpy()

    together = drawn([0, 1, 2], ONE_PROGRAM)
    sampled = (together[4:8] == 2).sum(axis=1)
    assert ((sampled > 30) & (sampled < 550)).all()
    assert (drawn([1], SPLIT) == together[4:8]).all()
    assert (drawn([2, 0], SPLIT)[4:] == together[:4]).all()


def test_a_workspace_for_other_flags_is_refused() -> None:
    rows = device_rows(shape_of(2, 1, 16), (3,))
    work = AdaptiveWorkspace.of(3, 2, 1, 2, 32, DEVICE)
    for shape in ((6, 40), (8, 32)):
        flags = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(ValueError, match="does not fit"):
            sample_adaptively(
                rows.query,
                rows.kv_cache,
                rows.batch,
                1.0,
                2,
                0.0,
                0.1,
                1.0,
                1,
                1,
                flags,
                torch.zeros(len(flags), device=DEVICE),
                work,
                SPLIT,
            )
