"""Commands: their flags, what users do wrong, files, runs."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import eval as evaluation
import generate
import hypernet
import lora
import model
import train
from support import files, flags, hub, state
from support.files import read_file, write_file
from tasks import checks
from tests.helpers import command, DESC, fit, HERE, interrupted_in_call, LORA, losses_of, refused, repeated
from tests.helpers import run_of, SAY, SHORT, small_config, TINY, tiny_llama

# -------------------- Flags --------------------


def test_help_shows_the_values_of_the_run(capsys):
    for words, values in {
        "@config/gemma-2-2b.args --lr 1e-3": "lr 0.001 dropout 0.05 encoder Alibaba-NLP/gte-large-en-v1.5",
        "@config/mistral-7b-recon.args": "recon_loss delta_w size medium dtype float32",
        "@config/d2l.args --seed 5": "n_blocks 1 target_modules down_proj seed 5",
    }.items():
        assert command(train, *words.split(), "--help") == 0
        shown = dict(re.findall(r"^  --(\w+) +(\S+)  ", capsys.readouterr().out, re.M))
        values = values.split()
        assert [shown[name] for name in values[::2]] == values[1::2]
    for module in (generate, evaluation):
        assert command(module, "--help") == 0


@pytest.mark.parametrize("file", [*HERE.glob("config/*.args"), *HERE.glob("checkpoints/*/*/train.args")])
def test_every_file_of_flags_is_a_run(file, monkeypatch, tmp_path):
    """Each setting is known, and what a run records is what it was given."""
    monkeypatch.chdir(HERE)
    words = ["--out_dir", str(tmp_path / "new")]
    if "recon" in str(file):
        words += ["--oracles", str(tmp_path / "oracles")]
    monkeypatch.setattr(sys, "argv", ["train.py", f"@{file}", *words])
    args = train.parse_args()
    (tmp_path / "train.args").write_text(args.as_text)
    monkeypatch.setattr(sys, "argv", ["train.py", f"@{tmp_path / 'train.args'}"])
    assert vars(train.parse_args()) == vars(args) and args.lr < 1
    assert args.dtype != "auto" and args.encoder != "preset"
    if file.parent == TINY / "sft_large":  # it has the defaults
        monkeypatch.setattr(sys, "argv", ["train.py", *words, "--max_steps", "3000"])
        assert vars(train.parse_args()) | {"as_text": args.as_text} == vars(args)


def test_files_of_flags_stand_first_and_may_begin_with_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """@b.args
    --tasks 'a#b' # comment with an apostrophe's end
    #another
    --out_dir 'a # b' --x "it's"
    """
    (tmp_path / "a.args").write_text(text, encoding="utf-8-sig")
    (tmp_path / "b.args").write_text("--lr 1 --seed 3\n")
    found = flags.expand(["@a.args", "--desc", "@ sign, please"])
    assert found[:4] == ["--lr", "1", "--seed", "3"] and found[-2:] == ["--desc", "@ sign, please"]
    assert found[4:-2] == ["--tasks", "a#b", "--out_dir", "a # b", "--x", "it's"]
    (tmp_path / "a.args").write_text("--x 'a b")
    refused("No closing quotation", flags.expand, ["@a.args"])


UNUSED = {  # flags that count for nothing in a kind of run
    "--mode lora": ["--offset_lr 1", "--oracles x", "--encoder base", "--init_from x"],
    "": ["--oracles x", "--multi_task", "--distill 4", "--n_heads 4"],
    "--mode recon --oracles x": ["--l1 1", "--label_smoothing 0.1", "--rank 4", "--shard", "--offset_lr 1"],
    "@config/d2l.args": ["--instruction", "--label_smoothing 0.1", "--encoder hash"],
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_flag_that_counts_for_nothing_is_refused(kind, capsys):
    for flag in UNUSED[kind]:
        assert command(train, *kind.split(), *flag.split()) == 2
        assert f"{flag.split()[0]} is not a setting of --mode " in capsys.readouterr().err


# -------------------- What users do wrong: one line on stderr, exit code 2 --------------------

MISTAKES = """
generate | | one of these: --desc
generate | --desc caf\udce9 | the command line is not valid UTF-8
generate | --desc x --desc ' ' | --desc number 2 is empty
generate | --desc x --input '' | --input is empty
generate | --desc x --out {note} | is a file
generate | --desc x --merge {foreign} | is no new folder
generate | --desc x --out {tmp}/n/a --merge {tmp}/other/../n | is no new folder
generate | --desc x --out . | is no new folder
generate | --desc x --desc y --merge {tmp}/m | takes a single --desc
generate | --desc x --base_model {adapter} | not a model
generate | --desc x --base_model mistral-7b | no hypernetwork for mistral-7b
generate | --desc x --hypernet {tmp}/none | is neither a folder nor USER/REPO
generate | --desc x --hypernet nobody/nothing/sub | pass its folder as --hypernet
generate | --desc x --hypernet {adapter} | holds an adapter, not a hypernetwork
generate | --desc x --hypernet {tmp}/list | must hold a JSON object
generate | --desc x --hypernet {net} --base_model {base} | cannot be used with
generate | --desc x --hypernet {other} --base_model {base} | another model
generate | --desc cat --hypernet {net} --encoder base | gives 128
generate | --desc x --hypernet {reader} | reads documents
generate | --desc x --input 'cat unicorn gnu' | no token for gnu, unicorn; it knows words
generate | --desc x --device gpu | --device gpu: there are auto
generate | --desc x --max_new_tokens 0 | must be at least 1
generate | --adapter {adapter} --base_model {base} --input '{long}' | do not fit into the base model's window
generate | --adapter {adapter} --out {tmp}/m | --out go with --desc or --doc
generate | --doc {tmp}/none.txt | cannot be read as text
generate | --doc {note} --hypernet {net} | reads descriptions
generate | --doc {note} --instruction | go with --desc
eval | --methods t2l,magic | there is no method 'magic'
eval | --methods oracle | needs --oracles DIR
eval | --tasks facts --methods t2l_reworded | needs descriptions that these tasks do not
eval | --oracles {tmp}/oracles | holds adapters of 0 of these 25 tasks
eval | --tasks {tmp}/tasks --split train | has no test part
eval | --tasks {tmp}/tasks | but: train (--split train)
eval | --tasks {tmp}/none | neither chores, facts
eval | --tasks facts --instruction | into the prompt
eval | --out {foreign} | must end in .json
eval | --out {note}/r.json | note.txt
train | --base_model ./nowhere | is neither a folder, a preset
train | @config/none.args | config/none.args
train | @{tmp}/self.args | it names itself
train | --arch t3l | invalid choice: 't3l'
train | --lr fast | must be a number, not fast
train | --rank 8.5 | must be a whole number
train | --dropout 1.5 | must be at most 1
train | --device cuda:7 | but the number of GPUs
train | --out_dir ' ' | --out_dir is empty
train | --shard | --shard needs several processes
train | --target_modules '' | no linear layers named
train | --latent_size 10 | must be a multiple of 4
train | --arch d2l --tasks facts --target_modules down_proj --n_heads 9 | must be a multiple of 4
train | --tasks {tmp}/tasks | no token for Paris, Rome
train | --arch d2l --tasks {tmp}/open | python -m extras.answers
train | --tasks facts | cannot be used with --arch t2l
train | --mode lora --tasks facts | tasks of equal names
train | --tasks benchmarks | neither chores, facts
train | --mode recon | needs --oracles
train | --mode recon --oracles {foreign} | holds no adapters of the train
train | --mode recon --oracles {tmp}/oracles | another model
train | --mode recon --oracles {tmp}/oracles --arch d2l | is trained with --mode sft
train | --target_modules down_proj --alpha 128 --init_from {reader} | has other settings
pictures.pictures | | one of the arguments --desc --train is required
pictures.pictures | --desc ' ' | --desc is empty
pictures.pictures | --desc x --train base | not allowed with
pictures.pictures | --train hypernet --weights nowhere | is missing
pictures.pictures | --train base | is there already
extras.pretrain | {foreign} | is in use; choose another folder
extras.answers | {tmp}/tasks {tmp}/new --base_model {base} | only documents can have open
extras.answers | {tmp}/open {foreign} --base_model {base} | is in use
extras.answers | {tmp}/open {tmp}/open --base_model {base} | is in use
extras.published | {foreign} {tmp}/new | is no published checkpoint
extras.published | {foreign} {foreign} | is in use
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_bad_input_is_one_line_and_exit_code_2(places, monkeypatch, capsys, line, tmp_path):
    module, words, message = map(str.strip, line.split("|"))
    monkeypatch.chdir(tmp_path)  # what a default would write is seen, and a user's out/ not in the way
    before = sorted(places["tmp"].rglob("*"))
    words = [word.format(**places, long=repeated("cat ", 2100)) for word in shlex.split(words)]
    assert command(importlib.import_module(module), *words) == 2
    error = capsys.readouterr().err
    lines = [said for said in error.strip().splitlines() if said.startswith("error:") or " error: " in said]
    assert message in error and "Traceback" not in error and len(lines) == 1
    assert sorted(places["tmp"].rglob("*")) == before and not [*tmp_path.rglob("*.*")]


