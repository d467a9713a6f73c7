"""Real `vllm serve` processes, and clients for them."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from transformers import AutoConfig

from examples.documents import python_manual
from sparse_attention_hub.adapters import ModelServerVLLM, calibrate_channels
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from tests.e2e.start_engines import Asked, EngineReport, run_engine, set_environment

REPOSITORY = Path(__file__).resolve().parents[2]
ARGUMENTS = ["--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"]
# Small enough that prompts of these tests are prefilled in several chunks.
CHUNKED = ["--max-num-batched-tokens", "512"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(REPOSITORY)}


class Client:
    """The real client of a server, and what else its tests ask of it."""

    def __init__(self, server: ModelServerVLLM) -> None:
        self.server = server
        self.root = server.base_url.removesuffix("/v1")
        self.openai = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)

    def complete(
        self,
        prompt: list[int] | str,
        tokens: int = 16,
        salt: str | None = None,
        ignore_eos: bool = False,
        **xargs,
    ):
        """A greedy completion with token ids and their logprobs."""
        extra = {
            "ignore_eos": ignore_eos,
            "return_token_ids": True,
            "vllm_xargs": xargs or None,
            "cache_salt": salt,
        }
        return self.openai.completions.create(
            model=self.server.model_name,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            logprobs=1,
            extra_body={name: value for name, value in extra.items() if value is not None},
        ).choices[0]

    def statistics(self, tag: str | None = None) -> requests.Response:
        return requests.get(
            f"{self.root}/sparse_attention/stats", params={"tag": tag} if tag else None, timeout=60
        )

    def metric(self, name: str) -> float:
        """A counter of the server's own metrics."""
        lines = requests.get(f"{self.root}/metrics", timeout=60).text.splitlines()
        values = [float(line.split()[-1]) for line in lines if line.startswith(name + "{")]
        assert values, f"no metric {name}"
        return sum(values)


def tokens_and_logprobs(choice) -> tuple[list[int], list[float]]:
    return choice.token_ids, choice.logprobs.token_logprobs


@pytest.fixture(scope="session")
def serve(model_path: str) -> Iterator[Callable[..., Client]]:
    """Starts servers, and stops them at the end of the run."""
    running: list[ModelServerVLLM] = []

    def start(sparse_attention=None, arguments=(), environment=None) -> Client:
        server = ModelServerVLLM(
            model_path,
            sparse_attention,
            arguments=[*ARGUMENTS, *arguments],
            environment={**ENVIRONMENT, **(environment or {})},
        )
        running.append(server)
        return Client(server.start())

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def start_engine() -> Iterator[Callable[..., EngineReport]]:
    """Starts an engine on a model folder, asks it, and lets it go; see `run_engine`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, set_environment, (ENVIRONMENT,)) as pool:

        def start(
            folder: Path,
            maskers: list[dict[str, Any]],
            asked: dict[str, Asked],
            options: dict[str, Any] | None = None,
        ) -> EngineReport:
            return pool.submit(run_engine, str(folder), maskers, asked, options or {}).result()

        yield start


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
    """The server of most tests: sparse when asked, prefilling in chunks."""
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
