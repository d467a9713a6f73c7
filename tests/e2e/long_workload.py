"""Runs in a process of its own: one engine under a long random workload, its indices looked at.

Prompts share beginnings, come in chunks, are preempted for want of blocks, and some requests are
aborted. After each step, the index of every block in use is compared with one that is made anew
from the keys in the block.
"""

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from vllm_sparse_plugin.paged.layout import LayerCache
from vllm_sparse_plugin.paged.page_bounds import PageBounds, stored_bounds
from vllm_sparse_plugin.paged.prefill import stored_rows

BLOCK_SIZE = 32
SINK_LOCAL = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 16}]
QUEST = [*SINK_LOCAL, {"type": "quest_top_k", "heavy_size": 32, "page_size": 16}]
MASKERS = {
    "quest": QUEST,
    "quest in few bits": [
        *SINK_LOCAL,
        {"type": "quest_top_k", "heavy_size": 32, "page_size": 8, "label_bits": 4},
    ],
    "sample": [*SINK_LOCAL, {"type": "random_sampling", "sampling_rate": 0.2}],
    "pq": [
        *SINK_LOCAL,
        {
            "type": "pq_cache",
            "heavy_size": 24,
            "pq_sub_dim": 8,
            "pq_bits": 3,
            "kmeans_iterations": 2,
        },
    ],
}


@dataclass(frozen=True)
class Sent:
    """One request of the workload.

    Attributes:
        prompt: Token ids.
        tokens: Of the answer.
        parameters: What a client would send as `vllm_xargs`.
        aborted_after: Steps after which it is aborted; None = never.
    """

    prompt: list[int]
    tokens: int
    parameters: dict[str, Any]
    aborted_after: int | None


@dataclass
class WorkloadReport:
    """What happened.

    Attributes:
        wrong: Blocks whose index was not that of their keys, in words.
        compared: Indices of blocks in use that were compared.
        steps: Of the engine.
        preemptions: Requests that lost their blocks and came back.
        aborted: Requests.
        hit_tokens: Found in the prefix cache.
        chunked: Steps in which a part of a prompt was computed.
        different: Requests that got other tokens alone than in the workload, in words.
        finished: Requests.
        prepared: Whether all layers had seen their caches before the first request.
    """

    wrong: list[str] = field(default_factory=list)
    compared: int = 0
    steps: int = 0
    preemptions: int = 0
    aborted: int = 0
    hit_tokens: int = 0
    chunked: int = 0
    different: list[str] = field(default_factory=list)
    finished: int = 0
    prepared: bool = False


def random_workload(count: int, seed: int) -> list[Sent]:
    """Requests of all modes, whose prompts share beginnings of any length."""
    choose = random.Random(seed)
    tokens = [choose.randrange(100, 40_000) for _ in range(4000)]
    sent = []
    for number in range(count):
        start = choose.choice([0, 0, 0, 700, 1400])
        shared = choose.choice([0, 31, 32, 33, 100, 160])
        own = choose.randrange(1, 120)
        prompt = tokens[start : start + shared] + tokens[2000 + 13 * number :][:own]
        parameters: dict[str, Any] = {"sparse_attention": "off"}
        if choose.random() < 0.75:
            name = choose.choice(list(MASKERS))
            config = config_from_dict({"maskers": MASKERS[name]})
            parameters = {
                "sparse_attention_config": config_to_json(config),
                "sparse_attention_dense_prefix": choose.choice([0, shared, len(prompt)]),
            }
        aborted_after = choose.randrange(1, 20) if choose.random() < 0.2 else None
        sent.append(Sent(prompt, choose.randrange(4, 64), parameters, aborted_after))
    return sent


