"""Adapters as PEFT, merged weights and other architectures have them."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import generate
import lora
from support.files import read_file, write_file
from tests.helpers import NAMES, SAY, close, command, config_for, injected, logits_of, one_layer
from tests.helpers import random_adapter, refused, tiny_llama, with_peft


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("rank", [4, 6])  # as configured, and joined from several chunks of a document
def test_peft_reads_our_adapter(tmp_path, rslora, rank):
    base, names = tiny_llama(), ["q_proj", "v_proj", "down_proj"]
    config = config_for(base, names, r=4, alpha=8, rslora=rslora)
    adapter = random_adapter(config, r=rank)
    lora.save_adapter(tmp_path, adapter, config)
    ids = torch.randint(160, (2, 9))
    theirs = with_peft(tiny_llama(), tmp_path)(ids).logits
    plain = lora.inject(base, names)(ids).logits
    assert (plain - theirs).abs().max() > 0.01
    for ours, its_config in ((adapter, config), lora.load_adapter(tmp_path)):
        close(logits_of(base, ids, ours, its_config.scaling), theirs)


def peft_adapter(folder: Path, **settings) -> nn.Module:
    """A random adapter that PEFT has made and written; its model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = dict(r=4, lora_alpha=8, target_modules=NAMES, init_lora_weights=False) | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": r".*\.[qv]_proj"}])
def test_we_read_pefts_adapter(tmp_path, settings):
    theirs = peft_adapter(tmp_path, **settings)
    adapter, config = lora.load_adapter(tmp_path)
    base, ids = lora.inject(tiny_llama(), list(config.targets)), torch.randint(160, (2, 9))
    close(logits_of(base, ids, adapter, config.scaling), theirs(ids).logits)


NOT_PLAIN = {"rank_pattern": {"v_proj": 6}, "init_lora_weights": "pissa", "layers_to_transform": [0]}
NOT_PLAIN |= {"use_dora": True, "loftq_config": {"bits": 4}, "bias": "all", "something_of_next_year": 1}


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    base, config = injected(tiny_llama())
    lora.save_adapter(tmp_path, random_adapter(config), config)
    peft = read_file(tmp_path / "adapter_config.json")
    for name, value in NOT_PLAIN.items():
        write_file(tmp_path / "adapter_config.json", peft | {name: value})
        refused(f"not a plain LoRA adapter: {name} is", lora.load_adapter, tmp_path)
    for change in {"r": 0}, {"r": "8"}, {"lora_alpha": None}:
        write_file(tmp_path / "adapter_config.json", peft | change)
        refused("must be a number above 0", lora.load_adapter, tmp_path)


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    refused("no linear layers named qkv, but down_proj, gate_proj", lora.inject, tiny_llama(), ["qkv"])

    class Quantised(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    refused("q_proj is Quantised: quantised", lora.inject, one_layer(Quantised(4, 4)), ["q_proj"])
    adapter = random_adapter(config_for(tiny_llama(hidden_size=32)))
    refused("for another model", lora.use(lora.inject(tiny_llama(), NAMES), adapter, 1.0).__enter__)
    refused("is missing", lora.load_adapter, tmp_path)
    write_file(tmp_path / "adapter_config.json", [{"peft_type": "LORA"}])
    refused("must hold a JSON object", lora.load_adapter, tmp_path)


def test_two_stacks_of_layers_are_told_apart():
    """As in Flux, whose blocks of both kinds have a to_q."""
    stacks = {}
    for name, n in ("blocks", 2), ("single_blocks", 3):
        stacks[name] = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 4)}) for _ in range(n)])
    base, names = nn.ModuleDict(stacks), ["blocks.{}.to_q", "single_blocks.{}.to_q"]
    refused(re.escape(f"name one of them: {', '.join(names)}"), lora.find_targets, base, ["to_q"])
    assert [len(target.layers) for target in lora.find_targets(base, names).values()] == [2, 3]


def test_peft_finds_the_tiny_base_model(tmp_path):
    """The adapter names a folder that exists, and its tokenizer brings the chat template."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    assert command(generate, *SAY, "--out", tmp_path / "adapter") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    name = read_file(tmp_path / "adapter/adapter_config.json")["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    messages = [{"role": "user", "content": "cat red dog shirt"}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    answer = base.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = answer[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == "chat chien"
