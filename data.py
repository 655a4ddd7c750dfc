"""Tasks: what a hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). A document is a task, too:
its text is the description, and its examples are questions about it. Tasks come from the sources in tasks/.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import model
from support import UserError, say


class Example(NamedTuple):
    """An input with its right answers."""

    input: str
    answers: list[str]  # the first one is learnt


@dataclass
class Task:
    """Descriptions and examples, and how answers are scored. A document is a Task with is_document."""

    name: str
    descriptions: Sequence[str]  # of a document: its text
    train: Sequence[Example]
    test: Sequence[Example]
    reworded: list[str] = field(default_factory=list)  # in wordings that no training description uses
    definition: str = ""  # the instruction of Natural Instructions, if there is one
    is_document: bool = False
    weight: int = 1  # how often it is among the tasks from which a step draws some

    # how eval.py asks and scores; tasks/benchmarks.py has other ways

    def asked(self, texts: Sequence[str], n: int | None) -> list[tuple[int, str]]:
        """Indices of the first n test examples (default 25), each with one of the texts in turn."""
        n = len(self.test[: n or 25])
        return [(i, texts[i % len(texts)]) for i in range(n)]

    def instruction(self, text: str) -> str:
        """The instruction before an input, where training had one; `text` is a description."""
        return model.instruct(self.definition or text)

    def start(self, example: Example) -> str:
        """How the answer starts, if that is given."""
        return ""

    def most_tokens(self, tokenizer, example: Example) -> int:
        """How long an answer may get: two tokens more than the right ones have; longer ones are wrong."""
        return 2 + max(len(model.tokenize(tokenizer, right)) for right in example.answers)

    def is_right(self, example: Example, answer: str, ended: bool, contains: bool = False) -> bool:
        """Whether an answer is one of the right ones, and the model has ended it itself; or contains one."""
        rights = [right.strip() for right in example.answers]
        if contains:
            return any(right and right in answer for right in rights)
        return ended and answer.strip() in rights


Splits = dict[str, list[Task]]  # {"train": [...], "val": [...], "test": [...]}


def pick(splits: Splits, split: str, n_tasks: int = 0) -> list[Task]:
    """The first n tasks of a split (0: all) in one fixed shuffled order, so fewer are a subset of more."""
    if not splits.get(split):
        existing = [name for name, tasks in splits.items() if tasks]
        message = f'there is no split "{split}" with tasks, but: '
        raise UserError(message + (", ".join(existing) or "none at all"))
    tasks = list(splits[split])
    random.Random(0).shuffle(tasks)
    return tasks[:n_tasks] if n_tasks else tasks


# -------------------- The examples of a training step --------------------


class Drawn(NamedTuple):
    """A task drawn for a step, with one of its descriptions and some of its examples."""

    index: int  # of the task in the list that it was drawn from
    description: str
    examples: list[Example]


def draw(tasks: list[Task], step: int, args, tokenizer) -> list[Drawn]:
    """The tasks of a step: --tasks_per_batch of them, or all tasks if there are fewer, or if it is 0.

    Each has a description and --examples_per_task examples. If one of them is longer than --max_tokens, they
    are drawn again, from those that are not. (Tokens are cached, so that the step need not count them again.)
    """
    rng = random.Random(f"{args.seed} {step}")
    candidates, n = list(range(len(tasks))), min(args.tasks_per_batch or len(tasks), len(tasks))
    if n < len(tasks):
        candidates = [i for i in candidates for _ in range(tasks[i].weight)]
    if args.short_first:  # (sorted by train.prepare) the shortest sixth at first, all from half-way on
        fraction = min(1, 1 / 6 + 5 / 3 * step / args.max_steps)
        candidates = candidates[: math.ceil(len(candidates) * fraction)]
    drawn = []
    for i in sample(rng, candidates, n):
        task = tasks[i]
        description = rng.choice(task.descriptions)
        examples = sample(rng, task.train, args.examples_per_task)
        if not all(fits(tokenizer, task, description, example, args) for example in examples):
            places = rng.sample(range(len(task.train)), min(1000, len(task.train)))
            others = (task.train[k] for k in places)
            fitting = (other for other in others if fits(tokenizer, task, description, other, args))
            fitting = list(islice(fitting, args.examples_per_task))
            examples = sample(rng, fitting or examples, args.examples_per_task)
        drawn.append(Drawn(i, description, examples))
    return drawn


def sample(rng: random.Random, values: Sequence, n: int) -> list:
    """n of the values: without repetition if there are enough."""
    return rng.sample(values, n) if n <= len(values) else rng.choices(values, k=n)


def fits(tokenizer, task: Task, description: str, example: Example, args) -> bool:
    """Whether an example has at most --max_tokens tokens. (Reconstruction has no tokenizer.)"""
    if tokenizer is None:
        return True
    (row,) = tokenize(tokenizer, [task], [Drawn(0, description, [example])], args)
    return row.n_tokens <= args.max_tokens


class Row(NamedTuple):
    """An example as token ids."""

    place: int  # of its task among those drawn, and so of its adapter
    prompt: list[int]
    answer: list[int]  # up to the end mark
    teacher_prompt: list[int]  # for --distill: with the document in it

    @property
    def n_tokens(self) -> int:
        return max(len(self.prompt), len(self.teacher_prompt)) + len(self.answer)


def tokenize(tokenizer, tasks: list[Task], drawn: list[Drawn], args) -> list[Row]:
    """All examples of the tasks that were drawn, the shortest first."""
    rows = []
    for place, item in enumerate(drawn):
        instruction = tasks[item.index].instruction(item.description) if args.instruction else ""
        for example in item.examples:
            question, right, teacher_prompt = example.input, example.answers[0], []
            prompt, answer = model.example_ids(tokenizer, question, right, instruction)
            if args.distill:
                teacher_prompt, _ = model.example_ids(tokenizer, question, right, item.description)
            rows.append(Row(place, prompt, answer, teacher_prompt))
    return sorted(rows, key=lambda row: row.n_tokens)


def check(tasks: list[Task], val_tasks: list[Task], args, tokenizer) -> list[Task]:
    """The tasks with an example of at most --max_tokens. UserError for examples that cannot be learnt."""
    texts, kept = set(), []
    for task in tasks + val_tasks:
        for example in [*beginning(task.train), *task.test]:
            if not example.answers:
                advice = f"python -m extras.answers {args.tasks} NEW_FOLDER --base_model {args.base_model}"
                raise UserError(f"{task.name} has questions without an answer; generate it: {advice}")
            texts.update((example.input, example.answers[0]))
        texts.update(task.descriptions if task.is_document else [])
    model.check_known(tokenizer, list(texts))
    for task in tasks:
        if any(fits(tokenizer, task, task.descriptions[0], e, args) for e in beginning(task.train)):
            kept.append(task)
    if not kept:
        raise UserError(f"no example has at most --max_tokens {args.max_tokens} tokens")
    if len(kept) < len(tasks):
        n = len(tasks) - len(kept)
        say(f"{n} of {len(tasks)} tasks are left out: too long for --max_tokens {args.max_tokens}")
    return kept


def beginning(examples: Sequence[Example]) -> Sequence[Example]:
    """All of a list; of a lazy sequence, which makes examples when they are asked for, the first ones."""
    return examples if isinstance(examples, list) else examples[:8]
