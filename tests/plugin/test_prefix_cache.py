"""Which blocks two requests share, asked of vLLM's own block hasher."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_sparse_plugin import plugin
from vllm_sparse_plugin.prefix_cache import sparse_hash_keys
from vllm_sparse_plugin.request_parameters import resolve_request
from vllm_sparse_plugin.serving_config import ServingConfig

BLOCK = 16
SERVER = ServingConfig.parse("streaming-llm")
HASH = get_hash_fn_by_name("sha256")


@pytest.fixture(scope="module", autouse=True)
def hooks() -> None:
    plugin.register()
    init_none_hash(HASH)


def hashes(
    num_prompt: int,
    generated: int,
    extra_args: dict | None,
    server: ServingConfig | None = SERVER,
    least: int = 0,
    steps_decide: bool = False,
) -> list[bytes]:
    """Block hashes of a request over the tokens 0, 1, 2, ... of which the last are generated."""
    parameters = SamplingParams(max_tokens=64)
    parameters.extra_args = resolve_request(extra_args, server, least, steps_decide)
    request = Request(
        request_id="r",
        prompt_token_ids=list(range(num_prompt)),
        sampling_params=parameters,
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, HASH),
    )
    request.append_output_token_ids(list(range(num_prompt, num_prompt + generated)))
    return list(request.block_hashes)


def shared(first: list[bytes], second: list[bytes]) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    # Hashes are chained: after the first difference nothing agrees again.
    assert not set(first[count:]) & set(second[count:])
    return count


DENSE = {"sparse_attention": "off"}


def test_dense_request_has_the_hashes_of_stock_vllm() -> None:
    assert hashes(80, 16, DENSE) == hashes(80, 16, None, server=None)


def test_prompt_is_shared_and_sparse_generation_is_not() -> None:
    assert shared(hashes(80, 32, None), hashes(80, 32, DENSE)) == 5
    # The block in which the prompt ends holds sparse tokens too.
    assert shared(hashes(79, 32, None), hashes(79, 32, DENSE)) == 4


def test_dense_follow_up_reuses_only_what_was_computed_densely() -> None:
    sparse_turn = hashes(70, 42, None)
    assert shared(sparse_turn, hashes(112, 0, None)) == 4
    assert shared(sparse_turn, hashes(112, 0, {"sparse_attention_dense_prefix": 70})) == 7


def test_tokens_that_may_be_dense_are_not_those_that_are_sparse() -> None:
    automatic = hashes(64, 64, None, least=97, steps_decide=True)
    assert shared(automatic, hashes(64, 64, None, least=97, steps_decide=True)) == 8
    assert shared(automatic, hashes(64, 64, None, least=97)) == 6
    # Queries of too few keys for any step are dense, and shared by everybody.
    assert shared(automatic, hashes(128, 0, DENSE)) == 6


def test_maskers_are_part_of_the_key() -> None:
    other = {"sparse_attention_config": "sink-local-oracle"}
    assert shared(hashes(64, 32, None), hashes(64, 32, other)) == 4


def test_end_of_the_dense_prefix_is_part_of_the_key() -> None:
    prefix = "sparse_attention_dense_prefix"
    assert shared(hashes(96, 0, {prefix: 33}), hashes(96, 0, {prefix: 34})) == 2
    assert shared(hashes(96, 0, {prefix: 33}), hashes(96, 0, {prefix: 64})) == 2
    assert shared(hashes(96, 0, {prefix: 33}), hashes(96, 0, {prefix: 33})) == 6


def test_tag_is_not_part_of_the_key() -> None:
    assert hashes(64, 32, {"sparse_attention_tag": "a"}) == hashes(64, 32, None)


@given(
    prompt=st.integers(1, 60),
    generated=st.integers(0, 40),
    first=st.one_of(st.none(), st.integers(0, 80)),
    second=st.one_of(st.none(), st.integers(0, 80)),
)
@settings(max_examples=200, deadline=None)
def test_a_block_is_shared_only_if_all_tokens_so_far_have_the_same_mode(
    prompt: int, generated: int, first: int | None, second: int | None
) -> None:
    """`None` stands for a dense request."""

    def arguments(prefix: int | None) -> dict:
        return DENSE if prefix is None else {"sparse_attention_dense_prefix": prefix}

    def modes(prefix: int | None, end: int) -> list[bool]:
        return [prefix is not None and position >= prefix for position in range(end)]

    one, two = (hashes(prompt, generated, arguments(prefix)) for prefix in (first, second))
    assert len(one) == (prompt + generated) // BLOCK
    for index, (left, right) in enumerate(zip(one, two, strict=True)):
        end = (index + 1) * BLOCK
        assert (left == right) == (modes(first, end) == modes(second, end))


def test_no_parameters_no_keys() -> None:
    assert sparse_hash_keys(None, 10, 0, 16) == ()
