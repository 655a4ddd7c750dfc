"""Where tasks come from: `--tasks NAME` calls `load()` of tasks/NAME.py; other values are folders of files.

A folder holds one JSON file per task, as in Natural Instructions, or one per document:

    {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}, ...]}
    {"name", "document", "questions": [{"question", "answer"}, ...], "other": the same, if there}

"other" are questions that have nothing to do with the document: a reader learns to answer them as the base
model does. splits.json, {"train": [names of files], "val", "test"}, assigns tasks to splits; without it all
are training tasks. Of a training task, the last fifth of the instances is for testing; of others all are.
"""

import importlib
from dataclasses import replace
from pathlib import Path

from data import Example, Splits, Task
from support import UserError, read_json

NO_SOURCES = {"__init__", "download", "benchmarks"}
SOURCES = sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - NO_SOURCES)
SPLITS = ("train", "val", "test")
RUN_FILES = (".args", ".json", ".jsonl", ".pt", ".safetensors")  # in the folder of a run, beside its adapters


def load_tasks(source: str | Path) -> Splits:
    """The tasks of a source, `tasks/SOURCE.py`, or of a folder of task files, by split."""
    name = str(source).replace("-", "_")
    if name in SOURCES:
        return importlib.import_module(f"tasks.{name}").load()
    known = f"neither {', '.join(SOURCES)} nor a folder of task files"
    expect(Path(source).is_dir(), f"--tasks {source}: {known}")
    return load_folder(Path(source))


def summary(source: str, splits: Splits) -> str:
    """What a source of tasks holds, in one line."""
    counts = ", ".join(f"{len(tasks)} {split}" for split, tasks in splits.items() if tasks)
    is_ours = str(source).replace("-", "_") in SOURCES and Path(source).is_dir()
    return f"tasks in {source}{f' (in the project, not ./{source})' if is_ours else ''}: {counts}"


def expect(is_so, message: str) -> None:
    """Raise UserError with a message if something is not so."""
    if not is_so:
        raise UserError(message)


def task_files(folder: Path) -> dict[str, Path]:
    """{name: file} of a folder's task files."""
    return {path.stem: path for path in sorted(folder.glob("*.json")) if path.name != "splits.json"}


def load_folder(folder: Path) -> Splits:
    """Read a folder of task files, split as splits.json says."""
    files, splits, file_of = task_files(folder), {}, {}  # {name of a task: that of its file}
    expect(files, f"--tasks {folder}: the folder holds no NAME.json files")
    names = read_json(folder / "splits.json") if (folder / "splits.json").exists() else {"train": list(files)}
    wanted = f'{folder / "splits.json"} must be {{"train": [names of files without .json], "val", "test"}}'
    are_lists = isinstance(names, dict) and all(isinstance(of_split, list) for of_split in names.values())
    expect(are_lists and set(names) <= {*SPLITS}, wanted)
    for split in SPLITS:
        splits[split] = []
        for name in names.get(split, []):
            expect(name in files, f'{wanted}; "{split}" has {name}, which is no file there')
            task = read_task(files[name])
            first = file_of.setdefault(task.name, name)
            expect(first == name, f'{folder}: {first} and {name} have the same "name": {task.name}')
            if split != "train" and not task.is_document:
                task = replace(task, test=task.train + task.test)
            splits[split].append(task)
    kinds = {task.is_document for tasks in splits.values() for task in tasks}
    expect(len(kinds) < 2, f"{folder} holds both documents and tasks; make two folders")
    return splits


def read_task(path: Path) -> Task:
    """One file: a task or a document. UserError, with the place, if it is neither."""
    content = read_json(path)
    expect(isinstance(content, dict), f'{path} must be {{"descriptions": [...], "Instances": [...]}}')
    name = content.get("name", path.stem)  # an adapter lies in a folder of this name, beside a run's files
    can_be = isinstance(name, str) and Path(name).name == name and Path(name).suffix not in RUN_FILES
    expect(can_be, f'{path}: "name" must be a text that can name a folder')
    if "document" in content:
        document = as_texts(content["document"], f'{path}: "document"')[0].strip()
        examples = read_examples(content, "questions", "question", "answer", path)
        other = read_examples(content, "other", "question", "answer", path) if "other" in content else []
        return Task(name, [document], examples + other, examples, is_document=True, other=other)
    descriptions = content.get("descriptions", content.get("Definition"))
    descriptions = as_texts(descriptions, f'{path}: "descriptions", which say what the task is,')
    definition = ""
    if content.get("Definition"):
        definition = as_texts(content["Definition"], f'{path}: "Definition"')[0]
    examples = read_examples(content, "Instances", "input", "output", path)
    n_train = len(examples) - len(examples) // 5
    return Task(name, descriptions, examples[:n_train], examples[n_train:], definition=definition)


def read_examples(content: dict, key: str, of_input: str, of_answers: str, path: Path) -> list[Example]:
    """The list under a key, of objects with an input and one or several right answers."""
    entries, examples = content.get(key), []
    wanted = f'{path}: "{key}" must be a list of {{"{of_input}": "a", "{of_answers}": ["b", ...]}}'
    expect(isinstance(entries, list) and entries, wanted)
    for i, entry in enumerate(entries):
        where = f"{wanted}; entry {i} is {str(entry)[:80]}"
        expect(isinstance(entry, dict) and isinstance(entry.get(of_input), str), where)
        answers = [entry[of_answers]] if isinstance(entry.get(of_answers), str) else entry.get(of_answers)
        are_texts = isinstance(answers, list) and answers and all(isinstance(text, str) for text in answers)
        expect(are_texts and answers[0].strip(), where)
        examples.append(Example(entry[of_input].strip(), [text.strip() for text in answers]))
    return examples


def as_texts(value, where: str) -> list[str]:
    """A text, or a list of texts, as a list. Raises UserError for anything else, and for empty texts."""
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    expect(are_texts and all(text.strip() for text in texts), f"{where} must be a text or a list of texts")
    return texts
