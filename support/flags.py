"""How flags are read: from the command line, and from files of flags such as those in config/.

A file of flags has one flag and its value on a line, as in `--lr 3e-3  # a comment`. `@FILE` arguments stand
first and mean the flags in the file, which may begin with further files. If a flag occurs twice, the last one
counts. Settings come from a table, or are the fields of a dataclass that are made by `setting`.
"""

import argparse
import dataclasses
import math
import shlex
from pathlib import Path
from typing import NamedTuple

from support.files import UserError


class Setting(NamedTuple):
    """A flag with a default, and the least and greatest value that a number may have."""

    name: str
    default: bool | int | float | str
    meaning: str
    least: float = 0
    most: float = math.inf

    def number(self, text: str) -> int | float:
        """The value of a number, checked."""
        value = type(self.default)(text)
        if not value >= self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least}, not {text}")
        if value > self.most:
            raise argparse.ArgumentTypeError(f"must be at most {self.most}, not {text}")
        return value


def setting(default, meaning: str, least: float = 0, most: float = math.inf):
    """A field of a dataclass that is also a flag."""
    return dataclasses.field(default=default, metadata={"flag": (meaning, least, most)})


def settings_of(config_class) -> list[Setting]:
    """The fields of a dataclass that were made by `setting`."""
    settings = []
    for field in dataclasses.fields(config_class):
        if "flag" in field.metadata:
            settings.append(Setting(field.name, field.default, *field.metadata["flag"]))
    return settings


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

    def add_settings(self, settings: list[Setting], choices: dict[str, list[str]]) -> None:
        """A flag for each setting, of the type of its default."""
        for setting in settings:
            options = {"default": setting.default}
            if isinstance(setting.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(setting.default, str):
                options["choices"] = choices.get(setting.name)
            else:
                options["type"] = setting.number
            self.add_argument(f"--{setting.name}", **options)


def expand(words: list[str]) -> list[str]:
    """Replace the @FILEs that stand first by the flags in them. An "@" anywhere else is text."""
    if not words or not words[0].startswith("@"):
        return words
    file = words[0].removeprefix("@")
    try:
        in_file = shlex.split(Path(file).read_text(encoding="utf-8"), comments=True)
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as a file of flags: {e}") from None
    return expand(in_file) + expand(words[1:])


def words_of_run(folder: Path) -> list[str]:
    """The command line of the interrupted run in a folder, with all its settings."""
    if not (folder / "state.safetensors").exists():
        raise UserError(f"--resume: {folder} holds no interrupted run")
    return expand([f"@{folder / 'train.args'}"])


def refuse_changes(before: argparse.Namespace, args: argparse.Namespace, may_change: list[str]) -> None:
    """Raise UserError if a resumed run has other settings than before, except for those in may_change."""
    for name, value in vars(before).items():
        if getattr(args, name) != value and name not in [*may_change, "resume", "help"]:
            raise UserError(f"--resume: this run has --{name} {value}, not {getattr(args, name)}")


def as_text(settings: list[Setting], args: argparse.Namespace) -> str:
    """The settings as the text of a file of flags."""
    lines = []
    for name, default, *_ in settings:
        value = getattr(args, name)
        if isinstance(default, bool):
            lines.append(f"--{name}" if value else f"--no-{name}")
        else:
            lines.append(f"--{name} {shlex.quote(str(value))}")
    return "\n".join(lines) + "\n"


def print_settings(title: str, settings: list[Setting], args: argparse.Namespace) -> None:
    """Print each setting with its value and its meaning."""
    print(f"\n{title}\n")
    for setting in settings:
        print(f"  --{setting.name:24} {getattr(args, setting.name)!s:20}  {setting.meaning}")
