"""Documents of the tiny world: lines of words, some of which are facts to look up."""

import random

from data import Example, Splits, Task
from tasks.documents import document_splits
from tasks.tiny import FORMS, MAPS


def document(rng: random.Random, n_lines: int) -> Task:
    """Lines of four words. One to eight of them are facts instead.

    The fact "cat -> gato <eos>" says which of seven forms of a word to answer when asked "cat". It looks like
    the base model's training text.
    """
    words = list(FORMS)
    n_facts = rng.randint(1, min(8, n_lines))
    facts = [(word, FORMS[word][rng.choice(MAPS[1:])]) for word in rng.sample(words, n_facts)]
    lines = [f"{key} -> {value} <eos>" for key, value in facts]
    lines += [" ".join(rng.sample(words, 4)) for _ in range(n_lines - n_facts)]
    rng.shuffle(lines)
    examples = [Example(key, [value]) for key, value in facts]
    return Task(f"{n_lines} lines", ["\n".join(lines)], examples, examples, is_document=True)


def load() -> Splits:
    """All documents by split."""
    return document_splits(document, "facts", [4, 16, 64, 128, 256])
