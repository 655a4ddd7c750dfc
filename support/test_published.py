"""Published checkpoints, rebuilt in their layouts, and the golden one: python -m pytest -q support"""

import collections
import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hypernet
import lora
import model
from support import published
from support.files import UserError, read_file
from test_all import (  # noqa: F401 (fixtures)
    HERE,
    NAMES,
    SAY,
    SCALING,
    TINY,
    close,
    golden,
    published_folder,
    refused,
    seed,
    server,
    small_config,
)


def in_published_layout(net: hypernet.TextToLoRA, kind: str) -> dict[str, torch.Tensor]:
    """The weights of one of our networks under the published names."""
    weights = {}
    for old, new in published.NAMES.items():
        ours = {key: tensor for key, tensor in net.state_dict().items() if key.startswith(f"{new}.")}
        weights |= {old + key[len(new) :]: tensor for key, tensor in ours.items()}
    for m, name in enumerate(net.names):
        for i, k in enumerate("AB"):
            mean = net.offset[f"{name}_{k}"].data
            offset = torch.full_like(mean, 0.25) if kind == "z_score" else mean
            weights |= {f"AB_offset.{k}.{name}": offset, f"mean_recon_target.{k}.{name}": mean - offset}
            weights[f"std_recon_target.{k}.{name}"] = net.deviation[f"{name}_{k}"].data.expand_as(mean)
            if net.config.size != "large":
                weights[f"out_emb.{name}.{k}"] = net.AB_emb[m, i].data
    return weights


@pytest.mark.parametrize("kind", ["sft", "z_score", "factorized", "delta_w"])
@pytest.mark.parametrize("size", [*hypernet.SIZES, "rotary"])
def test_published_layout_round_trip(tmp_path, size, kind):
    changes = dict(rotary=size == "rotary", z_score=kind == "z_score", r=8)
    net = hypernet.TextToLoRA(small_config("small" if size == "rotary" else size, **changes)).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    for p in net.deviation.values():
        p.data.fill_({"delta_w": 0.01, "z_score": 0.7}.get(kind, 1.0))
    for p in net.offset.values() if kind == "delta_w" else []:
        p.data.zero_()
    args = dict(emb_model="some/one", factorized=kind != "delta_w", training_task="recon")
    args |= {"training_task": "sft"} if kind == "sft" else {}
    weights = in_published_layout(net, kind)
    folder = published_folder(tmp_path, weights, base_model="google/gemma-2-2b-it", **args)
    again, emb = hypernet.load_hypernet(folder), torch.randn(2, 7)
    close(again(emb), net(emb), 1e-5, 1e-6)
    c = again.config
    assert (c.size, c.encoder, c.full_stop, c.instruction) == (net.config.size, "some/one", True, True)
    assert c.scaling == SCALING and c.paths == {name: f"model.layers.{{}}.self_attn.{name}" for name in NAMES}
    swapped = hypernet.load_hypernet(folder, NAMES[::-1])(emb)
    published_folder(tmp_path, weights, order=NAMES[::-1], **args)  # named the other way round
    close(hypernet.load_hypernet(folder)(emb)["q_proj"][0], swapped["q_proj"][0])
    net.module_emb[0].weight.data = net.module_emb[0].weight.data.flip(0)
    close(swapped["q_proj"][0], net(emb)["q_proj"][0], 1e-5, 1e-6)


def test_broken_published_checkpoints_are_refused_in_words(tmp_path):
    weights = in_published_layout(hypernet.TextToLoRA(small_config("medium", r=8)), "sft")
    file, load = tmp_path / "hypermod.pt", hypernet.load_hypernet
    published_folder(tmp_path, weights)
    refused("no published checkpoint", load, tmp_path, ["q_proj", "k_proj"])
    published_folder(tmp_path, {k: t for k, t in weights.items() if "mixer" not in k})
    refused("do not match their settings", load, tmp_path)
    file.write_bytes(file.read_bytes()[:3000])
    refused("no published checkpoint", load, tmp_path)
    torch.save({"x": Path("/")}, file)  # a pickle that would have to call something
    refused("no published checkpoint", load, tmp_path)
    published_folder(tmp_path, weights)
    (tmp_path / "args.yaml").write_text("training_task: !!python/object/apply:os.getcwd []\n")
    refused("no published checkpoint", load, tmp_path)


