"""Published checkpoints, rebuilt in their layouts, and the golden one."""

import collections
import contextlib
import itertools
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
from transformers import AutoModelForCausalLM, LlamaConfig

import hypernet
import lora
import model
import train
from extras import published
from support.files import UserError, read_file, write_file
from tests.helpers import (
    COMMIT,
    HERE,
    NAMES,
    SCALING,
    TINY,
    close,
    command,
    golden,
    logits_of,
    one_layer,
    refused,
    small_config,
)

SFT_FILES = [f"llama_{size}_sft" for size in ("L", "M", "S", "Srot")]
RECON_FILES = [f"llama_{size}_recon_{loss}" for size in ("L", "M", "S", "Srot") for loss in ("z", "dw")]
RECON_FILES.append("llama_L_recon_f")


def published_folder(folder: Path, weights: dict, base_model="tiny", order=NAMES, **args) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "hypermod.pt")
    args = dict(emb_model="", training_task="sft", factorized=False, delta_w_scaling=10000) | args
    (folder / "args.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in args.items()))
    peft = dict(peft_type="LORA", r=8, lora_alpha=16, use_rslora=True, target_modules=order)
    write_file(folder / "adapter_config.json", peft | dict(base_model_name_or_path=base_model))
    return folder


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
            weights[f"std_recon_target.{k}.{name}"] = net.std[f"{name}_{k}"].data.expand_as(mean)
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
    for tensor in net.std.buffers():
        tensor.fill_({"delta_w": 0.01, "z_score": 0.7}.get(kind, 1.0))
    for tensor in net.offset.buffers():
        tensor.zero_() if kind == "delta_w" else tensor.normal_(std=0.5)
    args = dict(emb_model="some/one", factorized=kind != "delta_w", training_task="recon")
    args |= {"training_task": "sft"} if kind == "sft" else {}
    weights = in_published_layout(net, kind)
    folder = published_folder(tmp_path, weights, base_model="google/gemma-2-2b-it", **args)
    assert command(published, folder, tmp_path / "ours") == 0
    again, emb = hypernet.load_hypernet(tmp_path / "ours"), torch.randn(2, 7)
    close(again.write(emb), net.write(emb), 1e-5, 1e-6)
    c = again.config
    assert (c.size, c.encoder, c.full_stop, c.instruction) == (net.config.size, "some/one", True, True)
    assert c.scaling == SCALING and c.targets == net.config.targets
    swapped = published.convert(folder, NAMES[::-1]).write(emb)
    published_folder(tmp_path, weights, order=NAMES[::-1], **args)  # named the other way round
    close(published.convert(folder).write(emb)["q_proj"][0], swapped["q_proj"][0])
    net.module_emb[0].weight.data = net.module_emb[0].weight.data.flip(0)
    close(swapped["q_proj"][0], net.write(emb)["q_proj"][0], 1e-5, 1e-6)


def test_broken_published_checkpoints_are_refused_in_words(tmp_path):
    weights = in_published_layout(hypernet.TextToLoRA(small_config("medium", r=8)), "sft")
    file, load = tmp_path / "hypermod.pt", published.convert
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
    net = published.convert(folder / "small_d2l" / "checkpoint-80000")
    base, tokenizer = model.load_base(str(folder / "tiny-gemma2"))
    lora.inject(base, ["down_proj"])
    assert net.config.scaling == pytest.approx(info["scaling"])
    net.config.chunk_len = info["max_ctx_chunk_len"]
    net.connect(base, tokenizer)
    documents = net(info["documents"])["down_proj"]
    assert net.encode(info["documents"])[1] == tensors["batch/n_ctx_chunks"].tolist()
    close(documents, (tensors["batch/A/down_proj"], tensors["batch/B/down_proj"].mT))
    for i in range(3):
        adapter = lora.select({"down_proj": documents}, i)
        for turn in ("plain", "system") if i == 0 else ("plain",):
            logits = logits_of(base, tensors[f"question/{turn}/input_ids"], adapter, net.config.scaling)
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
    net = published.convert(tmp_path)
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
            published.convert(tmp_path)
        published_doc_file(tmp_path, monkeypatch, hypernet_config=Hostile(call, *args))
        refused("no published Doc-to-LoRA checkpoint", published.convert, tmp_path)
        assert not mark.exists()
    content, _ = published_doc_file(tmp_path, monkeypatch)
    for missing in "hypernet_config", "head.weight", "ctx_encoder_args":
        torch.save({key: value for key, value in content.items() if key != missing}, file)
        refused("no published Doc-to-LoRA|do not match", published.convert, tmp_path)
    published_doc_file(tmp_path, monkeypatch)
    file.write_bytes(file.read_bytes()[:5000])
    refused("no published Doc-to-LoRA checkpoint", published.convert, tmp_path)


def test_a_checkpoint_that_asks_for_terabytes_is_refused_in_words(tmp_path, monkeypatch):
    weights = in_published_layout(hypernet.TextToLoRA(small_config("large", r=8)), "sft")
    for name in NAMES:  # a few bytes in the file
        n_out = len(weights[f"heads.{name}.bias"])
        weights[f"heads.{name}.weight"] = torch.zeros(1).expand(n_out, 10**12)
    weights["mlp3.4.weight"] = torch.zeros(1).expand(10**12, 96)
    weights["mlp3.4.bias"] = torch.zeros(1).expand(10**12)
    published_folder(tmp_path, weights)
    refused("that network would have .* parameters", published.convert, tmp_path)
    (tmp_path / "hypermod.pt").unlink()
    published_doc_file(tmp_path, monkeypatch, extra=Hostile(bytearray, 10**11))
    refused("holds a bytearray", published.convert, tmp_path)
    network = published_doc_file(tmp_path, monkeypatch)[0]["hypernet_config"]
    network.layer_indices = torch.arange(10**5)
    published_doc_file(tmp_path, monkeypatch, hypernet_config=network)
    refused("100000 layers", published.convert, tmp_path)


def test_a_published_hypernetwork_from_the_hub(tmp_path, server):
    net = hypernet.load_hypernet(TINY / "sft_small")
    weights = in_published_layout(net, "sft")
    sent = published_folder(tmp_path / "sent", weights, emb_model="hash", order=net.names)
    own = [file for file in sent.iterdir() if file.name in published.FILES]
    files = {f"trained/tiny/{f.name}": f.read_bytes() for f in own} | {"trained/other/big.bin": b"x"}
    tree = [dict(type="file", path=name, size=len(content), oid=COMMIT) for name, content in files.items()]
    siblings = [{"rfilename": name} for name in files]
    repo = {"id": "u/r", "sha": COMMIT, "siblings": siblings}
    replies = {"/api/models/u/r/revision/main": repo, f"/api/models/u/r/tree/{COMMIT}": tree}
    encoded = {path: json.dumps(reply).encode() for path, reply in replies.items()}
    server.files = {path: (content, len(content)) for path, content in encoded.items()}
    for name, content in files.items():
        server.files[f"/u/r/resolve/{COMMIT}/{name}"] = (content, len(content))
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_HUB_DISABLE_XET": "1"}
    env |= dict(HF_HOME=str(tmp_path / "home"), no_proxy="127.0.0.1", PYTHONPATH=str(HERE))
    program = """if True:
        import sys
        from huggingface_hub import constants
        from extras import published
        from tests import helpers
        for folder in sys.argv[1:]:
            assert helpers.command(published, "u/r/trained/tiny", folder) == 0
            constants.HF_HUB_OFFLINE = True  # now it is on this machine
    """
    words = [sys.executable, "-c", program, str(tmp_path / "first"), str(tmp_path / "again")]
    env |= dict(HF_ENDPOINT=server.url)
    run = subprocess.run(words, cwd=HERE, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in ("first", "again"):
        text_emb = torch.randn(2, 8192)
        again = hypernet.load_hypernet(tmp_path / name)
        close(again.write(text_emb)["q_proj"], net.write(text_emb)["q_proj"], 1e-4)
    assert not any("other" in path for path in server.asked)


# -------------------- Numbers of the published implementations --------------------


def golden_net(file: str, folder: Path) -> tuple[hypernet.TextToLoRA, dict, dict]:
    """One golden file as (our network, from a folder in the published layout; its tensors; its json)."""
    path = golden(file)
    tensors, info = load_file(f"{path}.safetensors"), read_file(f"{path}.json")
    args = {k: info["constructor_args"][k] for k in ("training_task", "factorized", "delta_w_scaling")}
    weights = {k[3:]: t for k, t in tensors.items() if k.startswith("sd/")}
    return published.convert(published_folder(folder, weights, **args)), tensors, info


def golden_base() -> nn.Module:
    path = golden("llama_base")
    info = read_file(f"{path}.json")["base_config"]
    config = LlamaConfig(**{k: v for k, v in info.items() if k in LlamaConfig().to_dict()})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    base.load_state_dict({k[5:]: t for k, t in load_file(f"{path}.safetensors").items()})
    return base


@pytest.mark.parametrize("file", SFT_FILES + RECON_FILES)
def test_golden_adapters(tmp_path, file):
    net, tensors, info = golden_net(file, tmp_path)
    adapter = net.write(tensors["in/task_emb"])
    n = len({key.split("/")[0] for key in tensors if key.startswith("out")})
    assert n in (1, 3)
    for i, layer, name in itertools.product(range(n), range(4), NAMES):
        key = f"out{i}/base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
        close(adapter[name][0][i, layer], tensors[f"{key}A.weight"])
        close(adapter[name][1][i, layer], tensors[f"{key}B.weight"])
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trainable == info["param_count"]["trainable_requires_grad"]


@pytest.mark.parametrize("file", SFT_FILES)
def test_golden_sft_losses_and_gradients(tmp_path, file):
    net, tensors, _ = golden_net(file, tmp_path)
    base, examples = lora.inject(golden_base(), NAMES), []
    ids, labels = tensors["sft/in/input_ids"], tensors["sft/in/labels"]
    for row, label in zip(ids.tolist(), labels.tolist()):  # prompt and answer, without padding
        at = [i for i, x in enumerate(label) if x != -100]
        examples.append((row[: at[0]], row[at[0] : at[-1] + 1]))
    adapter = net.write(tensors["sft/in/task_embs"])
    real = tensors["sft/in/attention_mask"].bool()
    with lora.use(base, adapter, SCALING):
        close(base(ids).logits[real], tensors["sft/logits"][real], 1e-4, 1e-3)
        answers = model.answer_logits(base, examples)
    for smoothing in (0.0, 0.1):
        loss = train.answer_loss(*answers, smoothing)
        close(loss, tensors[f"sft/ls{smoothing}_sample/sft_loss"][0], 0, 5e-5)
    l2 = 1e-3 * train.weight_size(adapter, net.ranks, torch.square)
    close(l2, tensors["sft/generated_w_l2_loss"][0], 0, 1e-8)
    (loss + l2).backward()
    ours = dict(net.named_parameters())
    for old, new in published.NAMES.items():
        for key in [key for key in tensors if key.startswith(f"grad/{old}.")]:
            grad = ours[new + key[len(f"grad/{old}") :]].grad
            assert (grad - tensors[key]).abs().max() < 1e-3 * tensors[key].abs().max(), key


@pytest.mark.parametrize("file", RECON_FILES)
def test_golden_reconstruction_losses(tmp_path, file):
    net, tensors, _ = golden_net(file, tmp_path)
    for name in NAMES:  # the loss is that of real runs, whose offset is zero
        for k in "AB":
            net.offset[f"{name}_{k}"].sub_(0 if "recon_dw" in file else tensors[f"sd/AB_offset.{k}.{name}"])
    adapter = net.write(tensors["recon/in/task_embs"].flatten(0, 1))

    def pick(k, name):
        return tensors[f"recon/in/target/{k}/{name}"].repeat_interleave(2, 0)

    target = {name: (pick("A", name), pick("B", name)) for name in NAMES}
    kind = "delta_w" if "recon_dw" in file else "z_score"  # the std of recon_f is 1
    std = {name: (net.std[f"{name}_A"], net.std[f"{name}_B"]) for name in NAMES}
    close(train.recon_loss(kind, adapter, target, std), tensors["recon/loss"][0], 1e-5, 5e-6)


def golden_doc_net(file: str) -> tuple[hypernet.DocToLoRA, dict]:
    """One golden Doc-to-LoRA file as (our network with its weights, its tensors)."""
    path = golden(file, "d2l")
    tensors, info = load_file(f"{path}.safetensors"), read_file(f"{path}.json")
    shared = load_file(f"{golden('perceiver_shared', 'd2l')}.safetensors")
    sizes = dict(targets=published.make_targets(4, info["d_in"], info["d_out"]), n_layers=4, alpha=128)
    sizes |= dict(input_size=64, latent_size=64, n_blocks=3)
    net = hypernet.DocToLoRA(hypernet.DocConfig(**sizes, early_exit=file == "down_flat")).eval()
    weights = {key: tensors.get(f"sd/{key}", shared.get(f"sd/{key}")).float() for key in info["state_dict"]}
    net.load_state_dict(published.doc_weights(weights))
    close(torch.tensor(net.config.scaling), torch.tensor(info["lora_forward_scaling"]))
    return net, tensors


@pytest.mark.parametrize("file", ["down_l2l", "down_flat"])
@torch.no_grad()
def test_golden_documents(file):
    net, tensors = golden_doc_net(file)

    def pair(key):
        return (tensors[f"{key}/A/down_proj"], tensors[f"{key}/B/down_proj"].mT)

    chunks = net.write_chunks(tensors["in/features"], tensors["in/attn_mask"])
    close(chunks["down_proj"], pair("out"))
    documents = net.join(chunks, [1, 2, 3])["down_proj"]
    expected = pair("combine/n123")
    layers = [2] if expected[0].shape[1] == 1 else range(4)
    close([x[:, layers] for x in documents], list(expected))
    features, mask = tensors["in/features"], tensors["in/attn_mask"]
    alone = net.write_chunks(features[1:2, ..., :7, :], mask[1:2, :7])["down_proj"]
    close(alone[0][0], chunks["down_proj"][0][1])  # without its padding
    # one linear layer with two, one and one questions about three documents
    linear = nn.Linear(112, 64)
    linear.load_state_dict({k: tensors[f"lora_forward/down_proj/{k}"] for k in ("weight", "bias")})
    holder = lora.inject(one_layer(linear, "down_proj"), ["down_proj"])
    third = {"down_proj": tuple(x[:, 2:3] for x in documents)}  # the fixture's are of layer 2
    with lora.use(holder, lora.select(third, [0, 0, 1, 2]), net.config.scaling):
        y = holder["layers"][0]["down_proj"](tensors["lora_forward/down_proj/x"])
    expected = tensors["lora_forward/down_proj/y"]
    close(y, expected, 1e-5, 1e-5 * expected.abs().max())  # sums of large terms

    # from token ids to logits
    base, mask = golden_base(), tensors["e2e/ctx_attn_mask"]
    features = model.hidden_states(base, tensors["e2e/ctx_ids"], mask, net.config.early_exit)
    real = mask.bool()
    close(features.movedim(-2, 1)[real], tensors["e2e/features"].movedim(-2, 1)[real], 1e-4, 1e-4)
    counts = tensors["e2e/n_ctx_chunks"].tolist()
    documents = net.write([(features, mask)], counts)
    rows = [i for i, n in enumerate(tensors["e2e/n_queries"].tolist()) for _ in range(n)]
    asked = tensors["e2e/attention_mask"].bool()
    with lora.use(lora.inject(base, ["down_proj"]), lora.select(documents, rows), net.config.scaling):
        logits = base(tensors["e2e/input_ids"], attention_mask=tensors["e2e/attention_mask"]).logits
    close(logits[asked], tensors["e2e/logits"][asked], 1e-4, 5e-4)
    assert (tensors["e2e/logits"] - tensors["e2e/logits_base"])[asked].abs().max() > 0.1
