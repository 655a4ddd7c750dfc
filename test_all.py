"""All tests: python -m pytest -q test_all.py

Golden files of the published implementations are used where ../shared/golden has them; PEFT judges our adapter
files where it is installed; T2L_BASE and T2L_ENCODER may name folders of real models (SmolLM2-135M-Instruct and
all-MiniLM-L6-v2) to be tried as well.
"""

import dataclasses
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM, CohereConfig, Gemma2Config, Gemma3Config, Gemma3TextConfig, GemmaConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config,
)  # fmt: skip

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
    config = lora.config_for(base, NAMES, "x")
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


def test_dropout_drops_its_share_keeps_the_mean_and_blocks_gradients_where_it_drops():
    torch.manual_seed(0)
    x = torch.full((99, 1001), 2.0, requires_grad=True)
    y = lora.Dropout(0.1)(x)
    y.sum().backward()
    assert abs((y == 0).float().mean() - 26 / 256) < 0.005 and abs(y.mean() - 2) < 0.01
    assert torch.equal(x.grad * 2, y)
    assert (y == 0).any(0).float().mean() > 0.99 and (y == 0).any(1).all()  # everywhere alike
    assert lora.Dropout(0.1).eval()(x) is x


def test_merge_is_the_adapter_and_unmerge_is_exact():
    base = tiny_llama()
    config = lora.config_for(base, NAMES, "x")
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
    config = lora.config_for(base, NAMES, "x")
    lora.inject(base, NAMES)
    one, two = random_adapter(config, r=3), random_adapter(config, r=5)
    both = lora.concat_rank([one, two])
    for name in NAMES:
        A, B = both[name]
        torch.testing.assert_close(B @ A, one[name][1] @ one[name][0] + two[name][1] @ two[name][0])
    only_q = lora.concat_rank([one, {"q_proj": two["q_proj"]}])
    assert only_q["q_proj"][0].shape[-2] == 8 and torch.equal(only_q["v_proj"][0], one["v_proj"][0])


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("joined", ["", "all", "v_proj"])
def test_peft_reads_our_adapter(tmp_path, rslora, joined):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny_llama()
    names = ["q_proj", "v_proj", "down_proj"]
    config = lora.config_for(base, names, "x", r=4, alpha=8, rslora=rslora)
    adapter = random_adapter(config, r=4)
    if joined:  # with a second adapter along the rank: uniformly, or for one module only
        second = random_adapter(config, r=2)
        adapter = lora.concat_rank([adapter, second if joined == "all" else {joined: second[joined]}])
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


@pytest.mark.parametrize("alphas", [{"v_proj": 3}, {"layers.0.self_attn.q_proj": 64}, {r"layers\.1\..*": 2, "q_proj": 5}])
def test_we_read_pefts_adapter(tmp_path, alphas):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False, rank_pattern={"v_proj": 6}, alpha_pattern=alphas
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
    with pytest.raises(lora.UserError, match="no linear layers named q_proj; it has down_proj, gate_up_proj, o_proj, qkv_proj"):
        lora.inject(small_decoder(Phi3Config), ["q_proj"])
    odd = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, n)}) for n in (4, 6)])})
    with pytest.raises(lora.UserError, match="changes its shape"):
        lora.inject(odd, ["q_proj"])
    adapter = random_adapter(lora.config_for(tiny_llama(hidden_size=32), NAMES, "x"))
    with pytest.raises(lora.UserError, match="for another base model"):
        lora.set_adapter(lora.inject(base, NAMES), adapter)
    with pytest.raises(lora.UserError, match="is missing"):
        lora.load_adapter(tmp_path)
    moving = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({place: nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}) for place in ("a", "b")])})
    with pytest.raises(lora.UserError, match="changes its place"):
        lora.inject(moving, ["q_proj"])
    for more in {"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}, {"alora_invocation_tokens": [3]}, {"layer_replication": [[0, 2], [1, 3]]}:
        lora.write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"} | more)
        with pytest.raises(lora.UserError, match="not a plain LoRA"):
            lora.load_adapter(tmp_path)
    lora.write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 8})
    with pytest.raises(lora.UserError, match="lacks r and lora_alpha"):
        lora.load_adapter(tmp_path)
    config = lora.config_for(tiny_llama(), NAMES, "x")
    lora.save_adapter(tmp_path / "a", random_adapter(config), config)
    for name, other in ("b", dataclasses.replace(config, alpha=64.0)), ("c", lora.config_for(tiny_llama(), NAMES[:1], "x")):
        lora.save_adapter(tmp_path / name, random_adapter(other), other)
        with pytest.raises(lora.UserError, match="they were not trained together"):
            lora.load_adapters([tmp_path / "a", tmp_path / name])


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


def test_the_task_encoder_starts_with_what_tells_tasks_apart():
    """Small differences between tasks come first, large ones between the wordings of one task do not."""
    torch.manual_seed(0)
    E, tasks = 12, []
    for k in range(6):
        x = torch.randn(40, E) * torch.tensor([5.0] * 4 + [0.1] * 8)  # wordings differ in the first four directions
        x[:, 4 + k] += 1  # tasks in the others
        tasks.append(x)
    net = hypernet.TextToLoRA(small_config("large", task_emb_size=E, latent_size=24))
    net.tell_apart(tasks)
    unit = [F.normalize(x, dim=-1) * E**0.5 for x in tasks]
    coded = torch.stack([net.task_encoder[0](x) for x in unit]).detach()[..., :5]  # six tasks differ in five directions
    torch.testing.assert_close(coded.mean((0, 1)), torch.zeros(5), rtol=0, atol=1e-4)
    means = torch.stack([x.mean(0) for x in unit])
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / 6
    total = torch.cat(unit).T.cov(correction=0) + 0.3 * torch.eye(E)
    shares = torch.linalg.eigvals(torch.linalg.solve(total, between)).real.sort(descending=True)[0][:5]  # Fisher's, of the whole variance
    torch.testing.assert_close(coded.mean(1).std(0, correction=0), 8 * shares, rtol=1e-3, atol=1e-4)


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


