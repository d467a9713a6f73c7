"""Kinds of models that are refused, with the reason; `test_architectures` has those served."""

from pathlib import Path

import pytest

from sparse_attention_hub.adapters import ModelServerVLLM
from sparse_attention_hub.adapters.utils import ModelServerError
from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.tiny_models import REFUSED, write_tiny_model

REASONS = {
    "mla": "cannot serve this model: MLA not supported",
    "encoder": "attention type AttentionType.ENCODER_ONLY not supported",
    "alibi": "ALiBi not supported",
    "softcap": "logits soft cap not supported",
}
SINK = [{"type": "sink", "sink_size": 4}]


@pytest.fixture(scope="module")
def folders(model_path: str, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_tiny_model(kind, root, model_path) for kind in REFUSED}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(start_engine, folders, kind: str) -> None:
    error = start_engine(folders[kind], SINK, {}).error
    assert REASONS[kind] in error
    assert "--attention-backend CUSTOM" in error


def test_the_reason_reaches_who_starts_a_server(folders) -> None:
    """It arises in the engine's process, and vLLM's own last words do not repeat it."""
    server = ModelServerVLLM(
        str(folders["alibi"]),
        {"maskers": SINK, "min_sparse_keys": 0},  # which else is measured first
        arguments=["--load-format", "dummy", "--dtype", "float32", "--enforce-eager"],
        environment=ENVIRONMENT,
    )
    with pytest.raises(ModelServerError) as error, server:
        pass
    assert REASONS["alibi"] in str(error.value)
