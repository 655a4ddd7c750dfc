"""Adapters of PEFT, and in base models of many families."""

from transformers import CONFIG_MAPPING

from tests.helpers import *  # noqa: F403

# -------------------- Adapters, as PEFT and merged weights have them --------------------


@pytest.mark.parametrize("rslora", [True, False])
def test_peft_reads_our_adapter(tmp_path, rslora):
    """Of another rank than its config's, as joined from several chunks of a document."""
    base, names = tiny_llama(), ["q_proj", "v_proj", "down_proj"]
    config = config_for(base, names, r=4, alpha=8, rslora=rslora)
    adapter = random_adapter(config, r=6)
    lora.save_adapter(tmp_path, adapter, config)
    ids = torch.randint(160, (2, 9))
    theirs = with_peft(tiny_llama(), tmp_path)(ids).logits
    plain = lora.inject(base, names)(ids).logits
    assert (plain - theirs).abs().max() > 0.01
    written = read_json(tmp_path / "adapter_config.json")  # for tools without rsLoRA
    assert written["lora_alpha"] / written["r"] == pytest.approx(config.scaling) and not written["use_rslora"]
    for ours, its_config in ((adapter, config), lora.load_adapter(tmp_path)):
        close(logits_of(base, ids, ours, its_config.scaling), theirs)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": r".*\.[qv]_proj"}])
def test_we_read_pefts_adapter(tmp_path, settings):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = dict(r=4, lora_alpha=8, target_modules=NAMES, init_lora_weights=False) | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many = tiny_llama(num_hidden_layers=11)  # so that their order is not that of the letters
        theirs = peft.get_peft_model(many, peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "checkpoint-5")  # as transformers' Trainer leaves it
    adapter, config = lora.load_adapter(tmp_path)
    base, ids = tiny_llama(num_hidden_layers=11), torch.randint(160, (2, 9))
    lora.inject(base, list(config.targets))
    close(logits_of(base, ids, adapter, config.scaling), theirs(ids).logits)


NOT_PLAIN = {"rank_pattern": {"v_proj": 6}, "init_lora_weights": "pissa", "layers_to_transform": [0]}
NOT_PLAIN |= {"use_dora": True, "loftq_config": {"bits": 4}, "bias": "all", "something_of_next_year": 1}


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    config = config_for(tiny_llama())
    lora.save_adapter(tmp_path, random_adapter(config), config)
    peft = read_json(tmp_path / "adapter_config.json")
    for name, value in NOT_PLAIN.items():
        write_file(tmp_path / "adapter_config.json", peft | {name: value})
        refused(f"not a plain LoRA adapter: {name} is", lora.load_adapter, tmp_path)


def test_what_does_not_fit_is_refused_in_words():
    refused("no nn.Linear layers named qkv, but down_proj, gate_proj", lora.inject, tiny_llama(), ["qkv"])


    class Quantised(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    refused("q_proj is Quantised: quantised", lora.inject, one_layer(Quantised(4, 4)), ["q_proj"])
    twice = ["q_proj", "self_attn.q_proj"]
    refused("would belong to two targets", lora.inject, tiny_llama(), twice)
    adapter = random_adapter(config_for(tiny_llama(hidden_size=32)))
    refused("for another model", lora.use(lora.inject(tiny_llama(), NAMES), adapter, 1.0).__enter__)


# -------------------- Base models of many families, as small random ones --------------------

MIXED, SLIDING = ["linear_attention", "full_attention"] * 2, ["sliding_attention", "full_attention"] * 2
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=4)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
FAMILIES = {  # whose layers differ in kind; what differs from the common settings below
    "llama": {},
    "gemma2": {},
    "phi3": dict(head_dim=None),
    "qwen3_5_text": LINEAR | dict(layer_types=MIXED),
    "gpt_oss": dict(layer_types=SLIDING, num_local_experts=4, num_experts_per_tok=2),
}
OTHER_NAMES = {"phi3": ["qkv_proj", "down_proj"], "gpt_oss": ["q_proj", "v_proj", "o_proj"]}


def random_base(family: str) -> nn.Module:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    torch.manual_seed(0)
    sizes = dict(vocab_size=424, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=8)
    sizes = {name: value for name, value in (sizes | FAMILIES[family]).items() if value is not None}
    config = CONFIG_MAPPING[family](**sizes)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for p in base.parameters():
        p.data = p.data * 2 if p.dim() > 1 else p.data
    return base


