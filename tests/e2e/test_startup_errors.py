"""What the plugin refuses when a server starts, with the message a person sees.

One value of its own configuration and one argument of vLLM's; `test_serving_config` has the others.
"""

import pytest

from sparse_attention_hub.adapters.utils import ModelServerError

SINK = {"maskers": [{"type": "sink", "sink_size": 4}]}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"maskers": [{"type": "snik"}]}, [], "did you mean 'sink'"),
        (
            SINK,
            ["--kv-cache-dtype", "fp8_e5m2"],
            "--kv-cache-dtype fp8_e5m2 (allowed: auto, the model's own type, fp8)",
        ),
    ],
)
def test_refused_at_start_up(serve, config, arguments, message: str) -> None:
    with pytest.raises(ModelServerError) as error:
        serve(config, arguments)
    assert message in str(error.value)
