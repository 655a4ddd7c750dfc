"""Runs: their folders, their state, what they keep."""

import collections
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hypernet
import train
from support import state
from support.files import read_file, write_file
from tasks import checks
from tests.helpers import HERE, LORA, SHORT, command, fit, interrupted_in_call, losses_of
from tests.helpers import refused, run_of, small_config


def test_learning_rates():
    args = types.SimpleNamespace(lr=2.0, warmup=0.1, max_steps=100, schedule="linear")
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0
    assert abs(rates[55] - 1.0) < 1e-9 and 0 < rates[-1] < 0.03
    args.schedule = "cosine"
    rates = [train.learning_rate(step, args) for step in range(101)]
    assert abs(rates[55] - 1.0) < 1e-6 and rates[100] == pytest.approx(1e-7)
    assert rates == rates[:10] + sorted(rates[10:])[::-1]
    args.schedule, args.warmup = "late", 0.3
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[30:67] == [2.0] * 37 and abs(rates[83] - 1.0) < 0.05 and rates[99] < 0.1
    args.weight_decay = 0.01
    net = hypernet.TextToLoRA(small_config("large", head_lr=0.5))
    groups = train.make_optimizer(net, args).param_groups
    kinds = collections.Counter((group["lr_factor"], group["weight_decay"]) for group in groups)
    assert set(kinds) == {(0.5, 0.01), (0.5, 0.0), (1.0, 0.01), (1.0, 0.0)}
    assert len(groups) == 4  # one for each kind

    net = hypernet.TextToLoRA(small_config("large", offset_lr=3.0))
    groups = train.make_optimizer(net, args).param_groups
    (offset,) = [group["params"] for group in groups if group["lr_factor"] == 3.0]
    assert sum(p.numel() for p in offset) == 3 * 4 * (10 + 10 + 10 + 6)  # one adapter


