"""Where tasks come from: one file per source. `--tasks NAME` calls the function `load` of tasks/NAME.py."""

import importlib
import math
import random
from collections.abc import Callable
from pathlib import Path

from data import Splits, Task, load_folder
from support.files import UserError

SOURCES = sorted(
    path.stem for path in Path(__file__).parent.glob("[!_]*.py") if not path.stem.startswith("test")
)


def load_tasks(source: str | Path) -> Splits:
    """The tasks of a source, `tasks/SOURCE.py`, or of a folder of task files, by split."""
    name = str(source).replace("-", "_")
    if name in SOURCES:
        return importlib.import_module(f"tasks.{name}").load()
    if not Path(source).is_dir():
        raise UserError(f"--tasks {source}: neither {', '.join(SOURCES)} nor a folder of task files")
    return load_folder(Path(source))


# -------------------- Documents --------------------

MAX_LINES = 32  # of a training document


def make_documents(make: Callable[[random.Random, int], Task], lines: tuple[int, int], n: int, seed: str):
    """n documents by `make(rng, n_lines)`.

    The number of lines is drawn from shortest, 2 * shortest, 4 * shortest, ... up to longest.
    """
    shortest, longest = lines
    rng = random.Random(f"{seed} {shortest} {longest}")
    doublings = int(math.log2(longest / shortest))
    return [make(rng, shortest * 2 ** rng.randint(0, doublings)) for _ in range(n)]


def document_splits(make: Callable[[random.Random, int], Task], name: str) -> Splits:
    """20,000 documents to train on, 32 to validate and 100 to test."""
    splits = {}
    for split, n in (("train", 20_000), ("val", 32), ("test", 100)):
        splits[split] = make_documents(make, (1, MAX_LINES), n, f"{name} {split}")
    return splits
