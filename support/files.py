"""Files are written completely or not at all; errors that a user can fix are printed as one line."""

import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
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
    """Run a command's main(). An error that a user can fix is one line on stderr, with exit code 2."""
    message = ""
    try:
        if any("\ud800" <= letter <= "\udfff" for letter in " ".join(sys.argv)):
            raise UserError("the command line is not valid UTF-8")
        main()
    except (UserError, OSError, SafetensorError) as e:
        message = " ".join(str(e).split())
    except RuntimeError as e:  # of a GPU's memory, or of the machine's
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
            raise
        message = "out of memory; try a smaller --rank, --micro_batch, --tasks_per_batch or --batch_size,"
        message += " or --gradient_checkpointing"
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    if message:  # with torchrun, most errors are those of all processes
        process = os.environ.get("LOCAL_RANK", "0")
        print("error:" if process == "0" else f"error in process {process}:", message, file=sys.stderr)
        sys.exit(2)


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


def read_texts(paths: list[str], flag: str) -> list[str]:
    """Text files that a flag names. Raises UserError if one is missing, no text, or empty."""
    try:
        texts = [Path(path).read_text(encoding="utf-8-sig") for path in paths]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} cannot be read as text: {e}") from None
    for path, text in zip(paths, texts):
        if not text.strip():
            raise UserError(f"{flag} {path} is empty")
    return texts


def check_name(path: Path, ending: str) -> None:
    """Raise UserError for a file to be written that is not called as it should, so that none gets lost."""
    if path.suffix != ending or path.is_dir():
        raise UserError(f"{path}: the file to be written must end in {ending}")


def check_folder(out: str, ours: set[str], mark: str) -> None:
    """Raise UserError if --out is anything but a new folder, or one with our files alone, such as `mark`."""
    folder, found = Path(out), set()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")
    if folder.exists():
        found = {path.name for path in folder.rglob("*") if path.is_file()}
    if Path(out.strip()).name in ("", "..") or not found <= ours or (found and mark not in found):
        raise UserError(f"--out {out!r} is no new folder, and generate.py did not write it; choose another")


@contextmanager
def whole_folder(folder: Path):
    """A new folder to write into, which takes the place of `folder` at the end of the block, or goes."""
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