def published_folder(folder: Path, weights: dict, base_model="tiny", order=NAMES, **args) -> Path:
    """A checkpoint in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "hypermod.pt")
    args = dict(emb_model="", training_task="sft", factorized=False, delta_w_scaling=10000, pred_z_score=True, model_dir=base_model) | args
    (folder / "args.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in args.items()))
    peft = dict(peft_type="LORA", r=8, lora_alpha=16, use_rslora=True, target_modules=order, base_model_name_or_path=base_model)
    lora.write_json(folder / "adapter_config.json", peft)
    return folder


def published_names(keys) -> dict[str, str]:
    """{published name of a parameter: ours}"""
    return {k: new + k[len(old) :] for k in keys for old, new in hypernet.PUBLISHED.items() if k.startswith(f"{old}.")}


def golden_net(file: str, folder: Path) -> tuple[hypernet.TextToLoRA, dict, dict]:
    """One golden file as (our network, from a folder in the published layout; its tensors; its json)."""
    tensors, info = load_file(GOLDEN / f"{file}.safetensors"), lora.read_json(GOLDEN / f"{file}.json")
    args = {k: info["constructor_args"][k] for k in ("training_task", "factorized", "delta_w_scaling", "pred_z_score")}
    weights = {k[3:]: t for k, t in tensors.items() if k.startswith("sd/")}
    return hypernet.import_text_to_lora(published_folder(folder, weights, **args)), tensors, info


def golden_base() -> nn.Module:
    """The frozen model of the golden files."""
    info = lora.read_json(GOLDEN / "llama_base.json")
    config = LlamaConfig(**{k: v for k, v in info.get("config", info.get("base_config", info)).items() if k in LlamaConfig().to_dict()})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    base.load_state_dict({k[5:]: t for k, t in load_file(GOLDEN / "llama_base.safetensors").items()})
    return base


GOLDEN_FILES = [f"llama_{s}_{v}" for s in ("L", "M", "S", "Srot") for v in ("sft", "recon_z", "recon_dw")] + ["llama_L_recon_f"]


@needs_golden
@pytest.mark.parametrize("file", GOLDEN_FILES)
def test_golden_adapters(tmp_path, file):
    net, tensors, info = golden_net(file, tmp_path)
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
def test_golden_sft_losses_and_gradients(tmp_path, size):
    net, tensors, _ = golden_net(f"llama_{size}_sft", tmp_path)
    names = published_names(k[5:] for k in tensors if k.startswith("grad/"))
    base = lora.inject(golden_base(), NAMES)
    ids, labels = tensors["sft/in/input_ids"], tensors["sft/in/labels"]
    adapter = net(tensors["sft/in/task_embs"])
    lora.set_adapter(base, adapter)
    real = tensors["sft/in/attention_mask"].bool()
    torch.testing.assert_close(base(ids).logits[real], tensors["sft/logits"][real], rtol=1e-4, atol=1e-3)
    for smoothing in (0.0, 0.1):
        loss = train.answer_loss(base, ids, labels, smoothing)
        torch.testing.assert_close(loss, tensors[f"sft/ls{smoothing}_sample/sft_loss"][0], rtol=0, atol=5e-5)
    l2 = 1e-3 * train.weight_loss(adapter, torch.square)
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
def test_golden_reconstruction_losses(tmp_path, file):
    net, tensors, _ = golden_net(file, tmp_path)
    for name in NAMES:  # the loss is that of real runs, whose offset is zero
        for k in "AB":
            net.shift[f"{name}_{k}"].data -= 0 if "recon_dw" in file else tensors[f"sd/AB_offset.{k}.{name}"]
    adapter = net(tensors["recon/in/task_embs"].flatten(0, 1))
    target = {name: tuple(tensors[f"recon/in/target/{k}/{name}"].repeat_interleave(2, 0) for k in "AB") for name in NAMES}
    loss = train.delta_w_loss(adapter, target) if "recon_dw" in file else train.z_score_loss(adapter, target, net.scale)
    torch.testing.assert_close(loss, tensors["recon/loss"][0], rtol=1e-5, atol=5e-6)


def in_published_layout(net: hypernet.TextToLoRA, kind: str) -> dict[str, torch.Tensor]:
    """The weights of one of our networks under the published names."""
    weights = {}
    for key, tensor in net.state_dict().items():
        old = next((old for old, new in hypernet.PUBLISHED.items() if key.startswith(f"{new}.")), None)
        if old:
            weights[old + key[len(hypernet.PUBLISHED[old]) :]] = tensor
    for m, name in enumerate(net.names):
        for i, k in enumerate("AB"):
            shift, scale = net.shift[f"{name}_{k}"].data, net.scale[f"{name}_{k}"].data.expand_as(net.shift[f"{name}_{k}"])
            offset = torch.full_like(shift, 0.25) if kind == "z_score" else shift
            weights |= {f"AB_offset.{k}.{name}": offset, f"mean_recon_target.{k}.{name}": shift - offset, f"std_recon_target.{k}.{name}": scale}
            if net.config.size != "large":
                weights[f"out_emb.{name}.{k}"] = net.AB_emb[m, i].data
    return weights


@pytest.mark.parametrize("kind", ["sft", "z_score", "factorized", "delta_w", "delta_w_z_score"])
@pytest.mark.parametrize("size", [*hypernet.SIZES, "rotary"])
def test_published_layout_round_trip(tmp_path, size, kind):
    torch.manual_seed(0)
    config = small_config(size.replace("rotary", "small"), rotary=size == "rotary", z_score="z_score" in kind, r=8)
    net = hypernet.TextToLoRA(config).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    for p in net.scale.values():
        p.data.fill_(0.01 if "delta_w" in kind else 0.7 if kind == "z_score" else 1.0)
    if "delta_w" in kind:
        for p in net.shift.values():
            p.data.zero_()
    args = dict(training_task="sft" if kind == "sft" else "recon", factorized="delta_w" not in kind, emb_model="some/encoder")
    folder = published_folder(tmp_path, in_published_layout(net, kind), base_model="google/gemma-2-2b-it", **args)
    again, emb = hypernet.load_hypernet(folder), torch.randn(2, 7)
    for name in NAMES:
        for ours, theirs in zip(net(emb)[name], again(emb)[name]):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    c = again.config
    assert (c.size, c.encoder, c.full_stop, c.scaling) == (config.size, "some/encoder", True, lora.SCALING)
    assert c.paths == {name: f"model.layers.{{}}.self_attn.{name}" for name in NAMES}
    assert model.preset_name(c.base_model) == "gemma-2-2b"
    swapped = hypernet.load_hypernet(folder, NAMES[::-1])(emb)
    swap = net.module_emb[0].weight.data
    swap.copy_(swap.flip(0).clone())
    torch.testing.assert_close(swapped["q_proj"][0], net(emb)["q_proj"][0], rtol=1e-5, atol=1e-6)
    swap.copy_(swap.flip(0).clone())
    published_folder(tmp_path, in_published_layout(net, kind), order=NAMES[::-1], **args)  # PEFT's file names them the other way round
    torch.testing.assert_close(hypernet.load_hypernet(folder)(emb)["q_proj"][0], swapped["q_proj"][0])


def test_broken_published_checkpoints_are_refused_in_words(tmp_path):
    net = hypernet.TextToLoRA(small_config("medium", r=8))
    weights = in_published_layout(net, "sft")
    load = lambda **k: hypernet.load_hypernet(tmp_path, **k)
    published_folder(tmp_path, weights)
    with pytest.raises(lora.UserError, match="--module_order q_proj,k_proj: the target modules of .* are q_proj, v_proj"):
        load(module_order=["q_proj", "k_proj"])
    published_folder(tmp_path, {k: t for k, t in weights.items() if "mixer" not in k})
    with pytest.raises(lora.UserError, match="not a published Text-to-LoRA checkpoint of a kind known here"):
        load()
    (tmp_path / "hypermod.pt").write_bytes((tmp_path / "hypermod.pt").read_bytes()[:3000])
    with pytest.raises(lora.UserError, match="cannot be read as a published checkpoint"):
        load()
    torch.save({"x": Path("/")}, tmp_path / "hypermod.pt")  # a pickle that would have to call something
    with pytest.raises(lora.UserError, match="cannot be read as a published checkpoint"):
        load()
    published_folder(tmp_path, weights)
    (tmp_path / "args.yaml").write_text("training_task: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(lora.UserError, match="cannot be read as a published checkpoint"):
        load()
    (tmp_path / "args.yaml").unlink()
    with pytest.raises(lora.UserError, match="args.yaml is missing"):
        load()
    hypernet.save_hypernet(net, tmp_path / "ours")
    with pytest.raises(lora.UserError, match="--module_order is for published checkpoints"):
        hypernet.load_hypernet(tmp_path / "ours", NAMES)


def test_the_papers_sizes(capsys):
    hypernet.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    counts = {(row[0], row[2]): [int(row[i].replace(",", "")) for i in (1, 3, 4)] for row in rows}
    assert counts["mistral-7b", "large"] == [3_407_872, 55_424_000, 55_317_504]
    assert counts["mistral-7b", "medium"] == [3_407_872, 34_412_288, 34_346_752]
    assert counts["mistral-7b", "small"] == [3_407_872, 4_996_096, 4_987_904]
    assert counts["gemma-2-2b", "small"] == [1_597_440, 3_157_312, 3_152_704]
    file = GOLDEN.parent / "PARAMS.json"
    for name, sizes in lora.read_json(file)["summary"]["t2l"].items() if file.exists() else ():
        short = next((preset for preset in hypernet.PAPER_SHAPES if name.startswith(preset) and name.endswith("latent128_head512")), None)
        for size in hypernet.SIZES if short else ():
            golden = sizes[size[0].upper()]
            assert counts[short, size] == [sizes["lora_adapter_r8_qv"], golden["sft"], golden["recon_zscore"]], name


PUBLISHED_D2L = [  # of the published names what to replace by ours, in this order
    ("aggregator.", ""), ("modality_projection", "project"), ("encoder.latents_q", "latents"), ("decoder.latents_q", "queries"), ("coder.layernorm", "coder_norm"),
    ("decoder.layers.0", "decoder"), ("encoder.layers", "encoder"), ("self_attn.", ""), ("input_latents_layernorm", "norm_latents"),
    ("input_context_layernorm", "norm_context"), ("post_attention_layernorm", "norm_post"), ("pre_ff_layernorm", "norm_preff"), ("post_ff_layernorm", "norm_postff"),
    ("layers.0.layers.0", "block_in"), ("layers.0.layers.4", "block_out"), ("layers.0.layers.1.weight", "W1"), ("layers.0.layers.1.bias", "b1"),
    ("layers.0.layers.3.weight", "W2"), ("layers.0.layers.3.bias", "b2"), ("head.weight", "head"), ("bias_A.down_proj", "bias.down_proj_A"),
    ("bias_B.down_proj", "bias.down_proj_B"), ("scaler_A.down_proj", "scale.down_proj_A"), ("scaler_B.down_proj", "scale.down_proj_B"),
]  # fmt: skip


def golden_doc_net(file: str) -> tuple[hypernet.DocToLoRA, dict]:
    """One golden Doc-to-LoRA file as (our network with its weights, its tensors)."""
    folder = GOLDEN.parent / "d2l"
    tensors, info = load_file(folder / f"{file}.safetensors"), lora.read_json(folder / f"{file}.json")
    shared = load_file(folder / "perceiver_shared.safetensors")
    config = hypernet.DocConfig(
        n_layers=4, paths={"down_proj": "model.layers.{}.mlp.down_proj"}, in_features=info["d_in"], out_features=info["d_out"],
        alpha=2 * 8**2, feature_size=64, per_layer=file == "down_l2l", latent_size=64, n_blocks=3,
    )  # fmt: skip
    net = hypernet.DocToLoRA(config).eval()
    shapes, weights = {k: t.shape for k, t in net.state_dict().items()}, {}
    for key in info["state_dict"]:
        tensor, name = tensors.get(f"sd/{key}", shared.get(f"sd/{key}")).float(), key
        for old, new in PUBLISHED_D2L:
            name = name.replace(old, new)
        tensor = tensor.mT if name == "bias.down_proj_B" else tensor
        weights[name] = tensor.reshape(shapes[name])
    net.load_state_dict(weights)
    torch.testing.assert_close(torch.tensor(config.scaling), torch.tensor(info["lora_forward_scaling"]))
    return net, tensors


@needs_golden
@pytest.mark.parametrize("file", ["down_l2l", "down_flat"])
@torch.no_grad()
def test_golden_documents(file):
    net, tensors = golden_doc_net(file)
    chunks = net(tensors["in/features"], tensors["in/attn_mask"])
    A, B = chunks["down_proj"]
    torch.testing.assert_close(A, tensors["out/A/down_proj"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B, tensors["out/B/down_proj"].mT, rtol=1e-5, atol=1e-5)
    for tag, counts in {"n1": [1], "n2": [2], "n3": [3], "n123": [1, 2, 3]}.items():
        A, B = net.join(lora.select(chunks, slice(sum(counts))), counts)["down_proj"]
        torch.testing.assert_close(A, tensors[f"combine/{tag}/A/down_proj"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(B, tensors[f"combine/{tag}/B/down_proj"].mT, rtol=1e-5, atol=1e-5)
    weighed = net.join(chunks, [1, 2, 3], scalers=tensors["combine/scalers"], bias_scaler=0.7)["down_proj"]
    without = net.join(lora.select(chunks, slice(3)), [3], bias_scaler=0)["down_proj"]
    for tag, (a, b) in {"n123_scaled": weighed, "n3_nobias": without}.items():
        torch.testing.assert_close(a, tensors[f"combine/{tag}/A/down_proj"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b, tensors[f"combine/{tag}/B/down_proj"].mT, rtol=1e-5, atol=1e-5)
    alone = net(tensors["in/features"][1:2, ..., :7, :], tensors["in/attn_mask"][1:2, :7])["down_proj"]  # without its padding
    torch.testing.assert_close(alone[0][0], chunks["down_proj"][0][1], rtol=1e-5, atol=1e-5)

    # one linear layer with two, one and one rows for three documents
    y, x = tensors["lora_forward/down_proj/y"], tensors["lora_forward/down_proj/x"]
    linear = nn.Linear(112, 64)
    linear.weight.data, linear.bias.data = tensors["lora_forward/down_proj/weight"], tensors["lora_forward/down_proj/bias"]
    holder = lora.inject(nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"down_proj": linear})])}), ["down_proj"])
    A, B = tensors["combine/n123/A/down_proj"], tensors["combine/n123/B/down_proj"].mT  # not ours, whose rounding the scaling would magnify
    third = {"down_proj": (A[:, 2:3], B[:, 2:3])}  # the fixture's are of layer 2
    lora.set_adapter(holder, lora.select(third, [0, 0, 1, 2]), net.config.scaling)
    torch.testing.assert_close(holder["layers"][0]["down_proj"](x), y, rtol=1e-5, atol=1e-5)

    # from token ids to logits
    base = golden_base()
    features = model.context_features(base, tensors["e2e/ctx_ids"], tensors["e2e/ctx_attn_mask"], net.config.per_layer)
    real = tensors["e2e/ctx_attn_mask"].bool()
    torch.testing.assert_close(features.movedim(-2, 1)[real], tensors["e2e/features"].movedim(-2, 1)[real], rtol=1e-4, atol=1e-4)
    documents = net.join(net(features, tensors["e2e/ctx_attn_mask"]), tensors["e2e/n_ctx_chunks"].tolist())
    rows = [i for i, n in enumerate(tensors["e2e/n_queries"].tolist()) for _ in range(n)]
    lora.set_adapter(lora.inject(base, ["down_proj"]), lora.select(documents, rows), net.config.scaling)
    asked = tensors["e2e/attention_mask"].bool()
    logits = base(tensors["e2e/input_ids"], attention_mask=tensors["e2e/attention_mask"]).logits
    torch.testing.assert_close(logits[asked], tensors["e2e/logits"][asked], rtol=1e-4, atol=5e-4)
    assert (tensors["e2e/logits"] - tensors["e2e/logits_base"])[asked].abs().max() > 0.1


def test_the_perceivers_size():
    """That of the published one for gemma-2-2b."""
    sizes = dict(n_layers=26, paths={"down_proj": ""}, in_features={"down_proj": 9216}, out_features={"down_proj": 2304}, feature_size=2304)
    for changes, expected in ({"n_blocks": 8}, 309_468_064), ({"n_blocks": 9}, 315_237_792), ({"per_layer": False}, 315_340_192):
        with torch.device("meta"):
            net = hypernet.DocToLoRA(hypernet.DocConfig(**sizes, **changes))
        assert sum(p.numel() for p in net.parameters()) == expected


def small_reader() -> hypernet.DocToLoRA:
    """A random Doc-to-LoRA hypernetwork."""
    torch.manual_seed(0)
    sizes = dict(n_layers=3, in_features={"q_proj": 10, "v_proj": 10}, out_features={"q_proj": 12, "v_proj": 6}, r=2)
    config = hypernet.DocConfig(base_model="tiny", paths=dict.fromkeys(NAMES, ""), **sizes, feature_size=5, latent_size=16, n_latents=3, n_blocks=2)
    return hypernet.DocToLoRA(config).eval()


def test_chunks_of_a_document_add_up_in_any_order():
    net = small_reader()
    features, mask = torch.randn(3, 3, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    fresh = net.join(net(features, mask), [3])
    assert all(not B.any() for _, B in fresh.values())  # starts as the base model
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        chunks = net(features, mask)
        delta = lambda adapter, i, name: adapter[name][1][i] @ adapter[name][0][i]
        both, turned = net.join(chunks, [2, 1]), net.join(lora.select(chunks, [2, 1, 0]), [1, 2])
        for name in NAMES:
            torch.testing.assert_close(delta(both, 0, name), delta(turned, 1, name))
            torch.testing.assert_close(delta(both, 1, name), delta(turned, 0, name))
            expected = sum(B @ A for A, B in zip(*chunks[name])) + net.bias[f"{name}_B"] @ net.bias[f"{name}_A"]
            torch.testing.assert_close(delta(net.join(chunks, [3]), 0, name), expected, rtol=1e-5, atol=1e-5)
        # adapters of different ranks share a batch
        ranks = lora.stack([lora.select(net.join(chunks, [3]), 0), lora.select(net.join(lora.select(chunks, [1]), [1]), 0)])
        torch.testing.assert_close(delta(ranks, 1, "v_proj"), delta(net.join(lora.select(chunks, [1]), [1]), 0, "v_proj"))
        moved = net(features[1:2][:, :, [2, 1, 3, 0]], mask[1:2][:, [2, 1, 3, 0]])  # no positions: order and side of padding are free
        torch.testing.assert_close(moved["q_proj"][0][0], chunks["q_proj"][0][1], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# model.py
# ---------------------------------------------------------------------------------------------------------


def test_names_of_one_base_model(tmp_path):
    (tmp_path / "gemma-2-2b").mkdir()
    same = ["gemma-2-2b", "google/gemma-2-2b-it", "models/gemma-2-2b-it", str(tmp_path / "gemma-2-2b"), "./Gemma-2-2b-it"]
    assert {model.preset_name(name) for name in same} == {"gemma-2-2b"}
    assert model.preset_name("someone/tiny") != "tiny" and model.full_name(model.TINY) == "tiny"
    assert model.preset_name("google/gemma-2-2b") != "gemma-2-2b" and model.preset_name("Qwen/Qwen3-0.6B") == "qwen3-0.6b"
    assert model.preset_name(model.TINY) == "tiny"
    assert model.full_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct" and model.full_name("tiny") == "tiny"


def test_a_hypernetwork_remembers_ones_own_tiny_base(tmp_path, capsys):
    own = tmp_path / "tiny"
    tiny_llama(vocab_size=len(data.VOCABULARY)).save_pretrained(own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model.TINY) / name, own)
    assert command(train, *SHORT, "--base_model", own, "--max_steps", "1", "--out_dir", tmp_path / "net") == 0
    assert command(generate, "--desc", DESC, "--hypernet", tmp_path / "net", "--out", tmp_path / "adapter") == 0
    assert "in 3 layers" in capsys.readouterr().out  # the shipped base has 4
    assert lora.load_adapter(tmp_path / "adapter")[1].base_model == str(own)


def test_hash_encoder_sees_words_and_spelling():
    encode = model.load_encoder("tiny")
    a, b, c, again = encode(["reverse the order of the animals", "put the animals in reversed order", "translate the fruits into Italian", "Reverse  the order of the animals"])
    assert a.shape == (8192,) and abs(a.norm() - 1) < 1e-5
    assert torch.equal(a, again)
    assert a @ b > a @ c + 0.2


def test_transformer_encoder_pools_real_tokens_only(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    lora.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)).eval()
    bert.save_pretrained(tmp_path)
    texts = ["one", "two three four one two"]
    alone = torch.cat([model.load_encoder(str(tmp_path))([t]) for t in texts])
    torch.testing.assert_close(model.load_encoder(str(tmp_path))(texts), alone, rtol=1e-5, atol=1e-6)
    hidden = bert(torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    torch.testing.assert_close(alone[0], F.normalize(hidden.mean(0), dim=0), rtol=1e-5, atol=1e-6)
    (tmp_path / "1_Pooling").mkdir()
    lora.write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    torch.testing.assert_close(model.load_encoder(str(tmp_path))(texts)[0], F.normalize(hidden[0], dim=0), rtol=1e-5, atol=1e-6)


def test_gte_loads_without_its_own_code(tmp_path):
    """A folder like Alibaba-NLP/gte-large-en-v1.5: model type "new", fused projections, NTK-scaled rotary positions, CLS."""
    torch.manual_seed(0)
    d, words = 32, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    lora.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    sizes = dict(hidden_size=d, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=10, type_vocab_size=2, layer_norm_eps=1e-12)
    new = dict(model_type="new", auto_map={"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"}, rope_theta=160000, rope_scaling={"type": "ntk", "factor": 2.0})
    new |= dict(architectures=["NewModel"], pack_qkv=True, position_embedding_type="rope", max_position_embeddings=64, pad_token_id=0, layer_norm_type="layer_norm")
    lora.write_json(tmp_path / "config.json", sizes | new)
    (tmp_path / "1_Pooling").mkdir()
    lora.write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    shapes = {"embeddings.word_embeddings.weight": (10, d), "embeddings.token_type_embeddings.weight": (2, d), "embeddings.LayerNorm.weight": (d,), "embeddings.LayerNorm.bias": (d,)}
    for i in range(2):
        own = {"attention.qkv_proj.weight": (3 * d, d), "attention.qkv_proj.bias": (3 * d,), "attention.o_proj.weight": (d, d), "attention.o_proj.bias": (d,)}
        own |= {"mlp.up_gate_proj.weight": (96, d), "mlp.down_proj.weight": (d, 48), "mlp.down_proj.bias": (d,)}
        own |= {f"{ln}.{k}": (d,) for ln in ("attn_ln", "mlp_ln") for k in ("weight", "bias")}
        shapes |= {f"encoder.layer.{i}.{k}": shape for k, shape in own.items()}
    w = {k: torch.randn(shape) * 0.3 for k, shape in shapes.items()}
    save_file(w, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def published(ids: list[int]) -> torch.Tensor:
        """The state at [CLS], from the published description of the network."""
        ln = lambda x, key: F.layer_norm(x, (d,), w[f"{key}.weight"], w[f"{key}.bias"], 1e-12)
        x = ln(w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        inverse = 1 / (160000 * 2.0) ** (torch.arange(0, 16, 2) / 16) / 2.0 ** (2 / 16)
        angle = (torch.arange(len(ids))[:, None] * inverse).repeat(1, 2)[:, None]  # [T, 1, 16]
        rotate = lambda x: x * angle.cos() + torch.cat([-x[..., 8:], x[..., :8]], -1) * angle.sin()
        for i in range(2):
            lin = lambda x, key, i=i: F.linear(x, w[f"encoder.layer.{i}.{key}.weight"], w.get(f"encoder.layer.{i}.{key}.bias"))
            q, k, v = (part.view(-1, 2, 16) for part in lin(x, "attention.qkv_proj").chunk(3, -1))
            weights = (torch.einsum("thd,shd->hts", rotate(q), rotate(k)) / 4).softmax(-1)
            x = ln(x + lin(torch.einsum("hts,shd->thd", weights, v).reshape(-1, d), "attention.o_proj"), f"encoder.layer.{i}.attn_ln")
            up, gate = lin(x, "mlp.up_gate_proj").chunk(2, -1)
            x = ln(x + lin(up * F.gelu(gate), "mlp.down_proj"), f"encoder.layer.{i}.mlp_ln")
        return F.normalize(x[0], dim=0)

    encode = model.load_encoder(str(tmp_path), full_stop=True)
    ours = encode(["one two", "three four one ."])
    torch.testing.assert_close(ours[0], published([2, 5, 6, 9, 3]), rtol=1e-4, atol=1e-5)  # with the full stop
    torch.testing.assert_close(ours[1], published([2, 7, 8, 5, 9, 3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.load_encoder(str(tmp_path))(["one two"])[0], published([2, 5, 6, 3]), rtol=1e-4, atol=1e-5)


def test_base_encoder_reads_the_last_token():
    base, tokenizer = model.load_base("tiny")
    encode = model.load_encoder("base", base=(base, tokenizer))
    alone = encode(["cat dog"])[0]
    torch.testing.assert_close(encode(["cat dog", "cat dog red hat"])[0], alone, rtol=1e-5, atol=1e-6)
    ids = torch.tensor([tokenizer("cat dog")["input_ids"]])
    hidden = base(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(alone, F.normalize(hidden[0, -1], dim=0))


def test_an_answer_that_was_cut_off_is_not_a_whole_one_with_white_space_after_it():
    tokenizer = lambda text, **_: {"input_ids": [1]}
    tokenizer.pad_token_id, letters = 0, "$?ab\n"  # $ ends an answer
    tokenizer.batch_decode = lambda rows, **_: ["".join(letters[i] for i in row if i) for row in rows]
    said = torch.tensor([[1, 2, 3, 4, 4], [1, 2, 3, 4, 0], [1, 4, 2, 3, 0]])
    base = types.SimpleNamespace(device="cpu", generate=lambda **_: said, generation_config=types.SimpleNamespace(eos_token_id=[0]))
    assert model.answer(base, tokenizer, ["?"] * 3) == ["ab\n\n", "ab", "ab"]


def test_a_batch_of_answers_is_that_of_each_prompt_alone():
    base, tokenizer = model.load_base("tiny")
    examples = [("cat red", "cat"), ("dog blue", "dog")]
    prompts = [model.render(tokenizer, model.prompt(tokenizer, "wolf silver", "", examples[:n])) for n in (0, 1, 2)]
    assert prompts[1] == "cat red -> cat<eos>\nwolf silver ->"
    assert model.render(tokenizer, model.prompt(tokenizer, "")) == " ->" and model.render(tokenizer, model.prompt(tokenizer, "cat"), "") == " <eos>"
    assert model.answer(base, tokenizer, prompts, 5) == [model.answer(base, tokenizer, [p], 5)[0] for p in prompts]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_chat_templates_with_and_without_a_system_message():
    _, tokenizer = model.load_base("tiny")
    tokenizer.chat_template = CHATML
    messages = model.prompt(tokenizer, "hello")
    assert model.render(tokenizer, messages) == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert model.render(tokenizer, messages, "bye") == "bye<|im_end|>"
    _, tokenizer = model.load_base("tiny")
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert model.prompt(tokenizer, "hello") == [{"role": "user", "content": "hello"}]
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{{ thoughts }}{% endif %}{{ m.content }}")
    thinking = "{% set thoughts = '<think></think>' %}" + tokenizer.chat_template + "{% if add_generation_prompt and not enable_thinking %}{{ thoughts }}{% endif %}"
    tokenizer.chat_template = thinking
    assert model.render(tokenizer, model.prompt(tokenizer, "hello"), "bye") == "bye<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}AI: {% endif %}"
    with pytest.raises(lora.UserError, match="does not put answers where it asks for them"):
        model.render(tokenizer, model.prompt(tokenizer, "hello"), "bye")


def test_a_base_model_without_a_chat_template_starts_its_texts_as_it_is_used_to(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    plain = model.load_base("tiny")[1]
    plain.chat_template, plain.bos_token = None, "<unk>"
    plain.save_pretrained(tmp_path)
    assert model.render(model.load_base(str(tmp_path))[1], model.prompt(plain, "cat")) == "cat ->"  # it knows a first token, and does not use it
    first, text = {"SpecialToken": {"id": "<unk>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<unk>": {"id": "<unk>", "ids": [plain.unk_token_id], "tokens": ["<unk>"]}}
    processor = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text], "special_tokens": known}
    lora.write_json(tmp_path / "tokenizer.json", lora.read_json(tmp_path / "tokenizer.json") | {"post_processor": processor})
    _, tokenizer = model.load_base(str(tmp_path))
    question, answer = model.tokenize_example(tokenizer, "cat", "gato")
    assert question == tokenizer("cat ->")["input_ids"] and question[0] == plain.unk_token_id != question[1]
    assert answer == plain.convert_tokens_to_ids(["gato", "<eos>"])


# ---------------------------------------------------------------------------------------------------------
# data.py
# ---------------------------------------------------------------------------------------------------------


def test_held_out_tasks_are_nowhere_in_training():
    splits = data.tiny_splits()
    assert [len(splits[k]) for k in ("train", "val", "test")] == [479, 8, 25]
    assert len({parts for tasks in splits.values() for parts in tasks}) == 512
    held_out = set(splits["val"] + splits["test"])
    for kind, parts in enumerate((data.FILTERS, data.MAPS, data.LAYOUTS)):
        assert {task[kind] for task in splits["train"]} == set(parts)

    class Args:
        tasks_per_batch, examples_per_task, max_steps = 200, 8, 10

    objective = train.Pretrain(Args, "cpu")
    drawn = set()
    tasks = objective.tasks
    assert not held_out & set(tasks)
    for step in range(0, 10, 2):
        batch = objective.draw(random.Random(step), step)
        drawn |= {len(question.split()) for text in batch for question, _ in text}
        assert all(len(text) == 8 for text in batch)
    assert drawn == {1, 2, 3, 4}
    for step in range(1, 10, 2):  # the other texts are looked up in, the tasks do not occur
        for (first, _), *others in (texts := objective.draw(random.Random(step), step)):
            document = first.rsplit(" ", 1)[0]
            assert all(f"{key} -> {value} <eos>" in document for key, (value,) in others)
        assert len(texts) == 200 and all(len(text) == 8 for text in texts)
    names = {"-".join(parts) for parts in held_out}
    assert not names & {task.name for task in data.load_tasks("tiny")["train"]}


def test_tiny_answers_are_right_and_tell_tasks_apart():
    rng = random.Random(0)
    words = "cat red dog shirt".split()
    rules = {  # by hand
        ("animals", "french", "reversed"): lambda q: "chien chat",
        ("all", "capitals", "joined"): lambda q: "CAT and RED and DOG and SHIRT",
        ("clothes", "italian", "numbered"): lambda q: "1. camicia",
        ("animals", "initial", "counted"): lambda q: "c d (2)",
    }
    for (chosen, change, layout), right in rules.items():
        kept = [data.FORMS[w][change] for w in words if chosen == "all" or w in data.CATEGORIES[chosen]]
        assert " ".join(data.LAYOUTS[layout](kept)) == right(words)
    for parts in rng.sample(data.tiny_splits()["train"], 60):  # another filter, map or layout gives another answer
        chosen, change, layout = parts
        for _ in range(5):
            question, (answer,) = data.tiny_example(parts, rng)
            words = question.split()
            ours = [w for w in words if chosen == "all" or w in data.CATEGORIES[chosen]]
            assert answer == " ".join(data.LAYOUTS[layout]([data.FORMS[w][change] for w in ours]))
            assert len(set(words)) == 4
            for other in data.MAPS:
                assert other == change or answer != " ".join(data.LAYOUTS[layout]([data.FORMS[w][other] for w in ours]))
            for other in data.LAYOUTS if len(ours) > 1 and change != "initial" else ():
                assert other == layout or answer != " ".join(data.LAYOUTS[other]([data.FORMS[w][change] for w in ours]))
            for other in data.FILTERS if layout not in ("first", "last") and change != "initial" else ():
                theirs = [w for w in words if other == "all" or w in data.CATEGORIES[other]]
                assert theirs == ours or answer != " ".join(data.LAYOUTS[layout]([data.FORMS[w][change] for w in theirs]))


def test_a_tiny_input_does_not_give_its_task_away():
    def mixtures(parts):  # {which of the four words are fruits: how often} in 4,000 inputs
        rng, counts = random.Random(1), {}
        for _ in range(4000):
            own = [word in data.CATEGORIES["fruits"] for word in data.tiny_example(parts, rng)[0].split()]
            counts[tuple(own)] = counts.get(tuple(own), 0) + 1
        return counts

    one = mixtures(("fruits", "same", "in_order"))
    for parts in (("fruits", "french", "first"), ("fruits", "plural", "last")):  # the same whatever map and layout
        other = mixtures(parts)
        assert all(abs(one[own] - other[own]) < 120 for own in one)
    for own in one:  # the words that are to be kept are as often the others
        swapped = tuple(not x for x in own)
        assert all(own) or abs(one[own] - one[swapped]) < 120
    rng = random.Random(2)
    for parts in rng.sample(data.tiny_splits()["train"], 100):  # always of two categories at most, be it a filter or not
        words = data.tiny_example(parts, rng)[0].split()
        assert len({c for c in data.CATEGORIES for word in words if word in data.CATEGORIES[c]}) <= 2


def test_reworded_descriptions_are_new():
    tasks = data.load_tasks("tiny")
    train_words = {d for task in tasks["train"] for d in task.descriptions}
    for task in tasks["test"]:
        assert len(task.descriptions) == 128 and not train_words & set(task.reworded)
    for part, styles in data.SAY.items():
        for seen, withheld in styles[:2]:
            assert not set(seen) & set(withheld) and len(seen) + len(withheld) >= 14, part
        for (around,) in styles[2:]:
            assert len(around) >= 8 and all("{x}" in phrase for phrase in around), part
    again = data.tiny_task(data.tiny_splits()["test"][0])
    assert again in tasks["test"]


def test_a_folder_of_task_files(tmp_path):
    instances = [{"id": str(i), "input": f" in {i}", "output": [f"out {i}", "x"]} for i in range(10)]
    lora.write_json(tmp_path / "a.json", {"name": "a", "descriptions": ["do a", "do it"], "Instances": instances})
    lora.write_json(tmp_path / "b.json", {"Definition": ["do b"], "Instances": instances})
    assert [t.name for t in data.load_tasks(tmp_path)["train"]] == ["a", "b"]
    lora.write_json(tmp_path / "splits.json", {"train": ["b"], "test": ["a"]})
    tasks = data.load_tasks(tmp_path)
    assert [t.name for t in tasks["train"]] == ["b"] and not tasks["val"] and tasks["train"][0].descriptions == ["do b"]
    task = tasks["test"][0]
    assert len(task.train) == 8 and task.test[0] == ("in 8", ["out 8", "x"])
    with pytest.raises(lora.UserError, match="no split val"):
        data.pick(tasks, "val")
    (tmp_path / "b.json").write_text('{"Instances": [{"input": 3}]}')
    with pytest.raises(lora.UserError, match="not a task file"):
        data.load_tasks(tmp_path)
    for empty in {"Instances": []}, {"Instances": [{"input": "a", "output": []}]}, {"Definition": " ", "Instances": instances}:
        lora.write_json(tmp_path / "b.json", {"Definition": ["do b"]} | empty)
        with pytest.raises(lora.UserError, match="an output each, and descriptions .or a document. that are not empty"):
            data.load_tasks(tmp_path)
    lora.write_json(tmp_path / "b.json", {"descriptions": [5], "Instances": instances})
    with pytest.raises(lora.UserError, match="not a task file"):
        data.load_tasks(tmp_path)
    for name in ("a", "../a", ".."):
        lora.write_json(tmp_path / "b.json", {"name": name, "Definition": ["do b"], "Instances": instances})
        with pytest.raises(lora.UserError, match=f"occur twice or are no names of folders: {name}"):
            data.load_tasks(tmp_path)
    for splits, message in (["b"], "splits.json cannot be read as JSON: it holds a list, no object"), ({"train": 5}, "splits.json takes"):
        lora.write_json(tmp_path / "splits.json", splits)
        with pytest.raises(lora.UserError, match=message):
            data.load_tasks(tmp_path)


def test_tasks_of_other_words_than_the_base_models(tmp_path, capsys):
    instances = [{"input": "Paris Berlin", "output": ["Berlin Paris"]}] * 10
    for name in "ab":
        lora.write_json(tmp_path / f"{name}.json", {"Definition": ["Swap them."], "Instances": instances})
    assert command(train, "--mode", "sft", "--tasks", tmp_path, "--out_dir", tmp_path / "net") == 2 and not (tmp_path / "net").exists()
    assert command(evaluation, "--tasks", tmp_path, "--split", "train", "--methods", "base") == 2
    assert capsys.readouterr().err.count("the base model has no token for Paris") == 2


# ---------------------------------------------------------------------------------------------------------
# train.py
# ---------------------------------------------------------------------------------------------------------


ARCHITECTURES = [LlamaConfig, GemmaConfig, Gemma2Config, Gemma3TextConfig, Gemma3Config, Qwen2Config, Qwen3Config, MistralConfig]


def small_decoder(make) -> nn.Module:
    """A random decoder with grouped key-value heads and a head size that is not hidden / heads, where it can be had."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | ({} if make is Qwen2Config else {"head_dim": 12})
    eyes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
    config = make(text_config=sizes, vision_config=eyes, mm_tokens_per_image=4) if make is Gemma3Config else make(**sizes)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for p in base.parameters():
        p.data *= 3
    return base


