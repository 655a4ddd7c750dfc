"""Commands: their flags, what users do wrong, files, runs."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import data
import generate
import hypernet
import lora
import model
import support
import train
from support import read_json, write_file
from tests.helpers import (
    DESC,
    HERE,
    LORA,
    SAY,
    SHORT,
    TINY,
    close,
    command,
    config_for,
    fit,
    interrupted_in_call,
    losses_of,
    random_adapter,
    refused,
    run_of,
    small_config,
    tiny_llama,
)

# -------------------- Flags --------------------


@pytest.mark.parametrize("file", [*HERE.glob("config/*.args"), *HERE.glob("checkpoints/*/*/train.args")])
def test_every_file_of_flags_is_a_run(file, monkeypatch, tmp_path):
    """Each setting is known, and what a run records is what it was given."""
    monkeypatch.chdir(HERE)
    args, settings = train.parse_args([f"@{file}", "--out_dir", str(tmp_path / "new")])
    (tmp_path / "train.args").write_text(settings)
    again, _ = train.parse_args([f"@{tmp_path / 'train.args'}"])
    assert vars(again) == vars(args) and args.lr < 1
    assert args.dtype != "auto" and getattr(args, "encoder", "") != "preset"


UNUSED = {  # flags that count for nothing in a kind of run
    "--mode lora": ["--oracles x", "--encoder base", "--init_from x", "--size small", "--distill 4"],
    "": ["--oracles x", "--multi_task", "--distill 4", "--recon_loss delta_w", "--encoder_rank 8"],
    "--mode recon --oracles x": ["--l1 1", "--label_smoothing 0.1", "--rank 4", "--shard"],
    "@config/d2l.args": ["--instruction", "--encoder hash", "--shard", "--size small"],
    "--arch linear": ["--size small", "--head_in_size 8", "--chunk_len 4"],
    "--arch linear --mode recon --oracles x": ["--dropout 0.5"],
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_flag_that_counts_for_nothing_is_refused(kind, capsys):
    for flag in UNUSED[kind]:
        with pytest.raises(SystemExit):
            train.parse_args([*kind.split(), *flag.split()])
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_help_shows_the_flags_of_the_run(capsys):
    """Of a network's file, too, with its defaults."""
    for words, there, absent in (
        (["--arch", "d2l"], "width of the Perceiver (default: 512)", "--size"),
        (["--arch", "linear"], "a single map (default: 64)", "--head_in_size"),
        (["--mode", "recon"], "--oracles", "--micro_batch"),
    ):
        with pytest.raises(SystemExit):
            train.parse_args([*words, "--help"])
        said = capsys.readouterr().out
        assert there in " ".join(said.split()) and f"{absent} " not in said


# -------------------- What users do wrong: one line on stderr, exit code 2 --------------------

