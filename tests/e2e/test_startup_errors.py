"""What the plugin refuses when a server starts, with the message a person sees."""

import pytest

from sparse_attention_hub.adapters.utils import ModelServerError

SINK = {"maskers": [{"type": "sink", "sink_size": 4}]}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"maskers": [{"type": "snik"}]}, [], "did you mean 'sink'"),
        ({"maskers": [{"type": "sink", "sink_size": 0}]}, [], "sink_size must be an integer >= 1"),
        ({**SINK, "sparse": True}, [], "sparse_attention.sparse is not a field; allowed:"),
        (
            SINK,
            ["--kv-cache-dtype", "fp8"],
            "--kv-cache-dtype fp8 (allowed: auto, or the model's own type)",
        ),
    ],
)
def test_refused_at_start_up(serve, config, arguments, message: str) -> None:
    with pytest.raises(ModelServerError) as error:
        serve(config, arguments)
    assert message in str(error.value)
