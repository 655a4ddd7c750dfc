"""What sources of documents need: documents of any length."""

import math
import random
from collections.abc import Callable

from data import Splits, Task

MAX_LINES = 32  # of a training document
N_LONG = 50  # documents of each length in the split "long"


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
