"""How flags are read: from the command line, and from files of flags such as those in config/.

A file of flags has one flag and its value on a line, as in `--lr 3e-3  # a comment`. "#" begins a comment;
quote a value that has one. `@FILE` arguments stand first and mean the flags in the file, which may begin with
further files. If a flag occurs twice, the last one counts. The settings of a run and of a network are the
fields of dataclasses that are made by `setting`.
"""

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from support.files import UserError


class Setting(NamedTuple):
    """A flag with its default, and the values that it may have."""

    name: str
    default: bool | int | float | str
    meaning: str
    least: float = 0
    most: float = math.inf
    choices: tuple[str, ...] = ()
    kinds: str = ""  # kinds of runs, such as "lora recon"; "" is all

    def number(self, text: str) -> int | float:
        """The value of a number, checked."""
        try:
            value = type(self.default)(text)
        except ValueError:
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            raise argparse.ArgumentTypeError(f"must be {kind}, not {text}") from None
        if not value >= self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least}, not {text}")
        if value > self.most:
            raise argparse.ArgumentTypeError(f"must be at most {self.most}, not {text}")
        return value


def setting(default, meaning: str, least=0, most=math.inf, choices=(), kinds=""):
    """A field of a dataclass that is also a flag. The arguments are those of `Setting`."""
    return dataclasses.field(default=default, metadata={"flag": (meaning, least, most, choices, kinds)})


def settings_of(config_class) -> list[Setting]:
    """The fields of a dataclass that were made by `setting`."""
    settings = []
    for field in dataclasses.fields(config_class):
        if "flag" in field.metadata:
            settings.append(Setting(field.name, field.default, *field.metadata["flag"]))
    return settings


def used_by(kind: str, settings: Iterable[Setting]) -> tuple[list[Setting], list[Setting]]:
    """Settings that a kind of run uses, and the others."""
    used, unused = [], []
    for item in settings:
        is_used = not item.kinds or kind in item.kinds.split()
        (used if is_used else unused).append(item)
    return used, unused


def at_least(least: int):
    """A type for argparse: integers that are not smaller."""
    return Setting("", least, "", least).number


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults that are not None, and the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reads flags, with errors of one line."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise UserError(message)

    def parse(self, words: list[str], what: str) -> argparse.Namespace:
        """Parse words. Raises UserError for a flag that is not a setting of `what`."""
        args, unknown = self.parse_known_args(words)
        if unknown:
            message = f"{unknown[0]} is not a setting of {what} (--help lists them); @FILEs stand in front"
            raise UserError(message)
        return args

    def add_settings(self, settings: list[Setting]) -> None:
        """A flag for each setting, of the type of its default."""
        for item in settings:
            options = {"default": item.default}
            if isinstance(item.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(item.default, str):
                options["choices"] = item.choices or None
            else:
                options["type"] = item.number
            self.add_argument(f"--{item.name}", **options)


# -------------------- Files of flags --------------------

def expand(words: list[str], inside: tuple[str, ...] = ()) -> list[str]:
    """Replace the @FILEs that stand first by their flags. `inside` are the files that are being read."""
    if not words or not words[0].startswith("@"):
        return words
    file = words[0].removeprefix("@")
    if file in inside:
        raise UserError(f"{file} cannot be read as a file of flags: it names itself")
    try:
        in_file = shlex.split(Path(file).read_text(encoding="utf-8-sig"), comments=True)
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as a file of flags: {e}") from None
    return expand(in_file, (*inside, file)) + expand(words[1:], inside)


def say_changes(settings: list[Setting], before, args, may_change: list[str]) -> None:
    """Print what a resumed run changes. Raises UserError if that is not in may_change."""
    changes = []
    for item in settings:
        old, new = getattr(before, item.name), getattr(args, item.name)
        if old != new and item.name not in may_change:
            raise UserError(f"--resume: this run has --{item.name} {old}, not {new}")
        if old != new:
            changes.append(f"--{item.name} {new} (before: {old})")
    if changes and os.environ.get("RANK", "0") == "0":
        print("changed:", ", ".join(changes))


def as_text(settings: list[Setting], args: argparse.Namespace) -> str:
    """The settings as the text of a file of flags."""
    lines = []
    for item in settings:
        value = getattr(args, item.name)
        if isinstance(item.default, bool):
            lines.append(f"--{item.name}" if value else f"--no-{item.name}")
        else:
            lines.append(f"--{item.name} {shlex.quote(str(value))}")
    return "\n".join(lines) + "\n"


def print_settings(title: str, settings: list[Setting], args: argparse.Namespace) -> None:
    """Print each setting with its value and its meaning."""
    print(f"\n{title}\n")
    for item in settings:
        choices = f" ({', '.join(item.choices)})" if item.choices else ""
        print(f"  --{item.name:24} {getattr(args, item.name)!s:20}  {item.meaning}{choices}")
