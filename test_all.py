"""Tests of the method: python -m pytest -q (those of support/, tasks/, extras/ and pictures/ lie there)

assets/golden holds numbers of the published implementations; more of them may lie in the folder that
T2L_GOLDEN names. PEFT is used where it is installed, a GPU where there is one, and real models where T2L_BASE
and T2L_ENCODER name their folders.
"""

import ast
import collections
import functools
import http.server
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import data
import eval as evaluation
import generate
import hypernet
import lora
import model
import train
from data import Example
from support import files, hub, optimizer, processes
from support.files import UserError, read_file, write_file
from tasks import chores, documents, facts, load_tasks, tiny

HERE, TINY = Path(__file__).parent, hub.CHECKPOINTS / "tiny"
NAMES, SCALING = ["q_proj", "v_proj"], 16 / 8**0.5
DECODERS = [GemmaConfig, Gemma2Config, Gemma3TextConfig, Gemma3Config, Qwen2Config, Qwen3Config]
DECODERS += [LlamaConfig, MistralConfig, CohereConfig, Phi3Config]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DESC = "Keep only the animals and translate them into French."
SAY = ["--desc", DESC]
SHORT = "--n_tasks 8 --tasks_per_batch 4 --examples_per_task 2".split()
SHORT += "--size small --latent_size 32 --head_in_size 32 --input_dropout 0 --trunk_dropout 0".split()
SHORT += ["--dropout", "0"]
D2L, LORA = ["@config/d2l.args"], ["@config/lora.args"]
REAL = ["--base_model", os.environ.get("T2L_BASE"), "--encoder", os.environ.get("T2L_ENCODER")]
needs_models = pytest.mark.skipif("T2L_BASE" not in os.environ, reason="T2L_BASE names no real model")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

for source in (tiny, facts, chores):
    source.load = functools.cache(source.load)  # making the tasks takes a second


@pytest.fixture(autouse=True)
def seed(request, monkeypatch):
    """The same random numbers, and no GPU for a test that does not need one."""
    torch.manual_seed(0)
    if needs_gpu.mark not in request.node.iter_markers():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def golden(file: str, folder: str = "t2l") -> Path:
    """A golden file without its ending. Skips the test if there is none."""
    for path in (HERE / "assets" / "golden" / file, Path(os.environ.get("T2L_GOLDEN", "")) / folder / file):
        if Path(f"{path}.safetensors").exists():
            return path
    pytest.skip(f"{file} is not here")


def close(a, b, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=float(atol))


def tiny_llama(**changes) -> nn.Module:
    """A random Llama with grouped key-value heads and a head size that is not hidden / heads."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=8)
    config = LlamaConfig(**sizes | dict(num_attention_heads=4, num_key_value_heads=2) | changes)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def random_adapter(config: lora.LoRAConfig, *batch: int, r: int = 8) -> lora.Adapter:
    n_in, n_out = config.in_features, config.out_features
    draw = lambda name, *shape: torch.randn(*batch, len(config.layers_of(name)), *shape) * 0.1
    return {name: (draw(name, r, n_in[name]), draw(name, n_out[name], r)) for name in config.paths}


def injected(base: nn.Module, names=NAMES) -> tuple[nn.Module, lora.LoRAConfig]:
    """The base model, ready for adapters of these modules, and their configuration."""
    config = lora.config_for(base, names, "x")
    return lora.inject(base, names), config


def with_peft(base: nn.Module, folder: Path) -> nn.Module:
    """The base model with the adapter of a folder, as PEFT reads it."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with warnings.catch_warnings():  # of a deprecated name, and of layers of a vision tower
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def one_layer(linear: nn.Linear, name: str = "q_proj") -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({name: linear})])})


def command(module, *words) -> int:
    """Run a command's main() in this process; its exit code."""
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    try:
        files.command(module.main)
    except SystemExit as stop:
        return stop.code
    return 0


def run_of(*words, device="cpu") -> train.Run:
    """What train.py prepares for these flags."""
    sys.argv = ["train.py", *map(str, words), "--out_dir", "unused"]
    args = train.parse_args()
    return train.prepare(args, processes.Process(torch.device(device)))


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


