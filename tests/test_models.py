"""Models: adapters in many families, text encoders, chat templates."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, CONFIG_MAPPING
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel, T5Config, T5EncoderModel

import data
import eval as evaluation
import generate
import hypernet
import lora
import model
import train
from data import Example, Task
from support import text_models
from support.files import read_file, write_file
from support.processes import Process
from tests.helpers import close, command, config_for, fit, logits_of, NAMES, one_layer
from tests.helpers import random_adapter, refused, run_of, SCALING, SHORT, tiny_llama, with_peft

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
    for ours, its_config in ((adapter, config), lora.load_adapter(tmp_path)):
        close(logits_of(base, ids, ours, its_config.scaling), theirs)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": r".*\.[qv]_proj"}])
def test_we_read_pefts_adapter(tmp_path, settings):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = dict(r=4, lora_alpha=8, target_modules=NAMES, init_lora_weights=False) | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    adapter, config = lora.load_adapter(tmp_path)
    base, ids = lora.inject(tiny_llama(), list(config.targets)), torch.randint(160, (2, 9))
    close(logits_of(base, ids, adapter, config.scaling), theirs(ids).logits)


NOT_PLAIN = {"rank_pattern": {"v_proj": 6}, "init_lora_weights": "pissa", "layers_to_transform": [0]}
NOT_PLAIN |= {"use_dora": True, "loftq_config": {"bits": 4}, "bias": "all", "something_of_next_year": 1}


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    config = config_for(tiny_llama())
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


def test_two_stacks_of_layers_are_told_apart(tmp_path):
    """As in Flux, whose blocks of both kinds have a to_q."""
    stacks = {}
    for name, n in ("blocks", 2), ("single_blocks", 3):
        stacks[name] = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 4)}) for _ in range(n)])
    base, names = nn.ModuleDict(stacks), ["blocks.{}.to_q", "single_blocks.{}.to_q"]
    refused(re.escape(f"name one of them: {', '.join(names)}"), lora.find_targets, base, ["to_q"])
    config = lora.LoRAConfig("x", n_layers=3, targets=lora.find_targets(base, names))
    assert [len(target.layers) for target in config.targets.values()] == [2, 3]
    lora.save_adapter(tmp_path, random_adapter(config), config)
    assert lora.load_adapter(tmp_path)[1].targets == config.targets


# -------------------- Base models of many families, as small random ones --------------------

MIXED, SLIDING = ["linear_attention", "full_attention"] * 2, ["sliding_attention", "full_attention"] * 2
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=4)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GEMMA_3N = dict(laurel_rank=4, altup_num_inputs=2, intermediate_size=[48] * 4)
GEMMA_3N |= dict(activation_sparsity_pattern=[0.0] * 4)
INPUTS = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, num_kv_shared_layers=2)
NEMOTRON = dict(mamba_num_heads=4, mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=8)
NEMOTRON |= dict(n_routed_experts=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=40)
FAMILIES = {  # what differs from the common settings below
    "llama": {},
    "mistral": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": dict(layer_types=SLIDING),
    "qwen2": dict(head_dim=None),
    "qwen3": {},
    "cohere": dict(head_dim=None),
    "phi3": dict(head_dim=None),
    "qwen3_5_text": LINEAR | dict(layer_types=MIXED),
    "qwen3_next": LINEAR | EXPERTS | dict(layer_types=MIXED, shared_expert_intermediate_size=16),
    "gemma4_text": INPUTS | dict(layer_types=SLIDING, per_layer_config={i: {"head_dim": 16} for i in "13"}),
    "gemma3n_text": INPUTS | GEMMA_3N | dict(layer_types=SLIDING),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, block_ff_dim=48),
    "lfm3": {},
    "olmo_hybrid": dict(layer_types=MIXED),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4),
    "nemotron_h": NEMOTRON,
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8),
    "gpt_oss": dict(layer_types=SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "smollm3": {},
    "olmo3": {},
    "ministral3": {},
}
ATTENTION = {  # otherwise q_proj and v_proj
    "phi3": ["qkv_proj"],
    "olmo_hybrid": ["self_attn.q_proj", "self_attn.v_proj"],
    "gemma4_text": ["layers.1.self_attn.q_proj", "layers.0.self_attn.v_proj"],
}
DOWN = {"lfm2": "w2", "lfm3": "w2", "gpt_oss": "o_proj", "nemotron_h": "mixer.down_proj"}  # others: down_proj
DOWN["qwen3_next"] = "self_attn.o_proj"  # its down_proj is that of an expert that PEFT takes for all


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
    """The names with which this family's layers are told apart."""
    return [*ATTENTION.get(family, ["q_proj", "v_proj"]), DOWN.get(family, "down_proj")]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_layers_that_differ(tmp_path, family):
    """One adapter per row equals single ones, PEFT and the merged weights; files are read back."""
    base = random_base(family)
    config = config_for(base, targets_of(family))
    lora.inject_targets(base, config.targets)
    batch, ids = random_adapter(config, 2), torch.randint(3, 64, (2, 9))
    plain = base(ids).logits
    together = logits_of(base, ids, batch)
    for row in range(2):
        alone = logits_of(base, ids[row : row + 1], lora.select(batch, row))
        close(alone[0], together[row], 1e-4, 1e-4)
    assert (together - plain).abs().max() > 0.01

    first = lora.select(batch, 0)
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
    base, tokenizer = random_base(family), model.load_base("tiny")[1]
    config = config_for(base, names, r=2)
    lora.inject(base, names)
    model.recompute_layers(base)
    if reads == "descriptions":
        sizes = dict(input_size=8192, latent_size=16, head_in_size=8, size="medium")
        net = hypernet.TextToLoRA(hypernet.TextConfig(**vars(config) | sizes))
    else:
        sizes = dict(input_size=32, latent_size=16, n_blocks=1, n_heads=4, chunk_len=9)
        net = hypernet.DocToLoRA(hypernet.DocConfig(**vars(config) | sizes))
        for p in net.bias.values():
            nn.init.normal_(p, std=0.1)
    examples = [Example(f"in {i}", [f"out {i}"]) for i in range(2)]
    tasks = [Task(str(i), [f"do this {i}"], examples, []) for i in range(2)]
    run = train.Run(args, Process(torch.device("cpu")), tasks, [], base, tokenizer, net)
    net.connect(base, tokenizer)
    drawn = [data.DrawnTask(i, task.descriptions[0], examples) for i, task in enumerate(tasks)]
    losses = train.sft_step(run, net, drawn)
    assert sum(losses.values()).isfinite()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all(), name
        assert name.endswith("bias") or p.grad.abs().max() > 0, name


