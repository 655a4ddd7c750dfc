"""A needle in a haystack: one line of a document says a magic number, the others are filler."""

import random

from data import Example, Splits, Task
from tasks.facts import document_splits

HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def document(rng: random.Random, n_lines: int) -> Task:
    """A haystack, and the question for its number."""
    number = str(rng.randint(10_000, 99_999))
    lines = [HAY] * (n_lines - 1)
    lines.insert(rng.randrange(n_lines), f"The magic number is {number}. Remember it.")
    examples = [Example("What is the magic number?", [number])]
    return Task(f"{n_lines} lines", ["\n".join(lines)], examples, examples, is_document=True)


def load() -> Splits:
    """All documents by split."""
    return document_splits(document, "needle", [1, 4, 16, 32, 64])
