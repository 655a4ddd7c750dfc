"""Where tasks come from: one file per source. `--tasks NAME` calls the function `load` of tasks/NAME.py."""

import importlib
from pathlib import Path

from data import Splits
from support.files import UserError
from tasks.folder import load_folder

NO_SOURCES = {"__init__", "benchmarks", "checks", "documents", "folder"}
SOURCES = sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - NO_SOURCES)


def load_tasks(source: str | Path) -> Splits:
    """The tasks of a source, `tasks/SOURCE.py`, or of a folder of task files, by split."""
    name = str(source).replace("-", "_")
    if name in SOURCES:
        return importlib.import_module(f"tasks.{name}").load()
    if not Path(source).is_dir():
        raise UserError(f"--tasks {source}: neither {', '.join(SOURCES)} nor a folder of task files")
    return load_folder(Path(source))
