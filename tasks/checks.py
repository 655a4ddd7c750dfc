"""Which tasks are trained on and scored, and what is checked before."""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import data
import model
from data import Task
from support import templates
from support.files import UserError, read_object
from tasks import benchmarks, folder, load_tasks


def choose_tasks(args, reads: str, is_first: bool) -> tuple[list[Task], list[Task]]:
    """(tasks to train on, tasks to validate on) of a run; its network reads descriptions or documents."""
    splits = load_tasks(args.tasks)
    if is_first:
        print(folder.summary(args.tasks, splits))
    tasks = data.pick(splits, args.split, args.n_tasks)
    check_instruction(tasks, args)
    if args.mode != "lora" and tasks[0].is_document != (reads == "documents"):
        reads += " (see config/d2l.args)" if reads == "documents" else ""
        raise UserError(f"--tasks {args.tasks} cannot be used with --arch {args.arch}, which reads {reads}")
    if args.mode == "lora" and not args.multi_task and len({task.name for task in tasks}) < len(tasks):
        raise UserError(f"--tasks {args.tasks}: tasks of equal names cannot have an adapter folder each")
    return tasks, [task for task in splits.get("val", []) if task.test]


def choose_scored(args, benchmark_names: list[str]) -> list[Task]:
    """The tasks that eval.py scores: of --tasks and --split, with the descriptions of --descriptions."""
    splits = benchmarks.load(benchmark_names) if benchmark_names else load_tasks(args.tasks)
    args.training_tasks = [task for task in splits.get("train", []) if not task.is_document]
    print(folder.summary(args.tasks, splits))
    tasks = data.pick(splits, args.split, args.n_tasks)
    if args.descriptions:
        descriptions = read_object(args.descriptions)
        tasks = [task for task in tasks if task.name in descriptions]
        if not tasks:
            raise UserError(f"{args.descriptions} has no descriptions of the {args.split} tasks")
        for i, task in enumerate(tasks):
            texts = folder.as_texts(descriptions[task.name], f"{args.descriptions}: {task.name}")
            tasks[i] = replace(task, descriptions=texts, reworded=[])
    check_instruction(tasks, args)
    for task in tasks:
        if not task.test:
            raise UserError(f"the task {task.name} has no test part: that is the last fifth of its instances")
        if not all(example.answers for example in task.test):
            raise UserError(f"{task.name} cannot be scored: one of its questions has no answer")
    return tasks


def beginning(values: Sequence) -> list:
    """A list; of an endless sequence, which makes its values when they are asked for, the first ones."""
    return values if isinstance(values, list) else list(values[:8])


def identify(tasks: list[Task]) -> dict:
    """The names of tasks and a checksum of their texts."""
    checksum = 0
    for task in tasks:
        texts = (task.name, task.definition, beginning(task.descriptions), beginning(task.train), task.test)
        checksum = zlib.crc32(repr(texts).encode(), checksum)
    return {"names": [task.name for task in tasks], "checksum": checksum}


def check_instruction(tasks: list[Task], args) -> None:
    """Raise UserError if the instruction of tasks is a document."""
    if args.instruction and tasks[0].is_document:
        raise UserError("--instruction would put the document itself into the prompt")


def check(tokenizer, tasks: list[Task], val_tasks: list[Task], args, is_first: bool) -> None:
    """Raise UserError for tasks that cannot be trained on; say once what will be left out."""
    for task in tasks + val_tasks:
        if not all(example.answers for example in [*beginning(task.train), *task.test]):
            command = f"python -m extras.answers {args.tasks} NEW_FOLDER --base_model {args.base_model}"
            raise UserError(f"{task.name} has questions without an answer; to generate answers: {command}")
    n_too_long = count_too_long(tokenizer, tasks, args)
    if n_too_long == len(tasks):
        raise UserError(f"no example has at most --max_tokens {args.max_tokens} tokens")
    if n_too_long and is_first:
        print(f"{n_too_long} of {len(tasks)} tasks are left out: too long for --max_tokens {args.max_tokens}")
    check_words(tokenizer, tasks + val_tasks)


def count_too_long(tokenizer, tasks: list[Task], args) -> int:
    """How many tasks have no example of at most --max_tokens among their first ones."""
    n, template = 0, len(model.tokenize(tokenizer, model.render(tokenizer, model.chat(tokenizer, ""))))
    for i, task in enumerate(tasks):
        description = task.descriptions[0] if args.instruction or args.distill else ""
        drawn = data.DrawnTask(i, description, task.train[:8])
        lengths = []  # in bytes; a token has at least one
        for example in drawn.examples:
            lengths.append(len((task.definition + description + example.input + example.answers[0]).encode()))
        if min(lengths) + template + len(model.instruct("")) > args.max_tokens:
            n += data.tokenize_drawn(tokenizer, tasks, [drawn], args)[0].n_tokens > args.max_tokens
    return n


def check_words(tokenizer, tasks: list[Task]) -> None:
    """Raise UserError for words in the examples that the base model has no token for."""
    if tokenizer.unk_token_id is None:
        return
    texts = set()
    for task in tasks:
        for example in [*beginning(task.train), *task.test]:
            texts.update((example.input, *example.answers[:1]))
    templates.check_known(tokenizer, list(texts))