def test_names_that_several_places_share_are_refused():
    places = "out_proj is in several places; name one of them: conv.out_proj, self_attn.out_proj"
    refused(places, lora.find_targets, random_base("lfm2"), ["out_proj"])
    shapes = "q_proj has 2 shapes; name single layers, such as layers.0.self_attn.q_proj"
    refused(shapes, lora.find_targets, random_base("gemma4_text"), ["q_proj"])
    gpt_2 = CONFIG_MAPPING["gpt2"](n_layer=1, n_head=2, n_embd=8, vocab_size=9)
    base = AutoModelForCausalLM.from_config(gpt_2)
    config = config_for(random_base("qwen3_5_text"), ["q_proj", "down_proj"])  # not all layers have both
    assert config.positions("q_proj") == [1, 3] and config.positions("down_proj") == slice(None)
    refused("no nn.Linear layers .GPT-2 has Conv1D", lora.inject, base, ["c_attn"])


def test_training_sees_the_inputs_that_generation_sees():
    """Gemma 3n and 4 have further inputs per layer, which embeddings alone would not bring."""
    for family in ("gemma3n_text", "gemma4_text"):
        base = random_base(family)
        for name, p in base.named_parameters():
            if "correct_output_scale" in name:
                p.data.fill_(1.0)
        ids = torch.randint(3, 64, (2, 9))
        logits, _, _ = model.answer_logits(base, [(row[:4], row[4:]) for row in ids.tolist()])
        close(logits, base(ids).logits[:, 3:-1].flatten(0, 1), 1e-4, 1e-4)
        noisy, _, _ = model.answer_logits(base, [(row[:4], row[4:]) for row in ids.tolist()], 5.0)
        assert (noisy - logits).abs().max() > 1e-3


def test_gemma_2_keeps_its_softcap(tmp_path):
    """Some versions of transformers drop it with sdpa attention."""
    random_base("gemma2").save_pretrained(tmp_path)
    model.load_base("tiny")[1].save_pretrained(tmp_path)
    assert model.load_base(str(tmp_path))[0].config._attn_implementation == "eager"


# -------------------- Text encoders --------------------


