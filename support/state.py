"""The folder of a run: metrics.jsonl, the state that --resume continues from, the best weights."""

import json
import math
import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from support import flags
from support.files import UserError, read_file, read_object, write_file


@contextmanager
def locked(folder: Path):
    """Lock a folder; the lock of a killed process is gone. Raises UserError if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out_dir {folder} is in use: a run is going on there") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def reserved(folder: Path, settings: str, resumes: bool):
    """Take the folder of a run, write its settings there (train.args), and lock it until the run ends.

    Raises UserError if it is not empty, unless the run `resumes`, or if a run is going on there. A run that
    fails before it saves anything gives the folder back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not resumes and any(folder.iterdir()):
            advice = "choose another, delete it, or --resume an interrupted run"
            raise UserError(f"--out_dir {folder} is in use; {advice}")
        try:
            if not resumes:
                write_file(folder / "train.args", settings)
            yield
        finally:
            if [file.name for file in folder.iterdir()] == ["train.args"]:
                (folder / "train.args").unlink()
                with suppress(OSError):  # a link, or the current folder
                    folder.rmdir()


def recorded_words(folder: str) -> list[str]:
    """The settings of an interrupted run, as words. Raises UserError if there is none in this folder."""
    if not Path(folder, "state.safetensors").exists():
        is_finished = Path(folder, "hypernet.safetensors").exists()
        advice = f"train further with --init_from {folder}" if is_finished else "start it in a new folder"
        raise UserError(f"--resume: {folder} holds no interrupted run; {advice}")
    return [*flags.expand([f"@{folder}/train.args"]), "--out_dir", folder]


class Checkpoint:
    """The folder of a run: metrics.jsonl with a row per step, its state, and which weights were the best.

    The best are those with the lowest validation loss. `tasks` are the names and a checksum of the run's
    tasks, `n_processes` those that compute it.
    """

    def __init__(self, folder: Path, tasks: dict, n_processes: int):
        self.metrics = folder / "metrics.jsonl"
        self.state_file, self.run_file = folder / "state.safetensors", folder / "state.json"
        self.run = {"processes": n_processes, **tasks}
        self.best: dict | None = None  # the row of the best weights so far

    def add(self, row: dict) -> bool:
        """Write the row of a step. Returns whether its weights are the best so far, by a validation."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return self.note_best(row)

    def note_best(self, row: dict) -> bool:
        """Whether the weights of a step are at least as good as the best so far; then they are the best."""
        loss = row.get("val_loss", math.nan)
        if math.isnan(loss) or (self.best and loss > self.best["val_loss"]):
            return False
        self.best = row
        return True

    def best_step(self) -> int:
        """The step of the best weights; 0 if there was no validation."""
        return self.best["step"] if self.best else 0

    def save_state(self, step: int, net: nn.Module, optimizer) -> None:
        """Write what --resume needs."""
        if not self.run_file.exists():
            write_file(self.run_file, self.run)
        save_state(self.state_file, step, net, optimizer)

    def resume(self, net: nn.Module, optimizer) -> int:
        """Put the saved state into net and optimizer; returns the number of steps done."""
        saved = read_object(self.run_file)
        if (saved["names"], saved["checksum"]) != (self.run["names"], self.run["checksum"]):
            changed = sorted(set(saved["names"]) ^ set(self.run["names"]))
            what = f"added or removed: {', '.join(changed[:5])}" if changed else "their texts are different"
            raise UserError(f"--resume: the tasks have changed since this run was started ({what})")
        if saved["processes"] != self.run["processes"]:
            message = f"--resume: this run has {saved['processes']} processes, not {self.run['processes']}"
            raise UserError(f"{message}: its dropout would be another")
        return load_state(self.state_file, net, optimizer)

    def rewind(self, step: int) -> None:
        """Forget the rows after a saved state."""
        rows = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:step]  # one per step
        write_file(self.metrics, "".join(rows))
        for row in rows:
            self.note_best(json.loads(row))

    def close(self) -> None:
        """Remove the state of a finished run."""
        self.state_file.unlink()
        self.run_file.unlink()


def save_state(path: Path, step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write step, weights and moments. Randomness follows from the step, the best loss from metrics.jsonl."""
    tensors = {"step": torch.tensor(step)}
    for name, tensor in net.state_dict().items():
        tensors[f"net {name}"] = tensor
    for name, p in net.named_parameters():
        for key, tensor in optimizer.state.get(p, {}).items():
            tensors[f"{key} {name}"] = tensor
    write_file(path, tensors)


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state into net and optimizer; returns the number of steps done."""
    tensors = read_file(path)
    step = int(tensors["step"])
    net.load_state_dict({name: tensors[f"net {name}"] for name in net.state_dict()})
    for name, p in net.named_parameters():
        if p.requires_grad:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[p][key] = tensors[f"{key} {name}"].to(p.device)
    return step


def on_ctrl_c() -> list:
    """Catch Ctrl-C once. Returns a list that it fills, so that the loop can end after a step."""
    interrupts = []

    def note(number, frame) -> None:
        interrupts.append(number)
        signal.signal(number, signal.default_int_handler)  # the second one ends the run at once

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return interrupts