MISTAKES = """
generate | | one of the arguments --desc --doc --adapter is required
generate | --desc x --input '' | a text of --input is empty
generate | --desc x --merge {foreign} | is no new folder
generate | --desc x --out {tmp} | is no new folder
generate | --desc x --desc y --merge {tmp}/m | takes a single --desc
train | --base_model {adapter} | is an adapter, not a model
generate | --desc x --base_model mistral-7b | no hypernetwork that reads descriptions is shipped for mistralai
generate | --desc x --hypernet {tmp}/cut | has not saved weights yet
generate | --desc x --hypernet {tiny} | holds a model, not a hypernetwork
generate | --desc x --hypernet {tmp}/oracles | holds adapters, not a hypernetwork
generate | --desc x --hypernet {net} --base_model {base} | cannot be used with
generate | --desc x --hypernet {other} --base_model {base} | another model
generate | --desc x --hypernet {reader} | reads documents
generate | --desc x --encoder base | is 128 wide; this network was trained with 8192
generate | --desc x --input 'cat unicorn gnu' | no token for gnu, unicorn; it knows words
generate | --desc x --device cuda | torch finds no CUDA GPU
generate | --adapter {adapter} --out {tmp}/m | --out go with --desc or --doc
generate | --doc {tmp}/none.txt | FileNotFoundError
generate | --doc {note} --instruction | go with --desc
eval | --methods net,magic | there is no method 'magic'
eval | --methods oracle | needs --oracles DIR
eval | --tasks facts --n_tasks 2 --methods net_reworded | needs tasks with descriptions in other wordings
eval | --oracles {tmp}/oracles | holds adapters of 0 of these 25 tasks
eval | --recon {net} --methods recon | was trained by SFT
eval | --tasks {tmp}/tasks --split train | has no test part
eval | --tasks facts --instruction | into the prompt
eval | --out {mine} | does not hold results of eval.py
eval | --n_examples 0 | must be at least 1
train | --base_model ./nowhere | OSError
train | --micro_batch -1 | must be at least 1, not -1
train | --warmup 2 | is a fraction
train | --examples_per_task 0 | must be at least 1, not 0
train | --alpha 0 | must be at least 0.001, not 0
eval | --n_tasks -1 | must be at least 0
train | --arch d2l --n_blocks 0 | must be at least 1, not 0
train | --skip 1 --head_in_size 8 | --skip needs --head_in_size 64
generate | --desc x --max_new_tokens 0 | must be at least 1
train | --arch rotary | only for --size small
train | --arch encoder_lora | needs a text encoder of the hub
train | --resume --out_dir {foreign} | train.args
train | --shard | --shard needs several processes
train | --arch foo-bar | there is no such network, but t2l, d2l, encoder_lora
train | --arch d2l --tasks facts --target_modules down_proj --chunk_len 600 | base model's window of 512
train | --tasks {tmp}/tasks | no token for Paris, Rome
train | --tasks benchmarks | neither chores, facts
train | --arch d2l --tasks {tmp}/open --n_heads 4 | python -m extras.answers
train | --tasks facts | cannot be used with --arch t2l
train | --mode lora --tasks facts | tasks of equal names
train | --mode recon --oracles {foreign} | holds no adapters of the train
train | --mode recon --oracles {tmp}/oracles | another model
train | --mode recon --oracles {tmp}/oracles --arch d2l | is trained with --mode sft
train | --init_from {reader} | that network is of --arch d2l, not t2l
train | --out_dir {foreign} | is in use
pictures.pictures | --desc x --input a.png --out a.png | would overwrite
pictures.pictures | --train base | is there already
pictures.pictures | --train base --steps 0 | must be at least 1
extras.answers | {tmp}/tasks {tmp}/new --base_model {base} | only documents can have open
extras.published | {foreign} {tmp}/new | is no published checkpoint
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_bad_input_is_one_line_and_exit_code_2(places, monkeypatch, capsys, line, tmp_path):
    module, words, message = map(str.strip, line.split("|"))
    monkeypatch.chdir(tmp_path)  # what a default would write is seen, and a user's out/ not in the way
    before = sorted(places["tmp"].rglob("*"))
    words = [word.format(**places) for word in shlex.split(words)]
    assert command(importlib.import_module(module), *words) == 2
    error = capsys.readouterr().err
    lines = [said for said in error.strip().splitlines() if said.startswith("error:") or " error: " in said]
    assert message in error and "Traceback" not in error and len(lines) == 1
    assert sorted(places["tmp"].rglob("*")) == before and not [*tmp_path.rglob("*.*")]


def test_an_error_of_a_library_is_one_line_and_a_later_process_says_which_it_is(capsys, monkeypatch):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(SystemExit) as stop:
        support.command(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said == "error: OutOfMemoryError: CUDA out of memory. Tried to allocate\n"
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        support.command(main)
    assert capsys.readouterr().err.startswith("error in process 3: ")
    monkeypatch.setenv("T2L_TRACEBACK", "1")
    with pytest.raises(torch.OutOfMemoryError):
        support.command(main)


# -------------------- Files: nothing half-written, nothing of somebody else's lost --------------------


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link"
    write_file(file, {"a": 1})
    os.link(file, link)
    write_file(file, {"a": 2})
    assert read_json(file) == {"a": 2} and json.loads(link.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_file(file, {"a": object()})
    assert read_json(file) == {"a": 2} and not list(tmp_path.glob("*.tmp"))
    write_file(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == file.stat().st_mode


def test_a_users_folder_is_never_taken_for_one_of_ours(tmp_path):
    """--out is a new folder, or exactly what this command writes."""
    assert command(generate, *SAY, "--out", tmp_path / "ad" / "a") == 0
    mine = tmp_path / "ad" / "mine"  # an adapter of somebody else beside it
    shutil.copytree(tmp_path / "ad" / "a", mine)
    (mine / "description.txt").unlink()
    more = tmp_path / "more"  # a file of the user's own beside ours
    shutil.copytree(tmp_path / "ad" / "a", more)
    (more / "notes.md").write_text("mine")
    for folder in (tmp_path / "ad", mine, more, tmp_path):
        before = sorted(folder.rglob("*"))
        assert command(generate, *SAY, "--desc", "x", "--out", folder) == 2
        assert command(generate, *SAY, "--out", tmp_path / "new", "--merge", folder) == 2
        assert sorted(folder.rglob("*")) == before


def test_what_the_last_call_wrote_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert command(generate, *SAY, "--desc", "Reverse the fruits.", "--out", out) == 0
    assert (out / "0" / "adapter_config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_adapter", lambda *_: 1 / 0)  # as if the disk were full
        assert command(generate, *SAY, "--out", out) == 2
    assert (out / "1" / "adapter_config.json").exists()  # still there
    assert command(generate, *SAY, "--out", out) == 0  # one adapter in place of two
    assert {file.name for file in out.iterdir()} == generate.OUR_FILES
    assert (out / "description.txt").read_text() == DESC + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_merged_model_answers_as_the_base_model_with_the_adapter(tmp_path):
    """Its settings of generation are the base model's own, and it says what stood in the prompts."""
    own, merged = tmp_path / "own", tmp_path / "merged"
    shutil.copytree(TINY, own, ignore=shutil.ignore_patterns("sft_*", "d2l", "recon"))
    tokenizer = model.load_base(model.TINY)[1]
    tokenizer.chat_template = dict.fromkeys(("default", "tool_use"), model.PLAIN_TEMPLATE)
    tokenizer.save_pretrained(own)
    write_file(own / "generation_config.json", {"temperature": 0.7, "do_sample": True, "eos_token_id": 1})
    words = [*SAY, "--base_model", own, "--out", tmp_path / "one", "--merge", merged]
    assert command(generate, *words) == 0
    (templates,) = [path for path in merged.iterdir() if path.is_dir()]
    assert templates.stat().st_mode & 0o111 == 0o111  # others can look into it
    again = ["--adapter", tmp_path / "one", "--base_model", own, "--merge", tmp_path / "one" / "merged"]
    assert command(generate, *again) == 0  # of an adapter that is there, beside its files
    assert read_json(merged / "generation_config.json")["temperature"] == 0.7
    assert read_json(merged / "prompt.json") == {"instruction": False}
    assert (merged / "description.txt").read_text() == DESC + "\n"
    assert (merged / "model.safetensors").stat().st_mode == (merged / "description.txt").stat().st_mode
    base, tokenizer = model.load_base(str(merged))
    prompt = model.render(tokenizer, "cat red dog shirt")
    assert model.answer(base, tokenizer, [prompt], 8) == ([" chat chien"], [True])


