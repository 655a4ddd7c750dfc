"""Published checkpoints in their layouts, and numbers of the published implementations."""

import itertools

from extras import published
from tests.helpers import *  # noqa: F403

SFT_FILES = [f"llama_{size}_sft" for size in ("L", "M", "S", "Srot")]
RECON_FILES = [f"llama_{size}_recon_{loss}" for size in ("L", "M", "S", "Srot") for loss in ("z", "dw")]
RECON_FILES.append("llama_L_recon_f")


def published_folder(folder: Path, weights: dict, base_model="u/b", order=NAMES, **args) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "hypermod.pt")
    args = dict(emb_model="", training_task="sft", factorized=False, delta_w_scaling=10000) | args
    (folder / "args.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in args.items()))
    peft = dict(peft_type="LORA", r=8, lora_alpha=16, use_rslora=True, target_modules=order)
    write_file(folder / "adapter_config.json", peft | dict(base_model_name_or_path=base_model))
    return folder



# -------------------- Text-to-LoRA --------------------


def golden_net(file: str, folder: Path) -> tuple[hypernet.TextToLoRA, dict, dict]:
    """One golden file as (our network, from a folder in the published layout; its tensors; its json)."""
    path = golden(file)
    tensors, info = load_file(f"{path}.safetensors"), read_json(f"{path}.json")
    args = {k: info["constructor_args"][k] for k in ("training_task", "factorized", "delta_w_scaling")}
    weights = {k[3:]: t for k, t in tensors.items() if k.startswith("sd/")}
    return published.convert(published_folder(folder, weights, **args)), tensors, info


def golden_base() -> nn.Module:
    path = golden("llama_base")
    info = read_json(f"{path}.json")["base_config"]
    config = LlamaConfig(**{k: v for k, v in info.items() if k in LlamaConfig().to_dict()})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    base.load_state_dict({k[5:]: t for k, t in load_file(f"{path}.safetensors").items()})
    return base


@pytest.mark.parametrize("file", SFT_FILES + RECON_FILES)
def test_golden_adapters(tmp_path, file):
    net, tensors, info = golden_net(file, tmp_path)
    hypernet.save_hypernet(net, tmp_path / "ours")
    net = hypernet.load_hypernet(tmp_path / "ours")
    adapter = net.write(tensors["in/task_emb"])
    n = len({key.split("/")[0] for key in tensors if key.startswith("out")})
    assert n in (1, 3)
    for i, layer, name in itertools.product(range(n), range(4), NAMES):
        key = f"out{i}/base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
        close(adapter[name][0][i, layer], tensors[f"{key}A.weight"])
        close(adapter[name][1][i, layer], tensors[f"{key}B.weight"])
    assert net.config.targets == lora.find_targets(golden_base(), NAMES)
    trainable = sum(p.numel() for name, p in net.named_parameters() if not name.startswith(("offset", "std")))
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
    l2 = 1e-3 * train.weight_size(adapter, torch.square)
    close(l2, tensors["sft/generated_w_l2_loss"][0], 1e-5, 1e-7)
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
            start = 0 if "recon_dw" in file else tensors[f"sd/AB_offset.{k}.{name}"]
            net.offset[f"{name}_{k}"].data -= start
    adapter = net.write(tensors["recon/in/task_embs"].flatten(0, 1))

    def pick(k, name):
        return tensors[f"recon/in/target/{k}/{name}"].repeat_interleave(2, 0)

    target = {name: (pick("A", name), pick("B", name)) for name in NAMES}
    kind = "delta_w" if "recon_dw" in file else "z_score"  # the std of recon_f is 1
    std = {name: (net.std.get(f"{name}_A", 1), net.std.get(f"{name}_B", 1)) for name in NAMES}
    close(train.recon_loss(kind, adapter, target, std), tensors["recon/loss"][0], 1e-5, 5e-6)


def test_what_the_files_of_a_checkpoint_say(tmp_path, monkeypatch):
    """From the hub, where only its files are downloaded. No file says the order of the module embedding."""
    path = golden("llama_L_sft")
    weights = {k[3:]: t for k, t in load_file(f"{path}.safetensors").items() if k.startswith("sd/")}
    folder = published_folder(tmp_path / "t2l", weights, "google/gemma-2-2b-it", emb_model="some/one")

    def snapshot_download(repo: str, allow_patterns, **_) -> Path:
        assert repo == "u/r" and set(allow_patterns) == {f"t2l/{name}" for name in published.FILES}
        return tmp_path

    monkeypatch.setattr(model, "snapshot_download", snapshot_download)
    assert command(published, "u/r/t2l", tmp_path / "ours", "--module_order", "v_proj,q_proj") == 0
    net, emb = hypernet.load_hypernet(tmp_path / "ours"), load_file(f"{path}.safetensors")["in/task_emb"]
    c = net.config
    assert (net.arch, c.size, c.encoder) == ("t2l", "large", "some/one") and c.full_stop and c.instruction
    assert c.base_model == "google/gemma-2-2b-it" and c.scaling == SCALING and list(c.targets) == NAMES[::-1]
    other = published.convert(folder)
    other.module_emb[0].weight.data = other.module_emb[0].weight.data.flip(0)
    close(net.write(emb)["q_proj"], other.write(emb)["q_proj"])
    turned = published.convert(published_folder(folder, weights, order=NAMES[::-1]))
    assert list(turned.config.targets) == NAMES[::-1]
    (folder / "args.yaml").write_text("training_task: !!python/object/apply:os.getcwd []\n")
    refused("no published checkpoint", published.convert, folder)
    for name in NAMES:  # terabytes, from a few bytes in the file
        weights[f"heads.{name}.weight"] = torch.zeros(1).expand(len(weights[f"heads.{name}.bias"]), 10**12)
    weights |= {"mlp3.4.weight": torch.zeros(1).expand(10**12, len(weights["mlp3.4.weight"][0]))}
    weights |= {"mlp3.4.bias": torch.zeros(1).expand(10**12)}
    refused("would have .* parameters", published.convert, published_folder(folder, weights))


# -------------------- Doc-to-LoRA --------------------


class Settings:
    """An object of a class of the published code."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


class Hostile:
    """Calls something when it is unpickled."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def document_folder(folder: Path, monkeypatch, file: str = "down_l2l", **changes) -> Path:
    """A golden Doc-to-LoRA network as the published code saves one; its classes are not here afterwards."""
    path = golden(file, "d2l")
    tensors, info = load_file(f"{path}.safetensors"), read_json(f"{path}.json")
    shared = load_file(f"{golden('perceiver_shared', 'd2l')}.safetensors")
    content = {key: tensors.get(f"sd/{key}", shared.get(f"sd/{key}")).float() for key in info["state_dict"]}
    network = Settings(latent_size=64, num_pre_head_layers=1, use_per_rank_bias=False)
    network.feature_sizes, network.layer_indices = (info["d_in"], info["d_out"]), torch.arange(4)
    network.lora_config = Settings(r=8, lora_alpha=info["lora_forward_scaling"])
    network.aggregator_config = Settings(feature_size=64, n_latent_queries=8, num_self_attn_per_block=0)
    kind = "early_exit" if file == "down_flat" else "per_layer_activations"
    content |= {"base_model_name_or_path": "google/gemma-2-2b-it", "hypernet_config": network}
    content |= {"ctx_encoder_args": Settings(ctx_encoder_type=kind)} | changes
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "__module__", "ctx_to_lora")
        patch.setitem(sys.modules, "ctx_to_lora", types.SimpleNamespace(Settings=Settings))
        torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_a_hostile_or_broken_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    for call, *args in (os.system, f"touch {mark}"), (exec, f"open({str(mark)!r}, 'w')"), (bytearray, 10**11):
        document_folder(tmp_path, monkeypatch, hypernet_config=Hostile(call, *args))
        refused("no published checkpoint", published.convert, tmp_path)
        assert not mark.exists()
    document_folder(tmp_path, monkeypatch, **{"head.weight": None})
    refused("no published checkpoint", published.convert, tmp_path)
    file = document_folder(tmp_path, monkeypatch) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    refused("no published checkpoint", published.convert, tmp_path)


