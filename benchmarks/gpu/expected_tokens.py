"""Makes `expected_tokens.json`: what the CPU engine answers, for the GPU's to be compared with.

    python -m benchmarks.gpu.expected_tokens

To be run on a machine without a GPU, and again when the model, the requests or the maskers change.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.gpu.command import commit
from benchmarks.gpu.engine_answers import prepare_environment
from benchmarks.gpu.engine_tokens import EXPECTED, answers_of
from benchmarks.gpu.tiny_models import write_models
from benchmarks.gpu.token_configs import token_configs


def main() -> None:
    """Starts an engine per list of maskers, and writes the file."""
    logging.basicConfig(level=logging.INFO)
    prepare_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fingerprints = write_models(folder)
        found = {
            config: {
                request: answer.to_dict()
                for request, answer in answers_of(config, folder, maskers, "cpu").items()
            }
            for config, maskers in tqdm(token_configs(folder / "llama").items())
        }
    content = {"commit": commit(), "weights": fingerprints, "answers": found}
    EXPECTED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