def test_a_base_model_that_scales_its_logits_is_refused():
    with pytest.raises(lora.UserError, match="CohereForCausalLM makes its logits in a way that is not known here"):
        model.check_head(small_decoder(CohereConfig))


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_an_adapter_on_every_architecture(tmp_path, make):
    """Ours, PEFT's and the merged model's logits are the same; so are gradients with and without checkpointing."""
    small_decoder(make).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model.TINY) / name, tmp_path / "base")
    base, _ = model.load_base(str(tmp_path / "base"))
    model.check_head(base)
    names = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = lora.config_for(base, names, "x")
    adapter, ids = random_adapter(config), torch.randint(1, 50, (2, 9))
    lora.save_adapter(tmp_path / "adapter", adapter, config)
    lora.inject(base, names)
    plain = base(ids).logits
    lora.set_adapter(base, adapter)
    ours = base(ids).logits
    assert (ours - plain).abs().max() > 0.01

    for pair in adapter.values():
        for x in pair:
            x.requires_grad_()
    grads, calls = [], []
    base.get_submodule(config.paths["q_proj"].format(0)).register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            base.train().gradient_checkpointing_enable({"use_reentrant": False})
        lora.set_adapter(base, adapter)
        grads.append(torch.autograd.grad(train.answer_loss(base, ids, ids), [x for pair in adapter.values() for x in pair]))
    assert len(calls) == 1 + 2  # once without, and once more in the backward pass with checkpointing
    for one, other in zip(*grads):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    lora.set_adapter(base.eval(), None)
    lora.merge(base, adapter)
    base.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-4)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = peft.PeftModel.from_pretrained(small_decoder(make), tmp_path / "adapter").eval()
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_answer_loss_equals_the_naive_one(make):
    base = small_decoder(make)
    lengths, prompts, smoothing = [9, 5, 7], [4, 2, 6], 0.2
    ids = torch.randint(1, 50, (3, 9))
    labels = ids.clone()
    naive = []
    for row, (n, k) in enumerate(zip(lengths, prompts)):
        ids[row, n:], labels[row, n:], labels[row, :k] = 0, -100, -100
        logp = base(ids[row : row + 1, :n]).logits[0].log_softmax(-1)
        losses = [-(1 - smoothing) * logp[i - 1, ids[row, i]] - smoothing * logp[i - 1].mean() for i in range(k, n)]
        naive.append(sum(losses) / len(losses))
    torch.testing.assert_close(train.answer_loss(base, ids, labels, smoothing), sum(naive) / 3, rtol=1e-5, atol=1e-5)
    lora.inject(base, NAMES)  # grouped heads, head_dim other than hidden / heads, Gemma's soft caps
    config = lora.config_for(base, NAMES, "x")
    lora.set_adapter(base, random_adapter(config, 3))
    assert (train.answer_loss(base, ids, labels, smoothing) - sum(naive) / 3).abs() > 1e-4


