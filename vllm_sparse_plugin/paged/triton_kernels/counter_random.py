"""The random numbers of `kernels.counter_random`, bit for bit.

A number is a function of (seed, layer, query head, query position, key position): the 53 bits that
the reference's `uniform_per_key` divides by 2**53. (SplitMix64, Steele et al. 2014; counters:
Salmon et al. 2011.)
"""

import triton
import triton.language as tl

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


@triton.jit
def mixed(bits):
    """SplitMix64's next output; `bits` is uint64."""
    bits = bits + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def stream_of(layer_stream, head, position):
    """What the numbers of one query have in common: uint64.

    Args:
        layer_stream: See the function of this name, int64.
        head: Query head.
        position: Of the query in its sequence.
    """
    bits = mixed(layer_stream.to(tl.uint64) ^ head.to(tl.uint64))
    return mixed(bits ^ position.to(tl.uint64))


@triton.jit
def number_of(stream, keys):
    """The numbers of the keys at some positions, int64 in [0, 2**53)."""
    return (mixed(stream ^ keys.to(tl.uint64)) >> 11).to(tl.int64)


def layer_stream(seed: int, layer: int) -> int:
    """What the numbers of one layer have in common, as a signed integer of 64 bits.

    Args:
        seed: Of the configuration, in [0, 2**63).
        layer: Index of the attention layer.
    """
    bits = _mixed(_mixed(seed) ^ layer)
    return bits - (1 << 64) if bits >> 63 else bits


def _mixed(bits: int) -> int:
    bits = (bits + _STEP) & _WORD
    bits = ((bits ^ (bits >> 30)) * _FIRST) & _WORD
    bits = ((bits ^ (bits >> 27)) * _SECOND) & _WORD
    return bits ^ (bits >> 31)
