"""How flags are read: from the command line, and from files of flags such as those in this folder.

A file of flags has one flag and its value on a line, as in `--lr 3e-3  # a comment`. `@FILE` on the command
line stands for the flags in it, and a file may name further files. If a flag occurs twice, the last counts.

Settings are a list of (name, default, meaning), or the fields of a dataclass that are made by `setting`. Each
becomes a flag of the type of its default.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from lora import UserError

Settings = list[tuple[str, object, str]]

def setting(default, meaning: str):
    """A field of a dataclass that is also a flag."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})

def settings_of(config_class) -> Settings:
    """The fields of a dataclass that were made by `setting`."""
    settings = []
    for field in dataclasses.fields(config_class):
        if "meaning" in field.metadata:
            settings.append((field.name, field.default, field.metadata["meaning"]))
    return settings

class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults that are not None, and the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

class Parser(argparse.ArgumentParser):
    """Reads flags, also from files, with errors of one line."""

    def __init__(self, description: str, **settings):
        settings |= {"formatter_class": Formatter, "fromfile_prefix_chars": "@", "allow_abbrev": False}
        super().__init__(description=description, **settings)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def error(self, message: str) -> None:
        raise UserError(message)

    def parse_run(self, may_change: list[str]) -> argparse.Namespace:
        """As `parse_args`. --resume starts from the flags that the run in --out_dir has recorded.

        Only those in may_change can then be changed.
        """
        args = self.parse_args()
        if not args.resume:
            return args
        folder = Path(args.out_dir)
        if not (folder / "state.safetensors").exists():
            raise UserError(f"--resume: {folder} holds no interrupted run")
        recorded = [f"@{folder / 'train.args'}"]
        before, args = self.parse_args(recorded), self.parse_args(recorded + sys.argv[1:])
        for name, value in vars(args).items():
            if value != getattr(before, name, None) and name not in may_change:
                raise UserError(f"--resume: this run has --{name} {getattr(before, name, '')}, not {value}")
        return args

    def add_settings(self, settings: Settings, choices: dict[str, list[str]], with_default=True) -> None:
        """A flag for each setting that has none yet. Without defaults, absent flags have no value at all."""
        for name, value, _ in settings:
            if f"--{name}" in self._option_string_actions:
                continue
            default = value if with_default else argparse.SUPPRESS
            if isinstance(value, bool):
                self.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
            else:
                allowed = choices.get(name)
                self.add_argument(f"--{name}", type=type(value), choices=allowed, default=default)

def print_settings(settings: Settings, args: argparse.Namespace) -> None:
    """Print each setting with its value and its meaning."""
    for name, _, meaning in settings:
        print(f"  --{name:24} {getattr(args, name)!s:20}  {meaning}")

def as_flags(settings: Settings, args: argparse.Namespace) -> str:
    """The settings as the text of a file of flags."""
    lines = []
    for name, _, _ in settings:
        value = getattr(args, name)
        if isinstance(value, bool):
            lines.append(f"--{name}" if value else f"--no-{name}")
        else:
            lines.append(f"--{name} {shlex.quote(str(value))}")
    return "\n".join(lines) + "\n"
