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


def distinct(tasks: list[Task]) -> list[Task]:
    """Each task once: a source may repeat some, so that they are drawn more often."""
    return list({id(task): task for task in tasks}.values())


def pick(splits: Splits, split: str, n_tasks: int = 0) -> list[Task]:
    """The first n tasks of a split (0: all) in one fixed shuffled order, so fewer are a subset of more."""
    if not splits.get(split):
        existing = [name for name, tasks in splits.items() if tasks]
        raise UserError(
            f'there is no split "{split}" with tasks, but: {", ".join(existing) or "none at all"}'
        )
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

    Examples longer than --max_tokens are left out, and so are tasks with none left. If all are too long, the
    shortest is kept. What is left is the same on every process; each takes every n-th task of it.
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
    examples.sort(key=lambda example: example.n_tokens)
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


cached_ids = lru_cache(2**16)(example_ids)  # rendering a chat template takes a millisecond


def drop_long_tasks(tokenizer, tasks: list[Task], args, is_first: bool) -> list[Task]:
    """The tasks that have an example of at most --max_tokens; prints the names of the others."""

    def fits(task: Task, example: Example) -> bool:
        """Whether an example is short enough."""
        description = task.descriptions[0] if args.instruction or args.distill else ""
        text = task.definition + description + example.input + example.answers[0]
        if len(text.encode()) + 64 <= args.max_tokens:  # at most one token per byte, and some around the text
            return True
        drawn = [DrawnTask(0, description, [example])]
        return make_batch(tokenizer, [task], drawn, args).examples[0].n_tokens <= args.max_tokens

    kept, dropped = [], []
    for task in tasks:
        if any(fits(task, example) for example in task.train):
            kept.append(task)
        else:
            dropped.append(task)
    names = ", ".join(task.name for task in dropped[:20]) + (", ..." if len(dropped) > 20 else "")
    if not kept:
        raise UserError(f"no example has at most --max_tokens {args.max_tokens} tokens")
    if dropped and is_first:
        print(f"left out, because no example has at most --max_tokens {args.max_tokens} tokens: {names}")
    return kept


def check_words(tokenizer, tasks: list[Task]) -> None:
    """Raise UserError for a word in the examples that the base model has no token for."""
    for task in tasks:
        texts = []
        for example in [*task.train[:100], *task.test[:100]]:
            texts += [example.input, *example.answers[:1]]
        model.check_known(tokenizer, texts)
