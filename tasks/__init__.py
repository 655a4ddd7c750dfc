"""Where tasks come from: `--tasks NAME` calls `load()` of tasks/NAME.py; other values are folders of files.

A folder holds one JSON file per task, as in Natural Instructions, or one per document:

    {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}, ...]}
    {"name", "document", "questions": [{"question", "answer" if known}, ...], "other": the same, if there}

"other" are questions that have nothing to do with the document: a reader learns to answer them as the base
model does.

The last fifth of the instances is the test part. splits.json, {"train": [names of files], "val", "test"},
assigns tasks to splits. Without it all are training tasks. Error messages name the file.
"""

import importlib
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
    n_unused = 0
    if str(source).replace("-", "_") in SOURCES:
        if Path(source).is_dir():
            source = f"{source} (in the project; ./{source} is the folder here)"
    elif Path(source).is_dir():
        n_unused = len(task_files(Path(source))) - sum(len(tasks) for tasks in splits.values())
    unused = f"; splits.json does not name {n_unused} files" if n_unused else ""
    return f"tasks in {source}: {counts}{unused}"


def expect(is_so: bool, message: str) -> None:
    """Raise UserError with a message if something is not so."""
    if not is_so:
        raise UserError(message)


def task_files(folder: Path) -> dict[str, Path]:
    """{name: file} of a folder's task files."""
    return {path.stem: path for path in sorted(folder.glob("*.json")) if path.name != "splits.json"}


def load_folder(folder: Path) -> Splits:
    """Read a folder of task files, split as splits.json says."""
    files = task_files(folder)
    expect(files, f"--tasks {folder}: the folder holds no NAME.json files")
    names, splits, file_of = read_splits(folder), {}, {}  # {name of a task: its file}
    for split in SPLITS:
        splits[split] = []
        for name in names.get(split, []):
            task = read_task(files[name])
            first = file_of.setdefault(task.name, files[name])
            expect(first == files[name], f'{first} and {files[name]} have the same "name": {task.name}')
            splits[split].append(task)
    kinds = {task.is_document for tasks in splits.values() for task in tasks}
    expect(len(kinds) < 2, f"{folder} holds both documents and tasks; make two folders")
    return splits


def read_splits(folder: Path) -> dict[str, list[str]]:
    """The names of files in splits.json, checked; without it all are in "train"."""
    file, files, seen = folder / "splits.json", task_files(folder), {}
    if not file.exists():
        return {"train": list(files)}
    content = read_json(file)
    expect(isinstance(content, dict), f'{file} must be {{"train": [...], "val": [...], "test": [...]}}')
    for split, names in content.items():
        expect(split in SPLITS, f'{file}: there is no split "{split}", but train, val and test')
        expect(isinstance(names, list), f'{file}: "{split}" must be a list of file names without .json')
        for name in names:
            expect(name in files, f'{file}: "{split}" names {name}, but {folder / str(name)}.json is missing')
            expect(name not in seen, f"{file}: {name} is both in {seen.get(name)} and in {split}; keep one")
            seen[name] = split
    return content


def read_task(path: Path) -> Task:
    """One file: a task or a document."""
    content = read_json(path)
    expect(isinstance(content, dict), f'{path} must be {{"descriptions": [...], "Instances": [...]}}')
    name = content.get("name", path.stem)  # an adapter lies in a folder of this name, beside a run's files
    can_be = isinstance(name, str) and can_name_a_folder(name)
    expect(can_be, f'{path}: "name" must be a text that can name a folder')
    read = read_document if "document" in content else read_instances
    return read(name, content, path)


def can_name_a_folder(name: str) -> bool:
    """Whether the adapter of a task can lie in a folder of this name, beside the files of a run."""
    is_plain = Path(name).name == name and name not in ("", "..") and "\0" not in name
    return is_plain and Path(name).suffix not in RUN_FILES and len(name.encode()) <= 200


def read_instances(name: str, content: dict, path: Path) -> Task:
    """The task of a file in the format of Natural Instructions."""
    key = "descriptions" if "descriptions" in content else "Definition"
    expect(key in content, f'{path}: "descriptions" is missing, texts that say what the task is')
    descriptions = as_texts(content[key], f'{path}: "{key}"')
    definition = ""
    if content.get("Definition"):
        definition = as_texts(content["Definition"], f'{path}: "Definition"')[0]
    examples = []
    for i, entry in enumerate(as_objects(content, "Instances", path, '{"input": "a", "output": ["b"]}')):
        text = as_text(entry.get("input"), f'{path}: "input" of instance {i}')
        answers = as_texts(entry.get("output"), f'{path}: "output" of instance {i}', may_be_empty=True)
        expect(answers[0].strip(), f'{path}: the first "output" of instance {i} is empty')
        examples.append(Example(text, [answer.strip() for answer in answers]))
    n_train = len(examples) - len(examples) // 5
    return Task(name, descriptions, examples[:n_train], examples[n_train:], definition=definition)


def read_document(name: str, content: dict, path: Path) -> Task:
    """The task of a file with a document. It is scored on the questions it is trained on."""
    document = as_text(content["document"], f'{path}: "document"')
    expect(document, f'{path}: "document" is empty')
    examples = read_questions(content, "questions", path)
    other = read_questions(content, "other", path) if "other" in content else []
    return Task(name, [document], examples + other, examples, is_document=True, other=other)


def read_questions(content: dict, key: str, path: Path) -> list[Example]:
    """The questions of a document, perhaps without an answer."""
    examples = []
    for i, entry in enumerate(as_objects(content, key, path, '{"question": "a?", "answer": "b"}')):
        where = f'of entry {i} of "{key}"'
        question = as_text(entry.get("question"), f'{path}: "question" {where}')
        answers = as_texts(entry["answer"], f'{path}: "answer" {where}') if "answer" in entry else []
        examples.append(Example(question, [answer.strip() for answer in answers]))
    return examples


def as_text(value, where: str) -> str:
    """A text, stripped. Raises UserError for anything else."""
    expect(isinstance(value, str), f"{where} must be a text, not {value!r}")
    return value.strip()


def as_texts(value, where: str, may_be_empty: bool = False) -> list[str]:
    """A text, or a list of texts, as a list. Raises UserError for anything else, and for empty texts."""
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    expect(are_texts, f"{where} must be a text or a list of texts")
    expect(may_be_empty or all(text.strip() for text in texts), f"{where} has an empty text")
    return texts


def as_objects(content: dict, key: str, path: Path, example: str) -> list[dict]:
    """The list of objects under a key. Raises UserError if it is anything else."""
    objects, found = content.get(key), "" if key in content else f"; the file has {', '.join(content)}"
    are_objects = isinstance(objects, list) and objects and all(isinstance(entry, dict) for entry in objects)
    expect(are_objects, f'{path}: "{key}" must be a list such as [{example}, ...]{found}')
    return objects