def targets_of(family: str) -> list[str]:
    return OTHER_NAMES.get(family, ["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_layers_that_differ(tmp_path, family):
    """One adapter per row equals single ones, PEFT and the merged weights; files are read back."""
    base = random_base(family)
    config = config_for(base, targets_of(family))
    lora.inject(base, targets_of(family))
    batch, ids = random_adapter(config, 2), torch.randint(3, 64, (2, 9))
    plain = base(ids).logits
    together = logits_of(base, ids, batch)
    for row in range(2):
        alone = logits_of(base, ids[row : row + 1], lora.select(batch, [row]))
        close(alone[0], together[row], 1e-4, 1e-4)
    assert (together - plain).abs().max() > 0.01

    first = lora.select(batch, [0])
    lora.save_adapter(tmp_path, first, config)
    again, config_again = lora.load_adapter(tmp_path)
    assert config_again.targets == config.targets
    for name in first:
        close(again[name], first[name])
    lora.merge(base, first, SCALING)
    close(base(ids[:1]).logits[0], together[0], 1e-4, 1e-4)
    close(with_peft(random_base(family), tmp_path)(ids[:1]).logits[0], together[0], 1e-4, 1e-4)


@pytest.fixture(scope="module")
def args():
    """The settings of a run with small micro-batches."""
    args = run_of("--max_steps", "2").args
    args.micro_batch, args.l2, args.gradient_checkpointing = 2, 0.1, True
    return args


@pytest.mark.parametrize("reads", ["descriptions", "documents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_networks_write_for_layers_that_differ(family, reads, args):
    """One step of SFT: every parameter gets a gradient, the adapters fit the base model."""
    *attention, down = targets_of(family)
    names = attention if reads == "descriptions" else [down]
    base, tokenizer = random_base(family), model.load_base(model.TINY)[1]
    config = config_for(base, names, r=2)
    lora.inject(base, names)
    model.recompute_layers(base)
    if reads == "descriptions":
        sizes = dict(encoder="hash", input_size=8192, latent_size=16, head_in_size=8, size="medium")
        net = hypernet.TextToLoRA(hypernet.TextConfig(**vars(config) | sizes))
    else:
        sizes = dict(input_size=32, latent_size=16, n_blocks=1, n_heads=4, chunk_len=9)
        sizes["early_exit"] = family == "llama"
        net = d2l.DocToLoRA(d2l.DocConfig(**vars(config) | sizes))
        for p in net.bias.values():
            nn.init.normal_(p, std=0.1)
    examples = [Example(f"in {i}", [f"out {i}"]) for i in range(2)]
    tasks = [Task(str(i), [f"do this {i}"], examples, []) for i in range(2)]
    run = train.Run(args, torch.device("cpu"), 0, 1, tasks, [], [], base, tokenizer, net)
    net.connect(base, tokenizer)
    drawn = [drawn_as(run, i, task.descriptions[0], examples) for i, task in enumerate(tasks)]
    train.sft_step(run, net, drawn)
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all(), name
        assert name.endswith("bias") or p.grad.abs().max() > 0, name


def test_names_that_several_places_share_are_refused(tmp_path):
    """As in Flux, whose blocks of both kinds have a to_q, and in Gemma 4, whose layers have two shapes."""
    stacks = {}
    for name, n in ("blocks", 2), ("single_blocks", 3):
        stacks[name] = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 4)}) for _ in range(n)])
    base, names = nn.ModuleDict(stacks), ["blocks.{}.to_q", "single_blocks.{}.to_q"]
    refused(re.escape(f"name one of them: {', '.join(names)}"), lora.find_targets, base, ["to_q"])
    config = lora.LoRAConfig("x", n_layers=3, targets=lora.find_targets(base, names))
    assert [len(target.layers) for target in config.targets.values()] == [2, 3]
    lora.save_adapter(tmp_path, random_adapter(config), config)
    assert lora.load_adapter(tmp_path)[1].targets == config.targets
    base["blocks"][1]["to_q"] = nn.Linear(4, 8)
    shapes = "blocks.{}.to_q has 2 shapes; name single layers, such as blocks.0.to_q"
    refused(re.escape(shapes), lora.find_targets, base, names)
    assert lora.find_targets(base, ["blocks.1.to_q"])["blocks.1.to_q"].n_out == 8
    gpt_2 = CONFIG_MAPPING["gpt2"](n_layer=1, n_head=2, n_embd=8, vocab_size=9)
    gpt_2 = AutoModelForCausalLM.from_config(gpt_2)
    refused("no nn.Linear layers named c_attn, but none at all", lora.inject, gpt_2, ["c_attn"])
    config = config_for(random_base("qwen3_5_text"), ["q_proj", "down_proj"])  # not all layers have both
    assert config.positions("q_proj") == [1, 3] and config.positions("down_proj") == slice(None)


def test_gemma_2_keeps_its_softcap(tmp_path):
    """Some versions of transformers drop it with sdpa attention."""
    random_base("gemma2").save_pretrained(tmp_path)
    model.load_base(model.TINY)[1].save_pretrained(tmp_path)
    assert model.load_base(str(tmp_path))[0].config._attn_implementation == "eager"


def test_an_adapter_that_cannot_be_put_in_use_leaves_nothing_behind(monkeypatch):
    base = lora.inject(tiny_llama(), NAMES)
    A, B = random_adapter(config_for(base), 1)["v_proj"]
    broken = types.SimpleNamespace(shape=A.shape, to=lambda *_: 1 / 0)  # as if there were no memory for it
    with pytest.raises(ZeroDivisionError):
        lora.use(base, random_adapter(config_for(base), 1) | {"v_proj": (broken, B)}, 1.0).__enter__()
    assert all(layer.A is None for layer in lora.injected_layers(base))


def test_a_layer_that_gets_the_tokens_of_some_experts_is_refused():
    holder = lora.inject(one_layer(nn.Linear(4, 4)), ["q_proj"])
    with lora.use(holder, {"q_proj": (torch.randn(2, 1, 3, 4), torch.randn(2, 1, 4, 3))}, 1.0):
        refused("tokens without their example", holder["layers"][0]["q_proj"], torch.randn(8, 4))
