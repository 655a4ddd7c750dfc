"""Documents of the tiny world: facts to look up, any word -> any other."""

import math
import random
from collections.abc import Callable

from data import Example, Splits, Task
from tasks.tiny import FORMS, MAPS

MAX_LINES = 32  # of a training document
N_LONG = 50  # documents of each length in the split "long"
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


def make_documents(make: Callable[[random.Random, int], Task], lines: tuple[int, int], n: int, seed: str):
    """n documents by `make(rng, n_lines)`.

    The number of lines is drawn from shortest, 2 * shortest, 4 * shortest, ... up to longest.
    """
    shortest, longest = lines
    rng = random.Random(f"{seed} {shortest} {longest}")
    doublings = int(math.log2(longest / shortest))
    return [make(rng, shortest * 2 ** rng.randint(0, doublings)) for _ in range(n)]


def document_splits(make: Callable[[random.Random, int], Task], name: str, lengths: list[int]) -> Splits:
    """20,000 documents to train on, 32 to validate, 100 to test; in "long" 50 for each number of lines."""
    splits = {}
    for split, n in (("train", 20_000), ("val", 32), ("test", 100)):
        splits[split] = make_documents(make, (1, MAX_LINES), n, f"{name} {split}")
    splits["long"] = []
    for n_lines in lengths:
        splits["long"] += make_documents(make, (n_lines, n_lines), N_LONG, f"{name} exam")
    return splits


def load() -> Splits:
    """All documents by split."""
    return document_splits(document, "facts", [1, 4, 16, 32, 64, 128])
