"""The code blocks of the documentation, as they stand there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "sparse_attention_hub/adapters/README.md",
    "vllm_sparse_plugin/README.md",
)

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS_A_SERVER = re.compile(r"\bModelAdapterVLLM\(|\bModelServerVLLM\(|\bopenai\.")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: File and line.
        language: After the fence; "" = shell.
        text: Between the fences.
    """

    place: str
    language: str
    text: str

    @property
    def needs_a_server(self) -> bool:
        """Whether it is Python that talks to vLLM."""
        return self.language == "python" and bool(_NEEDS_A_SERVER.search(self.text))

    def run_python(self, model: str) -> None:
        """Executes it as written, with the model's name replaced."""
        code = self.text.replace('"MODEL"', repr(model))
        exec(compile(code, self.place, "exec"), {"__name__": "__main__"})


def documented_blocks() -> list[Block]:
    """All of them, in order."""
    blocks = []
    for name in DOCUMENTS:
        text = (REPOSITORY / name).read_text()
        for match in _FENCED.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            blocks.append(Block(f"{name}:{line}", *match.groups()))
    return blocks