def test_merged_weights_keep_their_dtype():
    base = lora.inject(tiny_llama().to(torch.bfloat16), ["q_proj"])
    before = base.lora_layers["q_proj"][0].weight.clone()
    lora.merge(base, random_adapter(config_for(base, ["q_proj"])), 9.0)
    after = base.lora_layers["q_proj"][0].weight
    assert after.dtype == torch.bfloat16 and not torch.equal(after, before)


def test_a_base_model_that_is_not_whole_is_one_line(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)  # its lm_head is not missing
    base.save_pretrained(tmp_path)
    model.load_base(model.TINY)[1].save_pretrained(tmp_path)
    write_file(tmp_path / "generation_config.json", {"eos_token_id": 0})
    assert model.load_base(str(tmp_path))[0].generation_config.eos_token_id[0] == 0
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if "layers.2." not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    layer = "model.layers.2.input_layernorm.weight"
    refused(f"9 weights are missing, such as {layer}", model.load_base, str(tmp_path))


# -------------------- Runs --------------------


def test_learning_rates():
    args = types.SimpleNamespace(lr=2.0, warmup=0.1, max_steps=100, schedule="linear")
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0
    assert abs(rates[55] - 1.0) < 1e-9 and 0 < rates[-1] < 0.03
    args.schedule = "cosine"
    rates = [train.learning_rate(step, args) for step in range(101)]
    assert abs(rates[55] - 1.0) < 1e-6 and rates[100] == pytest.approx(1e-7)
    args.schedule, args.warmup = "late", 0.3
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[30:67] == [2.0] * 37 and abs(rates[83] - 1.0) < 0.05 and rates[99] < 0.1


