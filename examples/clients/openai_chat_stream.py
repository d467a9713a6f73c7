"""Chats with a server with sparse attention, token by token, with nothing but the OpenAI client.

python openai_chat_stream.py [--base-url URL] [--model NAME] [QUESTION]; left out: OPENAI_BASE_URL,
OPENAI_MODEL. OPENAI_API_KEY, if the server wants a key.

The prompt attends densely, which is the default; the answer attends sparsely.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.request
import uuid

import openai


def main() -> None:
    """Prints a dense and a sparse answer as they come, and how much the sparse one read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"))
    parser.add_argument("--model", default=os.environ.get("OPENAI_MODEL"))
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    options = parser.parse_args()
    client = openai.OpenAI(
        base_url=options.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")
    )
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    model = options.model or client.models.list().data[0].id
    tag = uuid.uuid4().hex
    modes: dict[str, dict[str, str | int]] = {
        "dense": {"sparse_attention": "off"},
        "sparse": {
            "sparse_attention": "on",
            "sparse_attention_min_keys": 0,  # else a server stays dense where that is faster
            "sparse_attention_tag": tag,
        },
    }
    for name, parameters in modes.items():
        print(f"{name}: ", end="", flush=True)
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": options.question}],
            max_tokens=64,
            temperature=0,
            stream=True,
            extra_body={"vllm_xargs": parameters},
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
        print()
    with urllib.request.urlopen(f"{root}/sparse_attention/stats?tag={tag}") as response:
        counts = json.load(response)
    print(f"density: {counts['density']:.3f} of the keys of {counts['sparse_queries']} queries")


if __name__ == "__main__":
    main()
