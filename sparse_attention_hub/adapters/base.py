"""Requests, responses, and the interface of every adapter."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sparse_attention_hub.sparse_attention.base import SparseAttention, SparseAttentionConfig

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

INT_MAX = 2**31 - 1
"""The default of `max_context_length`: no limit."""

DEFAULT_MAX_NEW_TOKENS = 50

Mode = Literal["dense", "sparse"]

_SPARSE_ADAPTERS: ContextVar[tuple[object, ...]] = ContextVar("sparse_adapters", default=())
"""Adapters (by `_mode_key`) whose `enable_sparse_mode` this thread or task is inside of."""


@dataclass
class Request:
    """Questions about a context.

    Attributes:
        context: Text that every question is about.
        questions: One question, or a list.
        answer_prefix: Text that every answer begins with.
    """

    context: str
    questions: str | list[str]
    answer_prefix: str = ""


@dataclass(frozen=True)
class Alternative:
    """A second or further answer to the same question (`num_return_sequences`).

    Attributes:
        text: Without the answer prefix.
        token_ids: Generated tokens, an end-of-sequence token included.
        finish_reason: "stop" or "length".
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class AnswerDetails:
    """What is known about one answer beyond its text.

    Attributes:
        mode: Whether the question and the answer attended sparsely.
        token_ids: Generated tokens, an end-of-sequence token included.
        prompt_tokens: Tokens before the answer.
        context_tokens: Those of them that belong to the context, and attended densely.
        density: Keys read / keys a dense pass would read, over question and answer (all of them,
            where there are alternatives), all query heads and all layers that have maskers or could
            have: those with a sliding window stay dense, and are not counted. 1.0 in dense mode,
            None when unknown. With a sparse context, over that too, where this question paid for
            it.
        read_keys: The numerator; None when dense or unknown.
        visible_keys: The denominator; None when dense or unknown.
        time_to_first_token_s: Seconds; with the context's prefill, where this question paid it.
        time_per_output_token_s: Seconds between tokens, mean; None for fewer than two tokens.
        finish_reason: "stop" or "length".
        total_time_s: Seconds, to the last token.
        alternatives: Further answers, where several were asked for.
        logits: `[tokens, vocabulary]`, float32, before any sampling; only when asked for.
    """

    mode: Mode
    token_ids: tuple[int, ...]
    prompt_tokens: int
    context_tokens: int
    density: float | None
    read_keys: int | None
    visible_keys: int | None
    time_to_first_token_s: float | None
    time_per_output_token_s: float | None
    finish_reason: str
    total_time_s: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    logits: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def new_tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.token_ids)


@dataclass
class RequestResponse:
    """Answers.

    Attributes:
        responses: A text for a single question, a list for a list.
        details: One per question, in order.
    """

    responses: str | list[str]
    details: tuple[AnswerDetails, ...] = field(default=(), compare=False)

    @property
    def mode(self) -> Mode | None:
        """In which mode the questions were answered; None without questions."""
        return self.details[0].mode if self.details else None

    @property
    def density(self) -> float | None:
        """Keys read / keys a dense pass would read, over all answers; None where unknown."""
        if not self.details or any(item.density is None for item in self.details):
            return None
        visible = sum(item.visible_keys or 0 for item in self.details)
        return sum(item.read_keys or 0 for item in self.details) / visible if visible else 1.0


class ModelHubAdapterInterface(ABC):
    """What runs requests."""

    @abstractmethod
    def process_request(
        self,
        request: Request,
        generation_kwargs: dict[str, Any] | None = None,
        request_kwargs: dict[str, Any] | None = None,
    ) -> RequestResponse:
        """Answers a request.

        Args:
            request: Context and questions.
            generation_kwargs: How to generate, in transformers' names; greedy, 50 tokens by
                default. `num_return_sequences` > 1 (with sampling) puts the further answers into
                the details' `alternatives`. A `streamer` gets each question's tokens as they
                come, one question after the other.
            request_kwargs: `max_context_length` (context tokens; default: no limit),
                `truncate_context` (default False: a longer context is an error; True: its first
                tokens are kept), `include_answer_prefix` (default True: the answer's text begins
                with it), `sparse_context` (default False: the context attends densely; True, in
                sparse mode only: sparsely, like the rest), `show_progress` (default None: a bar
                of the tokens, for long requests, on a terminal; True: always; False: never).

        Raises:
            ValueError: An argument is not allowed, or the context is too long.
        """


class SparseAttentionAdapterInterface(ABC):
    """What runs a sparse attention inside a model."""

    @abstractmethod
    def get_custom_attention_function(
        self, sparse_attention: SparseAttention
    ) -> Callable[..., Any]:
        """The sparse attention in the form that the model calls."""


