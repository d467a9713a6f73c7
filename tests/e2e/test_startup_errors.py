"""What the plugin refuses when a server starts, with the message a person sees.

One value of its own configuration; `test_serving_config` and `test_engine_check` have the others.
"""

import pytest

from sparse_attention_hub.adapters.utils import ModelServerError


def test_refused_at_start_up(serve) -> None:
    with pytest.raises(ModelServerError, match="did you mean 'sink'"):
        serve({"maskers": [{"type": "snik"}]})
