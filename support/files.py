"""Files are written completely or not at all; errors that a user can fix are printed as one line."""

import json
import os
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
    is_first_process = os.environ.get("LOCAL_RANK", "0") == "0"  # of torchrun's on this machine
    try:
        main()
    except (UserError, OSError, SafetensorError) as e:
        if is_first_process:
            print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:  # on any of the processes
        advice = "a smaller --micro_batch, --tasks_per_batch or --batch_size, or --gradient_checkpointing"
        print(f"error: out of GPU memory; try {advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_first_process:
            print("interrupted", file=sys.stderr)
        sys.exit(130)


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


def read_file(path: str | Path) -> dict:
    """Read tensors (.safetensors) or JSON. Raises UserError if the file is missing or broken."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None


# -------------------- The folder that generate.py writes --------------------


def may_overwrite(folder: Path) -> bool:
    """Whether a folder may be overwritten: it is new, empty, or made by generate.py."""
    if not folder.exists() or not any(folder.iterdir()):
        return True
    return (folder / "description.txt").exists() or (folder / "0" / "description.txt").exists()


def remove_adapters(folder: Path) -> None:
    """Remove the adapters that an earlier call has written into a folder."""
    numbered = [path for path in folder.glob("[0-9]*") if path.is_dir()]
    for old in (*numbered, folder):
        for name in ("adapter_model.safetensors", "adapter_config.json", "description.txt"):
            (old / name).unlink(missing_ok=True)
        if old.exists() and not any(old.iterdir()):
            old.rmdir()


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