class ModelAdapter(ModelHubAdapterInterface, SparseAttentionAdapterInterface, ABC):
    """A model, with a sparse attention that can be switched on.

    Outside `with adapter.enable_sparse_mode():` an adapter is dense. Inside it, a request's
    context attends densely, its questions and answers sparsely. The switch is seen by the thread
    (or asyncio task) that made it alone, and by this adapter alone.

    Attributes:
        model_name: As given.
        sparse_attention_config: As given; None = always dense.
        sparse_attention: Made from it, or None.
        sparse_by_default: Whether sparse mode needs no context manager.
        kwargs: Further arguments, as given.
    """

    def __init__(
        self,
        model_name: str,
        sparse_attention_config: SparseAttentionConfig | None = None,
        *,
        sparse_by_default: bool = False,
        **kwargs: Any,
    ) -> None:
        """Builds the sparse attention.

        Raises:
            ValueError: `sparse_by_default` without a configuration.
        """
        if sparse_by_default and sparse_attention_config is None:
            raise ValueError("sparse_by_default=True needs a sparse_attention_config, got None")
        self.model_name = model_name
        self.sparse_attention_config = sparse_attention_config
        self.sparse_by_default = sparse_by_default
        self.kwargs = kwargs
        self.sparse_attention: SparseAttention | None = None
        if sparse_attention_config is not None:
            self.sparse_attention = SparseAttention.create_from_config(sparse_attention_config)
        self._warned_dense = False
        # Not the adapter itself: contexts are copied, and must not keep it alive.
        self._mode_key = object()

    @abstractmethod
    @contextmanager
    def enable_sparse_mode(self) -> Iterator[None]:
        """Sparse mode, for the `with` block.

        Raises:
            RuntimeError: The adapter has no sparse configuration.
        """
        if self.sparse_attention is None:
            raise RuntimeError(
                "enable_sparse_mode needs an adapter with a sparse_attention_config; this one has "
                "None"
            )
        token = _SPARSE_ADAPTERS.set((*_SPARSE_ADAPTERS.get(), self._mode_key))
        try:
            yield
        finally:
            _SPARSE_ADAPTERS.reset(token)

    def get_custom_attention_function(
        self, sparse_attention: SparseAttention
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """A function with the arguments of transformers' attention functions.

        It takes `sparse_meta_data` (a dict; ValueError without it) beside them, and returns the
        output `(B, Q, H, D)` and the weights, if there are any.
        """

        def attend(
            module: torch.nn.Module | None,
            queries: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float = 1.0,
            dropout: float = 0.0,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if "sparse_meta_data" not in kwargs:
                raise ValueError("sparse_meta_data must be given: a dict, the maskers' cache")
            layer_index = getattr(module, "layer_idx", None)
            if layer_index is not None:
                kwargs["layer_idx"] = layer_index
            return sparse_attention.custom_attention(
                module, queries, keys, values, attention_mask, scaling, dropout, **kwargs
            )

        return attend

    def is_sparse(self) -> bool:
        """Whether a request would now run sparsely."""
        return self.sparse_by_default or self._mode_key in _SPARSE_ADAPTERS.get()

    def _mode_of_request(self) -> Mode:
        """The mode; warns once about a sparse configuration that is not used."""
        if self.is_sparse():
            return "sparse"
        if self.sparse_attention is not None and not self._warned_dense:
            self._warned_dense = True
            logger.warning(
                "this adapter has a sparse_attention_config but runs dense: wrap the call in "
                "`with adapter.enable_sparse_mode():`, or construct it with sparse_by_default=True"
            )
        return "dense"


def questions_of(request: Request) -> list[str]:
    """The questions as a list.

    Raises:
        ValueError: A field of the request holds something else than text; names it.
    """
    questions = request.questions
    found = [questions] if isinstance(questions, str) else questions
    for name in ("context", "answer_prefix"):
        if not isinstance(getattr(request, name), str):
            raise ValueError(f"request.{name} must be a str, got {getattr(request, name)!r}")
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"request.questions must be a str or a list of them, got {questions!r}")
    return list(found)


def make_response(
    request: Request, texts: list[str], details: list[AnswerDetails], include_answer_prefix: bool
) -> RequestResponse:
    """Puts answers into the form of the request's questions.

    Args:
        request: That was answered.
        texts: What was generated, without the answer prefix.
        details: One per text.
        include_answer_prefix: Whether answers begin with the prefix.
    """
    prefix = request.answer_prefix if include_answer_prefix else ""
    answers = [prefix + text for text in texts]
    single = isinstance(request.questions, str)
    return RequestResponse(answers[0] if single else answers, tuple(details))
