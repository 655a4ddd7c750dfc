"""Tasks: what a hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). A document is a task, too:
its text is the description, and its examples are questions about it. Tasks come from the sources in tasks/.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import model
from support.files import UserError


class Example(NamedTuple):
    """An input with its right answers."""

    input: str
    answers: list[str]  # the first one is learnt


def exact_match(example: Example, answer: str) -> bool:
    """Whether an answer is one of the right ones."""
    return answer.strip() in [right.strip() for right in example.answers]


def no_start(example: Example) -> str:
    return ""


@dataclass
class Task:
    """Descriptions and examples, and how it is scored. A document is a Task with is_document."""

    name: str
    descriptions: Sequence[str]  # of a document: its text
    train: Sequence[Example]
    test: Sequence[Example]
    reworded: list[str] = field(default_factory=list)  # in wordings that no training description uses
    definition: str = ""  # the instruction of Natural Instructions, if there is one
    is_document: bool = False
    weight: int = 1  # how often it is among the tasks from which a step draws
    # how eval.py asks and scores
    metric: Callable[[Example, str], bool] = exact_match
    start: Callable[[Example], str] = no_start  # how the answer starts, if that is given
    n_scored: int | None = 25  # test examples; None is all
    n_descriptions: int = 1  # how many descriptions each of them is asked with
    answer_tokens: int | None = None  # the longest answer; None goes by the right one
    has_instruction: bool = True  # False: its inputs say what to do, so eval.py adds no instruction


Splits = dict[str, list[Task]]  # {"train": [...], "val": [...], "test": [...]}


def pick(splits: Splits, split: str, n_tasks: int = 0) -> list[Task]:
    """The first n tasks of a split (0: all) in one fixed shuffled order, so fewer are a subset of more."""
    if not splits.get(split):
        existing = [name for name, tasks in splits.items() if tasks]
        message = f'there is no split "{split}" with tasks, but: {", ".join(existing) or "none at all"}'
        raise UserError(f"{message} (--split {existing[0]})" if existing else message)
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
    """The tasks of a step: --tasks_per_batch of them (0: all), and a description and examples of each."""
    rng = random.Random(f"{args.seed} {step}")
    candidates = list(range(len(tasks)))
    if args.tasks_per_batch:
        candidates = [i for i in candidates for _ in range(tasks[i].weight)]
    if args.short_first:  # (sorted by `prepare`) the shortest sixth at first, all from half-way on
        fraction = min(1, 1 / 6 + 5 / 3 * step / args.max_steps)
        candidates = candidates[: math.ceil(len(candidates) * fraction)]
    indices = sample(rng, candidates, args.tasks_per_batch or len(candidates))
    drawn = []
    for i in indices:
        description = rng.choice(tasks[i].descriptions)
        drawn.append(DrawnTask(i, description, sample(rng, tasks[i].train, args.examples_per_task)))
    return drawn


def sample(rng: random.Random, values: Sequence, n: int) -> list:
    """n of the values: without repetition if there are enough."""
    return rng.sample(values, n) if n <= len(values) else rng.choices(values, k=n)


class TokenizedExample(NamedTuple):
    """One example as token ids."""

    task: int  # place of its task among those that are drawn, then in the batch: that of its adapter
    prompt: list[int]
    answer: list[int]  # up to the end mark
    teacher_prompt: list[int]  # for --distill: with the document in it

    @property
    def n_tokens(self) -> int:
        return max(len(self.prompt), len(self.teacher_prompt)) + len(self.answer)


class Batch(NamedTuple):
    """What one process computes in a step.

    All processes draw the same tasks, and each takes every n-th of those that have examples left. A mean over
    all processes is the sum of fraction * (mean over mine): each computes such a part of the loss, and the
    gradients of the parts are added up.
    """

    tasks: list[DrawnTask]
    examples: list[TokenizedExample]  # of these tasks, the shortest first
    task_fraction: float  # these tasks, divided by those of all processes
    example_fraction: float
    most_examples: int  # of one process, for --shard


def tokenize_drawn(tokenizer, tasks: list[Task], drawn: list[DrawnTask], args) -> list[TokenizedExample]:
    """The examples of a step as token ids, the shortest first, at most --max_tokens long.

    If all are too long, the shortest is kept.
    """
    examples = []
    for k, item in enumerate(drawn):
        instruction = ""
        if args.instruction:
            instruction = model.instruct(tasks[item.index].definition or item.description)
        for example in item.examples:
            question, right = example.input, example.answers[0]
            prompt, answer = cached_ids(tokenizer, question, right, instruction)
            teacher_prompt = []
            if args.distill:
                teacher_prompt, _ = example_ids(tokenizer, question, right, item.description)
            examples.append(TokenizedExample(k, prompt, answer, teacher_prompt))
    examples.sort(key=lambda example: example.n_tokens)
    return [example for example in examples if example.n_tokens <= args.max_tokens] or examples[:1]


def make_batch(tokenizer, tasks: list[Task], drawn: list[DrawnTask], args, rank=0, count=1) -> Batch:
    """The batch of one process of `count` in a step.

    With two processes and examples left of the drawn tasks 0, 2 and 3, the first one takes 0 and 3.
    """
    kept = tokenize_drawn(tokenizer, tasks, drawn, args)
    with_examples = sorted({example.task for example in kept})  # places in `drawn`
    n_examples = [0] * count  # of each process
    for example in kept:
        n_examples[with_examples.index(example.task) % count] += 1
    mine = with_examples[rank::count]
    is_idle = not mine  # more processes than tasks: this one repeats the first task, with weight 0
    mine = mine or with_examples[:1]
    place = {k: i for i, k in enumerate(mine)}  # in the batch
    examples = [example._replace(task=place[example.task]) for example in kept if example.task in place]
    task_fraction = 0.0 if is_idle else len(mine) / len(with_examples)
    example_fraction = 0.0 if is_idle else len(examples) / len(kept)
    return Batch([drawn[k] for k in mine], examples, task_fraction, example_fraction, max(n_examples))


def example_ids(tokenizer, question: str, answer: str, instruction: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer.

    They are tokenized together, if the prompt's tokens stay the same: tokenized alone, the answer may begin
    with a different token from the one that the model generates.
    """
    messages = model.chat(tokenizer, question, instruction)
    prompt, target = model.render(tokenizer, messages), model.render(tokenizer, messages, answer)
    prompt_ids, whole = model.tokenize(tokenizer, prompt), model.tokenize(tokenizer, prompt + target)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    return prompt_ids, model.tokenize(tokenizer, target)


cached_ids = lru_cache(2**14)(example_ids)  # rendering a chat template takes a millisecond
