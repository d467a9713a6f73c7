"""Asks a server with sparse attention about a document, with nothing but the OpenAI client.

python openai_completion.py [--base-url URL] [--model NAME]; left out: OPENAI_BASE_URL,
OPENAI_MODEL. OPENAI_API_KEY, if the server wants a key.

The document attends densely and is prefilled once; question and answer attend sparsely.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.request
import uuid
from pydoc_data.topics import topics

import openai

DOCUMENT = "A chapter of the Python manual.\n\n" + topics["assert"] + "\n\n"
QUESTION = "In one sentence, the assert statement is"


def main() -> None:
    """Prints a dense and a sparse answer, and how much the sparse one read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"))
    parser.add_argument("--model", default=os.environ.get("OPENAI_MODEL"))
    options = parser.parse_args()
    client = openai.OpenAI(
        base_url=options.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")
    )
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    model = options.model or client.models.list().data[0].id

    def complete(**parameters: str | int) -> str:
        completion = client.completions.create(
            model=model,
            prompt=DOCUMENT + QUESTION,
            max_tokens=24,
            temperature=0,
            extra_body={"vllm_xargs": parameters},
        )
        return completion.choices[0].text

    print("dense:", repr(complete(sparse_attention="off")))

    # How many tokens the document has, with the token that the model's prompts begin with.
    tokenized = client.post(
        f"{root}/tokenize", body={"prompt": DOCUMENT}, cast_to=dict[str, object]
    )
    tag = uuid.uuid4().hex
    answer = complete(
        sparse_attention="on",
        sparse_attention_dense_prefix=int(str(tokenized["count"])),
        sparse_attention_min_keys=0,  # else a server stays dense where that is faster
        sparse_attention_tag=tag,
    )
    print("sparse:", repr(answer))
    with urllib.request.urlopen(f"{root}/sparse_attention/stats?tag={tag}") as response:
        counts = json.load(response)
    print(f"density: {counts['density']:.3f} of the keys of {counts['sparse_queries']} queries")


if __name__ == "__main__":
    main()
