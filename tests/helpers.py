"""What test files use: `from tests.helpers import *` also brings these modules."""

import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import data
import encoders
import eval as evaluation
import generate
import hypernet
import lora
import model
import support
import train
from data import Example, Task
from nets import d2l
from support import UserError, read_json, write_file
from tasks import chores, facts, load_tasks, tiny

HERE, TINY = Path(__file__).parents[1], Path(model.TINY)
SIZES = ("large", "medium", "small")
NAMES, SCALING = ["q_proj", "v_proj"], 16 / 8**0.5
DESC = "Keep only the animals and translate them into French."
SAY = ["--desc", DESC]
SHORT = "--n_tasks 8 --tasks_per_batch 4 --examples_per_task 2".split()
SHORT += "--size small --latent_size 32 --head_in_size 32 --input_dropout 0".split()
SHORT += ["--dropout", "0"]
D2L, LORA = ["@config/d2l.args"], ["@config/lora.args"]
REAL = ["--base_model", os.environ.get("T2L_BASE"), "--encoder", os.environ.get("T2L_ENCODER")]
needs_models = pytest.mark.skipif("T2L_BASE" not in os.environ, reason="T2L_BASE names no real model")
needs_time = pytest.mark.skipif("T2L_SLOW" not in os.environ, reason="it takes long; T2L_SLOW=1 runs it")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

for source in (tiny, facts, chores):
    source.load = functools.cache(source.load)  # making the tasks takes a second
read_base, read_tiny = model.load_base, functools.cache(functools.partial(model.load_base, model.TINY))


def load_base(name: str, device="cpu", dtype: torch.dtype | None = None):
    """As model.load_base, but the tiny base model is read once, and copied for each use."""
    if name == model.TINY and torch.device(device).type == "cpu":
        return copy.deepcopy(read_tiny(dtype=dtype))
    return read_base(name, device, dtype)


model.load_base = load_base


def golden(file: str, folder: str = "t2l") -> Path:
    """A golden file without its ending. Skips the test if there is none."""
    for path in (HERE / "assets" / "golden" / file, Path(os.environ.get("T2L_GOLDEN", "")) / folder / file):
        if Path(f"{path}.safetensors").exists():
            return path
    pytest.skip(f"{file} is not here")


def repeated(text: str, n: int) -> str:
    """The text n times, one after another."""
    return text * n


def close(a, b, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=float(atol))


def tiny_llama(make=LlamaConfig, **changes) -> nn.Module:
    """A random Llama, or Gemma, with grouped key-value heads and a head size that is not hidden / heads."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=8)
    config = make(**sizes | dict(num_attention_heads=4, num_key_value_heads=2) | changes)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def config_for(base: nn.Module, names=NAMES, base_model: str = "x", **settings) -> lora.LoRAConfig:
    """The configuration of adapters for these modules."""
    if not hasattr(base, "lora_targets"):
        base.lora_targets = lora.find_targets(base, names)
    return lora.config_for(base, base_model, **settings)


def random_adapter(config: lora.LoRAConfig, n: int = 1, r: int = 8) -> lora.Adapter:
    """n adapters of small random weights."""
    adapter = {}
    for name, target in config.targets.items():
        A = torch.randn(n, len(target.layers), r, target.n_in) * 0.1
        B = torch.randn(n, len(target.layers), target.n_out, r) * 0.1
        adapter[name] = (A, B)
    return adapter


def with_peft(base: nn.Module, folder: Path) -> nn.Module:
    """The base model with the adapter of a folder, as PEFT reads it."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with warnings.catch_warnings():  # of a deprecated name, and of layers of a vision tower
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def logits_of(base: nn.Module, ids: torch.Tensor, adapter=None, scaling: float = SCALING) -> torch.Tensor:
    """The logits of an injected base model with an adapter."""
    with lora.use(base, adapter or {}, scaling):
        return base(ids).logits


def one_layer(linear: nn.Linear, name: str = "q_proj") -> nn.ModuleDict:
    """As much of a model as has one linear layer."""
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({name: linear})])})


def small_config(size: str, **changes) -> hypernet.TextConfig:
    """Three layers with a q_proj of 10 to 10 and a v_proj of 10 to 6."""
    targets = {}
    for name, n_out in (("q_proj", 10), ("v_proj", 6)):
        targets[name] = lora.Target(f"model.layers.{{}}.self_attn.{name}", [0, 1, 2], 10, n_out)
    sizes = dict(encoder="hash", targets=targets, n_layers=3, r=4, input_size=7)
    sizes |= dict(latent_size=24, head_in_size=20, size=size)
    return hypernet.TextConfig(**sizes | changes)


def command(module, *words) -> int:
    """Run a command's main() in this process; its exit code."""
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    try:
        support.command(module.main)
    except SystemExit as stop:
        return stop.code
    return 0


def run_of(*words, device="cpu") -> train.Run:
    """What train.py prepares for these flags."""
    args, _ = train.parse_args([*map(str, words), "--out_dir", "unused"])
    return train.prepare(args, torch.device(device), 0, 1)


def drawn_in(run: train.Run, step: int) -> list[data.Drawn]:
    """What a step of a run draws."""
    return data.draw(run.tasks, run.pool, step, run.args, run.tokenizer)


def drawn_as(run: train.Run, i: int, text: str, examples: list[data.Example]) -> data.Drawn:
    """Task i with a text and examples that a test has chosen."""
    ids = [data.to_ids(run.tokenizer, run.tasks[i], text, example, run.args) for example in examples]
    return data.Drawn(i, text, ids)


def gradients(run: train.Run, step: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradients that a training step leaves in the network."""
    run.net.zero_grad()
    torch.manual_seed(0)
    losses = train.sft_step(run, run.net, drawn_in(run, step))
    return sum(losses.values()), [p.grad.clone() for p in run.net.parameters()]


def refused(message: str, action, *args) -> None:
    """The action ends in a UserError that says so."""
    with pytest.raises(UserError, match=message):
        action(*args)


def interrupted_in_call(n: int, function):
    """(a function whose n-th call brings Ctrl-C, the list of its calls)."""
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args)

    return call, calls


def losses_of(folder: Path, key: str = "loss", file: str = "metrics.jsonl") -> list[float]:
    rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def fit(folder: Path, *words) -> list[float]:
    """Train into a folder; the losses."""
    assert command(train, *words, "--out_dir", folder) == 0
    return losses_of(folder)


def evaluate(file: Path, *words) -> dict:
    """What eval.py writes to a file, by method."""
    assert command(evaluation, *words, "--out", file) == 0
    return read_json(file)["results"]