def test_out_of_memory_is_one_line_and_a_later_process_says_which_it_is(capsys, monkeypatch):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        files.command(main)
    assert stop.value.code == 2 and "out of memory; try a smaller" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert command(train, "--latent_size", "4000000") == 2  # memory that the machine does not have
    assert capsys.readouterr().err.startswith("error in process 3: out of memory; try a smaller --rank")


# -------------------- Files: nothing half-written, nothing of somebody else's lost --------------------


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link"
    write_file(file, {"a": 1})
    os.link(file, link)
    write_file(file, {"a": 2})
    assert read_file(file) == {"a": 2} and json.loads(link.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_file(file, {"a": object()})
    assert read_file(file) == {"a": 2} and not list(tmp_path.glob("*.tmp"))
    write_file(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == file.stat().st_mode


def test_a_users_folder_is_never_taken_for_one_of_ours(tmp_path):
    """An adapter of somebody else has the same names, but no description.txt."""
    oracle = ["adapter_config.json", "definition.txt"]
    for i, names in enumerate((["description.txt", "notes.md"], ["adapter_config.json"], oracle)):
        mine = tmp_path / str(i)
        for name in names:
            mine.mkdir(exist_ok=True)
            (mine / name).write_text("mine")
        assert command(generate, *SAY, "--out", mine) == 2
        assert command(generate, *SAY, "--out", tmp_path / "out", "--merge", mine) == 2
        assert {file.name: file.read_text() for file in mine.iterdir()} == dict.fromkeys(names, "mine")
    assert command(generate, *SAY, "--out", tmp_path) == 2 and (tmp_path / "0" / "notes.md").exists()


def test_what_the_last_call_wrote_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert command(generate, *SAY, "--desc", "Reverse the fruits.", "--out", out) == 0
    assert (out / "0" / "adapter_config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_adapter", lambda *_: 1 / 0)  # as if the disk were full
        with pytest.raises(ZeroDivisionError):
            command(generate, *SAY, "--out", out)
    assert (out / "1" / "adapter_config.json").exists()  # still there
    assert command(generate, *SAY, "--out", out) == 0  # one adapter in place of two
    assert {file.name for file in out.iterdir()} == generate.OUR_FILES
    assert (out / "description.txt").read_text() == DESC + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_merged_model_answers_as_the_base_model_with_the_adapter(tmp_path):
    """Its settings of generation are the base model's own, and it says what stood in the prompts."""
    own, merged = tmp_path / "own", tmp_path / "merged"
    shutil.copytree(TINY, own, ignore=shutil.ignore_patterns("sft_*", "d2l", "recon"))
    write_file(own / "generation_config.json", {"temperature": 0.7, "do_sample": True, "eos_token_id": 1})
    words = [*SAY, "--base_model", own, "--out", tmp_path / "one", "--merge", merged]
    assert command(generate, *words) == 0
    assert read_file(merged / "generation_config.json")["temperature"] == 0.7
    assert read_file(merged / "prompt.json") == {"instruction": False}
    assert (merged / "description.txt").read_text() == DESC + "\n"
    assert (merged / "model.safetensors").stat().st_mode == (merged / "description.txt").stat().st_mode
    base, tokenizer = model.load_base(str(merged))
    prompt = model.render(tokenizer, model.chat(tokenizer, "cat red dog shirt"))
    assert model.answer(base, tokenizer, [prompt], 8) == [" chat chien"]


def test_a_base_model_that_is_not_whole_is_one_line(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)  # its lm_head is not missing
    base.save_pretrained(tmp_path)
    model.load_base("tiny")[1].save_pretrained(tmp_path)
    write_file(tmp_path / "generation_config.json", {"eos_token_id": 0})
    assert model.load_base(str(tmp_path))[0].generation_config.eos_token_id[0] == 0
    weights, config = read_file(tmp_path / "model.safetensors"), read_file(tmp_path / "config.json")
    kept = {key: tensor for key, tensor in weights.items() if "layers.2." not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    layer = "model.layers.2.input_layernorm.weight"
    refused(f"9 weights are missing, such as {layer}", model.load_base, str(tmp_path))
    for broken in config | {"intermediate_size": 64}, [1]:
        write_file(tmp_path / "config.json", broken)
        refused("cannot be loaded", model.load_base, str(tmp_path))


def test_what_only_shards_need_is_not_imported():
    """It takes most of a second. (Some versions of transformers import it themselves.)"""
    program = "import sys; from transformers import AutoModelForCausalLM; before = {*sys.modules}"
    program += "; import generate; sys.exit('torch.distributed.fsdp' in {*sys.modules} - before)"
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE).returncode == 0


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
    args.weight_decay = 0.01
    net = hypernet.TextToLoRA(small_config("large", head_lr=0.5))
    groups = train.make_optimizer(net, args).param_groups
    kinds = sorted((group["lr_factor"], group["weight_decay"]) for group in groups)
    assert kinds == [(0.5, 0.0), (0.5, 0.01), (1.0, 0.0), (1.0, 0.01)]
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
    for flag, value in ("--label_smoothing", "0.5"), ("--neftune_alpha", "5"):  # each changes the loss
        other = fit(tmp_path / flag, *SHORT, "--l1", "0.1", flag, value, "--max_steps", "1")
        assert abs(other[0] - losses[0]) > 1e-3


def test_resume_after_kill_is_exact(tmp_path, capsys):
    words = [*SHORT, "--dropout", "0.1", "--neftune_alpha", "5", "--max_steps", "45", "--val_every", "7"]
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
    assert command(train, "--out_dir", whole, "--resume") == 2  # it is finished
    assert f"train further with --init_from {whole}" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, "--out_dir", cut, "--resume") == 0  # the settings are those of the run
    assert losses_of(cut) == losses_of(whole) and losses_of(cut, "val_loss") == losses_of(whole, "val_loss")
    ours, theirs = (load_file(folder / "hypernet.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs) and not (cut / "state.safetensors").exists()


def test_ctrl_c_saves_the_state_and_says_how_to_continue(tmp_path, monkeypatch, capsys):
    """A run that goes on does not read the network that it started from."""
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    run, start = tmp_path / "a run", ["--init_from", tmp_path / "first"]
    monkeypatch.setattr(train, "sft_step", interrupted_in_call(3, train.sft_step)[0])
    assert command(train, *SHORT, *start, "--max_steps", "2000", "--out_dir", run) == 130
    again = f"interrupted after 3 steps; to continue: python train.py --resume --out_dir '{run}'"
    assert again in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the next one ends it at once
    assert callable(signal.getsignal(signal.SIGTERM))
    assert int(load_file(run / "state.safetensors")["step"]) == len(losses_of(run)) == 3
    shutil.rmtree(tmp_path / "first")
    checkpoint = state.Checkpoint(tmp_path, checks.identify([]), 2)
    checkpoint.run, checkpoint.run_file = read_file(run / "state.json") | {"processes": 2}, run / "state.json"
    refused("this run has 1 processes, not 2", checkpoint.resume, None, None)
    assert len(fit(run, "--resume", "--max_steps", "5")) == 5


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
    assert "--lr 0.001\n" in (tmp_path / "run" / "train.args").read_text()


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


def test_two_runs_into_one_folder_do_not_mix(tmp_path):
    """The second one is refused from the first moment, long before the first one has written anything."""
    folder = tmp_path / "run"
    with state.reserved(folder, "--lr 1\n", False):
        for resumes in (False, True):
            refused("a run is going on there", state.reserved(folder, "--lr 2\n", resumes).__enter__)
        assert (folder / "train.args").read_text() == "--lr 1\n"
    assert not folder.exists()  # nothing was saved


def test_a_run_with_other_tasks_or_settings_is_not_resumed(tmp_path, monkeypatch, capsys):
    tasks, run = tmp_path / "tasks", tmp_path / "run"
    tasks.mkdir()
    instances = [{"input": f"cat {word}", "output": [f"{word} cat"]} for word in ("dog", "red", "sun")]
    content = {"descriptions": ["Swap."], "Instances": instances}
    for name in "ab":
        write_file(tasks / f"{name}.json", content)
    words = [*LORA, "--tasks", tasks, "--max_steps", "50", "--out_dir", run]
    monkeypatch.setattr(train, "sft_step", interrupted_in_call(2, train.sft_step)[0])
    assert command(train, *words) == 130
    monkeypatch.undo()
    write_file(tasks / "c.json", content)
    assert command(train, "--resume", "--out_dir", run) == 2
    assert "tasks have changed since this run was started (added or removed: c)" in capsys.readouterr().err
    assert command(train, "--resume", "--rank", "4", "--out_dir", run) == 2
    assert "this run has --rank 8, not 4" in capsys.readouterr().err
    (tasks / "c.json").unlink()
    write_file(tasks / "a.json", content | {"descriptions": ["Swap them."]})
    assert command(train, "--resume", "--out_dir", run) == 2
    assert "their texts are different" in capsys.readouterr().err
    write_file(tasks / "a.json", content)
    assert command(train, "--resume", "--max_steps", "2", "--out_dir", run) == 0  # it was at its end
    assert "changed: --max_steps 2 (before: 50)" in capsys.readouterr().out
    assert sorted(file.name for file in run.iterdir()) == ["a", "b", "metrics.jsonl", "train.args"]


def test_oracles_say_what_stands_in_the_prompts(tmp_path):
    fit(tmp_path / "with", *LORA, "--instruction", *"--n_tasks 2 --tasks_per_batch 2 --max_steps 1".split())
    recon = ["@config/recon.args", "--oracles", tmp_path / "with", "--max_steps", "1"]
    fit(tmp_path / "net", *recon)
    assert read_file(tmp_path / "net" / "config.json")["instruction"] is True
    write_file(next((tmp_path / "with").glob("*/prompt.json")), {"instruction": False})
    assert command(train, *recon, "--out_dir", tmp_path / "mixed") == 2  # they differ


def test_a_start_from_a_network_of_other_settings_is_refused(tmp_path):
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    start = [*SHORT, "--init_from", tmp_path / "first"]
    started, saved = run_of(*start).net.state_dict(), hypernet.load_hypernet(tmp_path / "first").state_dict()
    assert all(torch.equal(started[name], saved[name]) for name in saved)
    for changed in ["--alpha", "8"], ["--target_modules", "v_proj,q_proj"]:  # with weights of equal shapes
        refused("that network has other settings", run_of, *start, *changed)
    config = read_file(tmp_path / "first" / "config.json")
    write_file(tmp_path / "first" / "config.json", config | {"encoder": "some/encoder"})
    refused("other settings .encoder: some/encoder, not hash", run_of, *start)
    hub.check_base("User/a", [1, 2, 3], "user/A", [1, 2, 3])
    refused("cannot be used with", hub.check_base, "u/a", [1, 2, 3], "u/b", [1, 2, 3])  # two ids, one shape