def test_which_parameters_have_weight_decay(reader):
    args = types.SimpleNamespace(lr=2.0, weight_decay=0.01)

    def without_decay(net) -> set[str]:
        names = {id(p): name for name, p in net.named_parameters()}
        none, some = train.make_optimizer(net, args).param_groups
        assert (none["weight_decay"], some["weight_decay"]) == (0, 0.01) and some["params"]
        assert {*names} == {id(p) for p in none["params"] + some["params"]}
        return {names[id(p)] for p in none["params"]}

    net = hypernet.TextToLoRA(small_config("small"))
    assert without_decay(net) == {name for name, p in net.named_parameters() if p.dim() == 1}
    net = hypernet.load_hypernet(reader)
    kept = {"b1", "b2", "perceiver.latents", "perceiver.queries"}
    kept |= {name for name, _ in net.named_parameters() if name.startswith(("scaler", "bias"))}
    assert without_decay(net) == kept | {name for name, p in net.named_parameters() if p.dim() == 1}


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
    for flag, value in ("--label_smoothing", "0.5"), ("--neftune_alpha", "5"):  # each changes the loss
        other = fit(tmp_path / flag, *SHORT, "--l1", "0.1", flag, value, "--max_steps", "1")
        assert abs(other[0] - losses[0]) > 1e-3