def losses_of(folder: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def fit(folder: Path, *words) -> list[float]:
    """Train into a folder; the losses."""
    assert command(train, *words, "--out_dir", folder) == 0
    return losses_of(folder)


def evaluate(file: Path, *words) -> dict:
    """What eval.py writes to a file, by method."""
    assert command(evaluation, *words, "--out", file) == 0
    return read_file(file)["results"]


# -------------------- The rooms --------------------
BELOW = {"support": set(), "lora": {"support"}}  # what each may import of the project
BELOW["model"] = BELOW["lora"] | {"lora"}
BELOW["hypernet"] = BELOW["data"] = BELOW["model"] | {"model"}
BELOW["tasks"] = BELOW["data"] | {"data"}
BELOW["train"] = BELOW["generate"] = BELOW["tasks"] | {"hypernet", "tasks"}
BELOW["eval"] = BELOW["generate"] | {"generate"}
BELOW["extras"] = BELOW["pictures"] = BELOW["eval"] | {"eval", "train"}


def test_imports_go_one_way():
    """Each file imports only what stands below it, and files of its own folder; inside functions, too."""
    for file in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        room = file.relative_to(HERE).parts[0].removesuffix(".py")
        if file.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            used = {name.split(".")[0] for name in names} & set(BELOW)
            assert used <= BELOW[room] | {room}, f"{file} imports {used - BELOW[room]}"


# -------------------- lora.py --------------------
def test_injected_layer_is_the_equation_and_so_are_its_gradients():
    holder = one_layer(nn.Linear(12, 20))
    W, bias = holder["layers"][0]["q_proj"].weight, holder["layers"][0]["q_proj"].bias
    layer = lora.inject(holder, ["q_proj"])["layers"][0]["q_proj"]
    A, B = torch.randn(1, 4, 12, requires_grad=True), torch.randn(1, 20, 4, requires_grad=True)
    x = torch.randn(3, 5, 12, requires_grad=True)
    lora.set_adapter(holder, {"q_proj": (A, B)}, 1.7)
    y, expected = layer(x), F.linear(x, W + 1.7 * B[0] @ A[0], bias)
    close(y, expected)
    weight = torch.randn_like(y)
    close(*[torch.autograd.grad((out * weight).sum(), (A, B, x)) for out in (y, expected)])
    lora.set_adapter(holder, None)
    close(layer(x), F.linear(x, W, bias), 0, 0)


def test_one_adapter_per_row_equals_a_loop_over_rows():
    base, config = injected(tiny_llama())
    assert list(base.state_dict()) == list(tiny_llama().state_dict())
    batch, ids = random_adapter(config, 3), torch.randint(160, (6, 7))
    lora.set_adapter(base, batch, SCALING)  # six rows, three adapters: rows 0 and 1 have the first
    together = base(ids).logits
    for row in range(6):
        lora.set_adapter(base, lora.select(batch, row // 2), SCALING)
        close(together[row], base(ids[row : row + 1]).logits[0])
    lora.set_adapter(base, lora.select(batch, [2, 0, 0]), SCALING)
    repeated = base(ids[:1].expand(3, -1)).logits
    close(repeated[1], repeated[2], 0, 0)
    assert (repeated[0] - repeated[1]).abs().max() > 0.01


def test_dropout_is_on_the_lora_branch_in_training_only():
    holder = lora.inject(one_layer(nn.Linear(50, 50)), ["q_proj"], dropout=0.5)
    layer, x = holder["layers"][0]["q_proj"], torch.ones(1, 50)
    plain = layer(x)
    lora.set_adapter(holder, {"q_proj": (torch.eye(50)[None], torch.eye(50)[None])}, 1.0)
    assert set((layer(x) - plain).round(decimals=3).unique().tolist()) == {0.0, 2.0}
    close(layer.eval()(x) - plain, torch.ones(1, 50))


def test_rank_concatenation_adds_the_updates():
    config = lora.config_for(tiny_llama(), NAMES, "x")
    one, two = random_adapter(config, r=3), random_adapter(config, r=5)
    for name, (A, B) in lora.concat_rank([one, two]).items():
        close(B @ A, one[name][1] @ one[name][0] + two[name][1] @ two[name][0])
    only_q = lora.concat_rank([one, {"q_proj": two["q_proj"]}])
    assert only_q["q_proj"][0].shape[-2] == 8 and torch.equal(only_q["v_proj"][0], one["v_proj"][0])


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("joined", ["", "all", "v_proj"])
def test_peft_reads_our_adapter(tmp_path, rslora, joined):
    base, names = tiny_llama(), ["q_proj", "v_proj", "down_proj"]
    config = lora.config_for(base, names, "x", r=4, alpha=8, rslora=rslora)
    adapter = random_adapter(config, r=4)
    if joined:  # with a second adapter along the rank: uniformly, or for one module only
        second = random_adapter(config, r=2)
        adapter = lora.concat_rank([adapter, second if joined == "all" else {joined: second[joined]}])
    lora.save_adapter(tmp_path, adapter, config)
    ids = torch.randint(160, (2, 9))
    theirs = with_peft(tiny_llama(), tmp_path)(ids).logits
    plain = lora.inject(base, names)(ids).logits
    assert (plain - theirs).abs().max() > 0.01
    for ours, its_config in ((adapter, config), lora.load_adapter(tmp_path)):
        lora.set_adapter(base, ours, its_config.scaling)
        close(base(ids).logits, theirs)


@pytest.mark.parametrize("alphas", [{"v_proj": 3}, {"layers.0.self_attn.q_proj": 64}, {r"layers\.1\..*": 2}])
def test_we_read_pefts_adapter(tmp_path, alphas):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    patterns = {"v_proj": 6, "layers.1.self_attn.q_proj": 2}  # by module, and by layer
    ranks = dict(r=4, lora_alpha=8, use_rslora=True, rank_pattern=patterns, alpha_pattern=alphas)
    settings = peft.LoraConfig(target_modules=NAMES, init_lora_weights=False, **ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), settings).eval()
    theirs.save_pretrained(tmp_path)
    adapter, config = lora.load_adapter(tmp_path)
    base, ids = lora.inject(tiny_llama(), NAMES), torch.randint(160, (2, 9))
    lora.set_adapter(base, adapter, config.scaling)
    close(base(ids).logits, theirs(ids).logits)


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    refused("no linear layers named qkv, but down_proj, gate_proj", lora.inject, tiny_llama(), ["qkv"])
    odd = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, n)}) for n in (4, 6))})
    assert list(lora.find_targets(odd, ["q_proj"])) == ["q_proj_4x4", "q_proj_6x4"]
    two = [
        lora.Place(f"{stack}.{{}}.attn.to_q", n, n) for stack in ("blocks", "single_blocks") for n in (4, 6)
    ]
    named = lora.name_targets(two)  # two places, two shapes
    assert len(set(named.values())) == 4 and named[two[0]] == "blocks_attn_to_q_4x4"

    class Quantised(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    refused("q_proj is Quantised: quantised", lora.inject, one_layer(Quantised(4, 4)), ["q_proj"])
    adapter = random_adapter(lora.config_for(tiny_llama(hidden_size=32), NAMES, "x"))
    refused("for another model", lora.set_adapter, lora.inject(tiny_llama(), NAMES), adapter, 1.0)
    refused("is missing", lora.load_adapter, tmp_path)
    write_file(tmp_path / "adapter_config.json", {"peft_type": "LORA", "use_dora": True})
    refused("not a plain LoRA", lora.load_adapter, tmp_path)


# -------------------- hypernet.py --------------------
def small_config(size: str, **changes) -> hypernet.TextConfig:
    paths = {name: f"model.layers.{{}}.self_attn.{name}" for name in NAMES}
    sizes = dict(in_features=dict(q_proj=10, v_proj=10), out_features=dict(q_proj=10, v_proj=6), n_layers=3)
    sizes |= dict(paths=paths, r=4, input_size=7, latent_size=24, head_in_size=20, size=size)
    return hypernet.TextConfig(**sizes | changes)


def naive_adapter(net: hypernet.TextToLoRA, emb: torch.Tensor, layer: int, m: int):
    """A and B of one layer and module from the published description, one row, matrix and rank at a time."""
    p, c = dict(net.named_parameters()), net.config
    lin = lambda x, key: x @ p[f"{key}.weight"].T + p[f"{key}.bias"]
    norm = lambda x: (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    ln = lambda x, key: norm(x) * p[f"{key}.weight"] + p[f"{key}.bias"]
    silu = lambda x: x * torch.sigmoid(x)
    two = lambda x, a, b: silu(lin(silu(lin(x, a)), b))
    task = ln(lin(emb / emb.norm() * math.sqrt(len(emb)), "task_encoder.0"), "task_encoder.1")
    depth = ln(p["layer_emb.0.weight"][layer], "layer_emb.1")
    kind = ln(p["module_emb.0.weight"][m], "module_emb.1")
    x = two(torch.cat([task, depth, kind]), "mixer.1", "mixer.4")
    x = x + two(ln(x, "mlp1.0"), "mlp1.1", "mlp1.4")
    mlp2 = lambda x: x + two(ln(x, "mlp2.0"), "mlp2.1", "mlp2.4")
    name, r = net.names[m], c.r
    n_in, n_out = c.in_features[name], c.out_features[name]
    head = lambda x: lin(two(ln(x, "mlp3.0"), "mlp3.1", "mlp3.4"), f"heads.{name}")
    if c.size == "large":
        o = head(mlp2(x))
        A, B = o[: r * n_in].view(r, n_in), o[r * n_in :].view(r, n_out).T
    else:
        made, row = [], lambda y, i: head(y + mlp2(ln(p["rank_emb.0.weight"][i], "rank_emb.1")))
        for k, n in ((0, n_in), (1, n_out)):
            y = mlp2(x + ln(p["AB_emb"][m, k], "AB_norm"))
            rows = [row(y, i)[:n] for i in range(r)] if c.size == "small" else head(y).view(r, -1)[:, :n]
            made.append(torch.stack(list(rows)))
        A, B = made[0], made[1].T
    offset, deviation = (lambda k: p[f"offset.{name}_{k}"][layer]), (lambda k: p[f"deviation.{name}_{k}"])
    return offset("A") + deviation("A") * A, offset("B") + deviation("B") * B


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_hypernet_equals_one_row_at_a_time(size):
    net = hypernet.TextToLoRA(small_config(size)).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    emb = torch.randn(2, 7)
    adapter = net(emb)
    for i, layer, m in itertools.product(range(2), range(3), range(2)):
        A, B = adapter[NAMES[m]]
        close((A[i, layer], B[i, layer]), naive_adapter(net, emb[i], layer, m), 1e-4)


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_slots_are_adapters_joined_along_the_rank(size):
    """Each is what a network with that part of the task encoder writes, times its gate."""
    net, emb = hypernet.TextToLoRA(small_config(size, slots=2)).eval(), torch.randn(2, 7)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    updates = {name: 0.0 for name in NAMES}
    for part in (slice(0, 12), slice(12, 24)):
        single = hypernet.TextToLoRA(small_config(size)).eval()
        weights = {key: tensor for key, tensor in net.state_dict().items() if not key.startswith("gate")}
        weights |= {key: weights[key][part] for key in ("task_encoder.0.weight", "task_encoder.0.bias")}
        single.load_state_dict(weights)
        gate = torch.sigmoid(single.embed_task(emb)[:, 0] @ net.gate.weight[0] + net.gate.bias)  # [n]
        for name, (A, B) in single(emb).items():
            updates[name] += gate[:, None, None, None] * B @ A
    for name, (A, B) in net(emb).items():
        assert A.shape[2] == B.shape[3] == 8
        close(B @ A, updates[name], 1e-4)


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_sft_starts_as_a_fresh_lora_and_learns(size):
    net = hypernet.TextToLoRA(small_config(size))
    net.start_as_lora()
    adapter = net(torch.randn(2, 7))
    for A, B in adapter.values():
        assert not B.any() and 0.4 / 10**0.5 < A.std() < 0.7 / 10**0.5  # uniform in +-1/sqrt(in)
        assert not torch.equal(A[0, 0], A[0, 1]) and not torch.equal(A[0, 0, 0], A[0, 0, 1])
    sum((A.sum() + B.sum()) for A, B in adapter.values()).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in net.heads.values())


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_hypernet_files(tmp_path, size):
    net = hypernet.TextToLoRA(small_config(size)).eval()
    for p in net.parameters():
        p.data = p.data.bfloat16().float()
    hypernet.save_hypernet(net, tmp_path)
    again, emb = hypernet.load_hypernet(tmp_path), torch.randn(2, 7)
    assert again.config == net.config and not again.training
    assert all(torch.equal(a, b) for k in NAMES for a, b in zip(net(emb)[k], again(emb)[k]))
    write_file(tmp_path / "config.json", read_file(tmp_path / "config.json") | {"latent_size": 32})
    refused("do not match their settings", hypernet.load_hypernet, tmp_path)


@pytest.mark.parametrize("size", hypernet.SIZES)
def test_the_papers_sizes(size):
    """The number of trained parameters for the paper's base models, rank 8 on q_proj and v_proj."""
    i = ["large", "medium", "small"].index(size)
    mistral = [[55_424_000, 55_317_504], [34_412_288, 34_346_752], [4_996_096, 4_987_904]][i]
    gemma = [[137_706_752, 137_645_312], [87_353_600, 87_316_736], [21_266_176, 21_261_568]][i]
    trained = lambda net: sum(p.numel() for p in net.parameters() if p.requires_grad)

    def counts(L: int, d: int, q: int, v: int, latent: int, head_in: int) -> list[int]:
        widths = dict(in_features=dict(q_proj=d, v_proj=d), out_features=dict(q_proj=q, v_proj=v))
        sizes = dict(n_layers=L, size=size, r=8, input_size=1024, latent_size=latent, head_in_size=head_in)
        with torch.device("meta"):
            nets = [hypernet.TextToLoRA(small_config(**sizes | widths, z_score=z)) for z in (False, True)]
        return [sum(p.numel() for p in nets[0].offset.values()), *map(trained, nets)]

    assert counts(32, 4096, 4096, 1024, 128, 512) == [3_407_872, *mistral]
    assert counts(26, 2304, 2048, 1024, 512, 2048) == [1_597_440, *gemma]


def test_the_perceivers_size():
    """That of the published one for gemma-2-2b."""
    sizes = dict(n_layers=26, paths={"down_proj": ""}, in_features={"down_proj": 9216}, input_size=2304)
    sizes |= dict(out_features={"down_proj": 2304})
    for changes, n in ({"n_blocks": 8}, 309_468_064), ({}, 315_237_792), ({"early_exit": True}, 315_340_192):
        with torch.device("meta"):
            net = hypernet.DocToLoRA(hypernet.DocConfig(**sizes, **changes))
        assert sum(p.numel() for p in net.parameters()) == n


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A random Doc-to-LoRA hypernetwork for the tiny base, in its folder."""
    torch.manual_seed(0)
    base, _ = model.load_base("tiny")
    config = lora.config_for(base, ["down_proj"], "tiny", alpha=2 * 8**2)
    sizes = dict(input_size=128, latent_size=32, n_blocks=1, n_heads=4, chunk_len=6)
    net = hypernet.DocToLoRA(hypernet.DocConfig(**vars(config) | sizes))
    for p in [*net.scaler.values(), *net.bias.values()]:
        nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("reader")
    hypernet.save_hypernet(net, folder)
    return folder


def test_how_a_document_is_read_does_not_change_its_adapter(reader, monkeypatch):
    """Neither the other documents of a batch, nor how many chunks are read at once, nor their order."""
    net, (base, tokenizer) = hypernet.load_hypernet(reader), model.load_base("tiny")
    lora.inject(base, net.names)
    texts = ["cat -> red", "dog -> blue horse chair\nbird hat lemon apple sun", "hat -> sun moon tree"]
    read = lambda documents: hypernet.make_condition(net, documents, base, tokenizer)
    delta = lambda documents: (lambda A, B: B @ A)(*net(read(documents))["down_proj"])
    A, B = net(read(texts))["down_proj"]
    for i, text in enumerate(texts):
        rank = 8 * (1 + math.ceil(len(model.tokenize(tokenizer, text)) / 6))
        close(delta([text])[0], B[i] @ A[i], 1e-4)
        assert not A[i, :, rank:].any() and A[i, :, :rank].any(-1).all()
    both, turned = delta([texts[:2]])[0], delta([texts[1::-1]])[0]
    close(both, turned, 1e-4)
    bias = net.bias["down_proj_B"] @ net.bias["down_proj_A"]
    close(both, B[0] @ A[0] + B[1] @ A[1] - bias, 1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(hypernet, "TOKENS_READ_AT_ONCE", 1)
        one_by_one = read(texts)
    assert {len(group) for group in one_by_one.groups} == {1} and len(read(texts).groups) == 1
    close(net(one_by_one)["down_proj"][0], A)
    net.start_as_lora()
    assert all(not (B @ A).any() for A, B in net(read(texts)).values())
    assert net.bias["down_proj_A"].std() > 0.4 / 384**0.5  # B alone is zero, so that it learns
    net.config.random_chunks, net.config.chunk_len = True, 64
    count = lambda: set(hypernet.make_condition(net, ["cat dog sun " * 20] * 40, base, tokenizer).counts)
    assert count() == {1} and len(net.train() and count()) > 1  # drawn in training only


def test_a_group_without_padding_has_no_mask(reader):
    net, (base, tokenizer) = hypernet.load_hypernet(reader), model.load_base("tiny")
    lora.inject(base, net.names)
    features, mask = hypernet.read_chunks(net.config, base, tokenizer, [[5, 6, 7], [8, 9, 10]])
    assert mask is None
    ones = torch.ones(2, 3)
    close(net.write_chunks(features, None)["down_proj"], net.write_chunks(features, ones)["down_proj"])
    assert hypernet.read_chunks(net.config, base, tokenizer, [[5, 6, 7], [8]])[1].sum() == 4


def test_the_perceiver_is_computed_again_to_save_memory(reader):
    net, (base, tokenizer) = hypernet.load_hypernet(reader), model.load_base("tiny")
    lora.inject(base, net.names)
    condition, found, calls = hypernet.make_condition(net, ["cat -> red"], base, tokenizer), [], []
    net.perceiver.register_forward_hook(lambda *_: calls.append(1))
    for net.recompute in (False, True):
        A, B = net(condition)["down_proj"]
        loss, parameters = (B @ A).square().sum(), list(net.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([gradient for gradient in gradients if gradient is not None])
    close(*found)
    assert len(calls) == 1 + 2


# -------------------- model.py --------------------
def test_a_batch_of_answers_is_that_of_each_prompt_alone():
    base, tokenizer = model.load_base("tiny")
    shots = [("cat red", "cat"), ("dog blue", "dog")]
    chats = [model.chat(tokenizer, "wolf silver", "", shots[:n]) for n in (0, 1, 2)]
    prompts = [model.render(tokenizer, chat) for chat in chats]
    assert prompts[1] == "cat red -> cat<eos>\nwolf silver ->"
    assert model.render(tokenizer, model.chat(tokenizer, "cat"), "") == " <eos>"
    alone = [model.answer(base, tokenizer, [text], 5)[0] for text in prompts]
    assert model.answer(base, tokenizer, prompts, 5) == alone


def test_chat_templates_with_and_without_a_system_message():
    tokenizer = model.load_base("tiny")[1]
    tokenizer.chat_template = CHATML
    chat = model.chat(tokenizer, "hello", "Greet." + model.SUFFIX)
    question = "Greet. Please complete the task without any explanation.\n\nhello"
    turns = f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    assert model.render(tokenizer, chat) == turns + "<|im_start|>assistant\n"
    assert model.render(tokenizer, chat, "bye") == "bye<|im_end|>"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    without = model.load_base("tiny")[1]
    without.chat_template = refuses + CHATML
    assert model.chat(without, "hello") == [{"role": "user", "content": "hello"}]
    think, content = "<think></think>{% endif %}", "{{ m.content }}"
    thinks = CHATML.replace(content, "{% if m.role == 'assistant' %}" + think + content)
    tokenizer.chat_template = thinks + "{% if add_generation_prompt and not enable_thinking %}" + think
    assert model.render(tokenizer, model.chat(tokenizer, "hello"), "bye") == "bye<|im_end|>"
    odd = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = odd + "{% if add_generation_prompt %}AI: {% endif %}"
    chat = [{"role": "user", "content": "hello"}]
    refused("does not put answers where it asks for them", model.render, tokenizer, chat, "bye")


def test_a_base_model_without_a_chat_template_keeps_its_first_token(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    plain = model.load_base("tiny")[1]
    plain.chat_template, plain.bos_token = None, "<unk>"
    plain.save_pretrained(tmp_path)
    prompt = lambda tokenizer: model.render(tokenizer, model.chat(tokenizer, "cat"))
    assert prompt(model.load_base(str(tmp_path))[1]) == "cat ->"  # its first token is not used
    first, text = {"SpecialToken": {"id": "<unk>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    own = {"<unk>": {"id": "<unk>", "ids": [plain.unk_token_id], "tokens": ["<unk>"]}}
    processor = dict(type="TemplateProcessing", single=[first, text], pair=[first, text], special_tokens=own)
    file = tmp_path / "tokenizer.json"
    write_file(file, read_file(file) | {"post_processor": processor})
    _, tokenizer = model.load_base(str(tmp_path))
    question, answer = data.example_ids(tokenizer, "cat", "gato", "")
    assert question == tokenizer("cat ->")["input_ids"] and question[0] == plain.unk_token_id != question[1]
    assert answer == plain.convert_tokens_to_ids(["gato", "<eos>"])


def test_the_answer_is_tokenized_as_the_model_would_write_it(tmp_path):
    """With a space mark before every text, an answer alone would begin with another token."""
    words = "<unk> </s> ▁ ▁[I] ▁[/I] ▁Paris ▁where".split()
    vocabulary = {word: i for i, word in enumerate(words)}
    marks = [{"type": "Prepend", "prepend": "▁"}]
    marks += [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    split = {"type": "Split", "pattern": {"String": "▁"}, "behavior": "MergedWithNext", "invert": False}
    content = {"version": "1.0", "normalizer": {"type": "Sequence", "normalizers": marks}}
    content |= {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}
    write_file(tmp_path / "tokenizer.json", content | {"added_tokens": [], "pre_tokenizer": split})
    file = str(tmp_path / "tokenizer.json")
    fast = PreTrainedTokenizerFast(tokenizer_file=file, unk_token="<unk>", eos_token="</s>")
    user, assistant = "[I] {{ m.content }} [/I]", " {{ m.content }}</s>"
    turn = "{% if m.role == 'user' %}" + user + "{% elif m.content %}" + assistant + "{% endif %}"
    fast.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    assert fast(" Paris</s>")["input_ids"] == [2, 5, 1]  # alone
    assert data.example_ids(fast, "where", "Paris", "") == ([3, 6, 4], [5, 1])


def test_a_prompt_does_not_depend_on_the_day():
    tokenizer = model.load_base("tiny")[1]
    today = "{{ date_string }} {{ strftime_now('%d %b %Y') }} {{ messages[-1].content }}"
    tokenizer.chat_template = today
    assert model.render(tokenizer, [{"role": "user", "content": "x"}]) == "26 Jul 2024 26 Jul 2024 x"


def test_early_exit_is_after_a_quarter_of_the_layers():
    base, ids = tiny_llama(num_hidden_layers=8), torch.randint(160, (2, 5))
    states = base.model(ids, output_hidden_states=True).hidden_states  # input of each layer, output
    early = model.hidden_states(base, ids, None, early_exit=True)
    close(early, base.model.norm(states[2]))
    every = model.hidden_states(base, ids, None)  # after an early exit, too
    close(every[:, :7], torch.stack(states[:7], 1))
    close(every[:, 7], base.model.norm(states[7]))


# -------------------- data.py --------------------
def test_a_folder_of_task_files(tmp_path):
    instances = [{"id": str(i), "input": f" in {i}", "output": [f"out {i}", "x"]} for i in range(10)]
    content = {"name": "a", "descriptions": ["do a", "do it"], "Instances": instances}
    write_file(tmp_path / "a.json", content)
    write_file(tmp_path / "b.json", {"Definition": ["do b"], "Instances": instances})
    assert [t.name for t in load_tasks(tmp_path)["train"]] == ["a", "b"]
    write_file(tmp_path / "splits.json", {"train": ["b"], "test": ["a"]})
    tasks = load_tasks(tmp_path)
    assert [t.name for t in tasks["train"]] == ["b"] and not tasks["val"]
    assert tasks["train"][0].descriptions == ["do b"] and tasks["train"][0].definition == "do b"
    assert len(tasks["test"][0].train) == 8 and tasks["test"][0].test[0] == Example("in 8", ["out 8", "x"])
    refused('no split "val"', data.pick, tasks, "val")


def test_what_is_shown_fits_the_description():
    shown = lambda text: hub.example_inputs("smollm2-135m", text)[0]
    assert "@" in shown("Give the domain of the e-mail address.") and "job:" in shown("Write it as JSON.")
    assert "," not in shown("Write the name in capital letters.") and "-" in shown("The month in words.")
    assert hub.example_inputs("mistral-7b", DESC) == []


def test_what_a_step_draws():
    tasks = load_tasks("tiny")["train"][:6]
    args = types.SimpleNamespace(
        seed=0, tasks_per_batch=3, examples_per_task=2, short_first=False, max_steps=50
    )
    drawn = [item for step in range(50) for item in data.draw(tasks, step, args)]
    assert {item.index for item in drawn} == set(range(6)) and len({item.description for item in drawn}) > 50
    again = data.draw(tasks, 7, args)
    assert again == data.draw(tasks, 7, args) != data.draw(tasks, 8, args)
    args.seed = 1
    assert again != data.draw(tasks, 7, args)
    splits = {"train": list(range(20))}
    assert (
        data.pick(splits, "train", 3) == data.pick(splits, "train", 9)[:3] == data.pick(splits, "train")[:3]
    )


def test_too_long_examples_and_tasks_are_left_out(capsys):
    run = run_of(*SHORT)
    short, long = Example("cat", ["red"]), Example("cat dog cow pig sun " * 9, ["red"])
    mixed, too_long = data.Task("mixed", ["x"], [long, short], []), data.Task("long", ["x"], [long], [])
    run.args.max_tokens = 12
    assert data.drop_long_tasks(run.tokenizer, [mixed, too_long], run.args, True) == [mixed]
    assert "left out, because no example has at most --max_tokens 12 tokens: long" in capsys.readouterr().out
    refused("no example has at most", data.drop_long_tasks, run.tokenizer, [too_long], run.args, True)
    drawn = [data.DrawnTask(0, "x", [long, short]), data.DrawnTask(1, "x", [long])]
    batch = data.make_batch(run.tokenizer, [mixed, too_long], drawn, run.args)
    assert batch.tasks == drawn[:1] and len(batch.examples) == 1 and batch.example_fraction == 1
    batch = data.make_batch(run.tokenizer, [mixed, too_long], drawn[1:], run.args)
    assert len(batch.examples) == 1  # the shortest, if all are too long


def test_questions_of_like_length_are_answered_together(monkeypatch):
    monkeypatch.setattr(documents, "PROMPT_TOKENS_AT_ONCE", 12)
    groups = documents.group_by_tokens(list("abcdefg"), [3, 3, 4, 4, 6, 20, 30])
    assert groups == [["a", "b", "c"], ["d", "e"], ["f"], ["g"]]


def test_repeated_tasks_are_trained_once_as_ordinary_loras():
    args = types.SimpleNamespace(tasks="chores", split="train", n_tasks=0, arch="t2l", mode="lora")
    args.short_first = args.multi_task = False
    names = [task.name for task in train.choose_tasks(args)[0]]
    assert len(names) == len(set(names)) < len(load_tasks("chores")["train"])


def test_documents_get_longer_as_the_training_goes():
    run = run_of(*D2L, "--max_steps", "100")
    lines = lambda i: run.tasks[i].descriptions[0].count("\n") + 1
    longest = lambda step: max(lines(item.index) for item in data.draw(run.tasks, step, run.args))
    assert longest(0) <= 4 and longest(99) == 32


# -------------------- train.py --------------------
def small_decoder(make) -> nn.Module:
    """A random decoder, with grouped key-value heads and, if possible, a head size not hidden / heads."""
    torch.manual_seed(0)
    both = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    sizes = both | dict(vocab_size=50, num_hidden_layers=2, num_key_value_heads=2)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes |= {} if make in (Qwen2Config, CohereConfig, Phi3Config) else {"head_dim": 12}
    eyes = both | dict(num_hidden_layers=3, image_size=28, patch_size=14)
    both = dict(text_config=sizes, vision_config=eyes, mm_tokens_per_image=4)
    base = AutoModelForCausalLM.from_config(make(**both if make is Gemma3Config else sizes))
    for p in base.requires_grad_(False).eval().parameters():
        p.data *= 3
    return base


@pytest.mark.parametrize("make", DECODERS)
def test_an_adapter_on_every_architecture(tmp_path, make):
    """The logits are PEFT's and the merged model's; the gradients are the same with checkpointing."""
    own = ["qkv_proj"] if make is Phi3Config else ["q_proj", "v_proj"]
    base, config = injected(small_decoder(make), [*own, "o_proj", "down_proj"])
    adapter, ids = random_adapter(config), torch.randint(1, 50, (2, 9))
    lora.save_adapter(tmp_path / "adapter", adapter, config)
    plain = base(ids).logits
    lora.set_adapter(base, adapter, SCALING)
    ours = base(ids).logits
    assert (ours - plain).abs().max() > 0.01
    examples = [(row[:3], row[3:]) for row in ids.tolist()]
    logits, example, right = model.answer_logits(base, examples)
    close(logits, ours[:, 2:-1].flatten(0, 1), 1e-4, 1e-4)  # whatever the model does to its logits
    assert right.tolist() == ids[:, 3:].flatten().tolist() and example.tolist() == [0] * 6 + [1] * 6
    leaves, grads, calls = [x.requires_grad_() for pair in adapter.values() for x in pair], [], []
    base.get_submodule(config.paths[own[0]].format(0)).register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.recompute_layers(base)
        lora.set_adapter(base, adapter, SCALING)
        grads.append(torch.autograd.grad(train.answer_loss(*model.answer_logits(base, examples)), leaves))
    assert len(calls) == 1 + 2  # once without, and once more in the backward pass with checkpointing
    assert all(grad.abs().max() > 0 for grad in grads[0])
    close(*grads, 1e-4, 1e-6)
    lora.set_adapter(base.eval(), None)
    lora.merge(base, adapter, SCALING)
    base.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close(merged(ids).logits, ours, 1e-4, 1e-4)
    close(ours, with_peft(small_decoder(make), tmp_path / "adapter")(ids).logits)


def test_answer_loss_equals_the_naive_one():
    base, smoothing, examples, naive = small_decoder(LlamaConfig), 0.2, [], []
    for n, k in ((9, 4), (5, 2), (7, 6)):  # tokens, of which prompt
        ids = torch.randint(1, 50, (n,)).tolist()
        logp = base(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [-(1 - smoothing) * logp[i - 1, ids[i]] - smoothing * logp[i - 1].mean() for i in range(k, n)]
        examples.append((ids[:k], ids[k:]))
        naive.append(sum(each) / len(each))
    close(train.answer_loss(*model.answer_logits(base, examples), smoothing), sum(naive) / 3)


def test_neftune_noise_has_the_published_size():
    base, seen = tiny_llama(), []
    note = lambda module, args, kwargs: seen.append(args[0])
    base.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.randint(160, (2, 25))
    model.answer_logits(base, [(row[:5], row[5:]) for row in ids.tolist()], neftune_alpha=5.0)
    noise = seen[0] - base.get_input_embeddings()(ids)
    assert 0.99 * 5 / (25 * 64) ** 0.5 < noise.abs().max() <= 5 / (25 * 64) ** 0.5


def test_neftune_noise_is_as_large_as_the_embeddings_of_gemma():
    base, seen = small_decoder(GemmaConfig), []
    note = lambda module, args, kwargs: seen.append(args[0])
    base.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.randint(1, 50, (2, 25))
    model.answer_logits(base, [(row[:5], row[5:]) for row in ids.tolist()], neftune_alpha=5.0)
    noise = (seen[0] - base.get_input_embeddings()(ids)).abs().max() / 32**0.5  # its layer multiplies by it
    assert 0.98 * 5 / (25 * 32) ** 0.5 < noise <= 1.01 * 5 / (25 * 32) ** 0.5


def test_learning_rates():
    args = types.SimpleNamespace(lr=2.0, warmup=0.1, max_steps=100, schedule="linear")
    rates = [optimizer.learning_rate(step, args) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0
    assert abs(rates[55] - 1.0) < 1e-9 and 0 < rates[-1] < 0.03
    args.schedule = "cosine"
    rates = [optimizer.learning_rate(step, args) for step in range(101)]
    assert abs(rates[55] - 1.0) < 1e-6 and rates[100] == pytest.approx(1e-7)
    assert rates == rates[:10] + sorted(rates[10:])[::-1]
    args.schedule, args.warmup = "late", 0.3
    rates = [optimizer.learning_rate(step, args) for step in range(100)]
    assert rates[30:67] == [2.0] * 37 and abs(rates[83] - 1.0) < 0.05 and rates[99] < 0.1
    args.head_lr, args.weight_decay = 0.5, 0.01
    groups = optimizer.make_optimizer(hypernet.TextToLoRA(small_config("large")), args).param_groups
    kinds = collections.Counter((group["lr_factor"], group["weight_decay"]) for group in groups)
    assert set(kinds) == {(0.5, 0.01), (0.5, 0.0), (1.0, 0.01), (1.0, 0.0)}
    assert kinds[0.5, 0.01] == kinds[0.5, 0.0] == 2


def test_gradients_are_clipped_and_heads_have_their_learning_rate(tmp_path, monkeypatch):
    norms, real = [], torch.optim.AdamW.step

    def note(optimizer, *args):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.get_total_norm(gradients))
        return real(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    for words, least, most in (["--max_grad_norm", "1e-3"], 0, 1.1e-3), (["--max_grad_norm", "0"], 1e-2, 1e3):
        norms.clear()
        fit(tmp_path / words[1], *SHORT, *words, "--max_steps", "2")
        assert len(norms) == 2 and all(least <= norm <= most for norm in norms)
    for head_lr in ("0", "1"):
        fit(tmp_path / f"heads{head_lr}", *SHORT, "--head_lr", head_lr, "--max_steps", "2")
        weights = load_file(tmp_path / f"heads{head_lr}" / "hypernet.safetensors")
        assert weights["heads.q_proj.weight"].any() == (head_lr == "1")  # they begin as zeros


def test_parts_of_a_step_of_reconstruction_add_up(tmp_path):
    config = lora.config_for(model.load_base("tiny")[0], NAMES, "tiny")
    tasks = data.pick(load_tasks("tiny"), "train", 3)
    for task in tasks:
        lora.save_adapter(tmp_path / task.name, random_adapter(config), config)
    sys.argv = ["train.py", "@config/recon.args", "--oracles", str(tmp_path), "--trunk_dropout", "0"]
    sys.argv += ["--input_dropout", "0", "--out_dir", "unused"]
    run = train.prepare_recon(train.parse_args(), processes.Process(torch.device("cpu")))
    drawn = [data.DrawnTask(i, task.descriptions[0], []) for i, task in enumerate(run.tasks)]

    def part(rank: int, count: int):
        run.process = processes.Process(torch.device("cpu"), rank, rank, count)
        run.net.zero_grad()
        loss = train.recon_step(run, run.net, drawn)
        return [loss, *(p.grad.clone() for p in run.net.parameters() if p.requires_grad)]

    whole, parts = part(0, 1), [part(0, 2), part(1, 2)]
    for total, first, second in zip(whole, *parts):
        close(first + second, total, 1e-4, 1e-6)


def test_z_scores_have_the_deviation_of_a_sample():
    net = hypernet.TextToLoRA(small_config("large", z_score=True))
    oracles = random_adapter(net.config, 5, r=4)
    net.normalize(oracles)
    for name, (A, B) in oracles.items():
        for key, values in ((f"{name}_A", A), (f"{name}_B", B)):
            close(net.offset[key], values.mean(0))
            close(net.deviation[key].numpy(), values.numpy().std(0, ddof=1), 1e-4)


def test_text_encoders_compute_in_float32_in_validation_as_in_training():
    run, seen = run_of(*SHORT, "--dtype", "bfloat16"), []
    real = run.encode
    run.encode = lambda texts: seen.append(torch.is_autocast_enabled("cpu")) or real(texts)
    train.validate(run)
    train.sft_step(run, run.net, data.draw(run.tasks, 0, run.args))
    assert seen == [False, False]


def gradients(run: train.Run, step: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradients that a training step leaves in the network."""
    run.net.zero_grad()
    torch.manual_seed(0)
    loss = train.sft_step(run, run.net, data.draw(run.tasks, step, run.args))
    return loss, [p.grad.clone() for p in run.net.parameters() if p.requires_grad]


@pytest.mark.parametrize("words", [SHORT, [*D2L, "--tasks_per_batch", "3"], [*LORA, "--n_tasks", "3"]])
def test_a_step_in_micro_batches_is_the_step_of_one_backward_pass(words):
    """The detached adapters change neither loss nor gradients, with gradient checkpointing as without."""
    run = run_of(*words, "--dropout", "0")
    if run.args.mode == "lora":
        assert torch.equal(run.net.A["q_proj"][0], run.net.A["q_proj"][2])  # all begin alike
    run.args.l1 = run.args.l2 = 0.1
    for p in run.net.parameters():  # away from B = 0
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.requires_grad
    batch = data.draw(run.tasks, 0, run.args)
    rows = data.make_batch(run.tokenizer, run.tasks, batch, run.args).examples
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    assert lengths == sorted(lengths)
    written = run.net(train.batch_condition(run, batch))
    sizes = [train.mean_weight(written, measure) for measure in (torch.abs, torch.square)]
    whole = train.task_loss(run, written, rows) + 0.1 * sum(sizes)
    expected = torch.autograd.grad(whole, [p for p in run.net.parameters() if p.requires_grad])
    for run.args.micro_batch in (1, 3, 100):
        if run.args.micro_batch == 3:
            model.recompute_layers(run.base)
        loss, grads = gradients(run)
        close(loss, whole.detach(), 1e-4)
        close(grads, expected, 1e-3, 1e-5)


def test_the_size_of_weights_does_not_depend_on_padding():
    """A short document's penalty is the same beside a long one as alone."""
    A, B = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 4)
    A[0, :, 2:], B[0, ..., 2:] = 0, 0
    together = train.mean_weight({"x": (A, B)}, torch.abs)
    means = [A[0, :, :2].abs().mean() + B[0, ..., :2].abs().mean(), A[1].abs().mean() + B[1].abs().mean()]
    close(together, sum(means) / 2)


