"""What users do wrong ends in one line on stderr, with exit code 2 and nothing written."""

import importlib
import shlex
import sys

import pytest
import torch

import generate
import train
from support import files
from tests.helpers import command

MISTAKES = """
generate | | one of these: --desc
generate | --desc x --doc {note} | one of these: --desc
generate | --desc x --desc ' ' | --desc number 2 is empty
generate | --desc x --input '' | --input is empty
generate | --desc x --out '' | is no new folder
generate | --desc x --out {foreign} | did not write it
generate | --desc x --out {note} | is a file
generate | --desc x --merge {foreign} | is no new folder
generate | --desc x --out {tmp}/m --merge {tmp}/m | is no new folder
generate | --desc x --desc y --merge {tmp}/m | takes a single --desc
generate | --desc x --base_model {adapter} | not a model
generate | --desc x --base_model mistral-7b | no hypernetwork for mistral-7b
generate | --desc x --hypernet {tmp}/none | is neither a folder nor USER/REPO
generate | --desc x --hypernet nobody/nothing/sub | pass its folder: --hypernet DIR
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
generate | --doc {tmp}/none.txt | cannot be read as text
generate | --doc {net}/hypernet.safetensors | cannot be read as text
generate | --doc {note} --hypernet {net} | reads descriptions
generate | --doc {note} --instruction | goes with --desc
eval | --methods t2l,magic | there is no method 'magic'
eval | --methods oracle | needs --oracles DIR
eval | --tasks facts --methods t2l_reworded | needs descriptions that these tasks do not
eval | --oracles {tmp}/oracles | holds adapters of 0 of these 25 tasks
eval | --tasks {tmp}/tasks --split train | has no test part
eval | --tasks {tmp}/tasks | but: train (--split train)
eval | --tasks {tmp}/none | neither benchmarks, chores
eval | --tasks facts --instruction | into the prompt
eval | --out {foreign} | must end in .json
eval | --out {note}/r.json | note.txt
train | --base_model ./nowhere | is neither a folder, a preset
train | --depth 3 | is not a setting of --mode sft --arch t2l
train | --lr 1 @x.args | @x.args is not a setting
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
train | --tasks benchmarks | are for eval.py
train | --mode recon | needs --oracles
train | --mode recon --oracles {foreign} | holds no adapters of the train
train | --mode recon --oracles {tmp}/oracles | another model
train | --mode recon --oracles {tmp}/oracles --arch d2l | is trained with --mode sft
train | --size small --latent_size 32 --init_from {net} | has other settings
extras.pretrain | {foreign} | is in use; choose another folder
extras.answers | {tmp}/tasks {tmp}/new --base_model {base} | only documents can have open
extras.answers | {tmp}/open {foreign} --base_model {base} | is in use
extras.published | {foreign} {tmp}/new | holds no published checkpoint
extras.published | {foreign} {foreign} | is in use
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_bad_input_is_one_line_and_exit_code_2(places, monkeypatch, capsys, line, tmp_path):
    module, words, message = map(str.strip, line.split("|"))
    monkeypatch.chdir(tmp_path)  # what a default would write is seen, and a user's out/ not in the way
    before = sorted(places["tmp"].rglob("*"))
    words = [word.format(**places, long=2100 * "cat ") for word in shlex.split(words)]
    assert command(importlib.import_module(module), *words) == 2
    error = capsys.readouterr().err
    lines = [said for said in error.strip().splitlines() if said.startswith("error:") or " error: " in said]
    assert message in error and "Traceback" not in error and len(lines) == 1
    assert sorted(places["tmp"].rglob("*")) == before and not [*tmp_path.rglob("*.*")]


def test_a_broken_text_on_the_command_line_is_one_line(capsys):
    assert command(generate, "--desc", "caf\udce9") == 2  # what Python makes of a byte of Latin-1
    assert "'utf-8' codec can't encode" in capsys.readouterr().err


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
