"""Tasks: what a hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). A document is a task, too:
its text is the description, and its examples are questions about it. Tasks come from a source in tasks/, or
from a folder of JSON files in the format of Natural Instructions.
"""

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import nn
from tqdm import tqdm

import model
from support import processes
from support.files import UserError, read_file, write_file
from support.processes import Process


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


# -------------------- A folder of task files --------------------


def load_folder(folder: Path) -> Splits:
    """Read NAME.json files, split as splits.json says; without it all are training tasks.

    Raises UserError for a mistake in a file, with the file's name and what to write instead.
    """
    files = task_files(folder)
    if not files:
        raise UserError(f"--tasks {folder}: the folder holds no NAME.json files")
    names = {"train": list(files)}
    if (folder / "splits.json").exists():
        names = read_splits(folder / "splits.json", list(files))
    splits = {split: [] for split in SPLITS}
    file_of = {}  # of each task
    for split in SPLITS:
        for name in names.get(split, []):
            task = read_task(files[name])
            if task.name in file_of:
                raise UserError(f'{file_of[task.name]} and {files[name]} have the same "name": {task.name}')
            file_of[task.name] = files[name]
            splits[split].append(task)
    if len({task.is_document for tasks in splits.values() for task in tasks}) > 1:
        raise UserError(f"{folder} holds both documents and tasks; make two folders")
    return splits


SPLITS = ("train", "val", "test")


def task_files(folder: Path) -> dict[str, Path]:
    """{name: file} of a folder's task files."""
    return {path.stem: path for path in sorted(folder.glob("*.json")) if path.name != "splits.json"}


def summary(source: str, splits: Splits) -> str:
    """What a source of tasks holds, in one line."""
    counts = ", ".join(f"{len(tasks)} {split}" for split, tasks in splits.items() if tasks)
    n_tasks = sum(len(tasks) for tasks in splits.values())
    n_unused = len(task_files(Path(source))) - n_tasks if Path(source).is_dir() else 0
    unused = f"; splits.json does not name {n_unused} files" if n_unused > 0 else ""
    return f"tasks in {source}: {counts}{unused}"


def read_splits(file: Path, existing: list[str]) -> dict[str, list[str]]:
    """The names in splits.json, checked."""
    content, seen = read_file(file), {}
    if not isinstance(content, dict):
        raise UserError(f'{file} must be {{"train": [...], "val": [...], "test": [...]}}')
    for split, names in content.items():
        if split not in SPLITS:
            raise UserError(f'{file}: there is no split "{split}", but train, val and test')
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f'{file}: "{split}" must be a list of file names without .json')
        for name in names:
            if name.endswith(".json"):
                raise UserError(f'{file}: write "{name.removesuffix(".json")}" instead of "{name}"')
            if name not in existing:
                raise UserError(f'{file}: "{split}" names {name}, but {file.parent / name}.json is missing')
            if name in seen:
                raise UserError(f"{file}: {name} is both in {seen[name]} and in {split}; keep one")
            seen[name] = split
    return content


def read_task(path: Path) -> Task:
    """One file: a task as in Natural Instructions, or a document.

    {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}, ...]}, where the last
    fifth is the test part; or {"document", "questions": [{"question", "answer" if known}, ...]}.
    """
    content = read_file(path)
    if not isinstance(content, dict):
        raise UserError(f'{path} must be {{"descriptions": [...], "Instances": [...]}}')
    task = read_document(content, path) if "document" in content else read_instances(content, path)
    task.name = content.get("name", path.stem)
    if not isinstance(task.name, str) or Path(task.name).name != task.name or task.name in ("", ".."):
        raise UserError(f'{path}: "name" must be a text that can name a folder')
    return task


def as_texts(value, where: str) -> list[str]:
    """A text, or a list of texts, as a list. Raises UserError for anything else, and for empty texts."""
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not is_list or not texts or not all(text.strip() for text in texts):
        raise UserError(f"{where} must be a text or a list of texts, none of them empty")
    return texts


def as_text(value, where: str) -> str:
    """A text, stripped; it may be empty. Raises UserError for anything else."""
    if not isinstance(value, str):
        raise UserError(f"{where} must be a text, not {value!r}")
    return value.strip()


def as_objects(content: dict, key: str, path: Path, example: str) -> list[dict]:
    """The list of objects under a key. Raises UserError if it is anything else."""
    objects = content.get(key)
    if not isinstance(objects, list) or not objects or not all(isinstance(entry, dict) for entry in objects):
        raise UserError(f'{path}: "{key}" must be a list such as [{example}, ...]')
    return objects


def read_instances(content: dict, path: Path) -> Task:
    """The task of a file in the format of Natural Instructions."""
    if "descriptions" not in content and "Definition" not in content:
        raise UserError(f'{path}: "descriptions" is missing: a list of texts that say what the task is')
    key = "descriptions" if "descriptions" in content else "Definition"
    descriptions = as_texts(content[key], f'{path}: "{key}"')
    definition = ""
    if content.get("Definition"):
        definition = as_texts(content["Definition"], f'{path}: "Definition"')[0]
    examples = []
    for i, entry in enumerate(as_objects(content, "Instances", path, '{"input": "a", "output": ["b"]}')):
        text, answers = as_text(entry.get("input"), f'{path}: "input" of instance {i}'), entry.get("output")
        if not answers or not isinstance(answers, (str, list)):
            raise UserError(f'{path}: "output" of instance {i} must be a list of right answers')
        answers = [answers] if isinstance(answers, str) else answers
        answers = [as_text(answer, f'{path}: an "output" of instance {i}') for answer in answers]
        examples.append(Example(text, answers))
    n_train = len(examples) - len(examples) // 5
    return Task("", descriptions, examples[:n_train], examples[n_train:], definition=definition)


def read_document(content: dict, path: Path) -> Task:
    """The task of a file with a document. It is scored on the questions it is trained on."""
    (document,) = as_texts([content["document"]], f'{path}: "document"')
    examples = []
    for i, entry in enumerate(as_objects(content, "questions", path, '{"question": "a?", "answer": "b"}')):
        question = as_text(entry.get("question"), f'{path}: "question" of entry {i}')
        answers = []
        if "answer" in entry:
            answers = as_texts(entry["answer"], f'{path}: "answer" of entry {i}')
        examples.append(Example(question, [answer.strip() for answer in answers]))
    return Task("", [document], examples, examples, is_document=True)


# -------------------- Answers to questions that have none --------------------

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