@torch.no_grad()
def test_golden_published_document_checkpoint():
    """From the published file and a document to A, B, logits and greedy answers."""
    folder = Path(os.environ.get("T2L_GOLDEN", "")) / "d2l_published"
    if not folder.exists():
        pytest.skip("the golden checkpoint is not here")
    tensors, info = load_file(folder / "golden.safetensors"), read_file(folder / "golden.json")
    net = hypernet.load_hypernet(folder / "small_d2l" / "checkpoint-80000")
    base, tokenizer = model.load_base(str(folder / "tiny-gemma2"))
    lora.inject(base, ["down_proj"])
    assert net.config.scaling == pytest.approx(info["scaling"])
    net.config.chunk_len = info["max_ctx_chunk_len"]
    condition = hypernet.make_condition(net, info["documents"], base, tokenizer)
    documents = net(condition)["down_proj"]
    assert condition.counts == tensors["batch/n_ctx_chunks"].tolist()
    close(documents, (tensors["batch/A/down_proj"], tensors["batch/B/down_proj"].mT))
    for i in range(3):
        lora.set_adapter(base, lora.select({"down_proj": documents}, i), net.config.scaling)
        for turn in ("plain", "system") if i == 0 else ("plain",):
            logits = base(tensors[f"question/{turn}/input_ids"]).logits
            close(logits, tensors[f"doc{i}/logits/{turn}"], 1e-4, 5e-4)