def test_resume_after_kill_is_exact(tmp_path):
    words = [*SHORT, "--dropout", "0.1", "--neftune_alpha", "5", "--max_steps", "24", "--val_every", "5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, *words)
    start = [sys.executable, "train.py", *words, "--out_dir", str(cut)]
    run, metrics = subprocess.Popen(start, cwd=HERE, stderr=subprocess.DEVNULL), cut / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 9):
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert (cut / "state.pt").exists(), "the run had ended before it was killed"
    metrics.write_text(metrics.read_text() + '{"step": 99, "lo')  # a kill may leave half a line
    before = {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, *words, "--out_dir", cut) == command(train, *words, "--out_dir", whole) == 2
    assert command(train, "--out_dir", cut, "--resume", "--max_steps", "3") == 2  # it is past that
    assert command(train, "--out_dir", cut, "--resume", "--rank", "4") == 2
    assert command(train, "--out_dir", whole, "--resume") == 2  # it is finished
    assert before == {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, "--out_dir", cut, "--resume") == 0  # the settings are those of the run
    assert losses_of(cut) == losses_of(whole) and losses_of(cut, "val_loss") == losses_of(whole, "val_loss")
    ours, theirs = (load_file(folder / "hypernet.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert sorted(file.name for file in cut.iterdir()) == sorted(file.name for file in whole.iterdir())


def test_ctrl_c_stops_at_once_and_says_how_to_continue(tmp_path, monkeypatch, capsys):
    """A run that goes on does not read the network that it started from."""
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    run, start = tmp_path / "my run", ["--init_from", tmp_path / "first", "--val_every", "2"]
    monkeypatch.setattr(train, "sft_step", interrupted_in_call(6, train.sft_step)[0])
    assert command(train, *SHORT, *start, "--max_steps", "2000", "--out_dir", run) == 130
    assert f"train.py --resume --out_dir '{run}'" in capsys.readouterr().out
    assert len(losses_of(run)) == 5
    shutil.rmtree(tmp_path / "first")
    state = torch.load(run / "state.pt", weights_only=True)
    assert state["step"] == 4
    torch.save(state | {"n_processes": 2}, run / "state.pt")
    assert command(train, "--resume", "--out_dir", run) == 2
    assert "this run has 2 processes, not 1" in capsys.readouterr().err
    torch.save(state, run / "state.pt")
    assert command(train, "--resume", "--max_steps", "4", "--out_dir", run) == 0  # it was at its end
    assert len(losses_of(run)) == 4 and "--max_steps 4\n" in (run / "train.args").read_text()


def test_a_run_without_a_state_is_started_again(tmp_path, monkeypatch, capsys):
    words = [*SHORT, "--max_steps", "3", "--out_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "sft_step", interrupted_in_call(2, train.sft_step)[0])
        assert command(train, *words) == 130
    assert "--resume" not in capsys.readouterr().out
    assert command(train, *words, "--resume") == 2
    with monkeypatch.context() as patch:  # nor is the folder of a run that failed in use
        patch.setattr(train, "sft_step", lambda *_: 1 / 0)
        assert command(train, *words) == 2
    assert command(train, *words) == 0 and len(losses_of(tmp_path / "run")) == 3
    assert command(train, *words) == 2


def test_a_state_is_saved_every_ten_minutes(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 400))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    saved, real = [], train.save_state
    monkeypatch.setattr(train, "save_state", lambda *a: saved.append(a[3]["step"]) or real(*a))
    fit(tmp_path / "run", *SHORT, "--max_steps", "5", "--val_every", "100")
    assert saved[0] < 5 and len(saved) > 1


def test_the_seed_chooses_weights_and_each_process_its_dropout(tmp_path, monkeypatch):
    first = []
    for seed in "0", "1":
        fit(tmp_path / seed, *SHORT, "--seed", seed, "--lr", "0", "--max_steps", "1")
        first.append(load_file(tmp_path / seed / "hypernet.safetensors")["mixer.1.weight"])
    assert not torch.equal(*first)
    seeds, run = [], run_of(*SHORT, "--max_steps", "1")
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for run.process in 0, 1:
        train.train(run, tmp_path / "out", "")
    assert len(set(seeds)) == len(seeds) == 2


def test_randomness_differs_from_step_to_step(monkeypatch, tmp_path):
    """The same tasks, twice: only the noise differs."""
    real = data.draw
    monkeypatch.setattr(data, "draw", lambda tasks, pool, step, *more: real(tasks, pool, 0, *more))
    words = [*SHORT, "--neftune_alpha", "5", "--lr", "0"]
    first, second = fit(tmp_path / "run", *words, "--max_steps", "2")
    assert abs(first - second) > 1e-4
    assert fit(tmp_path / "again", *words, "--max_steps", "1") == [first]


def test_a_loss_that_diverges_stops_the_run(tmp_path, capsys, monkeypatch):
    words = [*SHORT, "--max_steps", "9", "--val_every", "2", "--out_dir", tmp_path / "run"]
    real, calls = train.task_loss, []

    def sixth_is(factor: float):
        def call(*a):
            calls.append(1)
            return real(*a) * (factor if len(calls) == 6 else 1.0)

        return call

    for factor, said in (float("nan"), "the loss is nan in step 6"), (float("inf"), "in step 6"):
        monkeypatch.setattr(train, "task_loss", sixth_is(factor))
        assert command(train, *words) == 2 and said in capsys.readouterr().err
        assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 4
        words = ["--resume", "--out_dir", tmp_path / "run"]
        calls[:] = 4 * [1]
    monkeypatch.setattr(train, "task_loss", real)
    assert len(fit(tmp_path / "run", "--resume", "--lr", "1e-3")) == 9
    assert "--lr 0.001\n" in (tmp_path / "run" / "train.args").read_text()


def test_the_best_weights_are_kept_also_if_the_run_is_killed(tmp_path, monkeypatch):
    """Those with the lowest validation loss, to the last bit; neither the first nor the last ones."""
    values, states, real, kills = {2: 0.5, 4: 0.2, 6: 0.9, 8: 0.4}, {}, train.save_state, [4, 6]

    def validate(run):
        step = len(losses_of(folder)) + 1
        weights = {key: tensor.clone() for key, tensor in run.net.state_dict().items()}
        states.setdefault(step, []).append(weights)
        return {"val_loss": values[step], "val_accuracy": 0.0}

    def save_state(*args):
        """Killed before the state of step 4, whose weights are written already, and before that of step 6."""
        if args[3]["step"] in kills:
            kills.remove(args[3]["step"])
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "save_state", save_state)
    folder = tmp_path / "run"
    assert command(train, *SHORT, "--max_steps", "8", "--val_every", "2", "--out_dir", folder) == 2
    assert command(train, "--resume", "--out_dir", folder) == 2
    fit(folder, "--resume")
    assert losses_of(folder, "val_loss") == [0.5, 0.2, 0.9, 0.4] and len(states[4]) == 2
    kept = load_file(folder / "hypernet.safetensors")
    for computed in states[4]:  # before and after the kill
        assert all(torch.equal(kept[name], computed[name]) for name in kept)


def test_oracles_say_what_stands_in_the_prompts(tmp_path):
    fit(tmp_path / "with", *LORA, "--instruction", *"--n_tasks 2 --tasks_per_batch 2 --max_steps 1".split())
    recon = ["@config/recon.args", "--oracles", tmp_path / "with", "--max_steps", "1"]
    fit(tmp_path / "net", *recon)
    assert read_json(tmp_path / "net" / "config.json")["instruction"] is True
    write_file(next((tmp_path / "with").glob("*/prompt.json")), {"instruction": False})
    assert command(train, *recon, "--out_dir", tmp_path / "mixed") == 2  # they differ


def test_a_start_from_other_oracles_keeps_what_was_learned_and_takes_the_new_statistics(tmp_path):
    for n in "2", "4":
        words = [*LORA, "--n_tasks", n, "--max_steps", "2", "--tasks_per_batch", "2"]
        fit(tmp_path / f"oracles{n}", *words)
    recon = ["--mode", "recon", "--size", "small", "--max_steps", "1", "--tasks_per_batch", "2"]
    fit(tmp_path / "first", *recon, "--oracles", tmp_path / "oracles2")
    run = run_of(*recon, "--oracles", tmp_path / "oracles4", "--init_from", tmp_path / "first")
    first, mean = hypernet.load_hypernet(tmp_path / "first"), lora.statistics(run.oracles)[0]
    assert torch.equal(run.net.mlp3[1].weight, first.mlp3[1].weight)
    close(run.net.offset["q_proj_B"], mean["q_proj"][1].float())
    assert not torch.equal(run.net.offset["q_proj_B"], first.offset["q_proj_B"])


def test_a_start_from_a_network_of_other_settings_is_refused(tmp_path):
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    start = [*SHORT, "--init_from", tmp_path / "first"]
    run = run_of(*start, "--base_model", TINY)
    assert read_json(tmp_path / "first" / "config.json")["base_model"] == "tiny"  # wherever the project is
    started, saved = run.net.state_dict(), hypernet.load_hypernet(tmp_path / "first").state_dict()
    assert all(torch.equal(started[name], saved[name]) for name in saved)
    other = ["--alpha", "8"], ["--target_modules", "v_proj,q_proj"], ["--skip", "0.1"]
    for changed in other:  # with weights of equal shapes
        refused("that network has other settings", run_of, *start, *changed)
    config = read_json(tmp_path / "first" / "config.json")
    write_file(tmp_path / "first" / "config.json", config | {"encoder": "some/encoder"})
    refused("other settings .encoder: some/encoder, not hash", run_of, *start)
    assert model.is_same_base("User/a", [1, 2, 3], "user/A", [1, 2, 3])
    assert not model.is_same_base("u/a", [1, 2, 3], "u/b", [1, 2, 3])  # two ids, one shape
