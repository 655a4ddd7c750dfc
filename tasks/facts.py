"""Documents of the tiny world: facts to look up, any word -> any other."""

import random

from data import Example, Splits, Task
from tasks.documents import document_splits
from tasks.tiny import FORMS, MAPS

WORDS = list(dict.fromkeys(forms[change] for change in MAPS[:6] for forms in FORMS.values()))  # 336


def document(rng: random.Random, n_lines: int) -> Task:
    """Facts, one per line: of "cat lamp <eos>" the question is "cat", the answer "lamp".

    No word occurs twice. Chance is below 1%. The mark "<eos>" ends a line, as it ends an answer: the
    tokenizer drops line breaks.
    """
    words = rng.sample(WORDS, 2 * n_lines)
    facts = list(zip(words[::2], words[1::2]))
    lines = [f"{key} {value} <eos>" for key, value in facts]
    examples = [Example(key, [value]) for key, value in facts]
    return Task(f"{n_lines} lines", ["\n".join(lines)], examples, examples, is_document=True)


def load() -> Splits:
    """All documents by split."""
    return document_splits(document, "facts", [1, 4, 16, 32, 64, 128])
