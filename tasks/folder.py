"""A folder of task files, one JSON file per task or document, checked in detail."""

from pathlib import Path

from data import Example, Splits, Task
from support.files import UserError, read_file

SPLITS = ("train", "val", "test")


def expect(is_so: bool, message: str) -> None:
    """Raise UserError with a message if something is not so."""
    if not is_so:
        raise UserError(message)


def load_folder(folder: Path) -> Splits:
    """Read NAME.json files, split as splits.json says; without it all are training tasks.

    Raises UserError for a mistake in a file, with the file's name and what to write instead.
    """
    files = task_files(folder)
    expect(files, f"--tasks {folder}: the folder holds no NAME.json files")
    names = {"train": list(files)}
    if (folder / "splits.json").exists():
        names = read_splits(folder / "splits.json", list(files))
    splits, file_of = {split: [] for split in SPLITS}, {}  # {name of a task: its file}
    for split in SPLITS:
        for name in names.get(split, []):
            task, file = read_task(files[name]), files[name]
            first = file_of.setdefault(task.name, file)
            expect(first == file, f'{first} and {file} have the same "name": {task.name}')
            splits[split].append(task)
    kinds = {task.is_document for tasks in splits.values() for task in tasks}
    expect(len(kinds) < 2, f"{folder} holds both documents and tasks; make two folders")
    return splits


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
    expect(isinstance(content, dict), f'{file} must be {{"train": [...], "val": [...], "test": [...]}}')
    for split, names in content.items():
        expect(split in SPLITS, f'{file}: there is no split "{split}", but train, val and test')
        are_texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        expect(are_texts, f'{file}: "{split}" must be a list of file names without .json')
        for name in names:
            bare = name.removesuffix(".json")
            expect(bare == name, f'{file}: write "{bare}" instead of "{name}"')
            missing = f'{file}: "{split}" names {name}, but {file.parent / name}.json is missing'
            expect(name in existing, missing)
            expect(name not in seen, f"{file}: {name} is both in {seen.get(name)} and in {split}; keep one")
            seen[name] = split
    return content


def read_task(path: Path) -> Task:
    """One file: a task as in Natural Instructions, or a document.

    {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}, ...]}, where the last
    fifth is the test part; or {"document", "questions": [{"question", "answer" if known}, ...]}.
    """
    content = read_file(path)
    expect(isinstance(content, dict), f'{path} must be {{"descriptions": [...], "Instances": [...]}}')
    task = read_document(content, path) if "document" in content else read_instances(content, path)
    task.name = content.get("name", path.stem)
    can_be = isinstance(task.name, str) and can_name_a_folder(task.name)
    expect(can_be, f'{path}: "name" must be a text that can name a folder')
    return task


def can_name_a_folder(name: str) -> bool:
    """Whether the adapter of a task can lie in a folder of this name, beside the files of a run."""
    is_file_of_run = Path(name).suffix in (".args", ".json", ".jsonl", ".safetensors")
    is_plain = Path(name).name == name and name not in ("", "..") and "\0" not in name
    return is_plain and not is_file_of_run and len(name.encode()) <= 200


def as_texts(value, where: str) -> list[str]:
    """A text, or a list of texts, as a list. Raises UserError for anything else, and for empty texts."""
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    expect(texts and are_texts, f"{where} must be a text or a list of texts, none of them empty")
    return texts


def as_text(value, where: str) -> str:
    """A text, stripped; it may be empty. Raises UserError for anything else."""
    expect(isinstance(value, str), f"{where} must be a text, not {value!r}")
    return value.strip()


def as_objects(content: dict, key: str, path: Path, example: str) -> list[dict]:
    """The list of objects under a key. Raises UserError if it is anything else."""
    objects, found = content.get(key), "" if key in content else f"; the file has {', '.join(content)}"
    are_objects = isinstance(objects, list) and all(isinstance(entry, dict) for entry in objects)
    expect(objects and are_objects, f'{path}: "{key}" must be a list such as [{example}, ...]{found}')
    return objects


def read_instances(content: dict, path: Path) -> Task:
    """The task of a file in the format of Natural Instructions."""
    key = "descriptions" if "descriptions" in content else "Definition"
    keys = ", ".join(content) or "nothing"
    message = f'{path}: "descriptions" is missing, texts that say what the task is; it has {keys}'
    expect(key in content, message)
    descriptions = as_texts(content[key], f'{path}: "{key}"')
    definition = ""
    if content.get("Definition"):
        definition = as_texts(content["Definition"], f'{path}: "Definition"')[0]
    examples = []
    for i, entry in enumerate(as_objects(content, "Instances", path, '{"input": "a", "output": ["b"]}')):
        where, answers = f"of instance {i}", entry.get("output")
        text = as_text(entry.get("input"), f'{path}: "input" {where}')
        answers = [answers] if isinstance(answers, str) else answers
        is_list = isinstance(answers, list) and answers
        expect(is_list, f'{path}: "output" {where} must be a list of right answers')
        answers = [as_text(answer, f'{path}: an "output" {where}') for answer in answers]
        expect(answers[0], f'{path}: the first "output" {where} is empty')
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
