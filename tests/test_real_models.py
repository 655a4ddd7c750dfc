"""Two real models of other families: T2L_GEMMA names gemma-3-270m, T2L_QWEN Qwen2.5-Coder-0.5B-Instruct.

Gemma 3 has sliding windows, norms on q and k, scaled embeddings and no chat template; Qwen 2.5 has biases on
q, k and v. Weights, prompts and stop marks of random models say little about these.
"""

import os
from pathlib import Path

import pytest

import data
import generate
import train
from support.files import read_file, write_file
from tests.helpers import command, losses_of, run_of

BASES = {"gemma": os.environ.get("T2L_GEMMA"), "qwen": os.environ.get("T2L_QWEN")}
PEOPLE = ["Ada Lovelace", "Grace Hopper", "Alan Turing", "Mary Shelley", "Carl Gauss", "Emmy Noether"]
PEOPLE += ["Max Planck", "Lise Meitner"]
TASKS = {
    "surname": ("Give the surname", lambda name: name.split()[1]),
    "first": ("Give the first name", lambda name: name.split()[0]),
    "comma": ("Put the surname first, then a comma", lambda name: ", ".join(name.split()[::-1])),
}
WORDS = "--tasks_per_batch 3 --examples_per_task 8 --micro_batch 24 --lr 1e-3 --head_lr 1 --dropout 0"


@pytest.fixture(scope="module", params=BASES)
def base_model(request) -> str:
    if not BASES[request.param]:
        pytest.skip(f"T2L_{request.param.upper()} names no folder")
    return BASES[request.param]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of three tasks with names, 8 examples each."""
    folder = tmp_path_factory.mktemp("names")
    for name, (description, answer) in TASKS.items():
        people = [*PEOPLE, "Test Part", "Test Parts"]  # the last fifth is the test part
        instances = [{"input": person, "output": [answer(person)]} for person in people]
        write_file(folder / f"{name}.json", {"descriptions": [description], "Instances": instances})
    return folder


@pytest.fixture(scope="module")
def trained(base_model, tasks, tmp_path_factory) -> Path:
    """The folder of a hypernetwork after 25 steps with NEFTune, in bfloat16."""
    folder = tmp_path_factory.mktemp("trained") / "net"
    words = ["--base_model", base_model, "--tasks", tasks, *WORDS.split(), "--dtype", "bfloat16"]
    assert command(train, *words, "--neftune_alpha", "5", "--max_steps", "25", "--out_dir", folder) == 0
    return folder


def test_the_loss_falls_and_the_description_is_followed(trained, base_model, tmp_path, capsys):
    assert read_file(trained / "config.json")["encoder"] == "base"  # the default without a preset
    losses = losses_of(trained, "loss_task")
    assert losses[-1] < 0.3 * losses[0]
    words = ["--base_model", base_model, "--hypernet", trained, "--desc", "Give the surname", "--input"]
    assert command(generate, *words, "Ada Lovelace", "--out", tmp_path / "a", "--dtype", "bfloat16") == 0
    assert "with adapter  Lovelace\n" in capsys.readouterr().out  # and nothing after the end mark


def test_a_step_of_doc_to_lora(base_model, tmp_path):
    question = {"question": "Who?", "answer": "Ada"}
    document = "Ada wrote the first program. " * 9
    write_file(tmp_path / "a.json", {"document": document, "questions": [question]})
    words = "--arch d2l --target_modules down_proj --latent_size 32 --n_blocks 1 --n_heads 4 --chunk_len 32"
    words += " --tasks_per_batch 1 --max_steps 2 --distill 4 --l2 0"
    run = run_of("--base_model", base_model, "--tasks", tmp_path, *words.split(), "--dtype", "float32")
    losses = train.sft_step(run, run.net, data.draw(run.tasks, 0, run.args))
    assert losses["task"].isfinite() and all(p.grad.isfinite().all() for p in run.net.parameters())
