"""Generation arguments in transformers' names, as the completions API takes them."""

import pytest

from sparse_attention_hub.adapters.completions import completion_arguments

ALWAYS = {"return_token_ids": True, "include_stop_str_in_output": True}


def test_greedy_by_default() -> None:
    assert completion_arguments(None) == {
        "max_tokens": 50,
        "temperature": 0.0,
        "n": 1,
        "extra_body": ALWAYS,
    }


def test_a_temperature_without_sampling_is_greedy_as_in_generate() -> None:
    assert completion_arguments({"temperature": 0.7})["temperature"] == 0.0


def test_sampling() -> None:
    given = {
        "max_new_tokens": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_new_tokens": 2,
        "stop_strings": ["x"],
        "seed": 1,
        "num_return_sequences": 2,
        "pad_token_id": 0,
        "streamer": None,
    }
    assert completion_arguments(given) == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 1,
        "n": 2,
        "extra_body": {
            "top_k": 3,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            **ALWAYS,
        },
    }


def test_own_ends_take_the_place_of_the_models() -> None:
    extra = completion_arguments({"eos_token_id": 5})["extra_body"]
    assert extra == {"ignore_eos": True, "stop_token_ids": [5], **ALWAYS}
    assert completion_arguments({"eos_token_id": None})["extra_body"] == ALWAYS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 2}, "num_beams.*cannot be sent to a server; allowed: do_sample, eos"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"num_return_sequences": 2}, "needs do_sample=True"),
    ],
)
def test_refused(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        completion_arguments(given)
