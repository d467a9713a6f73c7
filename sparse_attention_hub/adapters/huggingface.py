"""`ModelAdapterHF`: the in-process reference, on transformers."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparse_attention_hub.adapters import attention_session
from sparse_attention_hub.adapters.attention_session import AttentionSession
from sparse_attention_hub.adapters.base import (
    DEFAULT_MAX_NEW_TOKENS,
    INT_MAX,
    AnswerDetails,
    ModelAdapter,
    Request,
    RequestResponse,
    make_response,
)
from sparse_attention_hub.adapters.model_servers.huggingface import ModelServerHF
from sparse_attention_hub.adapters.prompt import RequestOptions, tokenize_request
from sparse_attention_hub.adapters.utils.model_utils import default_device
from sparse_attention_hub.sparse_attention.base import SparseAttentionConfig
from sparse_attention_hub.sparse_attention.density import count_read_keys
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttention
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)

logger = logging.getLogger(__name__)

__all__ = ["INT_MAX", "ModelAdapterHF"]

_NOT_GIVEN: Any = object()


class _TokenClock(StoppingCriteria):
    """Notes when each token was there; never stops anything."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class ModelAdapterHF(ModelAdapter):
    """Runs a transformers model in this process.

    The context is prefilled densely once per request and its KV cache reused for every question;
    inside `enable_sparse_mode()` the questions and answers attend sparsely. Outside it the same
    adapter is dense. Dense passes of a model that a sparse adapter uses run through torch's
    scaled-dot-product attention.

    Attributes:
        model: The transformers model, shared with other adapters of the same name and arguments.
        tokenizer: Its tokenizer.
        device: As given; None = CPU.
        model_kwargs: As given.
        tokenizer_kwargs: As given.
        torch_dtype: Of the model's weights.
    """

    def __init__(
        self,
        model_name: str,
        sparse_attention_config: SparseAttentionConfig | None = None,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        device: str | int | torch.device | None = _NOT_GIVEN,
        *,
        sparse_by_default: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads the model, or takes it from the process's `ModelServerHF`.

        Args:
            model_name: Or folder.
            sparse_attention_config: None = always dense.
            model_kwargs: For `AutoModelForCausalLM.from_pretrained`.
            tokenizer_kwargs: For `AutoTokenizer.from_pretrained`.
            device: Left out: "cuda" where there is one, else "cpu". None: CPU. An int: CUDA index.
            sparse_by_default: Sparse without `enable_sparse_mode()`.
            kwargs: Kept as they are.

        Raises:
            ModelCreationError: The model cannot be loaded.
            TokenizerCreationError: The tokenizer cannot be loaded.
            ValueError: The model does not take its attention from transformers' registry.
        """
        self._held: list[Callable[[], Any]] = []
        super().__init__(
            model_name, sparse_attention_config, sparse_by_default=sparse_by_default, **kwargs
        )
        self.model_kwargs = dict(model_kwargs or {})
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.device = default_device() if device is _NOT_GIVEN else device
        server = ModelServerHF()
        model_key, tokenizer_key = (
            (model_name, self.device, self.model_kwargs),
            (model_name, self.tokenizer_kwargs),
        )
        self.model = server.get_model(*model_key)
        # Not through `self`: an adapter that nobody holds must go at once.
        self._held.append(lambda: server.clear_model(*model_key))
        self.tokenizer = server.get_tokenizer(*tokenizer_key)
        self._held.append(lambda: server.clear_tokenizer(*tokenizer_key))
        self.torch_dtype = self.model.dtype
        if self.sparse_attention is not None:
            attention_session.install(self.model)

    def close(self) -> None:
        """Lets go of the model and the tokenizer; the adapter is of no use afterwards."""
        while self._held:
            self._held.pop()()
        self.model = self.tokenizer = None

    def __enter__(self) -> ModelAdapterHF:
        """The adapter itself; closed at the end of the `with` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """See `close`."""
        self.close()

    def __del__(self) -> None:
        """See `close`."""
        if getattr(self, "_held", None):
            self.close()

    @contextmanager
    def enable_sparse_mode(self) -> Iterator[None]:
        """See `ModelAdapter.enable_sparse_mode`; direct calls of `self.model` are sparse too."""
        with super().enable_sparse_mode(), attention_session.attention_session(self._session()):
            yield

    def _session(self) -> AttentionSession:
        """A session of this adapter's attention that counts what it reads."""
        attention = self.sparse_attention
        if not isinstance(attention, ResearchAttention):
            raise TypeError(f"cannot run a {type(attention).__name__} in a model")
        session: AttentionSession

        def attend(
            module: torch.nn.Module,
            queries: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float,
            dropout: float,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            inputs = (queries, keys, values, attention_mask, scaling, dropout)
            kwargs["layer_idx"] = getattr(module, "layer_idx", 0)
            mask = attention.select(*inputs, **kwargs)
            session.add_counts(count_read_keys(mask, attention_mask))
            output = get_masked_attention_output(module, *inputs, mask)
            attention.log_metrics(module, *inputs, mask, output, kwargs["layer_idx"])
            return output, None

        session = AttentionSession(attend)
        return session

    def process_request(
        self,
        request: Request,
        generation_kwargs: dict[str, Any] | None = None,
        request_kwargs: dict[str, Any] | None = None,
    ) -> RequestResponse:
        """See `ModelHubAdapterInterface.process_request`.

        Args:
            request: Context and questions.
            generation_kwargs: For `model.generate`.
            request_kwargs: As there; `return_logits` (default False) puts each answer's logits
                into its details.

        Raises:
            ValueError: An argument is not allowed, or the context is too long.
        """
        options = RequestOptions.parse(request_kwargs)
        generation = _generation_arguments(generation_kwargs)
        mode = self._mode_of_request()
        tokens = tokenize_request(self.tokenizer, request, options)
        texts, details = [], []
        started = time.perf_counter()
        with torch.inference_mode():
            with attention_session.attention_session(None):
                context_cache = self._prefill(tokens.context_ids)
            for question_ids in tqdm(
                tokens.question_ids, desc="questions", disable=_quiet(tokens.question_ids)
            ):
                session = self._session() if mode == "sparse" else None
                with attention_session.attention_session(session):
                    detail = self._answer(
                        tokens.context_ids,
                        question_ids,
                        _copy_cache(context_cache),
                        generation,
                        started,
                        options.return_logits,
                        session,
                    )
                details.append(detail)
                texts.append(self.tokenizer.decode(detail.token_ids, skip_special_tokens=True))
                started = time.perf_counter()
        return make_response(request, texts, details, options.include_answer_prefix)

    def _prefill(self, context_ids: list[int]) -> DynamicCache:
        """The KV cache of the context, from one forward pass."""
        cache = DynamicCache(config=self.model.config)
        if context_ids:
            ids = torch.tensor([context_ids], device=self.model.device)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _answer(
        self,
        context_ids: list[int],
        question_ids: list[int],
        cache: DynamicCache,
        generation: dict[str, Any],
        started: float,
        return_logits: bool,
        session: AttentionSession | None,
    ) -> AnswerDetails:
        prompt = [*context_ids, *question_ids]
        clock = _TokenClock()
        new_ids: tuple[int, ...] = ()
        logits = None
        if generation["max_new_tokens"] > 0:
            ids = torch.tensor([prompt], device=self.model.device)
            stops = generation.get("stopping_criteria") or []
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                **{
                    "pad_token_id": self.tokenizer.pad_token_id,
                    "tokenizer": self.tokenizer,
                    **generation,
                    "stopping_criteria": StoppingCriteriaList([clock, *stops]),
                    "return_dict_in_generate": True,
                    "output_logits": return_logits,
                },
            )
            new_ids = tuple(output.sequences[0, len(prompt) :].tolist())
            if return_logits:
                logits = torch.stack(output.logits, dim=1)[0].float()
        return AnswerDetails(
            mode="dense" if session is None else "sparse",
            token_ids=new_ids,
            prompt_tokens=len(prompt),
            context_tokens=len(context_ids),
            density=_density(session),
            read_keys=session.read_keys if session else None,
            visible_keys=session.visible_keys if session else None,
            time_to_first_token_s=clock.times[0] - started if clock.times else None,
            time_per_output_token_s=_mean_gap(clock.times),
            finish_reason=self._finish_reason(new_ids, generation),
            logits=logits,
        )

    def _finish_reason(self, new_ids: tuple[int, ...], generation: dict[str, Any]) -> str:
        """Returns "stop" for an end-of-sequence token or a stop string, else "length"."""
        ends = generation.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if new_ids and new_ids[-1] in ends:
            return "stop"
        return "length" if len(new_ids) >= generation["max_new_tokens"] else "stop"


def _density(session: AttentionSession | None) -> float:
    if session is None or session.visible_keys == 0:
        return 1.0
    return session.read_keys / session.visible_keys


def _quiet(questions: list[list[int]]) -> bool | None:
    """No progress bar for one question; tqdm's own choice (a terminal or not) for more."""
    return True if len(questions) < 2 else None


def _mean_gap(times: list[float]) -> float | None:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def _generation_arguments(generation_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of `generate`, greedy unless they say otherwise.

    Raises:
        ValueError: `max_new_tokens` is negative or no integer, or more than one sequence is asked.
    """
    arguments = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "do_sample": False}
    arguments.update(generation_kwargs or {})
    count = arguments["max_new_tokens"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {count!r}")
    if arguments.get("num_return_sequences", 1) != 1:
        raise ValueError(
            "num_return_sequences must be 1 (a response has one text per question), got "
            f"{arguments['num_return_sequences']!r}"
        )
    return arguments


def _copy_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow without changing the original.

    These layers concatenate and never write into their tensors, so the tensors can be shared;
    other kinds of layers are copied whole.
    """
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return copy.deepcopy(cache)
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
