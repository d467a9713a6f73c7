"""Bytes of a token in layers whose caches differ: blocks can be made equally large."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_plugin.paged.token_bytes import TokenNeed, shared_token_bytes


@st.composite
def needs(draw: st.DrawFn) -> TokenNeed:
    plain = 4 * draw(st.sampled_from([32, 64, 80, 96, 128, 256, 512]))
    extra = 4 * draw(st.integers(0, 40))
    return TokenNeed(draw(st.sampled_from([1, 2, 3, 4, 8, 16])), plain, plain + extra)


@given(st.lists(needs(), min_size=1, max_size=4))
def test_there_is_room_and_blocks_become_equal(layers: list[TokenNeed]) -> None:
    plain = {need: need.num_kv_heads * need.plain for need in layers}
    indexed = {need.needed > need.plain for need in layers}
    if len(indexed) == 1:  # vLLM's own ways do
        assert all(shared_token_bytes(need, layers) == need.needed for need in layers)
        return
    if any(max(plain.values()) % size for size in plain.values()):
        with pytest.raises(ValueError, match="layers with a window have caches of another size"):
            shared_token_bytes(layers[0], layers)
        return
    sizes = {need: need.num_kv_heads * shared_token_bytes(need, layers) for need in layers}
    for need, size in sizes.items():
        assert size >= need.num_kv_heads * need.needed
        assert size // need.num_kv_heads % 4 == 0
        # As vLLM makes them equal: more tokens where they are smaller.
        assert max(sizes.values()) % size == 0
        # Keys and values then end at the same place in all blocks: no index is before it.
        assert max(sizes.values()) // size == max(plain.values()) // plain[need]


@given(needs())
def test_layers_of_one_kind_take_what_they_need(need: TokenNeed) -> None:
    assert shared_token_bytes(need, [need, need]) == need.needed
    # One with a window has the same blocks, without an index.
    windowed = TokenNeed(need.num_kv_heads, need.plain, need.plain)
    assert shared_token_bytes(windowed, [need, windowed]) == need.needed
    assert shared_token_bytes(need, []) == need.needed


def test_what_is_lost_is_small() -> None:
    """Shapes as of Gemma 4, in bfloat16, with Quest's labels of 4 bits for pages of 16."""
    windowed, whole = TokenNeed(16, 1024, 1024), TokenNeed(4, 2048, 2048 + 36)
    layers = [windowed, whole]
    assert shared_token_bytes(whole, layers) == 2088
    assert shared_token_bytes(windowed, layers) == 1044  # of two tokens without a window
    small = [TokenNeed(2, 1024, 1024), TokenNeed(2, 2048, 2048 + 36)]
    assert [shared_token_bytes(need, small) for need in small] == [1044, 2088]