def bert_folder(folder: Path) -> nn.Module:
    """A random BERT with a vocabulary of ten."""
    torch.manual_seed(0)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] one two three four ."
    (folder / "vocab.txt").write_text(words.replace(" ", "\n"))
    write_file(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    bert = BertModel(BertConfig(vocab_size=10, **sizes)).eval()
    bert.save_pretrained(folder)
    return bert


def test_transformer_encoder_pools_real_tokens_only(tmp_path):
    """In float32, whatever its file holds; its width is known without its weights."""
    bert, texts = bert_folder(tmp_path), ["one", "two three four one two"]
    bert.bfloat16().save_pretrained(tmp_path)
    bert.float()
    encode = model.load_encoder(str(tmp_path))
    assert model.encoder_width(str(tmp_path), None) == encode(texts).shape[1] == 16
    alone = torch.cat([encode([t]) for t in texts])
    close(encode.embed(texts), alone, 1e-5, 1e-6)
    hidden = bert(torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    close(alone[0], F.normalize(hidden.mean(0), dim=0), 1e-5, 1e-6)
    (tmp_path / "1_Pooling").mkdir()
    write_file(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    close(model.load_encoder(str(tmp_path))(texts)[0], F.normalize(hidden[0], dim=0), 1e-5, 1e-6)
    write_file(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_lasttoken": True})
    close(model.load_encoder(str(tmp_path))(texts)[0], F.normalize(hidden[-1], dim=0), 1e-5, 1e-6)


def test_gte_loads_without_its_own_code(tmp_path):
    """A folder like Alibaba-NLP/gte-large-en-v1.5: type "new", fused projections, NTK-scaled rotary, CLS."""
    if not hasattr(transformers, "GteModel"):
        pytest.skip("this version of transformers has no GteModel")
    bert_folder(tmp_path)
    new = dict(model_type="new", auto_map={"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"})
    new |= dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48)
    new |= dict(vocab_size=10, type_vocab_size=2, layer_norm_eps=1e-12, layer_norm_type="layer_norm")
    new |= dict(rope_theta=160000, rope_scaling={"type": "ntk", "factor": 2.0}, max_position_embeddings=64)
    new |= dict(architectures=["NewModel"], pack_qkv=True, position_embedding_type="rope", pad_token_id=0)
    write_file(tmp_path / "config.json", new)
    assert model.encoder_width(str(tmp_path), None) == 32
    network = transformers.GteModel(text_models.gte_config(new)).eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "1_Pooling").mkdir()
    write_file(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})

    inverse = 1 / (160000 * 2.0) ** (torch.arange(0, 16, 2) / 16) / 2.0 ** (2 / 16)  # as published
    angle = (torch.arange(5)[:, None] * inverse).repeat(1, 2)[None]
    cos, sin = network.rotary_emb(torch.zeros(1), torch.arange(5)[None])
    close((cos, sin), (angle.cos(), angle.sin()))
    ids = torch.tensor([[2, 5, 6, 9, 3], [2, 7, 8, 9, 3]])  # with the full stop
    expected = F.normalize(network(ids).last_hidden_state[:, 0], dim=-1)
    close(model.load_encoder(str(tmp_path), full_stop=True)(["one two", "three four ."]), expected, 1e-4)


def test_base_encoder_reads_the_last_token():
    base, tokenizer = model.load_base("tiny")
    encode = model.load_encoder("base", "cpu", base, tokenizer)
    alone = encode(["cat dog"])[0]
    close(encode(["cat dog", "cat dog red hat"])[0], alone, 1e-5, 1e-6)
    hidden = base.model(torch.tensor([tokenizer("cat dog")["input_ids"]])).last_hidden_state
    close(alone, F.normalize(hidden[0, -1], dim=0))
    close(model.base_encoder(base, tokenizer, ["cat dog", "cat dog red hat"])[0], alone, 1e-5, 1e-6)


def test_the_positions_of_roberta_begin_later_and_of_t5_the_encoder_is_loaded(tmp_path):
    bert_folder(tmp_path)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = RobertaConfig(vocab_size=10, max_position_embeddings=12, pad_token_id=1, **sizes)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    longest = model.load_encoder(str(tmp_path))(["one two three four " * 9])
    assert longest.shape == (1, 16) and longest.isfinite().all()
    config = T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    network = T5EncoderModel(config).eval()
    network.save_pretrained(tmp_path)
    hidden = network(torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    close(model.load_encoder(str(tmp_path))(["one"])[0], F.normalize(hidden.mean(0), dim=0), 1e-5, 1e-6)


def test_a_lora_on_the_text_encoder_is_trained_and_used(tmp_path):
    """At first it changes nothing; it gets gradients, is saved, and changes what the network reads."""
    (tmp_path / "bert").mkdir()
    bert_folder(tmp_path / "bert")
    words = [*SHORT, "--encoder", tmp_path / "bert", "--encoder_rank", "2"]
    run, texts = run_of(*words), ["one two", "three"]
    first = run.net.encode(texts)
    close(first, model.load_encoder(str(tmp_path / "bert"), full_stop=True)(texts), 1e-5, 1e-6)
    nn.init.normal_(run.net.heads["q_proj"].weight, std=0.1)
    train.sft_step(run, run.net, data.draw(run.tasks, 0, run.args))
    grads = [p.grad.abs().max() for p in run.net.encoder_lora.B.values()]
    assert len(grads) == 6 and min(grads) > 0  # query, key, value, three dense layers
    fit(tmp_path / "net", *words, "--max_steps", "3", "--lr", "0.1")
    net = hypernet.load_hypernet(tmp_path / "net")
    assert len(net.config.encoder_targets["encoder.layer.{}.attention.self.query"].layers) == 2
    net.connect(None, None)
    assert (net.encode(texts) - first).abs().max() > 1e-3


# -------------------- Chat templates, and what stands in prompts --------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_chat_templates_with_and_without_a_system_message():
    tokenizer = model.load_base("tiny")[1]
    tokenizer.chat_template = CHATML
    chat = model.chat(tokenizer, "hello", model.instruct("Greet."))
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
    assert model.render(tokenizer, chat) == "user: hello\nAI: "
    silent = "{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
    mute = model.load_base("tiny")[1]
    mute.chat_template = CHATML.replace("<|im_start|>{{", silent + "<|im_start|>{{", 1)
    assert model.render(mute, chat).endswith("assistant\n")


def test_a_base_model_without_a_chat_template_keeps_its_first_token(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    plain = model.load_base("tiny")[1]
    plain.chat_template, plain.bos_token = None, "<unk>"
    plain.save_pretrained(tmp_path)

    def prompt(tokenizer):
        return model.render(tokenizer, model.chat(tokenizer, "cat"))

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


def test_what_a_template_writes_before_an_answer_belongs_to_the_prompt():
    """As gpt-oss's channel: otherwise it would be trained and read as a part of the answer."""
    tokenizer = model.load_base("tiny")[1]
    said = "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ m.content }}"
    tokenizer.chat_template = CHATML.replace("\n{{ m.content }}", "\n" + said)
    chat = [{"role": "user", "content": "x"}]
    prompt = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<|channel|>final<|message|>"
    assert model.render(tokenizer, chat) == prompt
    assert model.render(tokenizer, chat, "Paris") == "Paris<|im_end|>"


def test_the_mark_that_the_template_writes_after_an_answer_ends_it(tmp_path):
    """In Qwen's base models generation_config.json names another one."""
    tiny_llama().save_pretrained(tmp_path)
    tokenizer = model.load_base("tiny")[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    write_file(tmp_path / "generation_config.json", {"eos_token_id": 3})
    base, tokenizer = model.load_base(str(tmp_path))
    assert base.generation_config.eos_token_id == [3, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_prompt_does_not_depend_on_the_day():
    tokenizer = model.load_base("tiny")[1]
    today = "{{ date_string }} {{ strftime_now('%d %b %Y') }} {{ messages[-1].content }}"
    tokenizer.chat_template = today
    assert model.render(tokenizer, [{"role": "user", "content": "x"}]) == "26 Jul 2024 26 Jul 2024 x"


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
        return seen - {"", "x"}  # by which the template is measured

    for given, expected in ([], "cat dog"), (["--instruction"], model.instruct("red hat") + "\n\ncat dog"):
        net = tmp_path / f"net{len(given)}"
        data.cached_ids.cache_clear()
        words = [*SHORT, "--max_steps", "1", "--tasks", folder, "--out_dir", net, *given]
        assert prompts_of(train, *words) == {expected}
        own = ["--hypernet", net, "--split", "train", "--tasks", folder]
        assert prompts_of(evaluation, *own, "--methods", "t2l") == {expected}  # as in training
        assert prompts_of(evaluation, *own, "--methods", "base,t2l") == {"cat dog", expected}
        words = ["--desc", "red hat", "--input", "cat dog", "--hypernet", net, "--out", tmp_path / "out"]
        assert prompts_of(generate, *words) == {expected}
    assert prompts_of(evaluation, *own, "--methods", "t2l", "--no-instruction") == {"cat dog"}
    one = ["--methods", "mt_lora", "--mt_lora", tmp_path / "out", "--tasks", folder, "--split", "train"]
    assert prompts_of(evaluation, *one) == {expected}  # an adapter, too, is asked as it was trained
    both = ["--compare", tmp_path / "net0", "--tasks", folder, "--split", "train", "--methods", "t2l"]
    assert len(prompts_of(evaluation, "--hypernet", net, *both)) == 2  # each as it was trained
