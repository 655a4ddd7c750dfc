"""Where tasks come from: one module per source. `--tasks NAME` calls its function `load() -> Splits`.

This file holds what several of them, or training, need: documents of any length, answers to questions that
have none, and downloads.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from torch import nn
from tqdm import tqdm

import model
from data import Example, Splits, Task
from lora import UserError, read_file, write_file

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

def generate_answers(base: nn.Module, tokenizer, tasks: list[Task], file: Path) -> None:
    """Generate missing answers with the base model, with the document in its prompt, as published.

    They are kept in `file`, for other processes and for a run that starts again.
    """
    unanswered = []
    for task in tasks:
        if task.is_document:
            unanswered += [(task, example) for example in task.train if not example.answers]
    known = read_file(file) if file.exists() else {}

    def key(task: Task, example: Example) -> str:
        return f"{task.name}: {example.input}"

    missing = [(task, example) for task, example in unanswered if key(task, example) not in known]
    missing.sort(key=lambda pair: len(pair[0].descriptions[0]))
    for i in tqdm(range(0, len(missing), 32), desc="answers", disable=not missing):
        group = missing[i : i + 32]
        chats = [model.chat(tokenizer, example.input, task.descriptions[0]) for task, example in group]
        answers = model.answer(base, tokenizer, [model.render(tokenizer, chat) for chat in chats], 64)
        for (task, example), answer in zip(group, answers):
            known[key(task, example)] = answer
        if i % 3200 == 0 or i + 32 >= len(missing):  # every 100 groups
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, known)
    for task, example in unanswered:
        example.answers.append(known[key(task, example)])

# -------------------- Downloads --------------------

def cache_folder(name: str) -> Path:
    """The folder for downloads."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-lora" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder

def download(url: str, needed_for: str):
    """The JSON at a URL; waits if the server asks for it (HTTP 429).

    Raises UserError, which says what the file was needed for.
    """
    for wait in (1, 2, 4, 8, None):  # seconds; None: the last attempt
        try:
            with urlopen(url, timeout=60) as response:
                return json.loads(response.read())
        except (OSError, HTTPException, ValueError) as e:
            asked_to_wait = isinstance(e, HTTPError) and e.code == 429
            if not asked_to_wait or wait is None:
                raise UserError(f"{needed_for}, and {url} cannot be read: {e or type(e).__name__}") from None
            time.sleep(float(e.headers.get("Retry-After") or wait))