class Workload:
    """The engine and what it is asked."""

    def __init__(self, folder: str, sent: list[Sent]) -> None:
        """Starts the engine.

        Args:
            folder: Of the model.
            sent: The requests.
        """
        from vllm import LLM

        self.sent = sent
        self.report = WorkloadReport()
        self.llm = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=16,  # so few that requests are preempted
            max_model_len=384,
            max_num_seqs=6,
            max_num_batched_tokens=96,
            disable_log_stats=False,
            attention_backend="CUSTOM",
            additional_config={
                "sparse_attention": {
                    "maskers": SINK_LOCAL,
                    "min_sparse_keys": 0,
                    "index": [masker for maskers in MASKERS.values() for masker in maskers[2:]],
                }
            },
        )
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        worker = self.engine.model_executor.driver_worker.worker
        layers = worker.model_runner.compilation_config.static_forward_context
        self.caches: list[tuple[torch.Tensor, LayerCache]] = []
        self.report.prepared = all(layer.impl._views is not None for layer in layers.values())
        for layer in layers.values():
            self.caches.append((layer.kv_cache, layer.impl._cache(layer, layer.kv_cache)))

    def run(self) -> WorkloadReport:
        """The whole workload at once, and then each request that finished alone."""
        choose = random.Random(1)
        waiting = list(enumerate(self.sent))
        ends: dict[str, int] = {}
        answers: dict[int, tuple[list[int], list[Any]]] = {}
        while waiting or self.engine.has_unfinished_requests():
            while waiting and choose.random() < 0.7:
                number, sent = waiting.pop(0)
                self._send(str(number), sent)
                if sent.aborted_after is not None:
                    ends[str(number)] = self.report.steps + sent.aborted_after
            aborted = [name for name, end in ends.items() if end <= self.report.steps]
            for name in aborted:
                del ends[name]
                self.engine.abort_request([name])
                self.report.aborted += 1
            for output in self._step():
                answers[int(output.request_id)] = _tokens(output)
                ends.pop(output.request_id, None)
        self.report.finished = len(answers)
        for number, (found, _) in sorted(answers.items()):
            alone, logprobs = self._alone(number)
            if found != alone and not _near_tie(found, alone, logprobs):
                self.report.different.append(f"request {number}: {found} and alone {alone}")
        return self.report

    def _send(self, name: str, sent: Sent, salt: str | None = None) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0,
            max_tokens=sent.tokens,
            detokenize=False,
            logprobs=2,
            ignore_eos=True,
            extra_args=sent.parameters,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": sent.prompt}
        if salt is not None:
            prompt["cache_salt"] = salt
        self.engine.add_request(name, prompt, parameters)

    def _step(self) -> list[Any]:
        outputs = self.engine.step()
        self.report.steps += 1
        self._compare()
        return [output for output in outputs if output.finished]

    def _alone(self, number: int) -> tuple[list[int], list[Any]]:
        """A request's answer in an empty batch and with a cold cache."""
        self._send(f"alone-{number}", self.sent[number], salt=f"alone-{number}")
        while True:
            for output in self.engine.step():
                if output.finished:
                    return _tokens(output)

    def _compare(self) -> None:
        """Looks at all blocks of running requests, as far as they have keys."""
        filled: dict[int, int] = {}
        for request in self.scheduler.running:
            computed = request.num_computed_tokens
            [blocks] = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
            for place, block in enumerate(blocks):
                count = min(BLOCK_SIZE, computed - place * BLOCK_SIZE)
                if count > 0:
                    filled[block] = max(count, filled.get(block, 0))
            if 0 < computed < request.num_prompt_tokens:
                self.report.chunked += 1
        if not filled:
            return
        for kv_cache, cache in self.caches:
            again = self._written_anew(kv_cache, cache, filled)
            for index in cache.layout.indices:
                if isinstance(index, PageBounds):
                    self._compare_bounds(index, cache, again, filled)

    def _written_anew(
        self, kv_cache: torch.Tensor, cache: LayerCache, filled: dict[int, int]
    ) -> LayerCache:
        """A cache whose i-th block has the keys of the i-th of some blocks."""
        blocks = torch.tensor(list(filled), dtype=torch.int32)
        num_kv_heads = cache.layout.shape.num_kv_heads
        count = len(blocks) * BLOCK_SIZE
        keys, values = stored_rows(cache, blocks, count, 0, num_kv_heads, cache.layout.shape.dtype)
        anew = torch.zeros(len(blocks), *kv_cache.shape[1:])
        again = LayerCache.of(anew, cache.layout, cache.layer_index)
        slots = torch.cat(
            [torch.arange(count) + i * BLOCK_SIZE for i, count in enumerate(filled.values())]
        )
        again.write(keys[slots], values[slots], slots)
        return again

    def _compare_bounds(
        self, index: PageBounds, cache: LayerCache, again: LayerCache, filled: dict[int, int]
    ) -> None:
        stored, wanted = stored_bounds(index, cache), stored_bounds(index, again)
        for place, (block, count) in enumerate(filled.items()):
            pages = count // index.page_size  # the last one has no record until it is whole
            self.report.compared += 1
            if not all(
                torch.equal(own[block, :, :pages], other[place, :, :pages])
                for own, other in zip(stored, wanted, strict=True)
            ):
                self.report.wrong.append(
                    f"step {self.report.steps}, layer {cache.layer_index}, block {block}, "
                    f"{count} keys, {index}"
                )


def _tokens(output: Any) -> tuple[list[int], list[Any]]:
    [answer] = output.outputs
    return list(answer.token_ids), list(answer.logprobs)


def _near_tie(found: list[int], alone: list[int], logprobs: list[Any]) -> bool:
    """Whether two answers part where both tokens were as good as equally likely.

    vLLM's matrix products round differently for other numbers of tokens.
    """
    place = next(i for i, pair in enumerate(zip(found, alone, strict=True)) if pair[0] != pair[1])
    here = logprobs[place]
    return (
        found[place] in here and abs(here[found[place]].logprob - here[alone[place]].logprob) < 1e-4
    )


def run_workload(folder: str, count: int, seed: int) -> WorkloadReport:
    """See the module; `folder` has the model."""
    workload = Workload(folder, random_workload(count, seed))
    before = _counts(workload)
    report = workload.run()
    after = _counts(workload)
    return dataclasses.replace(
        report,
        preemptions=after[0] - before[0],
        hit_tokens=after[1] - before[1],
    )


def _counts(workload: Workload) -> tuple[int, int]:
    """Preemptions and tokens found in the prefix cache, by vLLM's own metrics."""
    values = {"vllm:num_preemptions": 0, "vllm:prefix_cache_hits": 0}
    for metric in workload.llm.get_metrics():
        if metric.name in values:
            values[metric.name] += int(metric.value)
    return values["vllm:num_preemptions"], values["vllm:prefix_cache_hits"]