def test_neftune_noise_has_the_published_size():
    base = tiny_llama()
    seen = []
    base.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    ids = torch.randint(160, (2, 25))
    train.answer_loss(base, ids, ids, neftune_alpha=5.0)
    noise = seen[0] - base.get_input_embeddings()(ids)
    assert 0.99 * 5 / (25 * 64) ** 0.5 < noise.abs().max() <= 5 / (25 * 64) ** 0.5


def test_pretraining_documents_are_what_the_chat_template_writes():
    class Args:
        tasks_per_batch, examples_per_task, max_steps, label_smoothing = 2, 3, 10, 0.0

    torch.manual_seed(0)
    objective = train.Pretrain(Args, "cpu")
    batch = objective.draw(random.Random(0), 8)[:1] + objective.draw(random.Random(0), 9)[:1]  # of a task, and of facts
    _, tokenizer = model.load_base("tiny")
    losses = []
    for document in batch:
        ids, labels = [], []
        for question, (answer,) in document:
            prompt, target = model.tokenize_example(tokenizer, question, answer)
            ids, labels = ids + prompt + target, labels + [-100] * len(prompt) + target
        losses.append(train.answer_loss(objective.net, torch.tensor([ids]), torch.tensor([labels])))
        text = model.render(tokenizer, model.prompt(tokenizer, document[-1][0], "", [(q, a[0]) for q, a in document[:-1]]))
        assert ids[: -len(target)] == model.tokenize(tokenizer, text)
    torch.testing.assert_close(objective(batch), sum(losses) / 2)


def test_learning_rate_rises_and_falls():
    class Args:
        lr, warmup, max_steps = 2.0, 0.1, 100

    rates = [train.learning_rate(step, Args) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and max(rates) == 2.0 and abs(rates[55] - 1.0) < 1e-9 and 0 < rates[-1] < 0.03


def test_oracles_train_apart_from_each_other():
    """The gradient of one adapter of the batch does not depend on the other tasks; that of the one A of all is the sum of theirs."""
    base = tiny_llama()
    config = lora.config_for(base, NAMES, "x")
    lora.inject(base, NAMES)
    torch.manual_seed(0)
    bank, one = train.Bank(config, 3), train.Bank(config, 3, one_A=True)
    assert torch.equal(bank.A["q_proj"][0], bank.A["q_proj"][2])
    assert not torch.equal(*train.Bank(config, 2, own_init=True).A["q_proj"])
    for B in bank.B.values():
        nn.init.normal_(B, std=0.1)
    ids = torch.randint(160, (6, 8))
    grads = {}
    for tasks in ([0, 1, 2], [1]):
        bank.zero_grad()
        lora.set_adapter(base, bank(torch.tensor(tasks)))
        rows = torch.cat([ids[2 * i : 2 * i + 2] for i in tasks])
        (train.answer_loss(base, rows, rows) * len(tasks)).backward()
        grads[len(tasks)] = bank.A["v_proj"].grad.clone(), bank.B["v_proj"].grad.clone()
    torch.testing.assert_close(grads[3][0][1], grads[1][0][1], rtol=1e-4, atol=1e-6)
    one.load_state_dict({key: x[:1] if key.startswith("A") else x for key, x in bank.state_dict().items()})
    lora.set_adapter(base, one(torch.arange(3)))
    (train.answer_loss(base, ids, ids) * 3).backward()
    torch.testing.assert_close(one.A["v_proj"].grad[0], grads[3][0].sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.B["v_proj"].grad, grads[3][1], rtol=1e-4, atol=1e-6)


SHORT = ["--mode", "sft", "--n_tasks", "8", "--tasks_per_batch", "4", "--examples_per_task", "2", "--size", "small", "--latent_size", "32"]


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["pretrain", "sft"])
def test_resume_after_kill_is_exact(tmp_path, mode):
    words = [*SHORT, "--dropout", "0.1", "--neftune_alpha", "5"] if mode == "sft" else ["--mode", "pretrain", "--tasks_per_batch", "4", "--examples_per_task", "2"]
    words = [*words, "--max_steps", "60", "--save_every", "7"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(train, *words, "--out_dir", whole) == 0
    run = subprocess.Popen([sys.executable, "train.py", *words, "--out_dir", cut], cwd=HERE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = cut / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 17):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (cut / "config.json").exists() and (cut / "state.safetensors").exists(), "the run had ended before it was killed"
    with metrics.open("a") as f:
        f.write('{"step": 99, "lo')  # a kill may leave half a line
    before = {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, *words, "--out_dir", cut, "--lr", "0.5", "--resume") == 2  # other settings are another run
    assert command(train, *words, "--out_dir", cut, "--max_steps", "14", "--resume") == 2  # it is past that
    assert command(train, *words, "--out_dir", cut) == command(train, *words, "--out_dir", whole) == 2  # a new run does not take the place of another
    assert before == {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    short = shutil.copytree(cut, tmp_path / "short")
    assert command(train, *words, "--max_steps", "30", "--out_dir", short, "--resume") == 0  # but it may end sooner
    assert len(losses_of(short)) == 30 and losses_of(short)[:14] == losses_of(whole)[:14] and (short / "train_args.json").exists()
    assert command(train, *words, "--out_dir", cut, "--resume") == 0
    assert losses_of(cut) == losses_of(whole)
    name = "hypernet.safetensors" if mode == "sft" else "model.safetensors"
    ours, theirs = load_file(cut / name), load_file(whole / name)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs) and not (cut / "state.safetensors").exists()
    for more in ([], ["--max_steps", "90"]):
        assert command(train, *words, *more, "--out_dir", cut, "--resume") == 2 and losses_of(cut) == losses_of(whole)  # it is finished


def test_a_full_disk_is_one_line_and_the_run_can_be_done_again(tmp_path, monkeypatch, capsys):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(lora, "save_file", full)
    words = [*SHORT, "--max_steps", "3", "--out_dir", tmp_path / "run"]
    assert command(train, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: No space left on device" and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    before = losses_of(tmp_path / "run")
    assert command(train, *words, "--resume") == 0 and losses_of(tmp_path / "run") == before and len(before) == 3
    assert (tmp_path / "run" / "hypernet.safetensors").exists()


def test_no_limit_to_gradients_is_one_that_none_reaches(tmp_path):
    for limit in ("0", "1e9"):
        assert command(train, *SHORT, "--max_steps", "3", "--max_grad_norm", limit, "--out_dir", tmp_path / limit) == 0
    assert losses_of(tmp_path / "0") == losses_of(tmp_path / "1e9")


def torchrun(n: int, folder: Path, *words: str) -> list[float]:
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone", "train.py", *SHORT, "--max_steps", "5", *words, "--out_dir", str(folder)],
        cwd=HERE, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return losses_of(folder)


def test_two_processes_are_one(tmp_path):
    one = torchrun(1, tmp_path / "one", "--dropout", "0", "--neftune_alpha", "0")
    two = torchrun(2, tmp_path / "two", "--dropout", "0", "--neftune_alpha", "0")
    assert len(one) == 5 and one[0] != one[-1]
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-5
    noisy = torchrun(2, tmp_path / "noisy", "--dropout", "0.1", "--neftune_alpha", "5")
    assert max(abs(a - b) for a, b in zip(noisy, two)) > 1e-4


def test_the_definition_is_in_the_prompt_where_a_flag_says_so(tmp_path, monkeypatch, capsys):
    instances = [{"input": "cat dog", "output": ["dog cat"]}] * 5
    (tmp_path / "tasks").mkdir()
    lora.write_json(tmp_path / "tasks" / "swap.json", {"Definition": "red hat", "descriptions": ["Swap them."], "Instances": instances})
    seen, real = [], model.prompt
    monkeypatch.setattr(model, "prompt", lambda *a: seen.append(real(*a)[-1]["content"]) or real(*a))
    for words, expected in ([], "cat dog"), (["--prompt_with_definition"], "red hat\n\ncat dog"):
        seen.clear()
        training = ["--mode", "sft", "--tasks_per_batch", "2", "--max_steps", "1", "--tasks", tmp_path / "tasks"]
        net = tmp_path / f"net{len(words)}"
        assert command(train, *training, "--out_dir", net, *words) == 0
        assert seen and set(seen) == {expected}
        seen.clear()
        assert command(evaluation, "--split", "train", "--methods", "base,t2l", "--tasks", tmp_path / "tasks", *words) == 0
        assert seen and set(seen) == {expected}
        seen.clear()
        capsys.readouterr()
        assert command(generate, "--desc", "red hat", "--input", "cat dog", "--out", tmp_path / "out", *words) == 0
        assert seen and set(seen) == {expected}
        assert ("the description, then the input" in capsys.readouterr().out) == bool(words)
    # a hypernetwork trained so needs no flag, and puts the whole table in that setting
    for run in (generate, "--desc", "red hat", "--input", "cat dog", "--out", tmp_path / "out"), (evaluation, "--split", "train", "--tasks", tmp_path / "tasks"):
        for words, content in ([], expected), (["--no-prompt_with_definition"], "cat dog"):
            seen.clear()
            assert command(*run, "--hypernet", net, *(["--methods", "base,t2l"] if run[0] is evaluation else []), *words) == 0
            assert seen and set(seen) == {content}
    # or before a share of the examples
    seen.clear()
    training = ["--mode", "sft", "--tasks_per_batch", "64", "--max_steps", "2", "--out_dir", tmp_path / "net"]
    instances = [{"input": f"cat {word}", "output": [f"{word} cat"]} for word in data.FORMS]
    lora.write_json(tmp_path / "tasks" / "swap.json", {"Definition": "red hat", "descriptions": ["Swap them."], "Instances": instances})
    assert command(train, *training, "--tasks", tmp_path / "tasks", "--prompt_with_definition", "0.3") == 0
    assert 0.1 < sum(content.startswith("red hat") for content in seen) / len(seen) < 0.5
    assert hypernet.load_hypernet(tmp_path / "net").config.prompt_with_definition is True


def test_without_a_definition_the_description_in_use_is_in_the_prompt(tmp_path, monkeypatch):
    lora.write_json(tmp_path / "swap.json", {"descriptions": ["red hat", "blue shoe"], "Instances": [{"input": "cat", "output": ["dog"]}] * 20})
    lora.write_json(tmp_path / "keep.json", {"descriptions": ["white sun"], "Instances": [{"input": "bird", "output": ["bird"]}] * 20})
    seen, real = [], model.prompt
    monkeypatch.setattr(model, "prompt", lambda *a: seen.append(real(*a)[-1]["content"]) or real(*a))
    training = ["--mode", "sft", "--tasks_per_batch", "2", "--max_steps", "6", "--out_dir", tmp_path / "net"]
    assert command(train, *training, "--tasks", tmp_path, "--prompt_with_definition") == 0
    assert set(seen) == {"blue shoe\n\ncat", "red hat\n\ncat", "white sun\n\nbird"}
    seen.clear()
    words = ["--split", "train", "--n_examples", "2", "--tasks", tmp_path, "--prompt_with_definition"]
    assert command(evaluation, *words, "--methods", "t2l_shuffled") == 0  # the adapter is another task's, the prompt is not
    assert sorted(seen) == ["blue shoe\n\ncat", "red hat\n\ncat"] + ["white sun\n\nbird"] * 2


def test_rows_in_groups_of_like_length_give_the_same_loss_and_gradient():
    args = train.argparse.Namespace(base_model="tiny", tasks="tiny", split="train", n_tasks=6, dtype="float32", target_modules="q_proj,v_proj", rank=8, alpha=16)
    vars(args).update(dropout=0.0, compile=False, gradient_checkpointing=False, multi_task=False, tasks_per_batch=6, examples_per_task=3, own_init=False, one_A=False)
    vars(args).update(prompt_with_definition=False, label_smoothing=0.1, neftune_alpha=0.0, l2=0.1, l1=0.1, row_groups=1, max_tokens=None)
    torch.manual_seed(0)
    objective = train.Lora(args, "cpu")
    for B in objective.net.B.values():
        nn.init.normal_(B, std=0.1)
    objective.tasks = [data.Task("t", ["d"], [(" ".join(list(data.FORMS)[: 1 + (i + k) % 4]), [list(data.FORMS)[i]]) for k in range(9)], []) for i in range(6)]
    batch, found = objective.draw(random.Random(0), 0), {}
    for args.row_groups in (1, 4, 18):
        objective.zero_grad()
        loss = objective(batch)
        loss.backward()
        found[args.row_groups] = (loss.detach(), objective.net.A["v_proj"].grad.clone())
    for groups in (4, 18):
        torch.testing.assert_close(found[groups], found[1], rtol=1e-4, atol=1e-6)


def test_ranks_that_fill_up_a_batch_do_not_count_in_the_size_of_the_weights(reader):
    net, (base, tokenizer) = hypernet.load_hypernet(reader), model.load_base("tiny")
    texts = ["cat -> red", "dog -> blue horse chair bird hat lemon apple sun hat -> sun moon tree"]
    for size in (torch.abs, torch.square):
        sizes = []
        for documents in (texts[:1], texts[1:], texts):
            adapter = hypernet.read_documents(net, base, tokenizer, [[text] for text in documents])
            sizes.append(train.weight_loss(adapter, size))
        A, B = hypernet.read_documents(net, base, tokenizer, [texts[:1]])["down_proj"]
        torch.testing.assert_close(sizes[0], size(A).mean() + size(B).mean())
        torch.testing.assert_close(sizes[2], (sizes[0] + sizes[1]) / 2)


def test_longer_examples_are_left_out(tmp_path, monkeypatch):
    words, seen, real = list(data.FORMS), set(), train.answer_loss
    (tmp_path / "tasks").mkdir()
    for name, lengths in dict(mixed=(1, 6), long=(6, 7)).items():
        instances = [{"input": " ".join(words[:n]), "output": ["cat"]} for n in lengths for _ in range(4)]
        lora.write_json(tmp_path / "tasks" / f"{name}.json", {"descriptions": ["Swap them."], "Instances": instances})
    monkeypatch.setattr(train, "answer_loss", lambda base, ids, *rest: seen.add(ids.shape[1]) or real(base, ids, *rest))
    training = ["--mode", "sft", "--tasks_per_batch", "4", "--tasks", tmp_path / "tasks", "--out_dir", tmp_path / "net"]
    assert command(train, *training, "--max_steps", "4", "--max_tokens", "4") == 0
    assert seen == {4}  # one word, the arrow, the answer and its end
    assert lora.read_json(tmp_path / "net" / "train_args.json")["trained_tasks"] == 1


def test_training_goes_on_from_a_hypernetwork(tmp_path, capsys):
    assert command(train, *SHORT, "--max_steps", "3", "--out_dir", tmp_path / "first") == 0
    assert command(train, *SHORT, "--max_steps", "1", "--lr", "0", "--start_from", tmp_path / "first", "--out_dir", tmp_path / "then") == 0
    first, then = (hypernet.load_hypernet(tmp_path / name) for name in ("first", "then"))
    assert first.config == then.config
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), then.state_dict().values()))
    capsys.readouterr()
    assert command(train, *SHORT, "--rank", "4", "--max_steps", "1", "--start_from", tmp_path / "first", "--out_dir", tmp_path / "other") == 2
    assert "r is 8, not 4" in capsys.readouterr().err
    assert command(train, *SHORT, "--target_modules", "v_proj,q_proj", "--max_steps", "1", "--start_from", tmp_path / "first", "--out_dir", tmp_path / "other") == 2
    assert "target_modules is q_proj,v_proj, not v_proj,q_proj" in capsys.readouterr().err
    assert command(train, *SHORT, "--tell_apart", "1", "--start_from", tmp_path / "first", "--out_dir", tmp_path / "other") == 2
    assert "is how a new hypernetwork starts" in capsys.readouterr().err
    lora.write_json(tmp_path / "first" / "config.json", lora.read_json(tmp_path / "first" / "config.json") | {"base_model": "someone/else"})
    assert command(train, *SHORT, "--max_steps", "1", "--start_from", tmp_path / "first", "--out_dir", tmp_path / "other") == 2
    assert "base_model is else, not tiny" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("arch", [[], ["--arch", "d2l", "--rank", "2", "--latent_size", "32"]])
