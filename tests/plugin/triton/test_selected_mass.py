"""The denominator of what is selected, and the spread of its terms, against float64."""

import numpy as np
import pytest
import torch

from tests.plugin.paged.paged_rows import shape_of
from tests.plugin.triton.device_rows import device_rows, permuted
from tests.plugin.triton.interpreter import DEVICE
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists, list_tokens
from vllm_sparse_plugin.paged.triton_kernels.selected_mass import DeviceMass, sum_selected_mass

LENGTHS = (1, 17, 700)


def random_lists(rows, units: int) -> tuple[DeviceLists, np.ndarray, np.ndarray]:
    """Lists of random flags, some sampled; the flags, and each unit's probability."""
    random = np.random.default_rng(units)
    num_rows = len(rows.lengths) * units
    flags = random.choice(np.array([0, 1, 2], np.uint8), (num_rows, 704), p=[0.3, 0.5, 0.2])
    flags[units] = 0  # a unit that has selected nothing
    probability = random.uniform(0.01, 1, num_rows).astype(np.float32)
    kv_heads = rows.kv_cache.shape[1]
    lists = DeviceLists.of(len(rows.lengths), kv_heads, units // kv_heads, 704, True, DEVICE)
    lists.tokens.fill_(1 << 28)
    lists.log_weights.fill_(torch.nan)
    device_flags = torch.from_numpy(flags).to(DEVICE)
    list_tokens(device_flags, rows.batch.lengths, lists, torch.from_numpy(probability).to(DEVICE))
    return lists, flags, probability


def mass_of(rows, lists: DeviceLists, has_spread: bool) -> DeviceMass:
    mass = DeviceMass.of(len(rows.lengths), rows.query.shape[1], has_spread, DEVICE, 4)
    for part in (mass.top, mass.mass, mass.squares, mass.terms):
        part.fill_(torch.nan)
    scaling = rows.query.shape[2] ** -0.5
    sum_selected_mass(rows.query, rows.kv_cache, rows.batch, lists, scaling, mass)
    return mass


@pytest.mark.parametrize(
    ("heads", "kv_heads", "units", "dtype"),
    [
        (4, 2, 4, torch.float32),
        (7, 1, 1, torch.float16),
        (6, 2, 2, torch.bfloat16),
        (3, 3, 3, torch.float16),
    ],
)
def test_mass_and_spread(heads: int, kv_heads: int, units: int, dtype: torch.dtype) -> None:
    rows = device_rows(shape_of(heads, kv_heads, 32, 16, dtype), LENGTHS, exact=False)
    lists, flags, probability = random_lists(rows, units)
    mass = mass_of(rows, lists, True)
    top, sums, squares, terms = (
        part.cpu().double() for part in (mass.top, mass.mass, mass.squares, mass.terms)
    )
    assert torch.equal(mass_of(rows, lists, False).mass.cpu().double(), sums)
    query = rows.query.cpu().double()
    for row, length in enumerate(rows.lengths):
        for head in range(heads):
            at = row * heads + head
            unit = row * units + head * units // heads
            own = torch.from_numpy(flags[unit, :length])
            if not own.any():
                assert (sums[at] == 0).all()
                assert (terms[at] == 0).all()
                assert (top[at] == -torch.inf).all()
                continue
            key = rows.host.keys[row][0, head * kv_heads // heads, :length].double()
            weights = torch.where(own == 2, 1 / float(probability[unit]), 1.0)
            logits = (key @ query[row, head] * 32**-0.5 + weights.log())[own > 0]
            # Relative to the largest of all parts, as who reads the parts does.
            peak = top[at].max()
            factor = torch.exp(top[at] - peak)
            exact = torch.exp(logits - peak)
            # float32 scores of a few units: 2**-24 of each, and their powers' last bits.
            assert abs(logits.max() - peak) < 1e-5
            found = (factor * sums[at]).sum()
            assert abs(found - exact.sum()) <= 1e-5 * exact.sum()
            count = terms[at].sum()
            assert count == len(logits)
            mean = found / count
            parts = terms[at].clamp(min=1)
            off_mean = factor * sums[at] / parts - mean
            spread = (factor**2 * squares[at] + off_mean**2 * terms[at]).sum()
            scatter = ((exact - exact.mean()) ** 2).sum()
            assert abs(spread - scatter) <= 1e-5 * scatter + 1e-12


def test_other_blocks_change_no_bit() -> None:
    rows = device_rows(shape_of(4, 2, 32, 16), LENGTHS, exact=False)
    lists, _, _ = random_lists(rows, 4)
    one, other = mass_of(rows, lists, True), mass_of(permuted(rows), lists, True)
    for name in ("top", "mass", "squares", "terms"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_too_little_room_is_refused() -> None:
    rows = device_rows(shape_of(4, 2, 32, 16), LENGTHS)
    lists, _, _ = random_lists(rows, 4)
    with pytest.raises(ValueError, match="does not fit"):
        sum_selected_mass(
            rows.query, rows.kv_cache, rows.batch, lists, 1.0, DeviceMass.of(3, 4, False, DEVICE)
        )
