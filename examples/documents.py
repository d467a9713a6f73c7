"""Real long documents with questions: chapters of the Python manual that ships with Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics


@dataclass(frozen=True)
class Document:
    """A text and questions that it answers.

    Attributes:
        text: The document.
        questions: About it.
    """

    text: str
    questions: tuple[str, ...]


def python_manual(chapters: Sequence[str], characters: int) -> str:
    """The first characters of chapters of the Python manual, put after one another.

    Raises:
        ValueError: The chapters are shorter than that.
    """
    text = "\n\n".join(topics[chapter] for chapter in chapters)
    if len(text) < characters:
        raise ValueError(f"{', '.join(chapters)} have {len(text)} characters, not {characters}")
    return text[:characters]


LONG_DOCUMENT = Document(
    text="Read this part of the Python manual.\n\n" + python_manual(["string-methods"], 16_000),
    questions=(
        "\n\nWhat does the method str.casefold() do?",
        "\n\nWhat does str.count() return?",
        "\n\nHow does str.join() work?",
    ),
)
"""More than 3,000 tokens of every common tokenizer."""
