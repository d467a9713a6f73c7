"""`ModelAdapterVLLM`: the same requests, answered by a vLLM server.

Prompts go out as tokens, so the server sees exactly what the in-process reference sees. The
questions of a request share their context through the server's prefix cache: the first question
prefills it, and once its answer begins the others follow together.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
from transformers import AutoTokenizer

from sparse_attention_hub.adapters.asking import ask_in_parallel, stream_one_by_one
from sparse_attention_hub.adapters.base import (
    Alternative,
    AnswerDetails,
    Mode,
    ModelAdapter,
    Request,
    RequestResponse,
    make_response,
)
from sparse_attention_hub.adapters.completions import (
    GeneratedRow,
    completion_arguments,
    stream_completion,
)
from sparse_attention_hub.adapters.generation import mean_gap
from sparse_attention_hub.adapters.model_servers.shared_vllm import (
    acquire_server,
    release_server,
)
from sparse_attention_hub.adapters.model_servers.vllm import PLUGIN_NAME, ModelServerVLLM
from sparse_attention_hub.adapters.progress import TokenProgress
from sparse_attention_hub.adapters.prompt import RequestOptions, tokenize_request
from sparse_attention_hub.adapters.server_errors import translated_errors
from sparse_attention_hub.adapters.utils.exceptions import (
    ModelServerError,
    TokenizerCreationError,
)
from sparse_attention_hub.sparse_attention.base import SparseAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.serialization import config_to_dict, config_to_json

_CONNECT_TIMEOUT_S = 10.0


class ModelAdapterVLLM(ModelAdapter):
    """Asks a vLLM server: a running one, or one that adapters of this process share.

    Attributes:
        tokenizer: Of the model, in this process.
        server: Who answers.
    """

    def __init__(
        self,
        model_name: str,
        sparse_attention_config: SparseAttentionConfig | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        server_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        sparse_by_default: bool = False,
        timeout_s: float = 600.0,
        max_retries: int = 2,
        **kwargs: Any,
    ) -> None:
        """Connects to a server; starts it where no adapter of this process has one like it.

        Args:
            model_name: Name or folder of the model; the tokenizer is loaded from it.
            sparse_attention_config: Sent with each sparse request, so that adapters with different
                configurations can share a server. None = always dense.
            base_url: Of a running server's API, such as "http://127.0.0.1:8000/v1"; None = one
                that this process starts. Adapters with equal model, `server_kwargs`, API key and
                (unless `server_kwargs` has a `sparse_attention`) configuration share it; the last
                one that is closed stops it.
            api_key: Of the server, if it wants one.
            server_kwargs: Of `ModelServerVLLM`, for a server that is started. `sparse_attention`
                is this adapter's configuration by default.
            tokenizer_kwargs: For `AutoTokenizer.from_pretrained`.
            sparse_by_default: Sparse without `enable_sparse_mode()`.
            timeout_s: Seconds that the server may be silent, before an answer's first token too.
            max_retries: How often a call is repeated that failed before its answer began: no
                connection, too long a silence, or an HTTP status that may pass (408, 409, 429 and
                from 500 on). An answer that breaks off is never repeated.
            kwargs: Kept as they are.

        Raises:
            ValueError: An argument is not allowed.
            TokenizerCreationError: The tokenizer cannot be loaded.
            ServerConnectionError: There is no server at `base_url`, or the shared one died.
            ServerRequestError: The server refuses, for its API key for example.
            ModelServerError: The server does not start, or serves other models.
        """
        self._is_user_of_server = False
        super().__init__(
            model_name, sparse_attention_config, sparse_by_default=sparse_by_default, **kwargs
        )
        if base_url is not None and server_kwargs:
            raise ValueError("server_kwargs are for a server that is started, not for base_url")
        if isinstance(timeout_s, bool) or not timeout_s > 0:
            raise ValueError(f"timeout_s must be a number of seconds > 0, got {timeout_s!r}")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError(f"max_retries must be an integer >= 0, got {max_retries!r}")
        self._config_json = None
        own_config: dict[str, Any] = {"maskers": []}
        if sparse_attention_config is not None:
            if not isinstance(sparse_attention_config, ResearchAttentionConfig):
                raise ValueError(
                    "sparse_attention_config must be a ResearchAttentionConfig to be served, got "
                    f"a {type(sparse_attention_config).__name__}"
                )
            self._config_json = config_to_json(sparse_attention_config)
            own_config = config_to_dict(sparse_attention_config)
        self.tokenizer: Any
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_name, **(tokenizer_kwargs or {}))
        except Exception as error:
            raise TokenizerCreationError(model_name, error) from error
        if base_url is None:
            settings = {
                "sparse_attention": {
                    **own_config,
                    "sparse_by_default": False,
                    "min_sparse_keys": 0,  # as the reference, which knows no such bound
                },
                "api_key": api_key,
                **(server_kwargs or {}),
            }
            self.server = acquire_server(ModelServerVLLM(model_name, **settings))
            self._is_user_of_server = True
        else:
            self.server = ModelServerVLLM(model_name, base_url=base_url, api_key=api_key)
        try:
            self._client = openai.OpenAI(
                base_url=self.server.base_url,
                api_key=self.server.api_key or "none",  # the client wants one
                timeout=openai.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
                max_retries=max_retries,
            )
            with translated_errors(self.server):
                self._served_name = self._find_served_name()
                self._has_plugin = self._statistics(None) is not None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the server, and stops it if this process started it and nobody else uses it.

        The adapter is of no use afterwards.
        """
        if self._is_user_of_server:
            self._is_user_of_server = False
            release_server(self.server)

    def __enter__(self) -> ModelAdapterVLLM:
        """The adapter itself; closed at the end of the `with` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """See `close`."""
        self.close()

    def __del__(self) -> None:
        """See `close`."""
        if getattr(self, "_is_user_of_server", False):
            self.close()

    @contextmanager
    def enable_sparse_mode(self) -> Iterator[None]:
        """See `ModelAdapter.enable_sparse_mode`."""
        with super().enable_sparse_mode():
            yield

    def process_request(
        self,
        request: Request,
        generation_kwargs: dict[str, Any] | None = None,
        request_kwargs: dict[str, Any] | None = None,
    ) -> RequestResponse:
        """See `ModelHubAdapterInterface.process_request`.

        Two things differ from `generate` of transformers: stop strings are looked for only after
        `min_new_tokens`, and sampling without a `top_k` (given here or in the model's generation
        configuration) draws from all tokens, not from the 50 likeliest.

        Args:
            request: Context and questions.
            generation_kwargs: In transformers' names: max_new_tokens, do_sample, temperature,
                top_p, top_k, min_p, repetition_penalty, min_new_tokens, stop_strings (part of the
                answer, as there), eos_token_id, num_return_sequences, seed, streamer.
            request_kwargs: As there.

        Raises:
            ValueError: An argument is not allowed, or the context is too long.
            ServerTimeoutError: The server was silent for longer than `timeout_s`.
            ServerConnectionError: It cannot be reached, or went away during an answer.
            ServerRequestError: It refuses the request, or fails at it.
            ModelServerError: It has no sparse attention; or the adapter was closed.
        """
        options = RequestOptions.parse(request_kwargs)
        if options.return_logits:
            raise ValueError("request_kwargs['return_logits']: a server does not send logits")
        mode = self._mode_of_request()
        options.check_mode(mode)
        arguments = completion_arguments(generation_kwargs)
        streamer = (generation_kwargs or {}).get("streamer")
        if mode == "sparse" and not self._has_plugin:
            raise ModelServerError(
                "the server does not run the sparse attention plugin",
                "start it with VLLM_PLUGINS=sparse_attention vllm serve ... --attention-backend "
                "CUSTOM --additional-config ...",
            )
        tokens = tokenize_request(self.tokenizer, request, options)
        is_abandoned = threading.Event()
        progress = TokenProgress(
            tokens.num_tokens,
            len(tokens.question_ids),
            arguments["max_tokens"],
            options.show_progress,
        )

        def ask(question_ids: list[int], on_tokens: Callable[[list[int]], None]) -> AnswerDetails:
            def count(token_ids: list[int]) -> None:
                progress.add(len(token_ids))
                on_tokens(token_ids)

            detail = self._answer(
                tokens.context_ids,
                question_ids,
                mode,
                options.sparse_context,
                arguments,
                count,
                is_abandoned,
            )
            progress.end_of_answer(detail.new_tokens)
            return detail

        with progress, translated_errors(self.server):
            if streamer is not None:
                details = stream_one_by_one(ask, tokens.context_ids, tokens.question_ids, streamer)
            else:
                details = ask_in_parallel(ask, tokens.question_ids, is_abandoned)
        return make_response(
            request,
            [self._text(item.token_ids) for item in details],
            details,
            options.include_answer_prefix,
        )

    def _answer(
        self,
        context_ids: list[int],
        question_ids: list[int],
        mode: Mode,
        sparse_context: bool,
        arguments: dict[str, Any],
        on_tokens: Callable[[list[int]], None],
        is_abandoned: threading.Event,
    ) -> AnswerDetails:
        """Asks one question; see `stream_completion` for the last two arguments."""
        tag = uuid.uuid4().hex
        prompt = context_ids + question_ids
        rows, times, counts = [GeneratedRow(finish_reason="length")], [], None
        started = time.perf_counter()
        if arguments["max_tokens"] > 0:
            parameters = self._parameters(mode, 0 if sparse_context else len(context_ids), tag)
            completion = stream_completion(
                self._client,
                {
                    **arguments,
                    "model": self._served_name,
                    "prompt": prompt,
                    "extra_body": {**arguments["extra_body"], "vllm_xargs": parameters},
                },
                on_tokens,
                is_abandoned,
            )
            rows, times = completion.rows, completion.times
        ended = time.perf_counter()
        if mode == "sparse":
            counts = self._statistics(tag) if times else {"read_keys": 0, "visible_keys": 0}
        first, *alternatives = [
            Alternative(self._text(row.token_ids), tuple(row.token_ids), str(row.finish_reason))
            for row in rows
        ]
        return AnswerDetails(
            mode=mode,
            token_ids=first.token_ids,
            prompt_tokens=len(prompt),
            context_tokens=len(context_ids),
            density=_density(mode, counts),
            read_keys=counts["read_keys"] if counts else None,
            visible_keys=counts["visible_keys"] if counts else None,
            time_to_first_token_s=times[0] - started if times else None,
            time_per_output_token_s=mean_gap(times),
            finish_reason=first.finish_reason,
            total_time_s=ended - started,
            alternatives=tuple(alternatives),
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _parameters(self, mode: Mode, dense_prefix: int, tag: str) -> dict[str, Any] | None:
        """The plugin's per-request parameters; None for a server without it."""
        if not self._has_plugin:
            return None
        if mode == "dense":
            return {"sparse_attention": "off"}
        return {
            "sparse_attention": "on",
            "sparse_attention_config": self._config_json,
            "sparse_attention_dense_prefix": dense_prefix,
            "sparse_attention_min_keys": 0,
            "sparse_attention_tag": tag,
        }

    def _find_served_name(self) -> str:
        """The name under which the server knows the model."""
        names = [model.id for model in self._client.models.list()]
        if self.model_name in names:
            return self.model_name
        if len(names) == 1:
            return names[0]
        raise ModelServerError(f"the server does not serve {self.model_name!r}", f"it has {names}")

    def _statistics(self, tag: str | None) -> dict[str, Any] | None:
        """The plugin's counts (see `vllm_sparse_plugin.endpoint`); None where there are none."""
        try:
            counts: dict[str, Any] = self._client.get(
                f"{self.server.root_url}/{PLUGIN_NAME}/stats",
                cast_to=dict[str, Any],
                options={"params": {"tag": tag} if tag else {}},
            )
        except openai.NotFoundError:
            return None
        return counts


def _density(mode: Mode, counts: dict[str, Any] | None) -> float | None:
    """Of an answer with these counts; None where a sparse one has none."""
    if mode == "dense":
        return 1.0
    if counts is None:
        return None
    return counts["read_keys"] / counts["visible_keys"] if counts["visible_keys"] else 1.0