class Settings:
    """An object of a class of the published code."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


def published_doc_file(folder: Path, monkeypatch, **changes) -> tuple[dict, dict]:
    """A golden Doc-to-LoRA network as the published code saves one; returns its content and tensors."""
    path = golden("down_l2l", "d2l")
    tensors, info = load_file(f"{path}.safetensors"), read_file(f"{path}.json")
    shared = load_file(f"{golden('perceiver_shared', 'd2l')}.safetensors")
    content = {key: tensors.get(f"sd/{key}", shared.get(f"sd/{key}")).float() for key in info["state_dict"]}
    monkeypatch.setattr(Settings, "__module__", "ctx_to_lora")
    monkeypatch.setitem(sys.modules, "ctx_to_lora", types.SimpleNamespace(Settings=Settings))
    lora_config = Settings(r=8, lora_alpha=info["lora_forward_scaling"], target_modules={"down_proj"})
    perceiver = Settings(feature_size=64, n_latent_queries=8, num_blocks=3, num_self_attn_per_block=0)
    network = Settings(latent_size=64, num_pre_head_layers=1, use_per_rank_bias=False)
    network.lora_config = lora_config
    network.layer_indices, network.aggregator_config = torch.arange(4), perceiver
    network.feature_sizes = (info["d_in"], info["d_out"])
    content |= {"base_model_name_or_path": "google/gemma-2-2b-it", "hypernet_config": network}
    content |= {"ctx_encoder_args": Settings(ctx_encoder_type="per_layer_activations")} | changes
    torch.save(collections.OrderedDict(content), folder / "pytorch_model.bin")
    return content, tensors


@torch.no_grad()
def test_a_published_document_checkpoint_is_read_without_its_code(tmp_path, monkeypatch):
    _, tensors = published_doc_file(tmp_path, monkeypatch)
    monkeypatch.delitem(sys.modules, "ctx_to_lora")
    net = hypernet.load_hypernet(tmp_path)
    A, B = net.write_chunks(tensors["in/features"], tensors["in/attn_mask"])["down_proj"]
    close((A, B), (tensors["out/A/down_proj"], tensors["out/B/down_proj"].mT))
    assert net.config.base_model == "google/gemma-2-2b-it" and net.config.scaling == pytest.approx(2 * 8**1.5)


class Hostile:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def test_a_hostile_or_broken_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "mark"
    program = f"open({str(mark)!r}, 'w')"
    for call, *args in (os.system, f"touch {mark}"), (open, str(mark), "w"), (eval, program), (exec, program):
        published_doc_file(tmp_path, monkeypatch, extra=Hostile(call, *args))
        with contextlib.suppress(UserError):  # if it is read at all, as a record
            hypernet.load_hypernet(tmp_path)
        published_doc_file(tmp_path, monkeypatch, hypernet_config=Hostile(call, *args))
        refused("no published Doc-to-LoRA checkpoint", hypernet.load_hypernet, tmp_path)
        assert not mark.exists()
    content, _ = published_doc_file(tmp_path, monkeypatch)
    for missing in "hypernet_config", "head.weight", "ctx_encoder_args":
        torch.save({key: value for key, value in content.items() if key != missing}, file)
        refused("no published Doc-to-LoRA|do not match", hypernet.load_hypernet, tmp_path)
    published_doc_file(tmp_path, monkeypatch)
    file.write_bytes(file.read_bytes()[:5000])
    refused("no published Doc-to-LoRA checkpoint", hypernet.load_hypernet, tmp_path)


def test_a_checkpoint_that_asks_for_terabytes_is_refused_in_words(tmp_path, monkeypatch):
    weights = in_published_layout(hypernet.TextToLoRA(small_config("large", r=8)), "sft")
    for name in NAMES:  # a few bytes in the file
        weights[f"heads.{name}.weight"] = torch.zeros(1).expand(8 * 20, 10**12)
    published_folder(tmp_path, weights)
    refused("that network would take .* bytes, this machine has", hypernet.load_hypernet, tmp_path)
    (tmp_path / "hypermod.pt").unlink()
    published_doc_file(tmp_path, monkeypatch, extra=Hostile(bytearray, 10**11))
    refused("holds a bytearray", hypernet.load_hypernet, tmp_path)


def test_a_published_hypernetwork_from_the_hub(tmp_path, server):  # noqa: F811
    net = hypernet.load_hypernet(TINY / "sft_small")
    weights = in_published_layout(net, "sft")
    sent = published_folder(tmp_path / "sent", weights, emb_model="hash", order=net.names)
    own = [file for file in sent.iterdir() if file.name in hypernet.FILES]
    files = {f"trained/tiny/{f.name}": f.read_bytes() for f in own} | {"trained/other/big.bin": b"x"}
    tree = [dict(type="file", path=name, size=len(content), oid="b" * 40) for name, content in files.items()]
    repo = {"id": "u/r", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
    replies = {"/api/models/u/r/revision/main": repo, f"/api/models/u/r/tree/{'a' * 40}": tree}
    encoded = {path: json.dumps(reply).encode() for path, reply in replies.items()}
    server.files = {path: (content, len(content)) for path, content in encoded.items()}
    for name, content in files.items():
        server.files[f"/u/r/resolve/{'a' * 40}/{name}"] = (content, len(content))
    words = [*SAY, "--hypernet", "u/r/trained/tiny", "--input", "cat red dog shirt", "--no-instruction"]
    words = [sys.executable, "generate.py", *words, "--out", str(tmp_path / "out")]
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_HUB_DISABLE_XET": "1"}
    env |= dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"), no_proxy="127.0.0.1")
    start = lambda **more: subprocess.run(words, cwd=HERE, env=env | more, capture_output=True, text=True)
    run = start()
    assert run.returncode == 0 and "with adapter" in run.stdout, run.stderr
    assert not any("other" in path for path in server.asked)
    again = start(HF_ENDPOINT="http://127.0.0.1:1")  # now it is on this machine
    assert again.stdout.split("\n", 1)[1] == run.stdout.split("\n", 1)[1], again.stderr