@pytest.mark.parametrize("file", ["down_l2l", "down_flat"])
@torch.no_grad()
def test_golden_documents(tmp_path, monkeypatch, file):
    net = published.convert(document_folder(tmp_path, monkeypatch, file))
    tensors = load_file(f"{golden(file, 'd2l')}.safetensors")

    def pair(key):
        return (tensors[f"{key}/A/down_proj"], tensors[f"{key}/B/down_proj"].mT)

    chunks = net.write_chunks(tensors["in/features"], tensors["in/attn_mask"])
    close(chunks["down_proj"], pair("out"))
    documents = net.join([chunks], [1, 2, 3])["down_proj"]
    expected = pair("combine/n123")
    layers = [2] if expected[0].shape[1] == 1 else range(4)
    close([x[:, layers] for x in documents], list(expected))
    # from token ids to logits
    base, mask = golden_base(), tensors["e2e/ctx_attn_mask"]
    assert net.config.targets == lora.find_targets(base, ["down_proj"])
    features = d2l.hidden_states(base, tensors["e2e/ctx_ids"], mask, net.config.early_exit)
    real = mask.bool()
    close(features.movedim(-2, 1)[real], tensors["e2e/features"].movedim(-2, 1)[real], 1e-4, 1e-4)
    counts = tensors["e2e/n_ctx_chunks"].tolist()
    documents = net.join([net.write_chunks(features, mask)], counts)
    rows = [i for i, n in enumerate(tensors["e2e/n_queries"].tolist()) for _ in range(n)]
    asked = tensors["e2e/attention_mask"].bool()
    with lora.use(lora.inject(base, ["down_proj"]), lora.select(documents, rows), net.config.scaling):
        logits = base(tensors["e2e/input_ids"], attention_mask=tensors["e2e/attention_mask"]).logits
    close(logits[asked], tensors["e2e/logits"][asked], 1e-4, 5e-4)
    assert (tensors["e2e/logits"] - tensors["e2e/logits_base"])[asked].abs().max() > 0.1