def test_gradients_are_clipped_and_each_term_of_the_loss_has_a_column(tmp_path, monkeypatch):
    norms, real = [], torch.optim.AdamW.step

    def note(optimizer, *args):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.get_total_norm(gradients))
        return real(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    losses = fit(tmp_path / "run", *SHORT, "--l1", "0.1", "--max_steps", "2")
    assert len(norms) == 2 and max(norms) < 1.001 < max(losses_of(tmp_path / "run", "grad_norm"))
    terms = [losses_of(tmp_path / "run", f"loss_{name}") for name in ("task", "l1", "l2")]
    assert [sum(values) for values in zip(*terms)] == pytest.approx(losses)


def test_resume_after_kill_is_exact(tmp_path, capsys):
    words = [*SHORT, "--dropout", "0.1", "--neftune_alpha", "5", "--max_steps", "60", "--val_every", "7"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, *words)
    start = [sys.executable, "train.py", *words, "--out_dir", str(cut)]
    run, metrics = subprocess.Popen(start, cwd=HERE, stderr=subprocess.DEVNULL), cut / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 17):
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert (cut / "state.safetensors").exists(), "the run had ended before it was killed"
    metrics.write_text(metrics.read_text() + '{"step": 99, "lo')  # a kill may leave half a line
    before = {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, *words, "--out_dir", cut) == command(train, *words, "--out_dir", whole) == 2
    assert command(train, "--out_dir", cut, "--resume", "--max_steps", "3") == 2  # it is past that
    assert command(train, "--out_dir", cut, "--resume", "--latent_size", "64") == 2  # another network
    assert command(train, "--out_dir", whole, "--resume") == 2  # it is finished
    assert f"train further with --init_from {whole}" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, "--out_dir", cut, "--resume") == 0  # the settings are those of the run
    assert losses_of(cut) == losses_of(whole) and losses_of(cut, "val_loss") == losses_of(whole, "val_loss")
    ours, theirs = (load_file(folder / "hypernet.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs) and not (cut / "state.safetensors").exists()


def test_ctrl_c_saves_the_state_and_says_how_to_continue(tmp_path, monkeypatch, capsys):
    """A run that goes on reads neither the network that it started from, nor a text encoder."""
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    run, start = tmp_path / "a run", ["--init_from", tmp_path / "first"]
    monkeypatch.setattr(train, "sft_step", interrupted_in_call(3, train.sft_step)[0])
    assert command(train, *SHORT, *start, "--max_steps", "2000", "--out_dir", run) == 130
    again = f"interrupted after 3 steps; to continue: python train.py --resume --out_dir '{run}'"
    assert again in capsys.readouterr().err
    assert int(load_file(run / "state.safetensors")["step"]) == len(losses_of(run)) == 3
    shutil.rmtree(tmp_path / "first")
    checkpoint = state.Checkpoint(tmp_path, checks.identify([]), 2)
    checkpoint.run, checkpoint.run_file = read_file(run / "state.json") | {"processes": 2}, run / "state.json"
    refused("this run has 1 processes, not 2", checkpoint.resume, None, None)
    assert len(fit(run, "--resume", "--max_steps", "5")) == 5


def test_a_run_that_dies_in_its_first_step_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sft_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(train, *SHORT, "--out_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    words = [*SHORT, "--max_steps", "9", "--val_every", "2", "--out_dir", tmp_path / "run"]
    real, calls = train.task_loss, []

    def sixth_is_nan(*a):
        calls.append(1)
        return real(*a) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(train, "task_loss", sixth_is_nan)
    assert command(train, *words) == 2 and "the loss is nan in step 6" in capsys.readouterr().err
    assert int(load_file(tmp_path / "run" / "state.safetensors")["step"]) == 4
    monkeypatch.setattr(train, "task_loss", real)
    assert len(fit(tmp_path / "run", "--resume", "--lr", "1e-3")) == 9


def test_the_best_weights_are_kept_also_if_the_run_is_killed_before_it_writes_them(tmp_path, monkeypatch):
    """Those with the lowest validation loss, to the last bit; neither the first nor the last ones."""
    losses, real, n_saved = iter([0.5, 0.2, 0.9, 0.4]), train.save, []

    def save(*args):
        n_saved.append(1)
        return real(*args) if len(n_saved) == 1 else 1 / 0

    monkeypatch.setattr(train, "validate", lambda run: {"val_loss": next(losses), "val_accuracy": 0.0})
    monkeypatch.setattr(train, "save", save)
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):  # in step 4, which is the best
        command(train, *SHORT, "--max_steps", "8", "--val_every", "2", "--out_dir", run)
    best = load_file(run / "state.safetensors")
    monkeypatch.setattr(train, "save", real)
    fit(run, "--resume", "--lr", "1e-4")
    assert losses_of(run, "val_loss") == [0.5, 0.2, 0.9, 0.4] and int(best["step"]) == 4
    kept = load_file(run / "hypernet.safetensors")
    assert all(torch.equal(kept[name], best[f"net {name}"]) for name in kept)


# -------------------- What a run refuses, keeps and says --------------------


def test_two_runs_into_one_folder_do_not_mix(tmp_path):
    """The second one is refused from the first moment, long before the first one has written anything."""
    folder = tmp_path / "run"
    with state.reserved(folder, "--lr 1\n", False):
        for resumes in (False, True):
            refused("a run is going on there", state.reserved(folder, "--lr 2\n", resumes).__enter__)
        assert (folder / "train.args").read_text() == "--lr 1\n"
    assert not folder.exists()  # nothing was saved
    with state.reserved(folder, "--lr 1\n", False):
        (folder / "state.safetensors").touch()
    refused("is in use; choose another", state.reserved(folder, "--lr 1\n", False).__enter__)
    with state.reserved(folder, "--lr 2\n", True):
        assert (folder / "train.args").read_text() == "--lr 1\n"  # until the state has been read


def task_folder_of(folder: Path, names: str) -> Path:
    """A folder of tasks that swap two words, with one of each name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        instances = [{"input": f"cat {word}", "output": [f"{word} cat"]} for word in ("dog", "red", "sun")]
        write_file(folder / f"{name}.json", {"descriptions": [f"Swap {name}."], "Instances": instances})
    return folder


def test_a_run_with_other_tasks_than_before_is_not_resumed(tmp_path, monkeypatch, capsys):
    tasks, run = task_folder_of(tmp_path / "tasks", "ab"), tmp_path / "run"
    words = [*LORA, "--tasks", tasks, "--max_steps", "50", "--out_dir", run]
    monkeypatch.setattr(train, "sft_step", interrupted_in_call(2, train.sft_step)[0])
    assert command(train, *words) == 130
    monkeypatch.undo()
    task_folder_of(tasks, "c")
    assert command(train, "--resume", "--out_dir", run) == 2
    assert "tasks have changed since this run was started (added or removed: c)" in capsys.readouterr().err
    assert command(train, "--resume", "--rank", "4", "--out_dir", run) == 2
    assert "this run has --rank 8, not 4" in capsys.readouterr().err
    assert command(train, "--resume", "--mode", "sft", "--out_dir", run) == 2
    (tasks / "c.json").unlink()
    content = read_file(tasks / "a.json")
    write_file(tasks / "a.json", content | {"descriptions": ["Swap them."]})
    assert command(train, "--resume", "--out_dir", run) == 2
    assert "their texts are different" in capsys.readouterr().err
    write_file(tasks / "a.json", content)
    assert command(train, "--resume", "--max_steps", "4", "--out_dir", run) == 0
    assert "changed: --max_steps 4 (before: 50)" in capsys.readouterr().out
    assert sorted(file.name for file in run.iterdir()) == ["a", "b", "metrics.jsonl", "train.args"]


def test_oracles_say_what_stands_in_the_prompts(tmp_path):
    """A reconstruction of them cannot say otherwise."""
    for name, words in (("plain", []), ("with", ["--instruction"])):
        fit(tmp_path / name, *LORA, *words, "--n_tasks", "2", "--tasks_per_batch", "2", "--max_steps", "1")
    fit(tmp_path / "net", "@config/recon.args", "--oracles", tmp_path / "with", "--max_steps", "1")
    assert read_file(tmp_path / "net" / "config.json")["instruction"] is True
    (name,) = [file.name for file in (tmp_path / "with").iterdir() if file.is_dir()][:1]
    shutil.rmtree(tmp_path / "plain" / name)
    shutil.copytree(tmp_path / "with" / name, tmp_path / "plain" / name)
    words = ["@config/recon.args", "--oracles", tmp_path / "plain", "--out_dir", tmp_path / "mixed"]
    assert command(train, *words) == 2


def test_a_start_from_a_network_of_other_settings_is_refused(tmp_path):
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    start = [*SHORT, "--init_from", tmp_path / "first"]
    started, saved = run_of(*start).net.state_dict(), hypernet.load_hypernet(tmp_path / "first").state_dict()
    assert all(torch.equal(started[name], saved[name]) for name in saved)
    for changed in ["--alpha", "8"], ["--target_modules", "v_proj,q_proj"]:  # with weights of equal shapes
        refused("that network has other settings", run_of, *start, *changed)
