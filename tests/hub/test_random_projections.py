"""Hash buckets of vectors: the signs of their projections, read as numbers."""

import pytest
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers import random_projections
from sparse_attention_hub.sparse_attention.research_attention.maskers.random_projections import (
    bucket_codes,
)


@pytest.mark.parametrize("bits", [1, 5, 31, 32, 62])
@pytest.mark.parametrize("num_vectors", [0, 1, 7, 8, 20])
@pytest.mark.parametrize("is_centred", [False, True])
def test_codes_are_the_signs_as_numbers(
    bits: int, num_vectors: int, is_centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: of whole numbers, whose products have no rounding; in pieces of any length."""
    monkeypatch.setattr(random_projections, "_NUMBERS_AT_ONCE", 8 * 2 * 3 * 4 * bits)
    random = torch.Generator().manual_seed(bits)
    vectors = torch.randint(-9, 10, (2, 3, num_vectors, 6), generator=random).to(torch.bfloat16)
    projections = torch.randint(-9, 10, (3, 6, 4 * bits), generator=random).float()
    mean = torch.randint(-9, 10, (2, 3, 1, 6), generator=random).float() if is_centred else None
    codes = bucket_codes(vectors, projections, bits, mean)
    assert codes.dtype == (torch.int32 if bits < 32 else torch.int64)
    assert codes.shape == (2, 3, num_vectors, 4)
    for b, g, n, table in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        vector = vectors[b, g, n].float() - (0 if mean is None else mean[b, g, 0])
        signs = vector @ projections[g, :, table * bits : (table + 1) * bits] >= 0
        assert int(codes[b, g, n, table]) == int("".join(map(str, signs.int().tolist())), 2)
