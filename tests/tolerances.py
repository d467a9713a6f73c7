"""Tolerances of the tests, in one place, with the reason for each."""

import torch

ATTENTION_ATOL = {
    # Inputs of order 1; sums of a few hundred products, each off by at most 2**-24 of its size.
    torch.float32: 1e-5,
    # The output is rounded once to 8 bits of mantissa: 2**-9 of values up to about 4.
    torch.bfloat16: 2e-2,
    # Likewise with 11 bits: 2**-12 of values up to about 4.
    torch.float16: 2e-3,
}
"""Largest absolute difference of an attention output of order 1 from its float64 value."""