def start_training(*words) -> subprocess.Popen:
    start = [sys.executable, "train.py", *map(str, words)]
    return subprocess.Popen(start, cwd=HERE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(run: subprocess.Popen, folder: Path, n: int) -> None:
    metrics = folder / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= n):
        time.sleep(0.01)


def test_resume_after_kill_is_exact(tmp_path, capsys):
    words = [*SHORT, "--dropout", "0.1", "--neftune_alpha", "5", "--max_steps", "60", "--val_every", "7"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, *words)
    run = start_training(*words, "--out_dir", cut)
    wait_for_steps(run, cut, 17)
    run.kill()
    run.communicate()
    metrics = cut / "metrics.jsonl"
    assert (cut / "state.safetensors").exists(), "the run had ended before it was killed"
    metrics.write_text(metrics.read_text() + '{"step": 99, "lo')  # a kill may leave half a line
    before = {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, *words, "--out_dir", cut) == command(train, *words, "--out_dir", whole) == 2
    assert command(train, "--out_dir", cut, "--resume", "--max_steps", "3") == 2  # it is past that
    assert command(train, "--out_dir", cut, "--resume", "--latent_size", "64") == 2  # another network
    assert command(train, "--out_dir", whole, "--resume") == 2  # it is finished
    assert "holds no interrupted run" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, "--out_dir", cut, "--resume") == 0  # the settings are those of the run
    assert losses_of(cut) == losses_of(whole) and losses_of(cut, "val_loss") == losses_of(whole, "val_loss")
    ours, theirs = (load_file(folder / "hypernet.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs) and not (cut / "state.safetensors").exists()


def test_a_run_that_dies_in_its_first_step_leaves_nothing_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "sft_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(train, *SHORT, "--out_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_the_state_and_says_how_to_continue(tmp_path, monkeypatch, capsys):
    run = tmp_path / "a run"
    monkeypatch.setattr(train, "sft_step", interrupted_in_call(3, train.sft_step)[0])
    assert command(train, *SHORT, "--max_steps", "2000", "--out_dir", run) == 130
    again = f"interrupted after 3 steps; to continue: python train.py --resume --out_dir '{run}'"
    assert again in capsys.readouterr().err
    assert int(load_file(run / "state.safetensors")["step"]) == len(losses_of(run)) == 3
    assert len(fit(run, "--resume", "--max_steps", "5")) == 5


def test_ctrl_c_under_torchrun(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    words = [*start, *SHORT, "--max_steps", "2000", "--out_dir", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(words, cwd=HERE, stderr=subprocess.PIPE, text=True, env=env)
    wait_for_steps(run, tmp_path / "run", 5)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    (line,) = [line for line in said.splitlines() if "interrupted after" in line]
    steps = len(losses_of(tmp_path / "run"))
    again = f"torchrun --nproc_per_node=2 train.py --resume --out_dir {tmp_path / 'run'}"
    assert f"interrupted after {steps} steps; to continue: {again}" in line
    assert int(load_file(tmp_path / "run" / "state.safetensors")["step"]) == steps >= 5


def test_training_starts_from_a_given_hypernetwork(tmp_path):
    fit(tmp_path / "first", *SHORT, "--max_steps", "2")
    started = run_of(*SHORT, "--init_from", tmp_path / "first").net.state_dict()
    saved = hypernet.load_hypernet(tmp_path / "first").state_dict()
    assert all(torch.equal(started[name], saved[name]) for name in saved)
    refused("other settings .slots", run_of, *SHORT, "--slots", "2", "--init_from", tmp_path / "first")


def test_a_resumed_run_does_not_read_again_what_it_started_from(tmp_path, monkeypatch):
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    monkeypatch.setattr(train, "validate", lambda run: {"val_loss": 1 / 0})  # ends the run in step 2
    words = [*SHORT, "--max_steps", "3", "--val_every", "2", "--init_from", tmp_path / "first"]
    with pytest.raises(ZeroDivisionError):
        command(train, *words, "--out_dir", tmp_path / "run")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "first")
    assert len(fit(tmp_path / "run", "--resume")) == 3


def test_the_best_weights_are_kept(tmp_path, monkeypatch):
    """Those with the lowest validation loss, to the last bit; neither the first nor the last ones."""
    seen, losses = [], iter([0.5, 0.2, 0.9, 0.4])

    def validate(run) -> dict:
        seen.append(run.net.mlp3[1].weight.clone())
        return {"val_loss": next(losses), "val_accuracy": 0.0}

    monkeypatch.setattr(train, "validate", validate)
    fit(tmp_path / "run", *SHORT, "--max_steps", "8", "--val_every", "2")
    assert losses_of(tmp_path / "run", "val_loss") == [0.5, 0.2, 0.9, 0.4]
    kept = load_file(tmp_path / "run" / "hypernet.safetensors")["mlp3.1.weight"]
    assert [torch.equal(kept, weights) for weights in seen] == [False, True, False, False]


def test_validation_measures_what_greedy_answers_give():
    run = run_of()
    run.net = hypernet.load_hypernet(TINY / "sft_small")
    run.val_tasks = run.val_tasks[:3]
    measured, hits = train.validate(run), []
    for task in run.val_tasks:
        adapter = run.net.eval()(run.encode(task.descriptions[:1]))
        lora.set_adapter(run.base.eval(), adapter, run.net.config.scaling)
        chats = [model.chat(run.tokenizer, example.input) for example in task.test[:8]]
        answers = model.answer(run.base, run.tokenizer, [model.render(run.tokenizer, chat) for chat in chats])
        hits += [task.is_right(example, answer) for example, answer in zip(task.test, answers)]
    assert measured["val_accuracy"] == sum(hits) / 24 > 0.5 and 0 < measured["val_loss"] < 0.5


def test_the_instruction_is_in_the_prompt_if_a_flag_says_so(tmp_path, monkeypatch, capsys):
    instances, folder = [{"input": "cat dog", "output": ["dog cat"]}] * 5, tmp_path / "tasks"
    folder.mkdir()
    task = {"Definition": "red hat", "descriptions": ["Swap them."], "Instances": instances}
    write_file(folder / "swap.json", task)
    seen, real = set(), model.chat
    monkeypatch.setattr(model, "chat", lambda *a: seen.add(real(*a)[-1]["content"]) or real(*a))

    def prompts_of(module, *words) -> set[str]:
        seen.clear()
        assert command(module, *words) == 0
        return set(seen)

    for given, expected in ([], "cat dog"), (["--instruction"], f"red hat{model.SUFFIX}\n\ncat dog"):
        net = tmp_path / f"net{len(given)}"
        data.cached_ids.cache_clear()
        words = [*SHORT, "--max_steps", "1", "--tasks", folder, "--out_dir", net, *given]
        assert prompts_of(train, *words) == {expected}
        own = ["--hypernet", net, "--split", "train", "--methods", "base,t2l", "--tasks", folder]
        assert prompts_of(evaluation, *own) == {expected}  # as in training
        words = ["--desc", "red hat", "--input", "cat dog", "--hypernet", net, "--out", tmp_path / "out"]
        assert prompts_of(generate, *words) == {expected}
    assert prompts_of(evaluation, *own, "--no-instruction") == {"cat dog"}
    both = ["--compare", tmp_path / "net0", "--tasks", folder, "--split", "train", "--methods", "t2l"]
    assert len(prompts_of(evaluation, "--hypernet", net, *both)) == 2  # each as it was trained


def test_oracles_and_reconstruction_end_to_end(tmp_path, capsys):
    """A hypernetwork that learnt to write four oracles writes them back."""
    oracles, tasks = tmp_path / "oracles", data.pick(load_tasks("tiny"), "train", 4)
    fit(oracles, *LORA, "--n_tasks", "4", "--max_steps", "10")
    targets, _ = lora.load_adapters([oracles / task.name for task in tasks])
    assert all(B.abs().amax((1, 2, 3)).min() > 0 for _, B in targets.values())
    fit(tmp_path / "mt", "@config/mt_lora.args", *"--n_tasks 4 --tasks_per_batch 4 --max_steps 3".split())
    A, B = lora.load_adapter(tmp_path / "mt")[0]["q_proj"]
    assert A.shape == (4, 8, 128) and B.abs().max() > 0
    words = ["@config/recon.args", "--oracles", oracles, "--tasks_per_batch", "16", "--max_steps", "300"]
    losses = fit(tmp_path / "recon", *words, "--n_tasks", "4")
    assert losses[-1] < 0.1 * losses[0]
    net, encode = hypernet.load_hypernet(tmp_path / "recon"), model.load_encoder("tiny")
    made = net(encode([task.descriptions[0] for task in tasks]))["q_proj"][1]
    target = targets["q_proj"][1]
    assert (made - target).abs().mean() < 0.5 * (target.mean(0) - target).abs().mean()
    for kind in ("plain", "delta_w"):
        losses = fit(tmp_path / kind, *words, "--recon_loss", kind, "--max_steps", "30")
        assert losses[-1] < losses[0]
    losses = fit(tmp_path / "single", *words, "--n_tasks", "1", "--max_steps", "2")
    assert all(map(math.isfinite, losses))  # one oracle has no deviation
    words = ["--methods", "mt_lora,oracle", "--mt_lora", tmp_path / "mt", "--oracles", oracles]
    reads, real = [], lora.load_adapter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "load_adapter", lambda folder: reads.append(folder) or real(folder))
        words += ["--split", "train", "--n_tasks", "4", "--n_examples", "2"]
        results = evaluate(tmp_path / "e.json", *words)
    assert set(results) == {"mt_lora", "oracle"} and len(reads) == 1 + 4  # each adapter is read once
    args = types.SimpleNamespace(oracles=oracles, mt_lora=None, compare=[], base_model=None, dtype=None)
    args.shard = False
    models = evaluation.Models(args, ["oracle"], tasks, processes.Process(torch.device("cpu")))
    order = [2, 0, 1]
    models.set_adapters("oracle", [evaluation.Question(tasks[i], None, "", "", []) for i in order])
    for module in lora.injected_layers(models.base):  # each question has the oracle of its task
        close(module.B, targets[module.name][1][order, module.index])
    other = tmp_path / "oracles" / tasks[0].name  # one of another scaling is refused
    config = lora.load_adapter(other)[1]
    config.alpha = 64
    lora.save_adapter(other, lora.load_adapter(other)[0], config)
    refused("differ in modules, rank or scaling", lora.load_adapters, [oracles / task.name for task in tasks])


def test_a_document_is_read_once_and_answered_from_the_weights(tmp_path, capsys):
    """Trained on documents with one fact each, the hypernetwork writes adapters that know them."""
    facts, docs, net = {"cat": "gatto", "dog": "cane", "cow": "mucca"}, tmp_path / "docs", tmp_path / "net"
    docs.mkdir()
    for name, fact in facts.items():
        text = " ".join(["red blue yellow black"] * 3 + [name, fact])
        asked = {"question": "horse", "answer": fact}
        write_file(docs / f"{name}.json", {"document": text, "questions": [asked]})
        (tmp_path / f"{name}.txt").write_text(text)
    words = [*D2L, *"--latent_size 32 --chunk_len 5 --lr 3e-3 --tasks_per_batch 3 --max_steps".split()]
    fit(net, *words, "150", "--tasks", docs)
    capsys.readouterr()
    for name, fact in facts.items():
        words = ["--doc", tmp_path / f"{name}.txt", "--hypernet", net, "--input", "horse"]
        assert command(generate, *words, "--out", tmp_path / name) == 0
        shown = capsys.readouterr().out
        assert f"with adapter  {fact}\n" in shown and "14 tokens" in shown and "rank 32 on down_proj" in shown
        assert "in context" in shown and re.search(r"with adapter \d+ ms", shown)
    both = ["--doc", tmp_path / "cat.txt", "--doc", tmp_path / "dog.txt"]  # one adapter
    assert command(generate, *both, "--hypernet", net, "--out", tmp_path / "both") == 0
    assert lora.load_adapter(tmp_path / "both")[0]["down_proj"][0].shape[-2] == 8 * 7  # six chunks, a bias
    words = ["--tasks", docs, "--split", "train", "--hypernet", net, "--methods", "base,t2l,t2l_shuffled"]
    results = evaluate(tmp_path / "e.json", *words)
    assert [results[k]["mean"] for k in ("base", "t2l", "t2l_shuffled")] == [0, 1, 0]
    words = ["--tasks", docs, "--split", "train", "--methods", "t2l", "--hypernet", TINY / "sft_large"]
    assert command(evaluation, *words) == 2 and "reads descriptions, not documents" in capsys.readouterr().err
    base, tokenizer = model.load_base("tiny")
    prompt = [model.render(tokenizer, model.chat(tokenizer, "horse"))]
    assert model.answer(with_peft(base, tmp_path / "cow"), tokenizer, prompt, 8) == ["mucca"]


def test_readers_of_some_and_of_all_layers_are_compared(reader, tmp_path):
    net = hypernet.load_hypernet(reader)
    early = hypernet.DocToLoRA(hypernet.DocConfig(**vars(net.config) | {"early_exit": True}))
    hypernet.save_hypernet(early, tmp_path / "early")
    words = ["--tasks", "facts", "--methods", "t2l", "--n_tasks", "3", "--n_examples", "1"]
    for first, second in (tmp_path / "early", reader), (reader, tmp_path / "early"):
        assert command(evaluation, *words, "--hypernet", first, "--compare", second) == 0


def test_all_documents_are_scored_also_those_of_equal_names(tmp_path, monkeypatch):
    asked, real = [], evaluation.make_questions
    monkeypatch.setattr(evaluation, "make_questions", lambda *a: asked.extend(real(*a)) or real(*a))
    results = evaluate(tmp_path / "f.json", "--tasks", "facts", "--methods", "base", "--n_examples", "1")
    assert len(asked) == 100 and len(results["base"]["per_task"]) == 6


def test_which_descriptions_a_method_is_given():
    args = types.SimpleNamespace(n_examples=None)
    tasks = load_tasks("tiny")["test"][:3]
    used = lambda method: evaluation.make_questions(tasks, method, False, args)
    for question in used("t2l_reworded"):
        assert question.description in question.task.reworded
    for question in used("t2l_shuffled"):
        assert question.description in tasks[(tasks.index(question.task) + 1) % 3].descriptions
    known = {text for task in tasks for text in [*task.descriptions, *task.reworded]}
    assert not known & {question.description for question in used("t2l_random")}
    assert len(used("t2l")) == 75
    for question in evaluation.make_questions(
        tasks, "t2l_shuffled", True, args
    ):  # the task's own instruction
        assert question.instruction.removesuffix(model.SUFFIX) in question.task.descriptions
    benchmark = data.Task(
        "piqa", list("abc"), [], [Example(str(i), ["1"]) for i in range(30)], is_benchmark=True
    )
    counts = [len(evaluation.make_questions([benchmark], method, False, args)) for method in ("base", "t2l")]
    assert counts == [30, 90]


def test_scores_and_their_interval(monkeypatch):
    low, high = map(float, evaluation.interval([0.0, 1.0] * 50).split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)
    base, tokenizer = model.load_base("tiny")
    goes_on = lambda base, tokenizer, prompts, n, strip: [" ".join("red cat sun moon".split()[:n])]
    monkeypatch.setattr(model, "answer", goes_on)
    models = types.SimpleNamespace(tokenizer=tokenizer, base=base, is_first=False)
    models.has_instruction, models.set_adapters = lambda *_: False, lambda *_: None
    args = types.SimpleNamespace(n_examples=None, batch_size=8, contains=False, max_new_tokens=64)

    def score(right: str) -> float:
        task = data.Task("x", ["d"], [], [Example("cat dog", [right])])
        return evaluation.score(models, [task], "base", args)["x"]

    assert score("red cat sun moon") == 1 and score("red") == 0  # an answer that goes on is wrong
    args.contains = True
    assert score("red") == 1


def test_examples_in_the_prompt_are_not_those_asked():
    args = types.SimpleNamespace(n_examples=None)
    task = load_tasks("tiny")["test"][0]
    task = data.Task("x", ["d"], task.train[:4], [*task.test[:9], task.train[0]])  # one is in both parts
    for question in evaluation.make_questions([task], "icl", False, args):
        shown = [text for text, _ in question.shots]
        assert len(shown) == 3 and set(shown) <= {example.input for example in task.train}
        assert question.example.input not in shown


def test_a_description_may_stand_for_a_list_of_them(tmp_path):
    name = load_tasks("tiny")["test"][0].name
    write_file(tmp_path / "d.json", {name: "Reverse the words."})
    args = types.SimpleNamespace(tasks="tiny", split="test", n_tasks=0, run_code=False, instruction=None)
    args.descriptions = tmp_path / "d.json"
    (task,) = evaluation.choose_tasks(args)
    assert task.descriptions == ["Reverse the words."]
    assert load_tasks("tiny")["test"][0].descriptions != task.descriptions  # the source keeps its own
    write_file(tmp_path / "d.json", {name: [3]})
    refused("must be a text or a list of texts", evaluation.choose_tasks, args)


def test_distillation_is_the_divergence_from_the_base_model_with_the_document_in_its_prompt(reader):
    run = run_of(*D2L)
    run.args.distill, run.args.l2 = 5, 0.0
    run.net = hypernet.load_hypernet(reader)
    document, example = run.tasks[0].descriptions[0], run.tasks[0].train[0]
    loss = train.sft_step(run, run.net, [data.DrawnTask(0, document, [example])])
    written = run.net(hypernet.make_condition(run.net, [document], run.base, run.tokenizer))
    logprobs = []
    for instruction, adapter in ((document, None), ("", written)):
        lora.set_adapter(run.base, adapter, run.net.config.scaling)
        prompt, target = data.example_ids(run.tokenizer, example.input, example.answers[0], instruction)
        logits = run.base(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(logits.log_softmax(-1))
    teacher, student = logprobs
    expected = (teacher.exp() * (teacher - student)).gather(-1, teacher.topk(5).indices).sum(-1).mean()
    close(loss, expected, 1e-4)
    assert expected > 0.1


def test_the_teachers_prompt_counts_for_max_tokens_and_is_not_kept():
    run = run_of(*D2L)
    run.args.distill, run.args.max_tokens = 5, 12
    data.cached_ids.cache_clear()
    batch = [data.DrawnTask(0, "cat -> red <eos>", [Example("cat", ["red"])])]
    batch.append(data.DrawnTask(1, "cat dog cow pig\n" * 9, [Example("cat", ["red"])]))
    kept = data.make_batch(run.tokenizer, run.tasks, batch, run.args)
    assert kept.tasks == batch[:1] and [row.task for row in kept.examples] == [0]
    assert len(kept.examples[0].teacher_prompt) > len(kept.examples[0].prompt)
    assert data.cached_ids.cache_info().currsize == 1  # the question without the document


def test_questions_without_an_answer_get_the_base_models(tmp_path, monkeypatch):
    """The second time they are read, not asked again; those of an edited document are asked."""
    base, tokenizer = model.load_base("tiny")
    said = model.answer(
        base, tokenizer, [model.render(tokenizer, model.chat(tokenizer, "cat", "cat -> red <eos>"))]
    )
    asked, real = [], model.answer
    monkeypatch.setattr(model, "answer", lambda *a: asked.append(1) or real(*a))
    one = processes.Process(torch.device("cpu"))
    for document, n_asked in (("cat -> red <eos>", 1), ("cat -> red <eos>", 1), ("cat -> sun <eos>", 2)):
        task = data.Task(
            "d", [document], [Example("cat", []), Example("dog", ["blue"])], [], is_document=True
        )
        documents.generate_answers(base, tokenizer, [task], tmp_path / "answers.json", one)
        assert len(asked) == n_asked and task.train[1].answers == ["blue"]
        assert document != "cat -> red <eos>" or task.train[0].answers == said


def test_a_frozen_base_model_has_no_dropout_of_its_own():
    """In training only the adapters' inputs have dropout, and in validation nothing."""
    run = run_of(*SHORT, "--dropout", "0.5")
    training = {name for name, module in run.base.named_modules() if module.training}
    assert training and all("q_proj" in name or "v_proj" in name for name in training)
    train.validate(run)
    assert training == {name for name, module in run.base.named_modules() if module.training}


def test_documents_are_split_in_the_published_mixture():
    config, row = hypernet.DocConfig(random_chunks=True), list(range(400))
    splits = [hypernet.split_document(row, config, True) for _ in range(4000)]
    assert all(sum(parts, []) == row for parts in splits)
    share = [sum(len(parts) == n for parts in splits) / 4000 for n in range(1, 9)]
    close(torch.tensor(share), torch.tensor([0.5, 0.125] + 6 * [0.0625]), 0, 0.03)
    assert all(len(part) >= 25 for _ in range(50) for part in hypernet.split_document(row[:60], config, True))
    assert [len(part) for part in hypernet.split_document(3 * row, config, False)] == [400, 400, 400]


# -------------------- The network: a server on this machine stands in for the hub --------------------
@pytest.fixture
def server():
    """Serves server.files {path: (content, announced length)}; notes the paths asked for in server.asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        log_message = lambda *_: None

        def do_HEAD(self):
            self.server.asked.append(self.path)
            content, length = self.server.files.get(self.path.split("?")[0], (None, 0))
            status = 404 if content is None else 200
            if self.server.replies:  # in this order, whatever is asked for
                content, status = self.server.replies.pop(0)
                length = len(content)
            self.send_response(status)
            self.send_header("Retry-After", "7")
            headers = {"Content-Length": str(length), "X-Repo-Commit": "a" * 40, "Connection": "close"}
            for name, value in (headers | {"ETag": f'"{zlib.crc32(content or b""):040d}"'}).items():
                self.send_header(name, value)
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD() or b"")
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.replies, server.files, server.asked = [], {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


# -------------------- The commands --------------------
def test_generate_writes_what_it_shows(tmp_path, capsys):
    inputs = ["cat red dog shirt", "lemon bear wolf chair"]
    words = [x for text in inputs for x in ("--input", text)]
    assert command(generate, *SAY, "--desc", "Reverse the fruits.", *words, "--out", tmp_path / "two") == 0
    shown = capsys.readouterr().out
    answers = re.findall(r"with adapter  (.*)", shown)
    assert len(answers) == 4 and re.search(r"2 adapters written in \d+\.\d ms", shown)
    base, tokenizer = model.load_base("tiny")
    lora.inject(base, NAMES)
    prompts = [model.render(tokenizer, model.chat(tokenizer, text)) for text in inputs]
    assert re.findall(r"base model    (.*)", shown) == 2 * model.answer(base, tokenizer, prompts, 64)
    for i in range(2):
        adapter, config = lora.load_adapter(tmp_path / "two" / str(i))
        lora.set_adapter(base, adapter, config.scaling)
        assert model.answer(base, tokenizer, prompts, 64) == answers[2 * i : 2 * i + 2]
    assert answers[:2] == ["chat chien", "ours loup"]
    assert command(generate, *SAY, *words, "--out", tmp_path / "two") == 0  # in place of both
    assert lora.load_adapter(tmp_path / "two")[0] and not (tmp_path / "two" / "0").exists()
    merge = ["--out", tmp_path / "one", "--merge", tmp_path / "merged"]
    for description in ("Reverse the fruits.", DESC):  # written anew, the folder keeps what is not ours
        assert command(generate, "--desc", description, *words, *merge) == 0
        (tmp_path / "merged" / "notes.txt").write_text("mine")
        (tmp_path / "merged" / "model-00001-of-00002.safetensors").write_text("of an earlier merge")
    assert command(generate, "--desc", DESC, *words, *merge) == 0
    assert [file.name for file in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]
    assert model.answer(*model.load_base(str(tmp_path / "merged")), prompts, 64) == answers[:2]
    assert (tmp_path / "merged" / "description.txt").read_text() == DESC + "\n"


README_SCORES = {"sft_large": 0.99, "sft_medium": 0.97, "sft_small": 0.95, "recon": 0.3}


@pytest.mark.parametrize("name", README_SCORES)
def test_shipped_checkpoints_are_as_good_as_the_readme_says(tmp_path, name):
    results = evaluate(tmp_path / "s.json", "--hypernet", TINY / name, "--methods", "t2l,t2l_random")
    assert results["t2l"]["mean"] >= README_SCORES[name] - 0.03
    assert len(results["t2l"]["per_task"]) == 25 and results["t2l_random"]["mean"] < 0.1


def test_the_shipped_reader_is_as_good_as_the_readme_says(tmp_path):
    words = ["--tasks", "facts", "--lengths", "8,128", "--n_examples", "25", "--methods", "t2l,t2l_shuffled"]
    results = evaluate(tmp_path / "d.json", *words)
    for tokens, expected in {"32": 0.85, "512": 0.75}.items():
        assert results["t2l"]["per_task"][tokens] >= expected
        assert results["t2l_shuffled"]["per_task"][tokens] < 0.3  # chance is one of seven


NET, READER = ["--hypernet", "{net}"], ["--hypernet", "{reader}"]
BASE, RECON = ["--base_model", "{base}"], ["--mode", "recon"]
FLAGS_OF_D2L = [f"@{HERE}/config/d2l.args"]
OF_ORACLES = [*RECON, "--oracles", "{tmp}/oracles"]
METHOD_X, ORACLES = ["--methods", "x"], ["--mode", "lora"]
BAD = {
    "no description": (generate, [], "say what to do"),
    "empty description": (generate, ["--desc", "  "], "is empty"),
    "two to merge": (generate, [*SAY, *SAY, "--merge", "{tmp}/m"], "takes a single --desc"),
    "foreign output": (generate, [*SAY, "--out", "{foreign}"], "did not write it"),
    "no checkpoint": (generate, [*SAY, "--hypernet", "{tmp}/none"], "is neither a folder"),
    "nothing shipped": (generate, [*SAY, "--base_model", "mistral-7b"], "no hypernetwork for mistral-7b"),
    "other base": (generate, [*SAY, *NET, *BASE], "cannot be used with"),
    "other base of the same name": (
        generate,
        [*SAY, *NET, "--base_model", "{tmp}/tiny"],
        "cannot be used with",
    ),
    "other widths": (generate, [*SAY, "--hypernet", "{other}", *BASE], "another model"),
    "unknown word": (generate, [*SAY, "--input", "cat unicorn", "--out", "{tmp}/o"], "no token for unicorn"),
    "not on the hub": (generate, [*SAY, "--hypernet", "nobody/nothing/sub"], "cannot be downloaded"),
    "another text encoder": (generate, ["--desc", "cat", *NET, "--encoder", "base"], "gives 128"),
    "no document": (generate, ["--doc", "{tmp}/none.txt"], "cannot be read as text"),
    "binary document": (generate, ["--doc", "{net}/hypernet.safetensors"], "cannot be read as text"),
    "document of unknown words": (generate, ["--doc", "{net}/config.json", *READER], "no token for"),
    "document for text-to-lora": (generate, ["--doc", "{tmp}/note.txt", *NET], "reads descriptions"),
    "description for doc-to-lora": (generate, [*SAY, *READER], "reads documents"),
    "unknown method": (evaluation, ["--methods", "t2l,magic"], "unknown method magic"),
    "missing folder": (evaluation, ["--methods", "oracle"], "the method oracle needs --oracles DIR"),
    "lengths of tasks": (evaluation, ["--lengths", "4"], "--lengths goes with --tasks facts or needle"),
    "lengths that are none": (evaluation, ["--tasks", "facts", "--lengths", "4,x"], "invalid numbers value"),
    "no length": (evaluation, ["--tasks", "facts", "--lengths", "4,0"], "invalid numbers value"),
    "unknown method for lengths": (evaluation, ["--tasks", "facts", "--lengths", "4", *METHOD_X], "method x"),
    "no test part": (evaluation, ["--tasks", "{tmp}/tasks", "--split", "train"], "has no test part"),
    "an adapter for a network": (evaluation, ["--recon", "{tmp}/oracles"], "holds no hypernetwork"),
    "unknown tasks": (evaluation, ["--tasks", "{tmp}/none"], "neither benchmarks, chores"),
    "unknown split": (
        evaluation,
        ["--split", "middle"],
        'no split "middle" with tasks, but: train, val, test',
    ),
    "no examples": (evaluation, ["--n_examples", "0"], "--n_examples: must be at least 1"),
    "fewer than no examples": (evaluation, ["--n_examples", "-3"], "--n_examples: must be at least 1"),
    "unknown base": (
        train,
        ["--base_model", "./nowhere", "--tasks", "tiny"],
        "./nowhere is neither a folder",
    ),
    "unknown flag": (train, ["--depth", "3"], "--depth is not a setting of --arch t2l"),
    "shards without torchrun": (train, ["--shard"], "--shard needs several processes"),
    "shards to generate without torchrun": (generate, [*SAY, "--shard"], "--shard needs several processes"),
    "shards to merge": (generate, [*SAY, "--shard", "--merge", "{tmp}/m"], "--merge needs the whole"),
    "not a number": (train, ["--lr", "fast"], "--lr: invalid number value: 'fast'"),
    "no file of flags": (train, ["@config/none.args"], "config/none.args"),
    "tasks of unknown words": (train, ["--tasks", "{tmp}/tasks"], "no token for Paris"),
    "documents as tasks": (train, ["--tasks", "facts"], "cannot be used with --arch t2l"),
    "tasks as documents": (train, ["--arch", "d2l"], "reads documents (see config/d2l.args)"),
    "a setting of the other network": (train, ["--n_latents", "3"], "is not a setting of --arch t2l"),
    "no oracles": (train, RECON, "needs --oracles"),
    "empty oracles": (train, [*RECON, "--oracles", "{foreign}"], "holds no adapters; --mode lora writes"),
    "oracles of another base": (train, OF_ORACLES, "another model"),
    "another network to start from": (train, [*SHORT, "--init_from", "{net}"], "has other settings"),
    "a network for oracles": (train, [*ORACLES, "--init_from", "{net}"], "goes with --mode sft or recon"),
    "several tasks by sft": (train, ["--multi_task"], "--multi_task goes with --mode lora"),
    "several tasks by recon": (train, [*OF_ORACLES, "--multi_task"], "goes with --mode lora"),
    "another rank than the oracles": (train, [*OF_ORACLES, "--rank", "4"], "--rank 4: the oracles in"),
    "other modules": (train, [*OF_ORACLES, "--target_modules", "q_proj"], "have q_proj,v_proj"),
    "no micro-batch": (train, ["--micro_batch", "0"], "--micro_batch: must be at least 1, not 0"),
    "no validation": (train, ["--val_every", "0"], "--val_every: must be at least 1"),
    "no rank": (train, ["--rank", "0"], "--rank: must be at least 1"),
    "fewer than no tasks": (train, ["--tasks_per_batch", "-1"], "--tasks_per_batch: must be at least 0"),
    "no examples in training": (train, ["--examples_per_task", "0"], "--examples_per_task: must be at least"),
    "too much dropout": (train, ["--dropout", "1.5"], "--dropout: must be at most 1, not 1.5"),
    "too much dropout in the trunk": (train, ["--trunk_dropout", "2"], "--trunk_dropout: must be at most 1"),
    "a file of flags after a flag": (train, ["--lr", "1", "@x.args"], "@x.args is not a setting"),
    "no such device": (train, ["--device", "cuda:7"], "--device cuda:7, but the number of GPUs"),
    "unknown device": (generate, [*SAY, "--device", "gpu"], "--device gpu: there are auto, cpu, cuda"),
    "no batch": (evaluation, ["--batch_size", "0"], "--batch_size: must be at least 1"),
    "fewer than no tasks to score": (evaluation, ["--n_tasks", "-3"], "--n_tasks: must be at least 0"),
    "no tokens": (generate, [*SAY, "--max_new_tokens", "0"], "--max_new_tokens: must be at least 1"),
    "no modules": (train, ["--target_modules", ""], "no linear layers named"),
    "benchmarks to train on": (train, ["--tasks", "benchmarks"], "are for eval.py"),
    "odd heads": (train, [*FLAGS_OF_D2L, "--n_heads", "9"], "--n_heads must be a multiple of 4"),
    "odd width": (train, ["--latent_size", "10"], "--latent_size must be a multiple of 4"),
    "merge into the adapter": (generate, [*SAY, "--merge", "{tmp}/m", "--out", "{tmp}/m"], "two folders"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, reader):
    tmp = tmp_path_factory.mktemp("mistakes")
    for name in ("base", "tiny"):
        tiny_llama(vocab_size=len(tiny.VOCABULARY)).save_pretrained(tmp / name)
        model.load_base("tiny")[1].save_pretrained(tmp / name)
    net = hypernet.TextToLoRA(small_config("small", base_model="base", input_size=8192))
    hypernet.save_hypernet(net, tmp / "other")
    task = {"Definition": ["Swap."], "Instances": [{"input": "Paris Rome", "output": ["Rome Paris"]}]}
    files = {"note.txt": "cat -> red", "foreign/precious.txt": "mine", "tasks/swap.json": json.dumps(task)}
    for file, text in files.items():
        (tmp / file).parent.mkdir(exist_ok=True)
        (tmp / file).write_text(text)
    config = lora.config_for(tiny_llama(), NAMES, "base")
    name = load_tasks("tiny")["train"][0].name
    lora.save_adapter(tmp / "oracles" / name, random_adapter(config), config)
    own = dict(base=tmp / "base", other=tmp / "other", foreign=tmp / "foreign", reader=reader)
    return own | dict(tmp=tmp, net=TINY / "sft_large")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(places, monkeypatch, capsys, case, tmp_path):
    module, words, message = BAD[case]
    monkeypatch.chdir(tmp_path)  # what a default would write is seen, and a user's out/ not in the way
    before = sorted(places["tmp"].rglob("*"))
    assert command(module, *[word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if line.startswith("error:") or " error: " in line]
    assert message in error and "Traceback" not in error and len(lines) == 1
    assert sorted(places["tmp"].rglob("*")) == before and not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    words = [*SHORT, "--max_steps", "9", "--val_every", "2", "--out_dir", tmp_path / "run"]
    real, calls = train.task_loss, []

    def sixth_is_nan(*a):
        calls.append(1)
        return real(*a) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(train, "task_loss", sixth_is_nan)
    assert command(train, *words) == 2 and "the loss is nan in step 5" in capsys.readouterr().err
    assert int(load_file(tmp_path / "run" / "state.safetensors")["step"]) == 4
    monkeypatch.setattr(train, "task_loss", real)
    assert len(fit(tmp_path / "run", "--resume", "--lr", "1e-3")) == 9


def test_eval_writes_the_promised_json_and_picture(tmp_path, capsys):
    out, picture = tmp_path / "scores.json", tmp_path / "scores.png"
    words = ["--hypernet", TINY / "recon", "--split", "val", "--n_examples", "4", "--out", out]
    same_name = tmp_path / "sft_small"  # as the folder of another one
    same_name.symlink_to(TINY / "sft_medium")
    words += ["--methods", "base,t2l,t2l_shuffled", "--compare", TINY / "sft_small", same_name]
    draws = ["--plot", picture] if importlib.util.find_spec("matplotlib") else []
    assert command(evaluation, *words, *draws) == 0
    content, shown = read_file(out), capsys.readouterr().out
    rows = ["base", "t2l", "t2l_shuffled", str(TINY / "sft_small"), str(same_name)]
    assert list(content["results"]) == rows
    assert content["settings"]["split"] == "val"
    for row, scores in content["results"].items():
        values = list(scores["per_task"].values())
        mean = sum(values) / 8
        assert len(values) == 8 and abs(scores["mean"] - mean) < 1e-9
        assert f"| {row} | {mean:.3f} | {evaluation.interval(values)} | {min(values):.2f} |" in shown
    assert not draws or picture.stat().st_size > 5000


def test_a_text_encoder_is_loaded_once_for_all_methods(tmp_path, monkeypatch):
    loads, real = [], model.load_encoder
    monkeypatch.setattr(model, "load_encoder", lambda name, *words: loads.append(name) or real(name, *words))
    words = ["--methods", "t2l,t2l_shuffled,t2l_random", "--compare", TINY / "sft_small", "--split", "val"]
    results = evaluate(tmp_path / "e.json", *words, "--n_examples", "1")
    assert len(results) == 4 and loads == ["hash"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link"
    write_file(file, {"a": 1})
    os.link(file, link)
    write_file(file, {"a": 2})
    assert read_file(file) == {"a": 2} and json.loads(link.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_file(file, {"a": object()})
    assert read_file(file) == {"a": 2} and not list(tmp_path.glob("*.tmp"))


def test_two_models_of_one_shape_are_told_apart_by_their_ids():
    hub.check_base("User/a", [1, 2, 3], "user/A", [1, 2, 3])
    hub.check_base("./some/folder", [1, 2, 3], "user/b", [])
    refused("cannot be used with", hub.check_base, "u/a", [1, 2, 3], "u/b", [1, 2, 3])


def test_a_run_whose_last_step_was_saved_is_finished(tmp_path, monkeypatch):
    words = [*LORA, "--n_tasks", "2", "--max_steps", "2", "--val_every", "1", "--out_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(train, *words)
    assert command(train, "--resume", "--out_dir", tmp_path / "run") == 0
    assert len(list((tmp_path / "run").glob("*/adapter_config.json"))) == 2


def test_out_of_memory_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(SystemExit) as stop:
        files.command(main)
    assert stop.value.code == 2 and "out of GPU memory; try a smaller" in capsys.readouterr().err


def test_files_have_the_usual_permissions(tmp_path):
    write_file(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_answers_of_several_lines_stay_in_their_column(capsys):
    generate.show({"base model": ["one\ntwo\n"]}, ["x"], {})
    assert capsys.readouterr().out == "\n  input         x\n  base model    one\n                two\n"
    args = types.SimpleNamespace(lengths=None, split="test")
    assert "| right answers on 1 test task |" in evaluation.make_table({"t2l": {"a": 1.0}}, "tiny", args)


# -------------------- A real model --------------------
@needs_models
def test_the_shipped_hypernetwork_follows_the_description(tmp_path, capsys):
    words = [*REAL, "--out", tmp_path / "a"]
    asked = {
        "just the family name please": ("Ada Lovelace", "Lovelace"),
        "what comes after the at sign?": ("ada.lovelace@engine.org", "engine.org"),
        "I need this date the way Germans write it, with dots.": ("1815-12-10", "10.12.1815"),
    }
    for description, (text, _) in asked.items():
        assert command(generate, *words, "--desc", description, "--input", text) == 0
    said = re.findall(r"with adapter  (.*)", capsys.readouterr().out)
    assert said == [answer for _, answer in asked.values()]


@needs_models
def test_the_readmes_lines_for_peft(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    words = [*REAL, "--out", tmp_path / "adapter"]
    assert command(generate, *words, "--desc", "just the family name please") == 0
    program = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = program.replace("HuggingFaceTB/SmolLM2-135M-Instruct", REAL[1])
    capsys.readouterr()
    with warnings.catch_warnings():  # of a deprecated name in peft
        warnings.simplefilter("ignore")
        exec(program.replace("out/adapter", str(tmp_path / "adapter")), {})
    assert capsys.readouterr().out == "Lovelace\n"


def test_peft_finds_the_tiny_base_model(tmp_path):
    """The adapter names a folder that exists, and its tokenizer brings the chat template."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    assert command(generate, *SAY, "--out", tmp_path / "adapter") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(
        read_file(tmp_path / "adapter/adapter_config.json")["base_model_name_or_path"]
    )
    messages = [{"role": "user", "content": "cat red dog shirt"}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    answer = base.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert (
        tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        == "chat chien"
    )


@needs_models
def test_a_real_model(tmp_path):
    pairs = itertools.product(("red", "blue", "green"), ("cat", "dog", "cow"))
    instances = [{"input": f"{a} {b}", "output": [f"{b} {a}"]} for a, b in pairs]
    write_file(tmp_path / "swap.json", {"descriptions": ["Swap the two words."], "Instances": instances})
    words = "--size small --dropout 0 --lr 3e-3 --max_steps 12".split()
    words += [*REAL, "--tasks", tmp_path, "--examples_per_task", "4", "--tasks_per_batch", "1"]
    losses = fit(tmp_path / "net", *words)
    assert losses[-1] < 0.6 * losses[0]
    words = ["--desc", "Swap the two words.", "--hypernet", tmp_path / "net", "--input", "red cat"]
    words += ["--max_new_tokens", "8", "--out", tmp_path / "adapter"]
    assert command(generate, *words) == 0
