"""`ModelAdapterVLLM`: the same requests, answered by a vLLM server.

Prompts go out as tokens, so the server sees exactly what the in-process reference sees. The
questions of a request share their context through the server's prefix cache: the first question
prefills it, the others follow together.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
from transformers import AutoTokenizer

from sparse_attention_hub.adapters.base import (
    DEFAULT_MAX_NEW_TOKENS,
    AnswerDetails,
    Mode,
    ModelAdapter,
    Request,
    RequestResponse,
    make_response,
)
from sparse_attention_hub.adapters.model_servers.vllm import PLUGIN_NAME, ModelServerVLLM
from sparse_attention_hub.adapters.prompt import RequestOptions, tokenize_request
from sparse_attention_hub.adapters.utils.exceptions import (
    ModelServerError,
    TokenizerCreationError,
)
from sparse_attention_hub.sparse_attention.base import SparseAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.serialization import config_to_json

logger = logging.getLogger(__name__)

MAX_CONCURRENT_QUESTIONS = 32

_OPENAI_NAMES = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop_strings": "stop",
    "seed": "seed",
}
_VLLM_NAMES = {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
}


class ModelAdapterVLLM(ModelAdapter):
    """Asks a running vLLM server, or one that it starts and stops itself.

    Attributes:
        tokenizer: Of the model, in this process.
        server: The server that this adapter started; None when it was given a URL.
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
        **kwargs: Any,
    ) -> None:
        """Connects to a server, or starts one.

        Args:
            model_name: Name or folder of the model; the tokenizer is loaded from it.
            sparse_attention_config: Sent with each sparse request, so that adapters with different
                configurations can share a server. None = always dense.
            base_url: Of a running server's API, such as "http://127.0.0.1:8000/v1"; None = start
                one with `ModelServerVLLM`.
            api_key: Of the server, if it wants one.
            server_kwargs: Of `ModelServerVLLM`, for a server of this adapter's own.
            tokenizer_kwargs: For `AutoTokenizer.from_pretrained`.
            sparse_by_default: Sparse without `enable_sparse_mode()`.
            timeout_s: Seconds that one answer may take.
            kwargs: Kept as they are.

        Raises:
            ValueError: `server_kwargs` together with `base_url`.
            TokenizerCreationError: The tokenizer cannot be loaded.
            ModelServerError: The server does not start, does not answer, or serves other models.
        """
        self.server: ModelServerVLLM | None = None
        super().__init__(
            model_name, sparse_attention_config, sparse_by_default=sparse_by_default, **kwargs
        )
        if base_url is not None and server_kwargs:
            raise ValueError(
                "server_kwargs are for a server of the adapter's own, not for base_url"
            )
        self.tokenizer: Any
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_name, **(tokenizer_kwargs or {}))
        except Exception as error:
            raise TokenizerCreationError(model_name, error) from error
        if base_url is None:
            own = {"sparse_attention": {"maskers": []}, "api_key": api_key, **(server_kwargs or {})}
            self.server = ModelServerVLLM(model_name, **own)
            base_url = self.server.start().base_url
        self._base_url = base_url.rstrip("/")
        self._api_key = api_key
        self._client = openai.OpenAI(
            base_url=self._base_url, api_key=api_key or "none", timeout=timeout_s, max_retries=0
        )
        try:
            self._served_name = self._find_served_name()
            self._has_plugin = self._statistics(None) is not None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the server if it is the adapter's own."""
        if self.server is not None:
            self.server.stop()

    def __enter__(self) -> ModelAdapterVLLM:
        """The adapter itself; closed at the end of the `with` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """See `close`."""
        self.close()

    def __del__(self) -> None:
        """See `close`."""
        if getattr(self, "server", None) is not None:
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

        Args:
            request: Context and questions.
            generation_kwargs: In transformers' names: max_new_tokens, do_sample, temperature,
                top_p, top_k, min_p, repetition_penalty, min_new_tokens, stop_strings, seed.
            request_kwargs: As there.

        Raises:
            ValueError: An argument is not allowed, or the context is too long.
            ModelServerError: The server refuses a request, or fails.
        """
        options = RequestOptions.parse(request_kwargs)
        if options.return_logits:
            raise ValueError("request_kwargs['return_logits']: a server does not send logits")
        arguments = _completion_arguments(generation_kwargs)
        mode = self._mode_of_request()
        if mode == "sparse" and not self._has_plugin:
            raise ModelServerError(
                "the server does not run the sparse attention plugin",
                "start it with VLLM_PLUGINS=sparse_attention vllm serve ... --attention-backend "
                "CUSTOM --additional-config ...",
            )
        tokens = tokenize_request(self.tokenizer, request, options)

        def answer(question_ids: list[int]) -> AnswerDetails:
            return self._answer(tokens.context_ids, question_ids, mode, arguments)

        # The first question fills the prefix cache with the context for all others.
        details = [answer(ids) for ids in tokens.question_ids[:1]]
        with ThreadPoolExecutor(MAX_CONCURRENT_QUESTIONS) as pool:
            details += pool.map(answer, tokens.question_ids[1:])
        texts = [
            self.tokenizer.decode(item.token_ids, skip_special_tokens=True) for item in details
        ]
        return make_response(request, texts, details, options.include_answer_prefix)

    def _answer(
        self,
        context_ids: list[int],
        question_ids: list[int],
        mode: Mode,
        arguments: dict[str, Any],
    ) -> AnswerDetails:
        tag = uuid.uuid4().hex
        token_ids: list[int] = []
        times: list[float] = []
        finish_reason = "length"
        started = time.perf_counter()
        if arguments["max_tokens"] > 0:
            extra_body = {
                **arguments["extra_body"],
                "return_token_ids": True,
                "vllm_xargs": self._parameters(mode, len(context_ids), tag),
            }
            try:
                stream = self._client.completions.create(
                    **{**arguments, "extra_body": extra_body},
                    model=self._served_name,
                    prompt=context_ids + question_ids,
                    stream=True,
                )
                for chunk in stream:
                    for choice in chunk.choices:
                        new_ids = getattr(choice, "token_ids", None) or []
                        token_ids += new_ids
                        times += [time.perf_counter()] * len(new_ids)
                        finish_reason = choice.finish_reason or finish_reason
            except openai.OpenAIError as error:
                raise ModelServerError("the vLLM server did not answer", str(error)) from error
        counts = self._statistics(tag) if mode == "sparse" and token_ids else None
        return AnswerDetails(
            mode=mode,
            token_ids=tuple(token_ids),
            prompt_tokens=len(context_ids) + len(question_ids),
            context_tokens=len(context_ids),
            density=counts["density"] if counts else 1.0,
            read_keys=counts["read_keys"] if counts else None,
            visible_keys=counts["visible_keys"] if counts else None,
            time_to_first_token_s=times[0] - started if times else None,
            time_per_output_token_s=(
                (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
            ),
            finish_reason=finish_reason,
        )

    def _parameters(self, mode: Mode, context_tokens: int, tag: str) -> dict[str, Any] | None:
        """The plugin's per-request parameters; None for a server without it."""
        if not self._has_plugin:
            return None
        if mode == "dense":
            return {"sparse_attention": "off"}
        config = self.sparse_attention_config
        assert isinstance(config, ResearchAttentionConfig)
        return {
            "sparse_attention": "on",
            "sparse_attention_config": config_to_json(config),
            "sparse_attention_dense_prefix": context_tokens,
            "sparse_attention_tag": tag,
        }

    def _find_served_name(self) -> str:
        """The name under which the server knows the model."""
        try:
            names = [model.id for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise ModelServerError(f"no vLLM server at {self._base_url}", str(error)) from error
        if self.model_name in names:
            return self.model_name
        if len(names) == 1:
            return names[0]
        raise ModelServerError(f"the server does not serve {self.model_name!r}", f"it has {names}")

    def _statistics(self, tag: str | None) -> dict[str, Any] | None:
        """The plugin's counts (see `vllm_sparse_plugin.endpoint`); None where there are none."""
        root = self._base_url.removesuffix("/v1")
        query = f"?{urllib.parse.urlencode({'tag': tag})}" if tag else ""
        request = urllib.request.Request(f"{root}/{PLUGIN_NAME}/stats{query}")
        if self._api_key is not None:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                content: dict[str, Any] = json.load(response)
                return content
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise ModelServerError("the server refused its statistics", str(error)) from error
        except OSError as error:
            raise ModelServerError(f"no vLLM server at {self._base_url}", str(error)) from error


def _completion_arguments(generation_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of the completions API, greedy unless they say otherwise.

    Raises:
        ValueError: An argument has no counterpart, or `max_new_tokens` is not allowed.
    """
    given = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **(generation_kwargs or {})}
    count = given["max_new_tokens"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {count!r}")
    do_sample = given.pop("do_sample", False)
    if not do_sample:
        given["temperature"] = 0.0
    known = _OPENAI_NAMES | _VLLM_NAMES
    for name in given:
        if name not in known:
            raise ValueError(
                f"generation_kwargs[{name!r}] cannot be sent to a server; allowed: do_sample, "
                + ", ".join(sorted(known))
            )
    return {
        **{_OPENAI_NAMES[name]: value for name, value in given.items() if name in _OPENAI_NAMES},
        "extra_body": {
            _VLLM_NAMES[name]: value for name, value in given.items() if name in _VLLM_NAMES
        },
    }
