"""What sources of documents need: documents of any length, and answers to questions that have none."""

import math
import random
import zlib
from collections.abc import Callable
from pathlib import Path

from torch import nn
from tqdm import tqdm

import model
from data import Example, Splits, Task
from support import processes
from support.files import read_file, write_file
from support.processes import Process

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


# -------------------- Answers --------------------

PROMPT_TOKENS_AT_ONCE = 16_384  # of prompts that are answered together, to save memory


def generate_answers(base: nn.Module, tokenizer, tasks: list[Task], file: Path, process: Process) -> None:
    """Generate missing answers with the base model, with the document in its prompt, as published.

    Each process answers a part. The answers are kept in `file`, for a run that starts again.
    """
    unanswered = []
    for task in tasks:
        if task.is_document:
            unanswered += [(task, example) for example in task.train if not example.answers]
    if not unanswered:
        return

    def key(task: Task, example: Example) -> str:
        """Another base model, or an edited document, has answers of its own."""
        source = f"{base.config.name_or_path} {task.descriptions[0]}"
        return f"{task.name} {zlib.crc32(source.encode()):08x}: {example.input}"

    known = processes.gather(process, read_file(file) if file.exists() else {})[0]  # the first process's
    prompts = {}
    for task, example in unanswered:
        if key(task, example) not in known:
            chat = model.chat(tokenizer, example.input, task.descriptions[0])
            prompts[key(task, example)] = model.render(tokenizer, chat)
    if prompts:
        known |= answer_in_parts(base, tokenizer, prompts, known, file, process)
    for task, example in unanswered:
        example.answers.append(known[key(task, example)])


def answer_in_parts(base, tokenizer, prompts: dict[str, str], known: dict, file: Path, process: Process):
    """{question: answer}, each process answering a part. `known` and new answers go into the file."""
    questions = sorted(prompts, key=lambda question: len(prompts[question]))
    if not processes.is_sharded(base):  # if it is, all processes compute the same
        questions = questions[process.rank :: process.count]
    lengths = [len(model.tokenize(tokenizer, prompts[question])) for question in questions]
    groups, answers = group_by_tokens(questions, lengths), {}
    n_rounds = max(processes.gather(process, len(groups)))
    for i in tqdm(range(n_rounds), desc="answers", disable=process.rank > 0):
        new = {}
        if i < len(groups):
            texts = model.answer(base, tokenizer, [prompts[question] for question in groups[i]], 64)
            new = dict(zip(groups[i], texts))
        for part in processes.gather(process, new):
            answers |= part
        if process.rank == 0 and (i % 100 == 99 or i == n_rounds - 1):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, known | answers)
    return answers


def group_by_tokens(questions: list[str], lengths: list[int]) -> list[list[str]]:
    """Neighbours that are answered together: a single one, or as many as PROMPT_TOKENS_AT_ONCE allows."""
    groups, longest = [], 0
    for question, length in zip(questions, lengths):
        longest = max(longest, length)
        if groups and (len(groups[-1]) + 1) * longest <= PROMPT_TOKENS_AT_ONCE:
            groups[-1].append(question)
        else:
            groups.append([question])
            longest = length
    return groups
