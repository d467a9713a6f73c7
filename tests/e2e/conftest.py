"""Real `vllm serve` processes, and clients for them."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from sparse_attention_hub.adapters import ModelServerVLLM
from tests.e2e.start_engines import Asked, EngineReport, run_engine, set_environment

REPOSITORY = Path(__file__).resolve().parents[2]
ARGUMENTS = ["--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"]
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
