"""The paper's tasks: 479 of Natural Instructions to train on, 11 to validate, named in lots_of_loras.json."""

from pathlib import Path

from tqdm import tqdm

from data import Splits
from support import read_json, write_file
from tasks import load_folder
from tasks.download import cache_folder, download

URL = "https://raw.githubusercontent.com/allenai/natural-instructions/master/tasks"
NAMES = Path(__file__).parent / "lots_of_loras.json"


def load() -> Splits:
    """The tasks by split. Downloads what is not in the cache, so a second call continues the first."""
    folder, splits = cache_folder("lots-of-loras"), read_json(NAMES)
    names = [name for split in splits.values() for name in split]
    missing = [name for name in names if not (folder / f"{name}.json").exists()]
    write_file(folder / "splits.json", splits)
    for i, name in enumerate(tqdm(missing, desc="Natural Instructions", unit="file", disable=not missing)):
        left = f"{len(missing) - i} of {len(names)} task files are not in {folder}"
        content = download(f"{URL}/{name}.json", f"--tasks lots_of_loras: {left}")
        write_file(folder / f"{name}.json", content)
    return load_folder(folder)
