"""Run as a script: starts an engine per model folder, one after the other, and reports as JSON.

A process for all of them, since importing vLLM takes longer than starting a tiny model.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

MASKERS = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 8}]


class Collected(logging.Handler):
    """Keeps the plugin's own log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def start(folder: str, prompt: list[int]) -> dict[str, Any]:
    collected = Collected()
    logging.getLogger("vllm_sparse_plugin").addHandler(collected)
    try:
        engine = LLM(
            folder,
            load_format="auto" if list(Path(folder).glob("*.safetensors")) else "dummy",
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=4,
            attention_backend="CUSTOM",
            additional_config={"sparse_attention": {"maskers": MASKERS}},
        )
    except ValueError as error:
        return {"error": str(error)}
    answers = {}
    for mode in ("on", "off"):
        parameters = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, extra_args={"sparse_attention": mode}
        )
        output = engine.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)
        answers[mode] = list(output[0].outputs[0].token_ids)
    statistics = engine.collective_rpc("sparse_attention_stats")[0]
    return {"log": collected.messages, "answers": answers, "statistics": statistics}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    reports = {folder: start(folder, given["prompt"]) for folder in given["folders"]}
    Path(given["report"]).write_text(json.dumps(reports))
