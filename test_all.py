"""All tests: python -m pytest -q test_all.py

Golden files of the published implementations are used where ../shared/golden has them; PEFT judges our adapter
files where it is installed; T2L_BASE and T2L_ENCODER may name folders of real models (SmolLM2-135M-Instruct and
all-MiniLM-L6-v2) to be tried as well.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

import data
import eval as evaluation
import generate
import hypernet
import lora
import model
import train

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "shared" / "golden" / "t2l"
NAMES = ["q_proj", "v_proj"]
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden files are not here")


def tiny_llama(**changes) -> nn.Module:
    """A random Llama with grouped key-value heads and a head size that is not hidden / heads."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes | changes)).requires_grad_(False).eval()


def random_adapter(config: lora.LoRAConfig, *batch: int, r: int = 8) -> lora.Adapter:
    L = config.n_layers
    return {
        name: (torch.randn(*batch, L, r, config.in_features[name]) * 0.1, torch.randn(*batch, L, config.out_features[name], r) * 0.1)
        for name in config.paths
    }


def command(module, *words: str) -> int:
    """Run a command's main() in this process; its exit code."""
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    try:
        lora.run(module.main)
    except SystemExit as stop:
        return stop.code
    return 0


# ---------------------------------------------------------------------------------------------------------
# lora.py
# ---------------------------------------------------------------------------------------------------------


def test_injected_layer_is_the_equation_and_so_are_its_gradients():
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(12, 20)})])})
    W, bias = holder["layers"][0]["q_proj"].weight, holder["layers"][0]["q_proj"].bias
    lora.inject(holder, ["q_proj"])
    A, B = torch.randn(1, 4, 12, requires_grad=True), torch.randn(1, 20, 4, requires_grad=True)
    x = torch.randn(3, 5, 12, requires_grad=True)
    lora.set_adapter(holder, {"q_proj": (A, B)}, scaling=1.7)
    y = holder["layers"][0]["q_proj"](x)
    expected = F.linear(x, W + 1.7 * B[0] @ A[0], bias)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad((y * weight).sum(), (A, B, x)), torch.autograd.grad((expected * weight).sum(), (A, B, x))):
        torch.testing.assert_close(ours, theirs)
    lora.set_adapter(holder, None)
    torch.testing.assert_close(holder["layers"][0]["q_proj"](x), F.linear(x, W, bias), rtol=0, atol=0)


def test_one_adapter_a_row_equals_a_loop_over_rows():
    base = tiny_llama()
    config = lora.describe(base, NAMES, "x")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    lora.inject(base, NAMES)
    assert list(base.state_dict()) == list(before)
    batch, ids = random_adapter(config, 3), torch.randint(160, (6, 7))
    lora.set_adapter(base, batch)  # six rows, three adapters: rows 0 and 1 have the first
    together = base(ids).logits
    for row in range(6):
        lora.set_adapter(base, lora.select(batch, row // 2))
        torch.testing.assert_close(together[row], base(ids[row : row + 1]).logits[0], rtol=1e-5, atol=1e-5)
    lora.set_adapter(base, lora.select(batch, [2, 0, 0, 1, 2, 2]))
    torch.testing.assert_close(base(ids[:1].expand(6, -1)).logits[1], base(ids[:1].expand(6, -1)).logits[2], rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot be shared out"):
        base(ids[:4])


def test_dropout_is_on_the_lora_branch_in_training_only():
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(50, 50)})])})
    layer = lora.inject(holder, ["q_proj"], dropout=0.5)["layers"][0]["q_proj"]
    x, A, B = torch.ones(1, 50), torch.eye(50)[None], torch.eye(50)[None]
    plain = layer(x)
    lora.set_adapter(holder, {"q_proj": (A, B)}, scaling=1.0)
    assert set((layer(x) - plain).round(decimals=3).unique().tolist()) == {0.0, 2.0}
    layer.eval()
    torch.testing.assert_close(layer(x) - plain, torch.ones(1, 50))