@torch.no_grad()
def test_golden_published_document_checkpoint():
    """From the published file and a document to A, B, logits and greedy answers."""
    folder = Path(os.environ.get("T2L_GOLDEN", "")) / "d2l_published"
    if not folder.exists():
        pytest.skip("the golden checkpoint is not here")
    tensors, info = load_file(folder / "golden.safetensors"), read_json(folder / "golden.json")
    net = published.convert(folder / "small_d2l" / "checkpoint-80000")
    base, tokenizer = model.load_base(str(folder / "tiny-gemma2"))
    lora.inject(base, ["down_proj"])
    assert net.config.scaling == pytest.approx(info["scaling"])
    net.config.chunk_len = info["max_ctx_chunk_len"]
    net.connect(base, tokenizer)
    documents = net(info["documents"])["down_proj"]
    _, counts = d2l.split_documents(net.config, info["documents"], tokenizer)
    assert counts == tensors["batch/n_ctx_chunks"].tolist()
    close(documents, (tensors["batch/A/down_proj"], tensors["batch/B/down_proj"].mT))
    for i in range(3):
        adapter = lora.select({"down_proj": documents}, [i])
        for turn in ("plain", "system") if i == 0 else ("plain",):
            logits = logits_of(base, tensors[f"question/{turn}/input_ids"], adapter, net.config.scaling)
            close(logits, tensors[f"doc{i}/logits/{turn}"], 1e-4, 5e-4)


def test_z_scores_have_the_deviation_of_a_sample():
    net = hypernet.TextToLoRA(small_config("large", recon_loss="z_score"))
    oracles = random_adapter(net.config, 5, r=4)
    net.start_at(*lora.statistics(oracles))
    for name, (A, B) in oracles.items():
        for key, values in ((f"{name}_A", A), (f"{name}_B", B)):
            close(net.offset[key], values.mean(0))
            close(net.std[key], values.std(0), 1e-4)
    assert not any(p.requires_grad for p in [*net.offset.values(), *net.std.values()])
    net = hypernet.TextToLoRA(small_config("large", recon_loss="delta_w"))
    net.start_at(*lora.statistics(oracles))
    assert not any(offset.any() for offset in net.offset.values())
