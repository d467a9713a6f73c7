"""Flags on the device: as the numba kernels mark them, and nothing past a query's length."""

import numpy as np
import pytest
import torch

from vllm_sparse_plugin.paged.kernels import group_flags, selection
from vllm_sparse_plugin.paged.triton_kernels import flags as kernels

LENGTHS = (0, 1, 8, 15, 16, 17, 4096, 4097, 8208, 9000)
BEGINS = (0, 0, 3, 0, 0, 2, 4095, 4097, 4000, 100)
ENDS = (0, 1, 3, 14, 16, 15, 4096, 4096, 4133, 18500)
POISON = 77


@pytest.fixture(params=[9008, 9000], ids=["aligned", "unaligned"])
def capacity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that begin at multiples of 16 bytes, as in engines, and others; of three tiles."""
    monkeypatch.setattr(kernels, "programs_per_row", lambda *_: 2)
    return int(request.param)


def lengths_of(device: str) -> torch.Tensor:
    return torch.tensor(LENGTHS, dtype=torch.int32, device=device)


def random_flags(rows: int, capacity: int, values: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    flags = torch.randint(0, values, (rows, capacity), generator=generator).to(torch.uint8)
    units = rows // len(LENGTHS)
    for row in range(rows):
        flags[row, LENGTHS[row // units] :] = POISON
    return flags


@pytest.mark.parametrize("units", [1, 3])
def test_starting_ends_at_the_length(device: str, units: int, capacity: int) -> None:
    flags = torch.full((len(LENGTHS) * units, capacity), POISON, dtype=torch.uint8, device=device)
    kernels.start_flags(flags, lengths_of(device))
    for row, values in enumerate(flags.cpu()):
        length = LENGTHS[row // units]
        assert not values[:length].any()
        assert (values[length:] == POISON).all()


@pytest.mark.parametrize("units", [1, 3])
def test_starting_with_ranges(device: str, units: int, capacity: int) -> None:
    """As clearing, and marking one range after the other: a sink, a window, and anything."""
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    ranges = torch.stack(
        [
            torch.zeros(len(LENGTHS)),
            lengths.clamp(max=4),
            lengths - 5,
            lengths,
            torch.tensor(BEGINS),
            torch.tensor(ENDS),
        ]
    ).to(device, torch.int32)
    found = random_flags(len(LENGTHS) * units, capacity, 3).to(device)
    expected = found.clone()
    kernels.start_flags(found, lengths_of(device), ranges)
    kernels.start_flags(expected, lengths_of(device))
    for begins, ends in ranges.view(3, 2, len(LENGTHS)):
        kernels.flag_range(expected, lengths_of(device), begins, ends)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ranges(device: str, units: int, dtype: torch.dtype, capacity: int) -> None:
    """Sinks, windows, whole rows, and ranges of nothing."""
    lengths = torch.tensor(LENGTHS)
    found = random_flags(len(LENGTHS) * units, capacity, 3)
    expected = found.clone()
    for begins, ends in (
        (torch.zeros(len(LENGTHS)), torch.minimum(lengths, torch.tensor(4))),
        ((lengths - 5).clamp(min=0), lengths),
        (torch.tensor(BEGINS), torch.tensor(ENDS).clamp(max=8500)),
    ):
        found = found.to(device)
        kernels.flag_range(
            found, lengths_of(device), begins.to(device, dtype), ends.to(device, dtype)
        )
        selection.flag_range(
            expected.numpy(), np.array(LENGTHS), begins.long().numpy(), ends.long().numpy()
        )
        assert (found.cpu() == expected).all()


def test_a_range_may_end_past_the_length(device: str, capacity: int) -> None:
    flags = random_flags(len(LENGTHS), capacity).to(device)
    begins = torch.full((len(LENGTHS),), -3, device=device)
    kernels.flag_range(flags, lengths_of(device), begins, begins + 1_000_000)
    for row, length in enumerate(LENGTHS):
        assert (flags[row, :length] == 1).all()
        assert (flags[row, length:] == POISON).all()


@pytest.mark.parametrize("group", [1, 2, 7])
def test_flags_of_groups_and_back(device: str, group: int, capacity: int) -> None:
    kv_heads = 2
    flags = random_flags(len(LENGTHS) * kv_heads * group, capacity)
    flags[flags == 1] = (torch.rand(int((flags == 1).sum())) < 0.3).to(torch.uint8)
    pooled = torch.full((len(LENGTHS) * kv_heads, capacity), POISON, dtype=torch.uint8)
    expected = pooled.clone()
    group_flags.pool_flags(flags.numpy(), np.array(LENGTHS), expected.numpy())
    found, of_heads = pooled.to(device), flags.to(device)
    kernels.pool_flags(of_heads, lengths_of(device), found)
    kernels.spread_flags(found, lengths_of(device), of_heads)
    group_flags.spread_flags(expected.numpy(), np.array(LENGTHS), flags.numpy())
    assert (of_heads.cpu() == flags).all()
    for row, values in enumerate(found.cpu()):
        length = LENGTHS[row // kv_heads]
        assert (values[:length] == expected[row, :length]).all()
        assert (values[length:] == POISON).all()
