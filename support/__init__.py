"""What all scripts stand on: errors as one line, files that are written whole or not at all."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from safetensors.torch import save_file


class UserError(ValueError):
    """An error the user can fix."""


def command(main) -> None:
    """Run the main() of a command. An error is one line on stderr, with exit code 2.

    T2L_TRACEBACK=1 shows where it was raised.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if os.environ.get("T2L_TRACEBACK"):
            raise
        message = " ".join(str(e).split())[:500]  # some libraries write pages
        if not isinstance(e, UserError):
            message = f"{type(e).__name__}: {message}"
        process = os.environ.get("RANK", "0")  # torchrun's name for the number of a process
        print("error:" if process == "0" else f"error in process {process}:", message, file=sys.stderr)
        sys.exit(2)


def make_parser(description: str, **settings) -> argparse.ArgumentParser:
    """argparse, with the docstring of a command as it is written."""
    settings |= dict(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    return argparse.ArgumentParser(allow_abbrev=False, **settings)


def at_least(least, kind: type = int):
    """An argparse type: a number of this kind, at least `least`."""

    def number(text: str):
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"it must be at least {least:g}, not {text}")
        return value

    return number


def settings_parser(description: str, settings: list[tuple], **options) -> argparse.ArgumentParser:
    """A parser of settings (name, default, meaning, *choices), also from @FILEs: a flag and its value on a
    line, "#" begins a comment. A setting that is not given is None. A number may be 0 if it is a fraction, or
    if 0 is its default or has a meaning ("0: all").
    """
    parser = make_parser(description, fromfile_prefix_chars="@", **options)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    for name, default, meaning, *choices in settings:
        kind = {"type": str, "choices": choices or None}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif not isinstance(default, str):
            may_be_zero = isinstance(default, float) or not default or "0:" in meaning
            kind = {"type": at_least(0 if may_be_zero else 1, type(default))}
        parser.add_argument(f"--{name}", help=f"{meaning} (default: {default})", **kind)
    return parser


def as_file(settings: dict) -> str:
    """Settings as an @FILE."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, bool):
            lines.append(f"--{name}" if value else f"--no-{name}")
        else:
            lines.append(f"--{name} {shlex.quote(str(value))}")
    return "\n".join(lines) + "\n"


def say(message: str) -> None:
    """Print a line, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def read_json(path: str | Path):
    """The content of a JSON file. Raises UserError, with the file's name, if it is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None


def write_file(path: str | Path, content) -> None:
    """Write tensors (.safetensors), text (a string) or JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            tmp.touch()
            mode = tmp.stat().st_mode  # save_file would make it readable for its owner only
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}
            save_file(tensors, tmp, {"format": "pt"})
            tmp.chmod(mode)
        elif isinstance(content, str):
            tmp.write_text(content, encoding="utf-8")
        else:
            tmp.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