def test_merge_is_the_adapter_and_unmerge_is_exact():
    base = tiny_llama()
    config = lora.describe(base, NAMES, "x")
    original = {k: v.clone() for k, v in base.state_dict().items()}
    lora.inject(base, NAMES)
    adapter, ids = random_adapter(config), torch.randint(160, (2, 9))
    lora.set_adapter(base, adapter)
    adapted = base(ids).logits
    lora.set_adapter(base, None)
    lora.merge(base, adapter)
    torch.testing.assert_close(base(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    with pytest.raises(lora.UserError, match="merged already"):
        lora.merge(base, adapter)
    lora.unmerge(base)
    assert all(torch.equal(v, original[k]) for k, v in base.state_dict().items())


def test_rank_concatenation_adds_the_updates():
    base = tiny_llama()
    config = lora.describe(base, NAMES, "x")
    lora.inject(base, NAMES)
    one, two = random_adapter(config, r=3), random_adapter(config, r=5)
    both = lora.concat_rank([one, two])
    for name in NAMES:
        A, B = both[name]
        torch.testing.assert_close(B @ A, one[name][1] @ one[name][0] + two[name][1] @ two[name][0])
    only_q = lora.concat_rank([one, {"q_proj": two["q_proj"]}])
    assert only_q["q_proj"][0].shape[-2] == 8 and torch.equal(only_q["v_proj"][0], one["v_proj"][0])


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("uneven", [False, True])
def test_peft_reads_our_adapter(tmp_path, rslora, uneven):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny_llama()
    names = ["q_proj", "v_proj", "down_proj"]
    config = lora.describe(base, names, "x", r=4, alpha=8, rslora=rslora)
    adapter = random_adapter(config, r=4)
    if uneven:
        adapter = lora.concat_rank([adapter, {"v_proj": random_adapter(config, r=2)["v_proj"]}])
    lora.save_adapter(tmp_path, adapter, config)
    ids = torch.randint(160, (2, 9))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)(ids).logits
    lora.inject(base, names)
    plain = base(ids).logits
    lora.set_adapter(base, adapter, config.scaling)
    torch.testing.assert_close(base(ids).logits, theirs, rtol=1e-5, atol=1e-5)
    assert (plain - theirs).abs().max() > 0.01
    again, config = lora.load_adapter(tmp_path)
    lora.set_adapter(base, again, config.scaling)
    torch.testing.assert_close(base(ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_we_read_pefts_adapter(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False, rank_pattern={"v_proj": 6}, alpha_pattern={"v_proj": 3}
    )
    theirs = peft.get_peft_model(tiny_llama(), settings).eval()
    theirs.save_pretrained(tmp_path)
    adapter, config = lora.load_adapter(tmp_path)
    base, ids = lora.inject(tiny_llama(), NAMES), torch.randint(160, (2, 9))
    lora.set_adapter(base, adapter, config.scaling)
    torch.testing.assert_close(base(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    base = tiny_llama()
    with pytest.raises(lora.UserError, match="no linear layers named qkv; it has down_proj, gate_proj"):
        lora.inject(base, ["qkv"])
    odd = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, n)}) for n in (4, 6)])})
    with pytest.raises(lora.UserError, match="changes its shape"):
        lora.inject(odd, ["q_proj"])
    adapter = random_adapter(lora.describe(tiny_llama(hidden_size=32), NAMES, "x"))
    with pytest.raises(lora.UserError, match="for another base model"):
        lora.set_adapter(lora.inject(base, NAMES), adapter)
    with pytest.raises(lora.UserError, match="is missing"):
        lora.load_adapter(tmp_path)
    lora.write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "use_dora": True})
    with pytest.raises(lora.UserError, match="not a plain LoRA"):
        lora.load_adapter(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# hypernet.py
# ---------------------------------------------------------------------------------------------------------


def small_config(size: str, **changes) -> hypernet.HypernetConfig:
    paths = {name: f"model.layers.{{}}.self_attn.{name}" for name in NAMES}
    sizes = dict(in_features={"q_proj": 10, "v_proj": 10}, out_features={"q_proj": 10, "v_proj": 6}, n_layers=3, paths=paths, r=4)
    return hypernet.HypernetConfig(**sizes | dict(task_emb_size=7, latent_size=24, head_in_size=20, size=size) | changes)


def naive_adapter(net: hypernet.TextToLoRA, emb: torch.Tensor, layer: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer and module from the published description, one row, one matrix and one rank at a time."""
    p, c = dict(net.named_parameters()), net.config
    lin = lambda x, key: x @ p[f"{key}.weight"].T + p[f"{key}.bias"]
    ln = lambda x, key: (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * p[f"{key}.weight"] + p[f"{key}.bias"]
    silu = lambda x: x * torch.sigmoid(x)
    two = lambda x, a, b: silu(lin(silu(lin(x, a)), b))
    task = ln(lin(emb / emb.norm() * math.sqrt(len(emb)), "task_encoder.0"), "task_encoder.1")
    depth, kind = (ln(p[f"{k}_emb.0.weight"][i], f"{k}_emb.1") for k, i in (("layer", layer), ("module", m)))
    x = two(torch.cat([task, depth, kind]), "mixer.1", "mixer.4")
    x = x + two(ln(x, "mlp1.0"), "mlp1.1", "mlp1.4")
    mlp2 = lambda x: x + two(ln(x, "mlp2.0"), "mlp2.1", "mlp2.4")
    name, r = net.names[m], c.r
    n_in, n_out = c.in_features[name], c.out_features[name]
    head = lambda x: lin(two(ln(x, "mlp3.0"), "mlp3.1", "mlp3.4") * c.head_scale, f"heads.{name}")
    if c.size == "large":
        o = head(mlp2(x))
        A, B = o[: r * n_in].view(r, n_in), o[r * n_in :].view(r, n_out).T
    else:
        made = []
        for k, n in ((0, n_in), (1, n_out)):
            y = mlp2(x + ln(p["AB_emb"][m, k], "AB_norm"))
            if c.size == "medium":
                made.append(head(y).view(r, -1)[:, :n])
            else:
                made.append(torch.stack([head(y + mlp2(ln(p["rank_emb.0.weight"][i], "rank_emb.1")))[:n] for i in range(r)]))
        A, B = made[0], made[1].T
    return p[f"shift.{name}_A"][layer] + p[f"scale.{name}_A"] * A, p[f"shift.{name}_B"][layer] + p[f"scale.{name}_B"] * B


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_hypernet_equals_one_row_at_a_time(size):
    torch.manual_seed(0)
    net = hypernet.TextToLoRA(small_config(size, head_scale=0.3)).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    emb = torch.randn(2, 7)
    with torch.no_grad():
        adapter = net(emb)
        for i in range(2):
            for layer in range(3):
                for m, name in enumerate(NAMES):
                    A, B = naive_adapter(net, emb[i], layer, m)
                    torch.testing.assert_close(adapter[name][0][i, layer], A, rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(adapter[name][1][i, layer], B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_sft_starts_as_a_fresh_lora_and_learns(size):
    torch.manual_seed(0)
    net = hypernet.TextToLoRA(small_config(size))
    net.start_as_lora()
    adapter = net(torch.randn(2, 7))
    for name, (A, B) in adapter.items():
        assert not B.any()
        assert 0.4 / 10**0.5 < A.std() < 0.7 / 10**0.5  # uniform in +-1/sqrt(in)
        assert not torch.equal(A[0, 0], A[0, 1]) and not torch.equal(A[0, 0, 0], A[0, 0, 1])
    sum((A.sum() + B.sum()) for A, B in adapter.values()).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in net.heads.values())


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_hypernet_files(tmp_path, size):
    net = hypernet.TextToLoRA(small_config(size)).eval()
    hypernet.save_hypernet(net, tmp_path)
    again, emb = hypernet.load_hypernet(tmp_path), torch.randn(2, 7)
    assert again.config == net.config and not again.training
    assert all(torch.equal(a, b) for k in NAMES for a, b in zip(net(emb)[k], again(emb)[k]))
    lora.write_json(tmp_path / "config.json", lora.read_json(tmp_path / "config.json") | {"latent_size": 32})
    with pytest.raises(lora.UserError, match="do not belong together"):
        hypernet.load_hypernet(tmp_path)


PUBLISHED = {
    "task_encoder.mlp": "task_encoder", "layer_depth_encoder": "layer_emb", "layer_type_encoder": "module_emb", "mixer": "mixer",
    "mlp1.mlp": "mlp1", "mlp2.mlp": "mlp2", "mlp3": "mlp3", "heads": "heads", "out_emb_norm": "AB_norm", "pos_emb": "rank_emb",
}  # fmt: skip


def published_net(file: str) -> tuple[hypernet.TextToLoRA, dict, dict, dict]:
    """One golden file as (our network with its weights, its tensors, its json, {their parameter: ours})."""
    tensors, info = load_file(GOLDEN / f"{file}.safetensors"), lora.read_json(GOLDEN / f"{file}.json")
    _, size, variant = file.split("_", 2)
    paths = {name: f"model.layers.{{}}.self_attn.{name}" for name in NAMES}
    config = hypernet.HypernetConfig(
        n_layers=4, paths=paths, in_features=info["in_features"], out_features=info["out_features"], task_emb_size=48, latent_size=24,
        head_in_size=32, size={"L": "large", "M": "medium"}.get(size, "small"), rotary=size == "Srot", z_score=variant == "recon_z",
    )  # fmt: skip
    net = hypernet.TextToLoRA(config).eval()
    theirs = {k[3:]: t for k, t in tensors.items() if k.startswith("sd/")}
    ours, names = {}, {}
    for old, new in PUBLISHED.items():
        for k in theirs:
            if k.startswith(old + "."):
                ours[new + k[len(old) :]], names[k] = theirs[k], new + k[len(old) :]
    if size != "L":
        ours["AB_emb"] = torch.stack([torch.stack([theirs[f"out_emb.{name}.{k}"] for k in "AB"]) for name in NAMES])
    for name in NAMES:
        for k in "AB":
            mean, std, offset = (theirs[f"{x}.{k}.{name}"] for x in ("mean_recon_target", "std_recon_target", "AB_offset"))
            ours[f"shift.{name}_{k}"] = {"recon_z": mean + offset, "recon_dw": torch.zeros_like(offset)}.get(variant, offset)
            ours[f"scale.{name}_{k}"] = {"recon_z": std + 1e-10, "recon_dw": torch.tensor(0.01)}.get(variant, torch.tensor(1.0))
    net.load_state_dict(ours)
    return net, tensors, info, names


GOLDEN_FILES = [f"llama_{s}_{v}" for s in ("L", "M", "S", "Srot") for v in ("sft", "recon_z", "recon_dw")] + ["llama_L_recon_f"]


@needs_golden
@pytest.mark.parametrize("file", GOLDEN_FILES)
def test_golden_adapters(file):
    net, tensors, info, _ = published_net(file)
    with torch.no_grad():
        adapter = net(tensors["in/task_emb"])
    for i in range(3):
        for layer in range(4):
            for name in NAMES:
                for k, ours in zip("AB", adapter[name]):
                    theirs = tensors[f"out{i}/base_model.model.model.layers.{layer}.self_attn.{name}.lora_{k}.weight"]
                    torch.testing.assert_close(ours[i, layer], theirs, rtol=1e-5, atol=1e-5)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trainable == info["param_count"]["trainable_requires_grad"]


@needs_golden
@pytest.mark.parametrize("size", ["L", "M", "S", "Srot"])
def test_golden_sft_losses_and_gradients(size):
    net, tensors, _, names = published_net(f"llama_{size}_sft")
    info = lora.read_json(GOLDEN / "llama_base.json")
    config = LlamaConfig(**{k: v for k, v in info.get("config", info.get("base_config", info)).items() if k in LlamaConfig().to_dict()})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    base.load_state_dict({k[5:]: t for k, t in load_file(GOLDEN / "llama_base.safetensors").items()})
    lora.inject(base, NAMES)
    ids, labels = tensors["sft/in/input_ids"], tensors["sft/in/labels"]
    adapter = net(tensors["sft/in/task_embs"])
    lora.set_adapter(base, adapter)
    real = tensors["sft/in/attention_mask"].bool()
    torch.testing.assert_close(base(ids).logits[real], tensors["sft/logits"][real], rtol=1e-4, atol=1e-3)
    for smoothing in (0.0, 0.1):
        loss = train.answer_loss(base, ids, labels, smoothing)
        torch.testing.assert_close(loss, tensors[f"sft/ls{smoothing}_sample/sft_loss"][0], rtol=0, atol=5e-5)
    l2 = 1e-3 * train.square_loss(adapter)
    torch.testing.assert_close(l2, tensors["sft/generated_w_l2_loss"][0], rtol=0, atol=1e-8)
    if "sft/grad_norm" in tensors:
        (loss + l2).backward()
        ours = dict(net.named_parameters())
        for key, theirs in tensors.items():
            if key.startswith("grad/") and key[5:] in names:
                grad = ours[names[key[5:]]].grad
                assert (grad - theirs).abs().max() < 1e-3 * theirs.abs().max(), key


@needs_golden
@pytest.mark.parametrize("file", [file for file in GOLDEN_FILES if "recon" in file])
def test_golden_reconstruction_losses(file):
    net, tensors, _, _ = published_net(file)
    for name in NAMES:  # the loss is that of real runs, whose offset is zero
        for k in "AB":
            net.shift[f"{name}_{k}"].data -= 0 if "recon_dw" in file else tensors[f"sd/AB_offset.{k}.{name}"]
    adapter = net(tensors["recon/in/task_embs"].flatten(0, 1))
    target = {name: tuple(tensors[f"recon/in/target/{k}/{name}"].repeat_interleave(2, 0) for k in "AB") for name in NAMES}
    loss = train.delta_w_loss(adapter, target) if "recon_dw" in file else train.z_score_loss(adapter, target, net.scale)
    torch.testing.assert_close(loss, tensors["recon/loss"][0], rtol=1e-5, atol=5e-6)
