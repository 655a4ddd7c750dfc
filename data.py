"""Tasks: what a hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). A document is a task, too:
its text is the description, and its examples are questions about it. Tasks come from a source in tasks/, or
from a folder of JSON files in the format of Natural Instructions.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import nn
from tqdm import tqdm

import model
from support.files import UserError, read_file, write_file

class Example(NamedTuple):
    """An input with its right answers."""

    input: str
    answers: list[str]  # the first one is learnt; a question about a document may have none yet
    start: str = ""  # how the answer starts, if that is given

def exact_match(example: Example, answer: str) -> bool:
    """Whether an answer is one of the right ones."""
    return answer in example.answers

@dataclass
class Task:
    """Descriptions, examples and a scorer. A document is a Task with is_document."""

    name: str
    descriptions: Sequence[str]  # of a document: its text
    train: Sequence[Example]
    test: Sequence[Example]
    reworded: list[str] = field(default_factory=list)  # in wordings that no training description uses
    definition: str = ""  # the instruction of Natural Instructions, if there is one
    is_document: bool = False
    is_benchmark: bool = False  # its inputs say what to do; it is scored with each of its descriptions
    is_right: Callable[[Example, str], bool] = exact_match
    answer_tokens: int | None = None  # the longest answer, if the task knows it

Splits = dict[str, list[Task]]  # {"train": [...], "val": [...], "test": [...]}

def pick(splits: Splits, split: str, n_tasks: int = 0) -> list[Task]:
    """The first n tasks of a split (0: all) in one fixed shuffled order, so fewer are a subset of more."""
    if not splits.get(split):
        existing = [name for name, tasks in splits.items() if tasks]
        raise UserError(f"these tasks have no split {split}, but {', '.join(existing)}")
    tasks = list(splits[split])
    random.Random(0).shuffle(tasks)
    return tasks[:n_tasks] if n_tasks else tasks

# -------------------- The batch of a training step --------------------

class DrawnTask(NamedTuple):
    """A task drawn for a step, with one of its descriptions and some of its examples."""

    index: int  # of the task in the list that it was drawn from
    description: str
    examples: list[Example]

def draw(tasks: list[Task], step: int, args) -> list[DrawnTask]:
    """The batch of a step: --tasks_per_batch tasks (0: all), and a description and examples of each."""
    rng = random.Random(f"{args.seed} {step}")
    candidates = range(len(tasks))
    if args.short_first:  # the shortest third of the documents at first, all from half-way on
        fraction = min(1, 1 / 3 + 4 / 3 * step / args.max_steps)
        candidates = candidates[: math.ceil(len(tasks) * fraction)]
    indices = sample(rng, candidates, args.tasks_per_batch or len(candidates))
    batch = []
    for i in indices:
        description = rng.choice(tasks[i].descriptions)
        batch.append(DrawnTask(i, description, sample(rng, tasks[i].train, args.examples_per_task)))
    return batch

def sample(rng: random.Random, values: Sequence, n: int) -> list:
    """n of the values: without repetition if there are enough."""
    return rng.sample(values, n) if n <= len(values) else rng.choices(values, k=n)

class TokenizedExample(NamedTuple):
    """One example as token ids."""

    task: int  # index of its task in the batch, and so of its adapter
    prompt: list[int]
    answer: list[int]  # up to the end mark
    teacher_prompt: list[int]  # for --distill: with the document in it

    @property
    def n_tokens(self) -> int:
        return max(len(self.prompt), len(self.teacher_prompt)) + len(self.answer)

@dataclass
class Batch:
    """What one process computes in a step."""

    tasks: list[DrawnTask]
    examples: list[TokenizedExample]  # of these tasks, the shortest first
    task_fraction: float = 1.0  # these tasks, divided by those of all processes
    example_fraction: float = 1.0

def make_batch(tokenizer, tasks: list[Task], drawn: list[DrawnTask], args, rank=0, n_processes=1) -> Batch:
    """One process's part of a step. `drawn` are the tasks of the whole step.

    Examples over --max_tokens are left out, except for the shortest one if all of them are, and so are tasks
    that lose all their examples. What is left is the same on every process; each takes every n-th task of it.
    """
    examples = []
    for k, item in enumerate(drawn):
        instruction = ""
        if args.instruction:
            instruction = (tasks[item.index].definition or item.description) + model.SUFFIX
        for example in item.examples:
            question, right = example.input, example.answers[0]
            prompt, answer = cached_ids(tokenizer, question, right, instruction)
            teacher_prompt = []
            if args.distill:
                teacher_prompt, _ = example_ids(tokenizer, question, right, item.description)
            examples.append(TokenizedExample(k, prompt, answer, teacher_prompt))
    examples.sort(key=lambda example: len(example.prompt) + len(example.answer))
    kept = [example for example in examples if example.n_tokens <= args.max_tokens] or examples[:1]

    kept_tasks = sorted({example.task for example in kept})
    mine = kept_tasks[rank::n_processes]
    is_idle = not mine  # there are more processes than tasks: this one repeats the first task, with weight 0
    mine = mine or kept_tasks[:1]
    my_examples = []
    for example in kept:
        if example.task in mine:
            my_examples.append(example._replace(task=mine.index(example.task)))
    batch = Batch([drawn[k] for k in mine], my_examples)
    batch.task_fraction = 0.0 if is_idle else len(mine) / len(kept_tasks)
    batch.example_fraction = 0.0 if is_idle else len(my_examples) / len(kept)
    return batch

def example_ids(tokenizer, question: str, answer: str, instruction: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer."""
    messages = model.chat(tokenizer, question, instruction)
    prompt, target = model.render(tokenizer, messages), model.render(tokenizer, messages, answer)
    return model.tokenize(tokenizer, prompt), model.tokenize(tokenizer, target)

