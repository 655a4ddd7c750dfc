"""What users do wrong ends in one line on stderr, with exit code 2 and nothing written."""

import sys

import pytest
import torch

import eval as evaluation
import generate
import train
from extras import answers, pretrain, published
from extras import gguf as converter
from extras import map as mapping
from support import files
from tests.helpers import HERE, SAY, SHORT, command

NET, READER = ["--hypernet", "{net}"], ["--hypernet", "{reader}"]
BASE = ["--base_model", "{base}"]
RECON = ["--mode", "recon", "--oracles", "{tmp}/oracles"]
DOCUMENTS = [f"@{HERE}/config/d2l.args"]
BAD = {
    # generate.py
    "no description": (generate, [], "one of these: --desc"),
    "empty description": (generate, [*SAY, "--desc", "  "], "--desc number 2 is empty"),
    "empty input": (generate, [*SAY, "--input", ""], "--input is empty"),
    "both": (generate, [*SAY, "--doc", "{tmp}/note.txt"], "one of these: --desc"),
    "no folder": (generate, [*SAY, "--out", ""], "is no new folder"),
    "an adapter for a base model": (generate, [*SAY, *NET, "--base_model", "{adapter}"], "not a model"),
    "two to merge": (generate, [*SAY, *SAY, "--merge", "{tmp}/m"], "takes a single --desc"),
    "merge into the adapter": (generate, [*SAY, "--merge", "{tmp}/m", "--out", "{tmp}/m"], "no new folder"),
    "foreign output": (generate, [*SAY, "--out", "{foreign}"], "did not write it"),
    "foreign folder to merge into": (generate, [*SAY, "--merge", "{foreign}"], "is no new folder"),
    "no checkpoint": (generate, [*SAY, "--hypernet", "{tmp}/none"], "is neither a folder nor USER/REPO"),
    "a preset's name": (generate, [*SAY, "--hypernet", "tiny"], "--hypernet tiny is neither a folder nor"),
    "an adapter": (generate, [*SAY, "--hypernet", "{adapter}"], "holds an adapter, not a hypernetwork"),
    "a file for a folder": (generate, [*SAY, "--out", "{tmp}/note.txt"], "note.txt is a file"),
    "a mistyped folder": (generate, [*SAY, "--hypernet", "here/none"], "here/none is neither a folder"),
    "a config that is a list": (generate, [*SAY, "--hypernet", "{tmp}/list"], "must hold a JSON object"),
    "nothing shipped": (generate, [*SAY, "--base_model", "mistral-7b"], "no hypernetwork for mistral-7b"),
    "other base": (generate, [*SAY, *NET, *BASE], "cannot be used with"),
    "other base of the same name": (
        generate,
        [*SAY, *NET, "--base_model", "{tmp}/tiny"],
        "cannot be used with",
    ),
    "other widths": (generate, [*SAY, "--hypernet", "{other}", *BASE], "another model"),
    "unknown words": (
        generate,
        [*SAY, "--input", "cat unicorn gnu"],
        "no token for gnu, unicorn; it knows words",
    ),
    "not on the hub": (
        generate,
        [*SAY, "--hypernet", "nobody/nothing/sub"],
        "pass its folder: --hypernet DIR",
    ),
    "another text encoder": (generate, ["--desc", "cat", *NET, "--encoder", "base"], "gives 128"),
    "an encoder offline": (generate, [*SAY, *NET, "--encoder", "no/body"], "pass its folder: --encoder DIR"),
    "no document": (generate, ["--doc", "{tmp}/none.txt"], "cannot be read as text"),
    "binary document": (generate, ["--doc", "{net}/hypernet.safetensors"], "cannot be read as text"),
    "document for text-to-lora": (generate, ["--doc", "{tmp}/note.txt", *NET], "reads descriptions"),
    "description for doc-to-lora": (generate, [*SAY, *READER], "reads documents"),
    "a document as instruction": (generate, ["--doc", "{tmp}/note.txt", "--instruction"], "goes with --desc"),
    "unknown device": (generate, [*SAY, "--device", "gpu"], "--device gpu: there are auto"),
    "no tokens": (generate, [*SAY, "--max_new_tokens", "0"], "--max_new_tokens: must be at least 1"),
    "a rank that is none": (train, ["--rank", "8.5"], "--rank: must be a whole number, not 8.5"),
    # eval.py
    "unknown method": (evaluation, ["--methods", "t2l,magic"], "there is no method 'magic'"),
    "missing folder": (evaluation, ["--methods", "oracle"], "the method oracle needs --oracles DIR"),
    "no rewordings": (
        evaluation,
        ["--tasks", "facts", "--methods", "t2l_reworded"],
        "needs descriptions that these tasks do not",
    ),
    "fewer oracles": (evaluation, ["--oracles", "{tmp}/oracles"], "holds adapters of 0 of these 25 tasks"),
    "no test part": (evaluation, ["--tasks", "{tmp}/tasks", "--split", "train"], "has no test part"),
    "no test split": (evaluation, ["--tasks", "{tmp}/tasks"], "but: train (--split train)"),
    "an adapter for a network": (evaluation, ["--recon", "{adapter}"], "holds an adapter"),
    "scores over a text": (evaluation, ["--out", "{foreign}/precious.txt"], "must end in .json"),
    "scores over a folder": (evaluation, ["--out", "{foreign}"], "must end in .json"),
    "no methods": (evaluation, ["--methods", ""], "there is no method ''"),
    "a hypernetwork for a base model": (evaluation, ["--base_model", "{net}"], "not a model"),
    "nothing to compare": (evaluation, ["--compare", "nothere"], "a hypernetwork nothere is neither"),
    "scores below a file": (evaluation, ["--out", "{tmp}/note.txt/r.json"], "note.txt"),
    "unknown tasks": (evaluation, ["--tasks", "{tmp}/none"], "neither benchmarks, chores"),
    "instruction with documents": (evaluation, ["--tasks", "facts", "--instruction"], "into the prompt"),
    # train.py
    "unknown base": (train, ["--base_model", "./nowhere"], "./nowhere is neither a folder, a preset"),
    "unknown flag": (train, ["--depth", "3"], "--depth is not a setting of --mode sft --arch t2l"),
    "unknown architecture": (train, ["--arch", "t3l"], "--arch: invalid choice: 't3l'"),
    "shards without torchrun": (train, ["--shard"], "--shard needs several processes"),
    "not a number": (train, ["--lr", "fast"], "--lr: must be a number, not fast"),
    "nothing as a scaling": (train, ["--alpha", "0"], "--alpha: must be at least 0.001"),
    "no file of flags": (train, ["@config/none.args"], "config/none.args"),
    "a file that names itself": (train, ["@{tmp}/self.args"], "it names itself"),
    "a file of flags after a flag": (train, ["--lr", "1", "@x.args"], "@x.args is not a setting"),
    "tasks of unknown words": (train, ["--tasks", "{tmp}/tasks"], "no token for Paris, Rome"),
    "open questions": (train, [*DOCUMENTS, "--tasks", "{tmp}/open"], "python -m extras.answers"),
    "documents as tasks": (train, ["--tasks", "facts"], "cannot be used with --arch t2l"),
    "tasks as documents": (train, ["--arch", "d2l"], "reads documents (see config/d2l.args)"),
    "documents of equal names": (train, ["--mode", "lora", "--tasks", "facts"], "tasks of equal names"),
    "documents as instructions": (
        train,
        ["--mode", "lora", "--multi_task", "--tasks", "facts", "--instruction"],
        "would put the document itself into the prompt",
    ),
    "documents by reconstruction": (
        train,
        [*RECON, "--arch", "d2l"],
        "--arch d2l is trained with --mode sft",
    ),
    "no oracles": (train, ["--mode", "recon"], "needs --oracles"),
    "empty oracles": (train, ["--mode", "recon", "--oracles", "{foreign}"], "holds no adapters of the train"),
    "oracles of another base": (train, RECON, "another model"),
    "another network to start from": (
        train,
        [*SHORT, "--init_from", "{net}"],
        "has other settings (size: large",
    ),
    "too much dropout": (train, ["--dropout", "1.5"], "--dropout: must be at most 1, not 1.5"),
    "no such device": (train, ["--device", "cuda:7"], "--device cuda:7, but the number of GPUs"),
    "no folder to train into": (train, ["--out_dir", " "], "--out_dir is empty"),
    "no modules": (train, ["--target_modules", ""], "no linear layers named"),
    "benchmarks to train on": (train, ["--tasks", "benchmarks"], "are for eval.py"),
    "odd heads": (train, [*DOCUMENTS, "--n_heads", "9"], "--n_heads must be a multiple of 4"),
    "odd width": (train, ["--latent_size", "10"], "--latent_size must be a multiple of 4"),
    # extras
    "a folder of somebody else": (pretrain, ["{foreign}"], "is in use; choose another folder"),
    "an adapter's base model offline": (converter, ["{elsewhere}", "{tmp}/x.gguf"], "--base_model DIR"),
    "one task on a map": (mapping, ["--split", "val", "--n_tasks", "2"], "--n_tasks: must be at least 3"),
    "tasks with answers": (answers, ["{tmp}/tasks", "{tmp}/new", *BASE], "only documents can have open"),
    "answers into a folder in use": (answers, ["{tmp}/open", "{foreign}", *BASE], "is in use"),
    "answers into the same folder": (answers, ["{tmp}/open", "{tmp}/open", *BASE], "is in use"),
    "no published checkpoint": (published, ["{foreign}", "{tmp}/new"], "holds no published checkpoint"),
    "published into a folder in use": (published, ["{foreign}", "{foreign}"], "is in use"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(places, monkeypatch, capsys, case, tmp_path):
    module, words, message = BAD[case]
    if module is converter:
        pytest.importorskip("gguf")
    if module is mapping:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # what a default would write is seen, and a user's out/ not in the way
    (tmp_path / "here").mkdir()
    before = sorted(places["tmp"].rglob("*"))
    assert command(module, *[word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if line.startswith("error:") or " error: " in line]
    assert message in error and "Traceback" not in error and len(lines) == 1
    assert sorted(places["tmp"].rglob("*")) == before and [*tmp_path.rglob("*")] == [tmp_path / "here"]


def test_a_broken_text_on_the_command_line_is_one_line(capsys):
    assert command(generate, "--desc", "caf\udce9") == 2  # what Python makes of a byte of Latin-1
    assert "the command line is not valid UTF-8" in capsys.readouterr().err


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(SystemExit) as stop:
        files.command(main)
    assert stop.value.code == 2 and "out of memory; try a smaller" in capsys.readouterr().err


def test_an_error_of_a_later_process_says_so(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert command(generate, "--desc", "") == 2
    assert capsys.readouterr().err.startswith("error in process 3: --desc is empty")


def test_memory_that_the_machine_does_not_have_is_one_line(capsys):
    assert command(train, "--latent_size", "4000000") == 2
    assert "out of memory; try a smaller --rank" in capsys.readouterr().err
