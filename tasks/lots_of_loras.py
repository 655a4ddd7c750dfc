"""The paper's tasks: 479 of Natural Instructions to train on, 11 to validate, named in lots_of_loras.json.

Each has about 200 published descriptions. As in the paper, the first 128 are for training; the others are
`reworded`. The definition of Natural Instructions is the instruction in prompts, if there is one.
"""

import re
from pathlib import Path

from tqdm import tqdm

from data import Splits
from support import read_json, write_file
from tasks import as_texts, load_folder
from tasks.download import PUBLISHED, cache_folder, download, published

URL = "https://raw.githubusercontent.com/allenai/natural-instructions/master/tasks"
NAMES = Path(__file__).parent / "lots_of_loras.json"
N_DESCRIPTIONS = 128  # to train on (n_descs_per_ds in the published config)


def published_descriptions(name: str, needed_for: str) -> list[str]:
    """The descriptions of a task, "task022_...", from the published repository."""
    number = re.match(r"task(\d+)_", name)[1]
    file = f"tasks/lol_{number}/metadata.yaml"
    return as_texts(published(file, needed_for).get("descriptions"), f'{PUBLISHED}/{file}: "descriptions"')


def load() -> Splits:
    """The tasks by split. Downloads what is not in the cache, so a second call continues the first."""
    folder, splits = cache_folder("lots-of-loras"), read_json(NAMES)
    names = [name for split in splits.values() for name in split]
    write_file(folder / "splits.json", splits)
    for i, name in enumerate(tqdm(names, desc="Natural Instructions", unit="task", leave=False)):
        needed_for = f"--tasks lots_of_loras: {len(names) - i} of {len(names)} tasks are not in {folder}"
        if not (folder / f"{name}.json").exists():
            write_file(folder / f"{name}.json", download(f"{URL}/{name}.json", needed_for))
        if not (folder / "descriptions" / f"{name}.json").exists():
            texts = published_descriptions(name, needed_for)
            write_file(folder / "descriptions" / f"{name}.json", texts)
    tasks = load_folder(folder)
    for split, its_names in splits.items():
        for name, task in zip(its_names, tasks[split], strict=True):
            texts = read_json(folder / "descriptions" / f"{name}.json")
            task.descriptions, task.reworded = texts[:N_DESCRIPTIONS], texts[N_DESCRIPTIONS:]
    return tasks
