"""Files are written completely or not at all; errors that a user can fix are printed as one line."""

import json
import os
import signal
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class UserError(ValueError):
    """An error the user can fix. The commands print it as one line and exit with code 2."""


def command(main) -> None:
    """Run a command's main(). A UserError, or a file error, is one line on stderr and exit code 2."""
    try:
        for word in sys.argv:
            if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
                raise UserError(f"the command line is not valid UTF-8: {word!r}")
        main()
    except (UserError, OSError, SafetensorError) as e:
        print_error(" ".join(str(e).split()))
        sys.exit(2)
    except torch.OutOfMemoryError:
        advice = "a smaller --micro_batch, --tasks_per_batch or --batch_size, or --gradient_checkpointing"
        print_error(f"out of GPU memory; try {advice}")
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(130)


def print_error(message: str) -> None:
    """Print an error once.

    Most errors occur in all processes of torchrun. A later one waits a few seconds before it prints: if the
    first one has failed, too, torchrun ends it in this time.
    """
    process = os.environ.get("LOCAL_RANK", "0")
    if process != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"{message} (process {process})"
    print("error:", message, file=sys.stderr)


def write_file(path: Path, content: dict | list | str) -> None:
    """Write tensors (.safetensors), text (a string) or JSON, whole or not at all."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}
            tmp.touch()
            mode = tmp.stat().st_mode  # save_file would make it readable for its owner only
            save_file(tensors, tmp, {"format": "pt"})
            tmp.chmod(mode)
        elif isinstance(content, str):
            tmp.write_text(content, encoding="utf-8")
        else:
            tmp.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def read_file(path: str | Path):
    """Read tensors (.safetensors) or JSON. Raises UserError if the file is missing or broken."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if r"\ud" in text.lower():  # half of a surrogate pair is valid JSON, but not a text
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, SafetensorError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None


def read_object(path: str | Path) -> dict:
    """Read a JSON file that holds an object."""
    content = read_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, {{...}}")
    return content


def check_name(path: Path, ending: str) -> None:
    """Raise UserError for a file to be written that is not called as it should, so that none gets lost."""
    if path.suffix != ending or path.is_dir():
        raise UserError(f"{path}: the file to be written must end in {ending}")


# -------------------- A folder that generate.py writes --------------------

MARK = "written_by_generate.json"  # lists the files that generate.py has written into a folder


def check_folder(folder: Path) -> None:
    """Raise UserError for a folder with files of somebody else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise UserError(f"{folder} is not empty, and generate.py did not write it; choose another folder")


def claim(folder: Path, files: list[str]) -> None:
    """Remove the files that an earlier call wrote into a folder, and note those that are written next.

    The note is written first, so that a call that fails half-way can be repeated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_file(folder / MARK) if (folder / MARK).exists() else []
    write_file(folder / MARK, sorted({*earlier, *files}))
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
        parent = (folder / name).parent
        if parent != folder and parent.exists() and not any(parent.iterdir()):
            parent.rmdir()
    write_file(folder / MARK, sorted(files))


# -------------------- Downloads --------------------


def cache_folder(name: str) -> Path:
    """The folder for downloads."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-lora" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def download(url: str, needed_for: str):
    """The JSON at a URL; waits if the server asks for it (HTTP 429).

    Raises UserError, which says what the file was needed for.
    """
    for wait in (1, 2, 4, 8, None):  # seconds; None: the last attempt
        try:
            with urlopen(url, timeout=60) as response:
                return json.loads(response.read())
        except (OSError, HTTPException, ValueError) as e:
            asked_to_wait = isinstance(e, HTTPError) and e.code == 429
            if not asked_to_wait or wait is None:
                raise UserError(f"{needed_for}, and {url} cannot be read: {e or type(e).__name__}") from None
            said = e.headers.get("Retry-After", "")  # seconds, or a date
            time.sleep(int(said) if said.isdigit() else wait)
