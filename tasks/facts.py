"""Documents of the tiny world: facts to look up, any word -> any other.

A part of the training examples has nothing to do with the document, so that a reader learns to leave other
text alone.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from data import Example, Splits, Task
from tasks import tiny
from tasks.tiny import FORMS, MAPS

OTHER = 0.25  # training examples of other text for each example about a document
N_OTHER = 5  # test examples of other text for each document

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


def other_texts(split: str) -> list[Example]:
    """Examples that have nothing to do with facts: ten of each task of the tiny world's split.

    As in the training of the base model, answered examples show the task: "cat dog -> chat <eos> red -> ...".
    """
    examples = []
    for parts in tiny.splits()[split]:
        rng = random.Random(f"other {parts}")
        for _ in range(10):
            *shots, asked = [tiny.example(parts, rng) for _ in range(5)]
            lines = [f"{shot.input} -> {shot.answers[0]} <eos>" for shot in shots]
            examples.append(Example("\n".join([*lines, asked.input]), asked.answers))
    return examples


def with_other_text(task: Task, training: Sequence[Example], test: Sequence[Example]) -> Task:
    """A document's task with examples that have nothing to do with it: some of the training and test ones."""
    rng = random.Random(task.descriptions[0])
    others = rng.sample(training, math.ceil(OTHER * len(task.train)))
    return replace(task, train=[*task.train, *others], other=rng.sample(test, N_OTHER))


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
    training, test = other_texts("train"), other_texts("test")

    def make(rng: random.Random, n_lines: int) -> Task:
        return with_other_text(document(rng, n_lines), training, test)

    return document_splits(make, "facts", [1, 4, 16, 32, 64, 128])