cached_ids = lru_cache(2**16)(example_ids)  # rendering a chat template takes a millisecond

# -------------------- A folder of task files --------------------

def load_folder(folder: Path) -> Splits:
    """Read NAME.json files, split as splits.json says; without it all are training tasks."""
    files = sorted(path for path in folder.glob("*.json") if path.name != "splits.json")
    if not files:
        raise UserError(f"--tasks {folder}: the folder holds no NAME.json files")
    if (folder / "splits.json").exists():
        names = read_file(folder / "splits.json")
    else:
        names = {"train": [path.stem for path in files]}
    splits = {}
    for split in ("train", "val", "test"):
        splits[split] = [read_task(folder / f"{name}.json") for name in names.get(split, [])]
    return splits

def read_task(path: Path) -> Task:
    """One file: a task as in Natural Instructions, or a document.

    {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}, ...]}, where the last
    fifth is the test part; or {"document", "questions": [{"question", "answer" if known}, ...]}.
    """
    content = read_file(path)
    try:
        task = read_document(content) if "document" in content else read_instances(content)
    except (AttributeError, KeyError, IndexError, TypeError) as e:
        raise UserError(f"{path} is not a task file: {e!r}") from None
    has_descriptions = all(description.strip() for description in task.descriptions)
    has_answers = task.is_document or all(example.answers for example in [*task.train, *task.test])
    if not (task.train and has_descriptions and has_answers):
        raise UserError(f"{path} is not a task file: it lacks descriptions (or a document) or answers")
    task.name = content.get("name", path.stem)
    return task

def as_list(text: str | list[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)

def read_instances(content: dict) -> Task:
    """The task of a file in the format of Natural Instructions."""
    descriptions = as_list(content.get("descriptions") or content["Definition"])
    definition = as_list(content.get("Definition") or "")[0]
    examples = []
    for instance in content["Instances"]:
        answers = [answer.strip() for answer in as_list(instance["output"])]
        examples.append(Example(instance["input"].strip(), answers))
    n_train = len(examples) - len(examples) // 5
    return Task("", descriptions, examples[:n_train], examples[n_train:], definition=definition)

def read_document(content: dict) -> Task:
    """The task of a file with a document. It is scored on the questions it is trained on."""
    examples = []
    for entry in content["questions"]:
        examples.append(Example(entry["question"].strip(), as_list(entry.get("answer", []))))
    return Task("", [content["document"]], examples, examples, is_document=True)

# -------------------- Answers to questions that have none --------------------

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
