"""The server that all tests of this folder ask: one process of tests runs them all."""

import pytest
import torch
from transformers import AutoConfig

from examples.documents import python_manual
from sparse_attention_hub.adapters import calibrate_channels
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from tests.e2e.conftest import Client

# Small enough that prompts of these tests are prefilled in several chunks.
CHUNKED = ["--max-num-batched-tokens", "512"]


@pytest.fixture(scope="session")
def masker_files(model_path, tmp_path_factory) -> dict[str, str]:
    """Channels of the model, calibrated by the command, and random hash networks for it."""
    folder = tmp_path_factory.mktemp("masker_files")
    text, channels = folder / "text.txt", folder / "channels.json"
    text.write_text(python_manual(["formatstrings"], 3000))
    calibrate_channels.main([model_path, "--text", str(text), "--output", str(channels)])
    config = AutoConfig.from_pretrained(model_path)
    generator = torch.Generator().manual_seed(0)

    def network() -> torch.Tensor:
        size = (config.num_attention_heads, config.head_dim, 32)
        return torch.randn(*size, generator=generator)

    weights = folder / "weights.safetensors"
    zeros = torch.zeros(config.num_attention_heads, 32)
    save_hat_weights(
        {
            layer: {
                "query_matrix": [matrix],
                "key_matrix": [matrix],
                "query_bias": [zeros],
                "key_bias": [zeros.clone()],
            }
            for layer in range(config.num_hidden_layers)
            for matrix in [network()]
        },
        weights,
    )
    return {"channels": str(channels), "weights": str(weights)}


@pytest.fixture(scope="session")
def sparse(serve, masker_files) -> Client:
    """Sparse when asked, prefilling in chunks."""
    config = {
        "maskers": [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 32}],
        "sparse_by_default": False,
        "min_sparse_keys": 0,  # tests count every sparse token
        "request_files": list(masker_files.values()),
        "index": [
            {"type": "quest_top_k", "heavy_size": 1, "page_size": 16},
            {"type": "quest_top_k", "heavy_size": 1, "page_size": 8, "label_bits": 4},
            {
                "type": "double_sparsity_top_k",
                "heavy_size": 1,
                "sorted_channel_file": masker_files["channels"],
                "label_bits": 8,
            },
            {
                "type": "hash_attention_top_k",
                "heavy_size": 1,
                "hat_bits": 32,
                "hat_mlp_layers": 1,
                "hat_mlp_hidden_size": 1,
                "hat_mlp_activation": "silu",
                "hat_weight_file": masker_files["weights"],
            },
            {
                "type": "pq_cache",
                "heavy_size": 1,
                "pq_sub_dim": 16,
                "pq_bits": 4,
                "kmeans_iterations": 3,
            },
            {"type": "magic_pig", "lsh_l": 40, "lsh_k": 5},
        ],
    }
    return serve(config, CHUNKED)