def test_training_starts_from_an_adapter(tmp_path, arch):
    words = ["--n_tasks", "8", "--tasks_per_batch", "4", "--max_steps", "2", "--target_modules", "v_proj", "--alpha", "16"]
    assert command(train, "--mode", "lora", "--multi_task", *words, *arch[2:4], "--out_dir", tmp_path / "lora") == 0
    assert command(train, "--mode", "sft", *words, *arch, "--lr", "0", "--start_from", tmp_path / "lora", "--out_dir", tmp_path / "net") == 0
    A, B = lora.load_adapter(tmp_path / "lora")[0]["v_proj"]
    net = hypernet.load_hypernet(tmp_path / "net")
    if arch:
        chunk, count = net(torch.randn(1, 3, net.config.feature_size) if not net.config.per_layer else torch.randn(1, 4, 3, 128), torch.ones(1, 3)), [1]
        found = tuple(x[0] for x in net.join(chunk, count)["v_proj"])
    else:
        found = tuple(x[0] for x in net(torch.randn(1, net.config.task_emb_size))["v_proj"])
    assert B.abs().max() > 0 and torch.allclose(found[1] @ found[0], B @ A, atol=2e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    words = [*SHORT, "--max_steps", "3", "--dropout", "0.1", "--neftune_alpha", "5"]
    assert command(train, *words, "--out_dir", tmp_path / "plain") == 0
    assert command(train, *words, "--gradient_checkpointing", "--out_dir", tmp_path / "again") == 0
    for one, other in zip(losses_of(tmp_path / "plain"), losses_of(tmp_path / "again")):
        assert abs(one - other) < 1e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_layers_compute_the_same(tmp_path, monkeypatch, capsys):
    words = [*SHORT, "--max_steps", "3", "--dropout", "0.1", "--dtype", "float32", "--row_groups", "2"]
    assert command(train, *words, "--out_dir", tmp_path / "plain") == 0
    assert command(train, *words, "--compile", "--out_dir", tmp_path / "compiled") == 0
    for one, other in zip(losses_of(tmp_path / "plain"), losses_of(tmp_path / "compiled")):
        assert abs(one - other) < 1e-4
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert command(train, *words, "--compile", "--out_dir", tmp_path / "none") == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_mixed_precision_computes_nearly_the_same(tmp_path):
    words = [*SHORT, "--max_steps", "12", "--dropout", "0"]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        assert command(train, *words, "--dtype", dtype, "--out_dir", tmp_path / dtype) == 0
        losses[dtype] = torch.tensor(losses_of(tmp_path / dtype))
    assert 0 < (losses["float32"] - losses["bfloat16"]).abs().max() < 0.03 and losses["bfloat16"][-1] < losses["bfloat16"][0]


def test_documents_get_longer_as_the_training_goes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--mode", "sft", "--arch", "d2l", "--max_steps", "100", "--dtype", "float32"])
    objective = train.Documents(train.complete(train.parse_args()), "cpu")
    lines = lambda step: [objective.tasks[i].descriptions[0].count("\n") + 1 for i, _, _ in objective.draw(random.Random(step), step)]
    assert max(lines(0)) <= 4 and max(lines(99)) == 32 and objective.reach(50) == objective.reach(99) == len(objective.tasks)


def test_a_new_tiny_base_goes_where_it_counts_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mode, expected in ("pretrain", "tiny"), ("lora", "lora"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--mode", mode])
        folder = train.complete(train.parse_args()).out_dir
        Path(folder).mkdir(parents=True)
        assert model.preset_name(folder) == expected


def test_wandb_gets_what_metrics_jsonl_gets(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(__spec__="there", init=lambda **k: calls.append(k), log=lambda row, step: calls.append((row["loss"], step)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert command(train, *SHORT, "--max_steps", "3", "--wandb", "--out_dir", tmp_path / "run") == 0
    assert calls[0]["config"]["max_steps"] == 3 and calls[1:] == [(loss, i + 1) for i, loss in enumerate(losses_of(tmp_path / "run"))]


def test_oracles_and_reconstruction_end_to_end(tmp_path, capsys):
    """A hypernetwork that learnt to write four oracles writes them back."""
    oracles, recon = tmp_path / "oracles", tmp_path / "recon"
    assert command(train, "--mode", "lora", "--n_tasks", "4", "--max_steps", "10", "--out_dir", oracles) == 0
    names = [task.name for task in data.pick(data.load_tasks("tiny"), "train", 4)]
    loaded = [lora.load_adapter(oracles / name) for name in names]
    assert all(B.abs().max() > 0 for adapter, _ in loaded for _, B in adapter.values())
    assert command(train, "--mode", "lora", "--one_A", "--n_tasks", "2", "--max_steps", "3", "--out_dir", tmp_path / "one_A") == 0
    (A, B), (other_A, other_B) = (lora.load_adapter(tmp_path / "one_A" / name)[0]["q_proj"] for name in names[:2])
    assert torch.equal(A, other_A) and not torch.equal(B, other_B)
    assert command(train, "--mode", "lora", "--multi_task", "--n_tasks", "4", "--max_steps", "3", "--out_dir", tmp_path / "mt") == 0
    one, _ = lora.load_adapter(tmp_path / "mt")
    assert one["q_proj"][0].shape == (4, 8, 128) and one["q_proj"][1].abs().max() > 0
    words = ["--mode", "recon", "--oracles", oracles, "--n_tasks", "4", "--tasks_per_batch", "16", "--max_steps", "300", "--lr", "3e-3", "--latent_size", "128", "--out_dir", recon]
    assert command(train, *words) == 0
    losses = losses_of(recon)
    assert losses[-1] < 0.1 * losses[0]
    net, encode = hypernet.load_hypernet(recon), model.load_encoder("tiny")
    assert command(train, *words[:4], "--n_tasks", "1", "--out_dir", tmp_path / "alone") == 2  # has no deviation
    targets = lora.stack([adapter for adapter, _ in loaded])
    with torch.no_grad():
        made = net(encode([task.descriptions[0] for task in data.pick(data.load_tasks("tiny"), "train", 4)]))
    mean = targets["q_proj"][1].mean(0)
    assert (made["q_proj"][1] - targets["q_proj"][1]).abs().mean() < 0.5 * (mean - targets["q_proj"][1]).abs().mean()
    sft = ["--mode", "sft", "--start_from", recon, "--n_tasks", "4", "--latent_size", "128", "--max_steps", "1", "--lr", "0", "--out_dir", tmp_path / "sft"]
    assert command(train, *sft) == 0  # and SFT can go on from there
    assert all(torch.equal(x, hypernet.load_hypernet(tmp_path / "sft").state_dict()[key]) for key, x in net.state_dict().items())
    shutil.rmtree(oracles / names[0])
    capsys.readouterr()
    assert command(train, *words[:4], "--n_tasks", "1", "--out_dir", tmp_path / "alone") == 2
    assert "no adapters of the train tasks" in capsys.readouterr().err  # the first task is the first, with an oracle or not


def test_what_all_oracles_share_is_no_part_of_the_loss():
    """Not even its rounding, which z-scores would divide by no deviation."""
    shapes = dict(n_layers=3, paths={"q_proj": "layers.{}.q_proj"}, in_features={"q_proj": 64}, out_features={"q_proj": 32})
    config = hypernet.HypernetConfig(**shapes, task_emb_size=16, z_score=True)
    torch.manual_seed(0)
    net, A, B = hypernet.TextToLoRA(config).eval(), 0.05 * torch.randn(3, 8, 64), torch.randn(7, 3, 32, 8)
    target = {"q_proj": (A.expand(7, -1, -1, -1).contiguous(), B)}
    net.normalize(target)
    made = net(torch.randn(7, 16))
    loss_of_B = ((made["q_proj"][1] - B) / B.std(0)).abs().mean()
    torch.testing.assert_close(train.z_score_loss(made, target, net.scale), loss_of_B / 2, rtol=1e-3, atol=0)  # it was 20 times that


def test_mixup_moves_descriptions_and_oracles_alike():
    """Adapters that are a linear function of the description still are that function of it; or their products are."""
    torch.manual_seed(0)
    task_emb, W_A, W_B = F.normalize(torch.randn(6, 32), dim=-1), torch.randn(32, 2 * 3 * 5), torch.randn(32, 2 * 7 * 3)
    adapters = lambda x: {"q_proj": ((x @ W_A).view(-1, 2, 3, 5), (x @ W_B).view(-1, 2, 7, 3))}
    moved, target = train.mixup(3 * task_emb, adapters(task_emb), False)  # the length of an embedding says nothing
    torch.testing.assert_close(target, adapters(moved))
    alike = moved @ torch.linalg.pinv(task_emb)  # [6, 6]: how much of which task is in each row
    assert alike.min() > -1e-5 and torch.allclose(alike.sum(1), torch.ones(6)) and ((alike > 1e-3).sum(1) <= 2).all()
    assert (moved - task_emb).norm(dim=1).gt(0.1).sum() > 3
    moved, target = train.mixup(task_emb, adapters(task_emb), True)
    A, B = adapters(task_emb)["q_proj"]
    own, alike = B @ A, moved @ torch.linalg.pinv(task_emb)
    torch.testing.assert_close(target["q_proj"][1] @ target["q_proj"][0], torch.einsum("ij,jlab->ilab", alike, own), rtol=1e-3, atol=1e-3)


def test_a_document_is_read_once_and_answered_from_the_weights(tmp_path, capsys):
    """Trained on documents with one fact each, the hypernetwork writes adapters that know them, chunks and PEFT included."""
    (tmp_path / "docs").mkdir()
    facts = {"cat": "gatto", "dog": "cane", "cow": "mucca"}
    for name, fact in facts.items():
        document = " ".join(["red blue yellow black"] * 3 + [name, fact])
        lora.write_json(tmp_path / "docs" / f"{name}.json", {"document": document, "questions": [{"question": "horse", "answer": fact}]})
        (tmp_path / f"{name}.txt").write_text(document)
    words = ["--mode", "sft", "--arch", "d2l", "--tasks", tmp_path / "docs", "--latent_size", "32", "--n_blocks", "1", "--chunk_len", "8"]
    words += ["--tasks_per_batch", "3", "--max_steps", "200", "--lr", "3e-3", "--dropout", "0", "--l2", "0", "--out_dir", tmp_path / "net"]
    assert command(train, *words) == 0
    capsys.readouterr()
    for name, fact in facts.items():
        words = ["--doc", tmp_path / f"{name}.txt", "--hypernet", tmp_path / "net", "--input", "horse", "--out", tmp_path / name]
        assert command(generate, *words) == 0
        shown = capsys.readouterr().out
        assert re.search(rf"with adapter  {fact}\n", shown) and re.search(r"with adapter \d+ ms", shown) and "14 tokens" in shown and "rank 24 on down_proj" in shown
    assert command(evaluation, "--tasks", tmp_path / "docs", "--split", "train", "--hypernet", tmp_path / "net", "--methods", "base,t2l,t2l_shuffled", "--out", tmp_path / "e.json") == 0
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    assert [results[k]["mean"] for k in ("base", "t2l", "t2l_shuffled")] == [0, 1, 0]
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, tokenizer = model.load_base("tiny")
    prompt = [model.render(tokenizer, model.prompt(tokenizer, "horse"))]
    assert model.answer(peft.PeftModel.from_pretrained(base, tmp_path / "cow"), tokenizer, prompt, 8) == ["mucca"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A random Doc-to-LoRA hypernetwork for the tiny base, in its folder."""
    torch.manual_seed(0)
    base, _ = model.load_base("tiny")
    config = lora.config_for(base, ["down_proj"], "tiny", alpha=2 * 8**2)
    net = hypernet.DocToLoRA(hypernet.DocConfig(**vars(config), feature_size=128, latent_size=32, n_blocks=1, n_heads=4, chunk_len=6))
    for p in [*net.scale.values(), *net.bias.values()]:
        nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("reader")
    hypernet.save_hypernet(net, folder)
    return folder


def test_how_a_document_is_read_does_not_change_its_adapter(reader):
    """Neither the other documents of a batch, nor how many pieces are read at once, nor their order."""
    net, (base, tokenizer) = hypernet.load_hypernet(reader), model.load_base("tiny")
    lora.inject(base, net.names)
    texts = ["cat -> red", "dog -> blue horse chair\nbird hat lemon apple sun", "hat -> sun moon tree"]
    read = lambda documents, **how: hypernet.read_documents(net, base, tokenizer, documents, **how)["down_proj"]
    with torch.no_grad():
        A, B = read([[text] for text in texts])
        for i, text in enumerate(texts):
            for alone in (read([[text]]), read([[text]], chunk_batch=1)):
                rank = alone[0].shape[-2]
                torch.testing.assert_close(alone[1][0] @ alone[0][0], B[i] @ A[i], rtol=1e-4, atol=1e-5)
                assert rank == 8 * (1 + math.ceil(len(model.tokenize(tokenizer, text)) / 6)) and not A[i, :, rank:].any()
        (one,), (two,) = (B @ A for A, B in (read([texts[:2]]), read([texts[1::-1]])))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        bias = net.bias["down_proj_B"] @ net.bias["down_proj_A"]
        torch.testing.assert_close(one, B[0] @ A[0] + B[1] @ A[1] - bias, rtol=1e-4, atol=1e-5)
    assert hypernet.cut(list(range(10)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and hypernet.cut([1, 2, 3, 4], 4, 2) == [[1, 2], [3, 4]]


def test_documents_are_added_to_an_adapter(tmp_path, reader, capsys):
    texts = {"one": "cat -> red", "two": "dog -> blue horse chair"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    write = lambda out, *words: command(generate, "--hypernet", reader, *words, "--input", "cat", "--out", tmp_path / out)
    docs = [word for name in texts for word in ("--doc", tmp_path / f"{name}.txt")]
    assert write("both", *docs) == 0 and "one.txt" in (shown := capsys.readouterr().out) and "in context" in shown
    assert write("first", *docs[:2]) == 0 and write("second", *docs[2:], "--add_to", tmp_path / "first") == 0
    delta = lambda name: (lambda A, B: B @ A)(*lora.load_adapter(tmp_path / name)[0]["down_proj"])
    torch.testing.assert_close(delta("second"), delta("both"), rtol=1e-4, atol=1e-5)
    assert lora.load_adapter(tmp_path / "second")[1].r == lora.load_adapter(tmp_path / "both")[1].r  # no rank is spent on a second bias
    assert (tmp_path / "second" / "description.txt").read_text() == (tmp_path / "both" / "description.txt").read_text() == "cat -> red\n\ndog -> blue horse chair\n"

    # to one of the same module that this hypernetwork did not write: the bias is there once, also after the next document
    config = hypernet.load_hypernet(reader).config
    lora.save_adapter(tmp_path / "other", random_adapter(config, r=4), config)
    assert write("third", *docs[:2], "--add_to", tmp_path / "other") == 0 and write("fourth", *docs[2:], "--add_to", tmp_path / "third") == 0
    scaling = lora.load_adapter(tmp_path / "other")[1].scaling / config.scaling
    torch.testing.assert_close(delta("fourth"), delta("both") + scaling * delta("other"), rtol=1e-4, atol=1e-4)

    # to an adapter of another kind: both act
    assert command(generate, "--desc", DESC, "--out", tmp_path / "french") == 0
    assert write("mixed", *docs[:2], "--add_to", tmp_path / "french") == 0
    mixed, config = lora.load_adapter(tmp_path / "mixed")
    french, french_config = lora.load_adapter(tmp_path / "french")
    assert set(mixed) == {"down_proj", *NAMES}
    for name in NAMES:
        ours, theirs = (c.scaling * a[name][1] @ a[name][0] for a, c in ((mixed, config), (french, french_config)))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed["down_proj"][1] @ mixed["down_proj"][0], delta("first"), rtol=1e-4, atol=1e-5)


def test_interactive_answers_line_by_line(tmp_path, reader, capsys, monkeypatch):
    (tmp_path / "doc.txt").write_text("cat -> red")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cat\nunicorn\n\xff\ndog\n\nbird\n"), encoding="utf-8"))
    assert command(generate, "--doc", tmp_path / "doc.txt", "--hypernet", reader, "--interactive", "--out", tmp_path / "adapter") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"input  +(\w+)", shown) == ["cat", "dog"] and "no token for unicorn" in shown and "no token for \ufffd" in shown


def test_any_whole_number_is_a_seed(tmp_path):
    losses = []
    for seed in (0, -1, 2**64):
        assert command(train, *SHORT, "--max_steps", "1", "--seed", seed, "--out_dir", tmp_path / str(seed)) == 0
        losses += losses_of(tmp_path / str(seed))
    assert len(set(losses)) == 3  # each draws other examples


def test_distillation_is_the_divergence_from_the_base_model_with_the_document_in_its_prompt(reader):
    words = ["--mode", "sft", "--arch", "d2l", "--tasks", "facts", "--latent_size", "32", "--n_blocks", "1", "--distill", "5", "--dropout", "0", "--l2", "0", "--out_dir", "unused"]
    sys.argv = ["train.py", *words]
    args = train.complete(train.parse_args())
    args.dtype = "float32"
    objective = train.Documents(args, "cpu")
    objective.net = hypernet.load_hypernet(reader)
    base, tokenizer = objective.frozen
    document, (question, (answer,)) = objective.tasks[0].descriptions[0], objective.tasks[0].train[0]
    loss = objective([(0, document, [(question, [answer])])])
    with torch.no_grad():
        logprobs = []
        for stated, adapter in ((document, None), ("", objective.adapters([(0, document, [])]))):
            lora.set_adapter(base, adapter, objective.config.scaling)
            prompt, target = model.tokenize_example(tokenizer, question, answer, stated)
            logprobs.append(base(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        teacher, student = logprobs
        likely = teacher.topk(5).indices
        expected = (teacher.exp() * (teacher - student)).gather(-1, likely).sum(-1).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert expected > 0.1
    whole = train.distill_loss(student, teacher, torch.zeros(len(target), dtype=torch.long), 10**6)  # more tokens than there are: all
    torch.testing.assert_close(whole, F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean())
    with torch.no_grad():
        objective.args.distill, objective.args.l1 = 0, 0.5
        adapter = objective.adapters([(0, document, [])])
        lora.set_adapter(base, adapter, objective.config.scaling)
        plain = train.answer_loss(base, *objective.padded([(question, answer, "")]))
        torch.testing.assert_close(objective([(0, document, [(question, [answer])])]), plain + 0.5 * sum(x.abs().mean() for x in adapter["down_proj"]))


def test_built_in_documents_say_what_is_asked():
    for kind, says in (("facts", "{} -> {} <eos>"), ("needle", "The magic number is {1}. Remember it.")):
        splits = data.load_tasks(kind)
        assert [len(splits[split]) for split in ("train", "val", "test")] == [20_000, 100, 100]
        seen = {task.descriptions[0] for task in splits["train"] if len(task.descriptions[0].split("\n")) > 2}
        assert kind == "needle" or not any(task.descriptions[0] in seen for split in ("val", "test") for task in splits[split])
        for task in splits["test"]:
            lines = task.descriptions[0].split("\n")
            assert f"{len(lines)} lines" == task.name and 1 <= len(lines) <= data.LONGEST
            for question, (answer,) in task.test:
                assert says.format(question, answer) in lines
            assert sum("->" in line or "magic" in line for line in lines) == len(task.test)


# ---------------------------------------------------------------------------------------------------------
# The network: a server on this machine stands in for the Hugging Face hub and for Natural Instructions
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """Serves server.files {path: (content, announced length)}; notes the paths asked for in server.asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        log_message = lambda *_: None

        def do_HEAD(self):
            self.server.asked.append(self.path)
            content, length = self.server.files.get(self.path.split("?")[0], (None, 0))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(length))
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{zlib.crc32(content or b""):040d}"')
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD() or b"")
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.url = {}, [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_lots_of_loras_is_downloaded_once_and_whole(tmp_path, monkeypatch, server):
    splits = lora.read_json(HERE / "assets" / "lots_of_loras.json")
    assert [len(splits[k]) for k in ("train", "val")] == [479, 11] and not set(splits["train"]) & set(splits["val"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "NATURAL_INSTRUCTIONS", server.url)
    task = json.dumps({"Definition": ["Do it."], "Instances": [{"id": "1", "input": "a", "output": ["b"]}] * 5}).encode()
    first, second, third = splits["train"][:3]
    for name in splits["train"] + splits["val"]:
        server.files[f"/{name}.json"] = (task, len(task))
    folder = tmp_path / "text-to-lora" / "lots-of-loras"
    for file, reason in {second: (task[:-9], len(task)), third: (task[:-9], len(task) - 9)}.items():  # cut off; shorter than it should be
        server.files[f"/{file}.json"] = reason
        with pytest.raises(lora.UserError, match=f"of 490 task files are not in {folder}, and {server.url}/{file}.json cannot be read"):
            data.load_tasks("lots-of-loras")
        assert not (folder / f"{file}.json").exists() and (folder / f"{first}.json").exists()
        server.files[f"/{file}.json"] = (task, len(task))
    tasks = data.load_tasks("lots-of-loras")
    assert [t.name for t in tasks["train"]] == splits["train"] and len(tasks["val"]) == 11
    assert tasks["val"][0].descriptions == ["Do it."] and tasks["val"][0].definition == "Do it." and len(tasks["val"][0].test) == 1
    assert server.asked.count(f"/{first}.json") == 1 and server.asked.count(f"/{third}.json") == 2
    server.asked.clear()
    data.load_tasks("lots-of-loras")
    assert not server.asked
    (folder / f"{first}.json").unlink()
    monkeypatch.setattr(data, "NATURAL_INSTRUCTIONS", "http://127.0.0.1:1")
    with pytest.raises(lora.UserError, match="1 of 490 task files are not in"):
        data.load_tasks("lots-of-loras")


@pytest.mark.parametrize("case", ["published", "ours", "cut off", "not there"])
def test_a_hypernetwork_from_the_hub(tmp_path, server, case):
    sent = Path(model.TINY) / "sft_small"
    if case == "published":
        net = hypernet.load_hypernet(sent)
        sent = published_folder(tmp_path / "sent", in_published_layout(net, "sft"), emb_model="hash", order=net.names)
    files = {f"trained/tiny/{file.name}": file.read_bytes() for file in sent.iterdir() if file.name in hypernet.FILES}
    files["trained/other/big.bin"] = b"x"
    repo = {"id": "u/r", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": len(content), "oid": "b" * 40} for name, content in files.items()]
    replies = {"/api/models/u/r/revision/main": repo, f"/api/models/u/r/tree/{'a' * 40}": tree}
    if case != "not there":
        server.files = {path: (json.dumps(reply).encode(), len(json.dumps(reply))) for path, reply in replies.items()}
    for name, content in files.items():
        server.files[f"/u/r/resolve/{'a' * 40}/{name}"] = (content[:100] if case == "cut off" else content, len(content))
    words = ["--desc", DESC, "--hypernet", "u/r/trained/tiny", "--input", "cat red dog shirt", "--out", str(tmp_path / "out")]
    env = os.environ | dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1", no_proxy="127.0.0.1")
    run = subprocess.run([sys.executable, "generate.py", *words], cwd=HERE, env=env, capture_output=True, text=True)
    if case in ("published", "ours"):
        assert run.returncode == 0 and "with adapter" in run.stdout, run.stderr
        assert not any("other" in path for path in server.asked)
        server.files, env = {}, env | {"HF_ENDPOINT": "http://127.0.0.1:1"}  # now it is on this machine
        again = subprocess.run([sys.executable, "generate.py", *words], cwd=HERE, env=env, capture_output=True, text=True)
        assert again.stdout.split("\n", 1)[1] == run.stdout.split("\n", 1)[1], again.stderr
    else:
        assert run.returncode == 2 and not (tmp_path / "out").exists()
        assert run.stderr.startswith("error: u/r/trained/tiny is neither a folder nor on this machine, and") and run.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------

DESC = "Keep only the animals and translate them into French."


def test_generate_writes_what_it_shows(tmp_path, capsys):
    inputs = ["cat red dog shirt", "lemon bear wolf chair"]
    words = [x for text in inputs for x in ("--input", text)]
    assert command(generate, "--desc", DESC, "--desc", "Reverse the fruits.", *words, "--out", tmp_path / "two") == 0
    shown = capsys.readouterr().out
    answers = re.findall(r"with adapter  (.*)", shown)
    assert len(answers) == 4 and re.search(r"2 adapters written in \d+\.\d ms", shown)
    base, tokenizer = model.load_base("tiny")
    lora.inject(base, NAMES)
    prompts = [model.render(tokenizer, model.prompt(tokenizer, text)) for text in inputs]
    for i in range(2):
        adapter, config = lora.load_adapter(tmp_path / "two" / str(i))
        lora.set_adapter(base, adapter, config.scaling)
        assert model.answer(base, tokenizer, prompts, 64) == answers[2 * i : 2 * i + 2]
    assert answers[:2] == ["chat chien", "ours loup"]
    assert command(generate, "--desc", DESC, *words, "--out", tmp_path / "one", "--merge", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    lora.set_adapter(base, lora.load_adapter(tmp_path / "one")[0])
    ids = torch.tensor([model.tokenize(tokenizer, prompts[0])])
    torch.testing.assert_close(merged(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.answer(*model.load_base(str(tmp_path / "merged")), prompts, 64) == answers[:2]
    (tmp_path / "merged" / "notes.txt").write_text("mine")  # written anew, the folder keeps what is not ours
    assert command(generate, "--desc", "Reverse the fruits.", *words, "--out", tmp_path / "one", "--merge", f"{tmp_path}/merged/") == 0
    assert (tmp_path / "merged" / "notes.txt").exists() and not list(tmp_path.glob("**/*.tmp"))
    assert (tmp_path / "merged" / "description.txt").read_text() == "Reverse the fruits.\n"
    for folders in ("--out", "merged", "--merge", "new"), ("--out", "new", "--merge", "one"):  # transformers would add the adapter to the merged model
        capsys.readouterr()
        assert command(generate, "--desc", DESC, *(tmp_path / f if f[0] != "-" else f for f in folders)) == 2 and not (tmp_path / "new").exists()
        assert "transformers would load both" in capsys.readouterr().err


def test_answers_may_be_counted_where_they_contain_the_right_one(tmp_path):
    base, tokenizer = model.load_base("tiny")
    (said,) = model.answer(base, tokenizer, [model.render(tokenizer, model.prompt(tokenizer, "cat"))])
    instances = [{"id": str(i), "input": "cat", "output": [said[1:]]} for i in range(5)]  # a part of what the base model says
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "say.json").write_text(json.dumps({"name": "say", "descriptions": ["Say it."], "Instances": instances}))
    words = ["--tasks", tmp_path / "tasks", "--split", "train", "--methods", "base", "--out", tmp_path / "s.json"]
    for more, expected in ([], 0.0), (["--contains"], 1.0):
        assert command(evaluation, *words, *more) == 0
        assert json.loads((tmp_path / "s.json").read_text())["results"]["base"]["mean"] == expected
    assert command(evaluation, "--tasks", tmp_path / "tasks", "--split", "train", "--out", tmp_path / "s.json") == 0  # no second task, no files of other methods
    assert list(json.loads((tmp_path / "s.json").read_text())["results"]) == ["base", "icl", "prompt", "t2l", "t2l_random"]


README_SCORES = {"sft_large": 0.997, "sft_medium": 0.978, "sft_small": 0.952, "recon": 0.634}

README_LENGTHS = {"8": 0.9, "128": 0.8}  # lines: right answers


@pytest.mark.parametrize("name", README_SCORES)
def test_shipped_checkpoints_are_as_good_as_the_readme_says(tmp_path, name):
    out = tmp_path / "scores.json"
    words = ["--hypernet", HERE / "checkpoints" / "tiny" / name, "--methods", "t2l,t2l_random", "--out", out]
    assert command(evaluation, *words) == 0
    results = json.loads(out.read_text())["results"]
    assert results["t2l"]["mean"] >= README_SCORES[name] - 0.03
    assert len(results["t2l"]["per_task"]) == 25 and results["t2l_random"]["mean"] < 0.1


def test_the_description_says_which_words_to_keep():
    base, tokenizer = model.load_base("tiny")
    net, encode = hypernet.load_hypernet(HERE / "checkpoints" / "tiny" / "sft_large"), model.load_encoder("tiny")
    rng, rows = random.Random(0), []
    for _ in range(100):  # of one input once the one category, once the other
        one, other = rng.sample(list(data.CATEGORIES), 2)
        words = rng.sample(data.CATEGORIES[one], 2) + rng.sample(data.CATEGORIES[other], 2)
        rng.shuffle(words)
        for chosen in (one, other):
            right = " ".join(data.FORMS[word]["capitals"] for word in words if word in data.CATEGORIES[chosen])
            rows.append((data.describe((chosen, "capitals", "in_order"), rng), " ".join(words) + " ->", right))
    descriptions, prompts, rights = zip(*rows)
    with torch.no_grad():
        adapters = net(encode(list(descriptions)))
    lora.set_adapter(lora.inject(base, list(adapters)), adapters, net.config.scaling)
    answers = model.answer(base, tokenizer, list(prompts))
    assert sum(map(str.__eq__, answers, rights)) >= 0.9 * len(rows)


def test_the_shipped_reader_is_as_good_as_the_readme_says(tmp_path):
    words = ["--doc", "--tasks", "facts", "--lengths", ",".join(README_LENGTHS), "--n_examples", "25", "--chunk_batch", "128", "--out", tmp_path / "d.json"]
    assert command(evaluation, *words) == 0
    results = json.loads((tmp_path / "d.json").read_text())["results"]
    for lines, expected in README_LENGTHS.items():
        tokens = f"{4 * int(lines):,}"
        assert results["d2l"]["per_task"][tokens] >= expected - 0.05  # a quarter of the README's documents
        assert results["d2l_shuffled"]["per_task"][tokens] < 0.3  # chance is one of seven


def foreign(folder: Path) -> Path:
    (folder / "out").mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    (folder / "out" / "description.txt").write_text("an adapter below a folder does not make the folder ours")
    return folder


def test_examples_in_the_prompt_are_never_the_question_itself(monkeypatch):
    base, tokenizer = model.load_base("tiny")
    pairs = [("cat", ["gato"]), ("sun", ["sol"]), ("bird", ["oiseau"]), ("star", ["Stern"])]
    seen = []
    monkeypatch.setattr(model, "answer", lambda base, tokenizer, prompts, room: seen.extend(prompts) or [""] * len(prompts))
    args = types.SimpleNamespace(n_examples=25, batch_size=8, max_new_tokens=8, contains=False, prompt_with_definition=False, seed=0)
    evaluation.score((args, lora.inject(base, NAMES), tokenizer), [data.Task("facts", ["unused"], pairs, pairs)], "icl")  # as in a folder of documents
    for prompt in seen:
        *examples, question = re.findall(r"(\w+) ->", prompt)
        assert len(examples) == 3 and question not in examples
    assert len(seen) == 4


BAD = {
    "no description": (generate, [], "say what the model should do"),
    "empty description": (generate, ["--desc", "  "], "--desc is empty"),
    "over-long description": (generate, ["--desc", "x" * 2001], "2,000 are the most"),
    "two to merge": (generate, ["--desc", DESC, "--desc", DESC, "--merge", "{tmp}/m"], "take a single --desc"),
    "one folder for two": (generate, ["--desc", DESC, "--out", "{tmp}/m", "--merge", "{tmp}/m/"], "name one folder"),
    "foreign output": (generate, ["--desc", DESC, "--out", "{foreign}"], "did not write"),
    "foreign merge": (generate, ["--desc", DESC, "--merge", "{foreign}"], "did not write"),
    "no checkpoint": (generate, ["--desc", DESC, "--hypernet", "{tmp}/none"], "holds no hypernetwork"),
    "foreign checkpoint": (generate, ["--desc", DESC, "--hypernet", "{foreign}"], "holds no hypernetwork"),
    "other base by name": (generate, ["--desc", DESC, "--hypernet", "{hypernet}", "--base_model", "{base}"], "does not go with"),
    "other base by shape": (generate, ["--desc", DESC, "--hypernet", "{other}", "--base_model", "{base}"], "another base model"),
    "unknown base": (generate, ["--desc", DESC, "--hypernet", "{hypernet}", "--base_model", "./nowhere"], "does not go with"),
    "unknown word": (generate, ["--desc", DESC, "--input", "cat unicorn", "--out", "{tmp}/o"], "no token for unicorn"),
    "unknown method": (evaluation, ["--methods", "t2l,magic"], "unknown method magic"),
    "a picture of no known kind": (evaluation, ["--plot", "{tmp}/x.foo"], "it takes the name of a .png file"),
    "missing folder": (evaluation, ["--methods", "oracle"], "needs --oracles"),
    "no other task": (evaluation, ["--n_tasks", "1", "--methods", "t2l_shuffled"], "needs two tasks or more"),
    "adapter of another base by name": (evaluation, ["--methods", "mt_lora", "--mt_lora", "{adapter}", "--base_model", "tiny"], "trained for base does not go with tiny"),
    "adapter of another base by shape": (evaluation, ["--methods", "mt_lora", "--mt_lora", "{adapter}", "--base_model", "{base}"], "is for another base model"),
    "no such hypernetwork on the hub": (generate, ["--desc", DESC, "--hypernet", "nobody/nothing/sub"], "nobody/nothing/sub is neither a folder nor on this machine"),
    "another text encoder": (generate, ["--desc", "cat dog", "--hypernet", "{hypernet}", "--encoder", "base"], "the text encoder gives 128 numbers"),
    "module order of our own": (generate, ["--desc", DESC, "--hypernet", "{hypernet}", "--module_order", "v_proj,q_proj"], "is for published checkpoints"),
    "no document": (generate, ["--doc", "{tmp}/none.txt"], "cannot be read as text"),
    "empty document": (generate, ["--doc", "{empty}"], "is empty"),
    "binary document": (generate, ["--doc", "{hypernet}/hypernet.safetensors"], "cannot be read as text"),
    "document of unknown words": (generate, ["--doc", "{hypernet}/config.json", "--hypernet", "{reader}"], "has no token for {"),
    "over-long document": (generate, ["--doc", "{long}"], "1,000,000 are the most"),
    "document for another base": (generate, ["--doc", "{note}", "--hypernet", "{reader}", "--add_to", "{adapter}"], "trained for base does not go with tiny"),
    "description to add": (generate, ["--desc", DESC, "--add_to", "{adapter}"], "--add_to is for --doc"),
    "lengths of other documents": (evaluation, ["--doc", "--tasks", "tiny"], "--tasks is one of facts, needle"),
    "length of descriptions": (evaluation, ["--doc", "--tasks", "facts", "--hypernet", "{hypernet}"], "reads descriptions, not documents"),
    "document for text-to-lora": (generate, ["--doc", "{hypernet}/config.json", "--hypernet", "{hypernet}"], "this hypernetwork reads descriptions: use --desc"),
    "description for doc-to-lora": (generate, ["--desc", DESC, "--hypernet", "{reader}"], "this hypernetwork reads documents: use --doc"),
    "document and description": (generate, ["--desc", DESC, "--doc", "{hypernet}/config.json"], "from --desc or from --doc"),
    "switch of documents": (train, ["--mode", "sft", "--distill", "4"], "--distill is for --arch d2l"),
    "switch of oracles": (train, ["--mode", "sft", "--own_init"], "--own_init is for --mode lora"),
    "switch without effect": (train, ["--mode", "pretrain", "--row_groups", "2"], "--row_groups is for --mode lora, --mode sft, --arch d2l"),
    "switch of the table": (evaluation, ["--doc", "--split", "val"], "--split is for scores on tasks"),
    "switch of speed": (evaluation, ["--doc", "--size", "small"], "--size is for --speed"),
    "size of a given hypernetwork": (evaluation, ["--speed", "--hypernet", "{hypernet}", "--size", "small"], "--size is for --speed without --hypernet"),
    "oracles of no row": (evaluation, ["--methods", "t2l", "--oracles", "{tmp}/oracles"], "--oracles DIR is for the method oracle"),
    "pieces of no document": (evaluation, ["--methods", "t2l", "--hypernet", "{hypernet}", "--chunk_len", "8"], "--chunk_len is for hypernetworks that read documents"),
    "smoothing of a teacher": (train, ["--mode", "sft", "--arch", "d2l", "--distill", "4", "--label_smoothing", "0.1"], "--distill learns what the base model says"),
    "pieces of a description": (generate, ["--desc", DESC, "--chunk_len", "8"], "--chunk_len is for --doc"),
    "tasks of every step": (train, ["--mode", "lora", "--tasks_per_batch", "8"], "--tasks_per_batch goes with --multi_task"),
    "one adapter of its own": (train, ["--mode", "lora", "--multi_task", "--own_init"], "--own_init, --one_A and --multi_task exclude one another"),
    "no rows": (evaluation, ["--batch_size", "0"], "argument --batch_size: it takes 1 or more"),
    "no length": (evaluation, ["--doc", "--lengths", "4,"], "argument --lengths: invalid"),
    "one document": (evaluation, ["--doc", "--n_examples", "1"], "--n_examples 2 or more"),
    "all tasks are far": (evaluation, ["--split", "val", "--far", ",".join("-".join(parts) for parts in data.tiny_splits()["val"])], "--far names all tasks"),
    "scores in a folder": (evaluation, ["--out", "{foreign}"], "is a folder"),
    "no checkpoint to name a base": (evaluation, ["--methods", "base", "--hypernet", "{tmp}/none"], "holds no hypernetwork"),
    "no such device": (generate, ["--desc", DESC, "--device", "nowhere"], "argument --device: nowhere"),
    "empty input": (generate, ["--desc", DESC, "--input", " "], "--input is empty"),
    "bytes that are no text": (generate, ["--desc", DESC, "--input", "cat \udcff", "--out", "{tmp}/o"], "take text in UTF-8"),
    "adapters that do nothing": (train, ["--mode", "lora", "--alpha", "0", "--out_dir", "{tmp}/o"], "--alpha 0: the adapters would do nothing"),
    "a text encoder that knows none of the words": (train, ["--mode", "sft", "--encoder", "base", "--out_dir", "{tmp}/o"], "has no token for"),
    "negative amount": (train, ["--mode", "sft", "--max_grad_norm", "-1"], "argument --max_grad_norm: it takes a number, 0 or more"),
    "no number": (train, ["--mode", "sft", "--lr", "nan"], "argument --lr: it takes a number, 0 or more"),
    "more than all": (train, ["--mode", "sft", "--prompt_with_definition", "2"], "argument --prompt_with_definition: it takes a share"),
    "variable that is not set": (generate, ["--desc", DESC, "--out", ""], "--out is empty"),
    "documents as tasks": (train, ["--mode", "lora", "--tasks", "facts"], "they go with --arch d2l"),
    "descriptions as documents": (train, ["--mode", "sft", "--arch", "d2l", "--tasks", "tiny", "--out_dir", "{tmp}/o"], "has no token for"),
    "description of unknown words in the prompt": (generate, ["--desc", "Ignore all.", "--prompt_with_definition", "--out", "{tmp}/o"], "has no token for Ignore"),
    "folder below the file of a document": (generate, ["--desc", DESC, "--out", "{note}/o"], "Not a directory"),
    "dropout of all": (train, ["--mode", "sft", "--dropout", "1"], "--dropout 1.0: 0.99 is the most"),
    "groups computed again": (train, ["--mode", "sft", "--row_groups", "2", "--gradient_checkpointing"], "--gradient_checkpointing goes with --row_groups 1"),
    "oracles of another base": (train, ["--mode", "recon", "--oracles", "{tmp}/oracles"], "are for base, not for --base_model tiny"),
    "document in the prompt": (generate, ["--doc", "{note}", "--prompt_with_definition"], "--prompt_with_definition is for --desc"),
    "documents of other words": (evaluation, ["--doc", "--tasks", "needle", "--hypernet", "{reader}"], "has no token for The"),
    "speed of documents": (evaluation, ["--speed", "--hypernet", "{reader}"], "--speed is for hypernetworks that read descriptions"),
    "document without questions": (evaluation, ["--split", "train", "--tasks", "{tmp}/mute"], "takes instances with an output each"),
    "heads of documents": (train, ["--mode", "sft", "--arch", "d2l", "--n_heads", "6"], "not a multiple of 4"),
    "oracles of documents": (train, ["--mode", "lora", "--arch", "d2l"], "is trained with --mode sft"),
    "two rows of one name": (evaluation, ["--compare", "a/x", "b/x"], "have to differ"),
    "unknown tasks": (evaluation, ["--tasks", "{tmp}/none"], "neither tiny, nor lots-of-loras, nor facts, nor needle, nor a folder"),
    "no task files": (evaluation, ["--tasks", "{foreign}"], "no task files"),
    "unknown split": (evaluation, ["--split", "exam"], "invalid choice"),
    "unknown mode": (train, ["--mode", "magic"], "invalid choice"),
    "unknown base for training": (train, ["--mode", "sft", "--base_model", "./nowhere"], "no such folder"),
    "unknown base offline": (train, ["--mode", "sft", "--base_model", "nobody/nothing", "--out_dir", "{tmp}/o"], "nobody/nothing is not on this machine"),
    "unknown encoder": (train, ["--mode", "sft", "--encoder", "./nowhere", "--out_dir", "{tmp}/o"], "text encoder ./nowhere: there is no such folder"),
    "unknown split for training": (train, ["--mode", "sft", "--split", "test", "--out_dir", "{tmp}/o"], "--split is for --mode lora"),
    "too many tasks": (train, ["--mode", "sft", "--n_tasks", "500", "--out_dir", "{tmp}/o"], "has 1 to 479 tasks"),
    "no oracles": (train, ["--mode", "recon"], "needs --oracles"),
    "empty oracles": (train, ["--mode", "recon", "--oracles", "{foreign}", "--out_dir", "{tmp}/o"], "no adapters of the train tasks"),
    "foreign out_dir": (train, ["--mode", "sft", "--out_dir", "{foreign}"], "did not write"),
    "nothing to resume": (train, ["--mode", "sft", "--out_dir", "{tmp}/none", "--resume"], "there is no run"),
    "unknown target": (train, ["--mode", "sft", "--target_modules", "qkv", "--out_dir", "{tmp}/o"], "no linear layers named qkv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, case):
    module, words, message = BAD[case]
    monkeypatch.chdir(tmp_path)  # what a default would write is seen, and what a user has in out/ is not in the way
    base, other = tmp_path / "base", tmp_path / "other"
    if "base" in case:
        net = hypernet.TextToLoRA(small_config("small", base_model="base", task_emb_size=8192))
        hypernet.save_hypernet(net, other)
        tiny_llama(vocab_size=len(data.VOCABULARY)).save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(model.TINY) / name, base)
    if "doc" in case:
        hypernet.save_hypernet(small_reader(), tmp_path / "reader")
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "long.txt").write_text("cat " * 250_001)
        (tmp_path / "note.txt").write_text("cat -> red")
        (tmp_path / "mute").mkdir()
        lora.write_json(tmp_path / "mute" / "note.json", {"document": "cat -> red", "questions": []})
    if "base" in case:
        config = lora.config_for(tiny_llama(hidden_size=32), NAMES, "base")
        for folder in ("adapter", f"oracles/{data.load_tasks('tiny')['train'][0].name}"):
            lora.save_adapter(tmp_path / folder, random_adapter(config), config)
    places = dict(tmp=tmp_path, foreign=foreign(tmp_path / "foreign"), base=base, other=other, adapter=tmp_path / "adapter", reader=tmp_path / "reader", empty=tmp_path / "empty.txt", long=tmp_path / "long.txt", note=tmp_path / "note.txt", hypernet=Path(model.TINY) / "sft_large")
    before = sorted(tmp_path.rglob("*"))
    assert command(module, *[str(w).format(**places) for w in words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    lines = [line for line in error.strip().splitlines() if line.startswith("error:") or " error: " in line]
    assert len(lines) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    words = [*SHORT, "--max_steps", "9", "--save_every", "2", "--out_dir", tmp_path / "run"]
    real = train.answer_loss
    calls = []
    monkeypatch.setattr(train, "answer_loss", lambda *a: real(*a) * (calls.append(1) or float("nan") if len(calls) == 5 else 1 + 0 * len(calls.append(1) or calls)))
    assert command(train, *words) == 2
    assert "the loss is nan" in capsys.readouterr().err
    assert int(load_file(tmp_path / "run" / "state.safetensors")["step"]) == 4
    assert not (tmp_path / "run" / "hypernet.safetensors").exists()
    monkeypatch.setattr(train, "answer_loss", real)
    assert command(train, *words, "--resume") == 0
    assert len(losses_of(tmp_path / "run")) == 9


def test_speed_prints_ratios(monkeypatch, capsys):
    def once(*actions, repeat=0):
        for action in actions:
            action()
        return [2.0, 5.0, 64.0][: len(actions)]

    monkeypatch.setattr(evaluation, "timed", once)
    assert command(evaluation, "--speed", "--hypernet", Path(model.TINY) / "sft_small") == 0
    shown = capsys.readouterr().out
    ratios = dict(re.findall(r"\| (.+?) \| .+? \| ([\d.]+) \|", shown))
    assert "tiny, small, on cpu" in shown
    steps = ("training step of the hypernetwork on them, a description for each row", "the same, a description for 8 rows")
    assert [ratios[what] for what in (*steps, "one adapter", "64 adapters in one call, each")] == ["2.50", "32.00", "2.50", "0.50"]
    assert command(evaluation, "--speed", "--base_model", "gemma-2-2b", "--size", "small") == 0
    shown = capsys.readouterr().out
    assert "no training step: base model google/gemma-2-2b-it" in shown and "| one adapter |" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of memory")
def test_the_peak_of_memory_is_that_of_what_runs():
    code = """
import sys, torch, eval
print(*(eval.peak_memory(action, "cpu") for action in (lambda: None, lambda: torch.ones(2**26))))  # 256 MiB
eval.timed = lambda *actions, repeat=0: [1.0] * len(actions)
sys.argv = ["eval.py", "--speed", "--hypernet", "checkpoints/tiny/sft_small"]
eval.main()
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout  # memory kept for reuse would hide it
    before, after = map(float, out.splitlines()[0].split())
    assert 240 < after - before < 272
    assert float(re.search(r"peak memory of the second \| .+? \| ([\d.]+)", out)[1]) > 1


def test_eval_writes_the_promised_json_and_picture(tmp_path, capsys):
    out = tmp_path / "scores.json"
    names = [task.name for task in data.load_tasks("tiny")["val"]]
    words = ["--hypernet", Path(model.TINY) / "recon", "--split", "val", "--n_examples", "4", "--methods", "base,t2l,t2l_shuffled"]  # right here and there
    words += ["--out", out, "--far", ",".join(names[:2]), "--per_task"]
    picture = []
    try:
        import matplotlib  # noqa: F401

        picture = ["--plot", tmp_path / "scores.png"]
    except ImportError:
        pass
    assert command(evaluation, *words, *picture) == 0
    content = json.loads(out.read_text())
    assert list(content["results"]) == ["base", "t2l", "t2l_shuffled"] and content["settings"]["split"] == "val"
    for scores in content["results"].values():
        assert len(scores["per_task"]) == 8
        assert abs(scores["mean"] - sum(scores["per_task"].values()) / 8) < 1e-9
    shown = capsys.readouterr().out
    scores = content["results"]["t2l"]["per_task"]
    near, far = (sum(scores[name] for name in part) / len(part) for part in (names[2:], names[:2]))
    low, high = evaluation.interval(list(scores.values()))
    assert f"| t2l | {sum(scores.values()) / 8:.3f} | {low:.2f} to {high:.2f} | {near:.3f} | {far:.3f} |" in shown and low < sum(scores.values()) / 8 < high
    other = content["results"]["t2l_shuffled"]["per_task"]
    low, high = evaluation.interval([scores[name] - other[name] for name in scores])
    (line,) = [line for line in shown.splitlines() if line.startswith("| t2l_shuffled |")]
    assert f"| {low:+.2f} to {high:+.2f} |" in line and low > 0
    assert f"| {names[3]} | 0.00 | {scores[names[3]]:.2f} |" in shown
    if picture:
        assert all((tmp_path / name).stat().st_size > 5000 for name in ("scores.png", "scores_adapters.png"))
    assert command(evaluation, *words[:4], "--methods", "base", "--far", "nothing") == 2


def test_the_bootstrap_interval_is_that_of_the_mean():
    scores = [i / 99 for i in range(100)]
    low, high = evaluation.interval(scores)
    error = 1.96 * (sum((s - 0.5) ** 2 for s in scores) / 100) ** 0.5 / 10  # of the normal distribution
    assert abs(low - (0.5 - error)) < 0.01 and abs(high - (0.5 + error)) < 0.01


def test_eval_over_the_length_of_documents(tmp_path, reader, capsys):
    words = ["--doc", "--tasks", "facts", "--hypernet", reader, "--lengths", "2,8,200", "--n_examples", "5", "--out", tmp_path / "d.json"]
    picture = ["--plot", tmp_path / "d.png"] if importlib.util.find_spec("matplotlib") else []
    assert command(evaluation, *words, *picture) == 0
    content, shown = json.loads((tmp_path / "d.json").read_text()), capsys.readouterr().out
    lengths = {row: list(scores["per_task"]) for row, scores in content["results"].items()}
    assert lengths["d2l"] == lengths["base"] == ["8", "32", "800"] and lengths["in_context"] == ["8", "32"]  # the window has 512 tokens
    assert "| tokens of the document | 8 | 32 | 800 |" in shown and "answer from the weights (rank 56)" in shown
    assert not picture or (tmp_path / "d.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------
# A real model, where T2L_BASE and T2L_ENCODER name one
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("T2L_BASE" not in os.environ, reason="T2L_BASE and T2L_ENCODER name no real models")
def test_the_shipped_reader_finds_the_needle(tmp_path, capsys):
    rng = random.Random(7)
    for i in range(5):
        task = data.needle_document(rng, 2**i)  # up to 16 lines
        (tmp_path / f"{i}.txt").write_text(task.descriptions[0])
        words = ["--doc", tmp_path / f"{i}.txt", "--base_model", os.environ["T2L_BASE"], "--input", task.test[0][0], "--max_new_tokens", "8"]
        assert command(generate, *words, "--out", tmp_path / "adapter") == 0
        (tmp_path / f"{i}.right").write_text(task.test[0][1][0])
    answers = re.findall(r"with adapter  (\S*)", capsys.readouterr().out)
    assert sum(given == (tmp_path / f"{i}.right").read_text() for i, given in enumerate(answers)) >= 4


@pytest.mark.skipif("T2L_BASE" not in os.environ, reason="T2L_BASE and T2L_ENCODER name no real models")
def test_the_shipped_hypernetwork_follows_the_description(tmp_path, capsys):
    words = ["--base_model", os.environ["T2L_BASE"], "--encoder", os.environ["T2L_ENCODER"], "--max_new_tokens", "8", "--out", tmp_path / "adapter"]
    for description, question in (("Turn the verb into its past tense.", "walk"), ("Write the weekday of the date.", "Friday, 3 March 1989")):
        assert command(generate, *words, "--desc", description, "--input", question) == 0
    assert re.findall(r"with adapter  (.*)", capsys.readouterr().out) == ["walked", "Friday"]
    words += ["--hypernet", HERE / "checkpoints" / "smollm2-135m" / "sft_words", "--max_new_tokens", "12"]
    for description, question in (("Write the animals in Spanish, back to front.", "bird knee horse nose"), ("Only the first body part, in French.", "bird knee horse nose")):
        assert command(generate, *words, "--desc", description, "--input", question) == 0
    assert re.findall(r"with adapter  (.*)", capsys.readouterr().out) == ["caballo pájaro", "genou"]


@pytest.mark.skipif("T2L_BASE" not in os.environ, reason="T2L_BASE and T2L_ENCODER name no real models")
def test_a_real_model(tmp_path):
    base, encoder = os.environ["T2L_BASE"], os.environ["T2L_ENCODER"]
    instances = [{"input": f"{a} {b}", "output": [f"{b} {a}"]} for a in ("red", "blue", "green") for b in ("cat", "dog", "cow")]
    lora.write_json(tmp_path / "swap.json", {"name": "swap", "descriptions": ["Swap the two words."], "Instances": instances})
    words = ["--mode", "sft", "--base_model", base, "--encoder", encoder, "--tasks", tmp_path, "--size", "small", "--max_steps", "12"]
    words += ["--dropout", "0", "--neftune_alpha", "0", "--label_smoothing", "0"]  # the same losses but for rounding, on any machine
    assert command(train, *words, "--lr", "1e-4", "--examples_per_task", "4", "--tasks_per_batch", "1", "--out_dir", tmp_path / "net") == 0
    losses = losses_of(tmp_path / "net")
    assert losses[-1] < 0.5 * losses[0]
    words = ["--desc", "Swap the two words.", "--hypernet", tmp_path / "net", "--input", "red cat", "--max_new_tokens", "8"]
    assert command(generate, *words, "--out", tmp_path / "adapter", "--merge", tmp_path / "merged") == 0
    model_, tokenizer = model.load_base(base)
    peft = pytest.importorskip("peft")
    ids = torch.tensor([model.tokenize(tokenizer, model.render(tokenizer, model.prompt(tokenizer, "red cat")))])
    theirs = peft.PeftModel.from_pretrained(model_, tmp_path / "adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(merged, theirs, rtol=1e-3, atol=1e-3)
