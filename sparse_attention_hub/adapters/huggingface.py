"""`ModelAdapterHF`: the in-process reference, on transformers."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from sparse_attention_hub.adapters import attention_session
from sparse_attention_hub.adapters.attention_session import AttentionSession
from sparse_attention_hub.adapters.base import (
    INT_MAX,
    AnswerDetails,
    ModelAdapter,
    Request,
    RequestResponse,
    make_response,
)
from sparse_attention_hub.adapters.huggingface_answers import answer, generate_arguments
from sparse_attention_hub.adapters.model_servers.huggingface import ModelServerHF
from sparse_attention_hub.adapters.progress import TokenProgress
from sparse_attention_hub.adapters.prompt import RequestOptions, tokenize_request
from sparse_attention_hub.adapters.sparse_layers import say_what_stays_dense
from sparse_attention_hub.adapters.utils.model_utils import (
    default_device,
    loader_arguments,
    resolve_device,
)
from sparse_attention_hub.sparse_attention.base import SparseAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttention

logger = logging.getLogger(__name__)

__all__ = ["INT_MAX", "ModelAdapterHF"]

_NOT_GIVEN: Any = object()


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

    _is_process_ending = staticmethod(sys.is_finalizing)

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
            model_kwargs: For `AutoModelForCausalLM.from_pretrained`; `torch_dtype` is `dtype`.
            tokenizer_kwargs: For `AutoTokenizer.from_pretrained`.
            device: Left out: "cuda" where there is one, else "cpu". None: CPU. An int: CUDA index.
                Takes no part where `model_kwargs` has a `device_map`.
            sparse_by_default: Sparse without `enable_sparse_mode()`.
            kwargs: Kept as they are.

        Raises:
            ModelCreationError: The model cannot be loaded.
            TokenizerCreationError: The tokenizer cannot be loaded.
            ValueError: The model does not take its attention from transformers' registry, or there
                is no such device.
        """
        self._held: list[Callable[[], Any]] = []
        super().__init__(
            model_name, sparse_attention_config, sparse_by_default=sparse_by_default, **kwargs
        )
        self.model_kwargs = dict(model_kwargs or {})
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.device = default_device() if device is _NOT_GIVEN else device
        if loader_arguments(self.model_kwargs).get("device_map") is None:
            resolve_device(self.device)
        model_key = (model_name, self.device, self.model_kwargs)
        tokenizer_key = (model_name, self.tokenizer_kwargs)
        server = ModelServerHF()
        try:
            self.model = server.get_model(*model_key)
            # Not through `self`: an adapter that nobody holds must go at once.
            self._held.append(lambda: server.clear_model(*model_key))
            self.tokenizer = server.get_tokenizer(*tokenizer_key)
            self._held.append(lambda: server.clear_tokenizer(*tokenizer_key))
            self.torch_dtype = self.model.dtype
            if self.sparse_attention is not None:
                attention_session.install(self.model)
                say_what_stays_dense(self.model.config.get_text_config(), self.sparse_attention)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the model and the tokenizer; the adapter is of no use afterwards."""
        self.model = self.tokenizer = None
        while self._held:
            self._held.pop()()

    def __enter__(self) -> ModelAdapterHF:
        """The adapter itself; closed at the end of the `with` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """See `close`."""
        self.close()

    def __del__(self) -> None:
        """See `close`; at the end of the process there is nothing left to close it with."""
        if getattr(self, "_held", None) and not self._is_process_ending():
            self.close()

    @contextmanager
    def enable_sparse_mode(self) -> Iterator[None]:
        """See `ModelAdapter.enable_sparse_mode`; direct calls of `self.model` are sparse too.

        They may follow each other, but only one sequence, or one batch, is continued at a time.
        """
        with super().enable_sparse_mode(), attention_session.attention_session(self._session()):
            yield

    def _session(self) -> AttentionSession:
        """A session of this adapter's attention that counts what it reads."""
        attention = self.sparse_attention
        if not isinstance(attention, ResearchAttention):
            raise TypeError(f"cannot run a {type(attention).__name__} in a model")
        return AttentionSession(attention)

    def process_request(
        self,
        request: Request,
        generation_kwargs: dict[str, Any] | None = None,
        request_kwargs: dict[str, Any] | None = None,
    ) -> RequestResponse:
        """See `ModelHubAdapterInterface.process_request`.

        Args:
            request: Context and questions.
            generation_kwargs: For `model.generate`; a `seed` makes sampling repeatable. Requests
                that sample take turns, as torch has one generator for all threads.
            request_kwargs: As there; `return_logits` (default False) puts each answer's logits
                into its details.

        Raises:
            ValueError: An argument is not allowed, or the context is too long.
        """
        options = RequestOptions.parse(request_kwargs)
        mode = self._mode_of_request()
        options.check_mode(mode)
        arguments = generate_arguments(
            generation_kwargs, is_sparse=mode == "sparse", return_logits=options.return_logits
        )
        tokens = tokenize_request(self.tokenizer, request, options)
        texts: list[str] = []
        details: list[AnswerDetails] = []
        started = time.perf_counter()
        progress = TokenProgress(
            tokens.num_tokens,
            len(tokens.question_ids),
            arguments["max_new_tokens"],
            options.show_progress,
        )
        with torch.inference_mode(), progress:
            context_session = self._session() if options.sparse_context else None
            with attention_session.attention_session(context_session):
                context_cache = self._prefill(tokens.context_ids)
            for question_ids in tokens.question_ids:
                session = self._session() if mode == "sparse" else None
                if session is not None and context_session is not None and not details:
                    session.add_counts((context_session.read_keys, context_session.visible_keys))
                with attention_session.attention_session(session):
                    detail = answer(
                        self.model,
                        self.tokenizer,
                        tokens.context_ids,
                        question_ids,
                        context_cache,
                        arguments,
                        session,
                        started=started,
                        return_logits=options.return_logits,
                        on_token=progress.add,
                    )
                rows = [detail.token_ids, *(item.token_ids for item in detail.alternatives)]
                progress.end_of_answer(max(map(len, rows)))
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
