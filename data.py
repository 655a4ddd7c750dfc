"""Tasks: what a hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). A document is a task, too:
its text is the description, and its examples are questions about it. Tasks come from the sources in tasks/.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import model
from support import UserError, say


class Example(NamedTuple):
    """An input with its right answers."""

    input: str
    answers: list[str]  # the first one is learnt


@dataclass
class Task:
    """Descriptions and examples. A document is a Task with is_document."""

    name: str
    descriptions: Sequence[str]  # of a document: its text
    train: Sequence[Example]
    test: Sequence[Example]
    reworded: list[str] = field(default_factory=list)  # in wordings that no training description uses
    definition: str = ""  # of Natural Instructions: the instruction in prompts, if it is there
    is_document: bool = False
    weight: int = 1  # how often it is in the pool from which a step draws
    rules: Any = None  # how eval.py asks and scores, of a benchmark (tasks/benchmarks.py)
    other: Sequence[Example] = ()  # of a document: test examples that have nothing to do with it


Splits = dict[str, list[Task]]  # {"train": [...], "val": [...], "test": [...]}


def pick(splits: Splits, split: str, n_tasks: int = 0) -> list[Task]:
    """The first n tasks of a split (0: all) in one fixed shuffled order, so fewer are a subset of more."""
    if not splits.get(split):
        existing = [name for name, tasks in splits.items() if tasks]
        message = f'there is no split "{split}" with tasks, but: '
        raise UserError(message + (", ".join(existing) or "none at all") + " (--split)")
    tasks = list(splits[split])
    if n_tasks > len(tasks):
        raise UserError(f'--n_tasks {n_tasks}: the split "{split}" has {len(tasks)} tasks')
    random.Random(0).shuffle(tasks)
    return tasks[:n_tasks] if n_tasks else tasks


# -------------------- The examples of a training step --------------------


class Ids(NamedTuple):
    """An example as token ids."""

    prompt: list[int]
    answer: list[int]  # up to the end mark
    teacher_prompt: list[int]  # for --distill: with the document in it

    @property
    def n_tokens(self) -> int:
        return max(len(self.prompt), len(self.teacher_prompt)) + len(self.answer)


class Drawn(NamedTuple):
    """A task of a step, with one of its descriptions and some of its examples."""

    index: int  # in the list of tasks
    description: str
    examples: list[Ids]


def draw(tasks: list[Task], pool: Sequence[int], step: int, args, tokenizer) -> list[Drawn]:
    """Draw --tasks_per_batch tasks from a pool of task indices, each repeated by its weight.

    Each task has one description, and --examples_per_task examples of at most --max_tokens. Reconstruction
    uses no examples. They are drawn all the same, so that a seed draws the tasks and descriptions of SFT.
    """
    rng, drawn = random.Random(f"{args.seed} {step}"), []
    for i in sample(rng, pool, args.tasks_per_batch):
        task, examples = tasks[i], []
        description = rng.choice(task.descriptions)
        chosen = sample(rng, task.train, args.examples_per_task)
        for example in [] if args.mode == "recon" else chosen:
            for _ in range(1000):
                ids = to_ids(tokenizer, task, description, example, args)
                if ids.n_tokens <= args.max_tokens:
                    break
                example = rng.choice(task.train)
            else:
                message = f"1,000 examples are too long for --max_tokens {args.max_tokens}"
                raise UserError(f"{task.name}: {message}")
            examples.append(ids)
        drawn.append(Drawn(i, description, examples))
    return drawn


def sample(rng: random.Random, values: Sequence, n: int) -> list:
    """n of the values: without repetition if there are enough."""
    return rng.sample(values, n) if n <= len(values) else rng.choices(values, k=n)


def to_ids(tokenizer, task: Task, description: str, example: Example, args) -> Ids:
    """Token ids of an example. With --instruction, its prompt contains the instruction."""
    question, answer, teacher_prompt = example.input, example.answers[0], []
    instruction = model.instruct(task.definition or description) if args.instruction else ""
    prompt, answer_ids = model.example_ids(tokenizer, question, answer, instruction)
    if args.distill:
        teacher_prompt, _ = model.example_ids(tokenizer, question, answer, description)
    return Ids(prompt, answer_ids, teacher_prompt)


def with_short_examples(tasks: list[Task], val_tasks: list[Task], args, tokenizer) -> list[Task]:
    """The tasks with an example of at most --max_tokens. UserError for examples that cannot be learnt.

    With --instruction, a task keeps the descriptions with which it has a short example.
    """
    check_examples(tasks + val_tasks, args, tokenizer)
    kept = []
    for task in tasks:
        shortest = min(beginning(task.train), key=lambda example: len(example.input + example.answers[0]))

        def fits(description: str) -> bool:
            return to_ids(tokenizer, task, description, shortest, args).n_tokens <= args.max_tokens

        if fits(max(beginning(task.descriptions), key=len)):
            kept.append(task)
        elif fitting := [text for text in beginning(task.descriptions) if fits(text)]:
            kept.append(replace(task, descriptions=fitting))
    if not kept:
        raise UserError(f"no example has at most --max_tokens {args.max_tokens} tokens")
    if len(kept) < len(tasks):
        n = len(tasks) - len(kept)
        say(f"{n} of {len(tasks)} tasks are left out: too long for --max_tokens {args.max_tokens}")
    return kept


def check_examples(tasks: list[Task], args, tokenizer) -> None:
    """Raise UserError for words without a token."""
    texts = set()
    for task in tasks:
        for example in [*beginning(task.train), *task.test]:
            texts.update((example.input, example.answers[0]))
        texts.update(task.descriptions if task.is_document else [])
    model.check_known(tokenizer, list(texts))


N_VALIDATE = 8  # at most so many examples of each validation task


def validation_of(val_tasks: list[Task], args, tokenizer) -> list[Drawn]:
    """The validation tasks with their first description, and test examples of at most --max_tokens."""
    validation = []
    for i, task in enumerate(val_tasks):
        text = task.descriptions[0]
        ids = [to_ids(tokenizer, task, text, example, args) for example in task.test[:N_VALIDATE]]
        if short := [example for example in ids if example.n_tokens <= args.max_tokens]:
            validation.append(Drawn(i, text, short))
    return validation


def beginning(values: Sequence) -> Sequence:
    """A whole list, or the first 8 elements of a lazy sequence, which makes its elements on access."""
    return values if isinstance(values, list) else values[:8]
