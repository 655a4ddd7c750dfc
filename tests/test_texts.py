"""What models read: text encoders, chat templates, prompts."""

import transformers
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    GemmaConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from encoders import hub
from encoders.base import last_states
from encoders.hash import hash_texts
from tests.helpers import *  # noqa: F403

# -------------------- Text encoders --------------------


def bert_folder(folder: Path, num_hidden_layers: int = 2) -> nn.Module:
    """A random BERT with a vocabulary of ten."""
    torch.manual_seed(0)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] one two three four ."
    (folder / "vocab.txt").write_text(words.replace(" ", "\n"))
    write_file(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    sizes = dict(hidden_size=16, num_hidden_layers=num_hidden_layers, num_attention_heads=2)
    sizes["intermediate_size"] = 32
    bert = BertModel(BertConfig(vocab_size=10, **sizes)).eval()
    bert.save_pretrained(folder)
    return bert


def test_transformer_encoder_pools_real_tokens_only(tmp_path):
    """In float32, whatever its file holds; its width is known without its weights."""
    bert, texts = bert_folder(tmp_path), ["one", "two three four one two"]
    bert.bfloat16().save_pretrained(tmp_path)
    bert.float()
    encode = encoders.load(str(tmp_path))
    assert encoders.width(str(tmp_path), None) == encode(texts).shape[1] == 16
    alone = torch.cat([encode([t]) for t in texts])
    close(hub.TransformerEncoder(str(tmp_path))(texts * 40), alone.repeat(40, 1))
    hidden = bert(torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}
    close(alone[0], F.normalize(pooled["mean"], dim=0))
    for fields, mode in {  # of older and of newer versions of sentence-transformers
        ("pooling_mode_cls_token", True): "cls",
        ("pooling_mode_lasttoken", True): "last",
        ("pooling_mode_mean_tokens", True): "mean",
        ("pooling_mode", "cls"): "cls",
        ("pooling_mode", "mean"): "mean",
    }.items():
        write_file(tmp_path / "1_Pooling" / "config.json", dict([fields, ("pooling_mode_max_tokens", False)]))
        close(encoders.load(str(tmp_path))(texts)[0], F.normalize(pooled[mode], dim=0))
    for fields in {"pooling_mode_max_tokens": True}, {"pooling_mode": "weightedmean"}:
        write_file(tmp_path / "1_Pooling" / "config.json", fields)
        refused("pooling by .* is not implemented", encoders.load, str(tmp_path))


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
    assert encoders.width(str(tmp_path), None) == 32
    network = transformers.GteModel(hub.gte_config(new)).eval()
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
    close(encoders.load(str(tmp_path), full_stop=True)(["one two", "three four ."]), expected, 1e-4)


def test_base_encoder_reads_the_last_token():
    base, tokenizer = model.load_base(model.TINY)
    encode = encoders.load("base", "cpu", base, tokenizer)
    alone = encode(["cat dog"])[0]
    hidden = base.model(torch.tensor([tokenizer("cat dog")["input_ids"]])).last_hidden_state
    close(alone, F.normalize(hidden[0, -1], dim=0))
    close(last_states(base, tokenizer, ["cat dog", "cat dog red hat"])[0], alone)


def test_the_positions_of_roberta_begin_later_and_of_t5_the_encoder_is_loaded(tmp_path):
    bert_folder(tmp_path)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = RobertaConfig(vocab_size=10, max_position_embeddings=12, pad_token_id=1, **sizes)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    longest = encoders.load(str(tmp_path))([repeated("one two three four ", 9)])
    assert longest.shape == (1, 16) and longest.isfinite().all()
    config = T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    network = T5EncoderModel(config).eval()
    network.save_pretrained(tmp_path)
    hidden = network(torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    close(encoders.load(str(tmp_path))(["one"])[0], F.normalize(hidden.mean(0), dim=0))


def test_a_lora_on_the_text_encoder_is_trained_and_used(tmp_path):
    """At first it changes nothing; it gets gradients, is saved, and changes what the network reads."""
    (tmp_path / "bert").mkdir()
    bert_folder(tmp_path / "bert")
    words = [*SHORT, "--encoder", tmp_path / "bert", "--arch", "encoder_lora", "--encoder_rank", "2"]
    run, texts = run_of(*words), ["one two", "three"]
    first = run.net.encode(texts)
    close(first, encoders.load(str(tmp_path / "bert"), full_stop=True)(texts))
    nn.init.normal_(run.net.heads["q_proj"].weight, std=0.1)
    train.sft_step(run, run.net, drawn_in(run, 0))
    grads = [p.grad.abs().max() for p in run.net.encoder_lora.B.values()]
    assert len(grads) == 6 and min(grads) > 0  # query, key, value, three dense layers
    fit(tmp_path / "net", *words, "--max_steps", "3", "--lr", "0.1")
    net = hypernet.load_hypernet(tmp_path / "net")
    assert len(net.config.encoder_targets["encoder.layer.{}.attention.self.query"].layers) == 2
    net.connect(None, None)
    assert (net.encode(texts) - first).abs().max() > 1e-3
    (tmp_path / "deeper").mkdir()
    bert_folder(tmp_path / "deeper", num_hidden_layers=3)  # as wide, with more layers
    net.config.encoder = str(tmp_path / "deeper")
    refused("has a LoRA for another one", net.connect, None, None)


# -------------------- Chat templates, and what stands in prompts --------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def with_template(template: str, *marks: str):
    """The tiny base model's tokenizer with another chat template, and special tokens."""
    tokenizer = model.load_base(model.TINY)[1]
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


def test_chat_templates_with_and_without_a_system_message():
    chatml, content = with_template(CHATML), "{{ m.content }}"
    question = "Greet. Please complete the task without any explanation.\n\nhello"
    turns = f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    assert model.render(chatml, "hello", model.instruct("Greet.")) == turns + "<|im_start|>assistant\n"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    without = with_template(refuses + CHATML)
    assert d2l.around_document(without)[0] == "<|im_start|>user\n\n\n"
    think = "<think></think>{% endif %}"
    thinks = CHATML.replace(content, "{% if m.role == 'assistant' %}" + think + content)
    thinks += "{% if add_generation_prompt and not enable_thinking %}" + think
    thinks = with_template(thinks, "<|im_end|>")
    # Mistral's v0.3 writes the system text into the last user turn, so it is left out
    start = "{% set system = 'S' if messages[0].role == 'system' and messages[-1].role == 'user' else '' %}"
    moves = with_template(start + CHATML.replace(content, "{{ system }}" + content))
    for tokenizer in (without, moves):
        assert model.render(tokenizer, "hello").startswith("<|im_start|>user\nhello<|im_end|>")
    # Phi-3 writes a second mark, which is not part of the answer; Falcon none, so it is the tokenizer's EOS
    two = CHATML.replace("<|im_end|>\n", "<|im_end|>\n<|endoftext|>")
    two = with_template(two, "<|im_end|>", "<|endoftext|>")
    chatml = with_template(CHATML, "<|im_end|>")
    falcon = "{% for m in messages %}{{ 'AI: ' if m.role == 'assistant' }}{{ m.content }} {% endfor %}"
    falcon = with_template(falcon + "{% if add_generation_prompt %}AI: {% endif %}")
    for tokenizer, end in [(other, "<|im_end|>") for other in (chatml, thinks, two)] + [(falcon, "<eos>")]:
        _, answer = model.example_ids(tokenizer, "cat", "red")
        assert answer[-1:] == model.tokenize(tokenizer, end) and len(model.tokenize(tokenizer, end)) == 1
    falcon = with_template(falcon.chat_template)
    falcon.eos_token = None
    refused("answers would have no end", model.render, falcon, "cat")
    # some write something else before an answer, as gpt-oss's channel, have no place for one, or refuse it
    channel = "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}"
    channel = with_template(CHATML.replace(content, channel + content))
    odd = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    silent = "{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
    mute = with_template(CHATML.replace("<|im_start|>{{", silent + "<|im_start|>{{", 1))
    for tokenizer in (channel, with_template(odd + "{% if add_generation_prompt %}AI: {% endif %}"), mute):
        refused("does not continue a prompt with its answer", model.render, tokenizer, "hello")


def test_a_base_model_without_a_chat_template_keeps_its_first_token(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    plain = model.load_base(model.TINY)[1]
    plain.chat_template, plain.bos_token = None, "<unk>"
    plain.save_pretrained(tmp_path)

    def prompt(tokenizer):
        return model.render(tokenizer, "cat")

    assert prompt(model.load_base(str(tmp_path))[1]) == "cat ->"  # its first token is not used
    first, text = {"SpecialToken": {"id": "<unk>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    own = {"<unk>": {"id": "<unk>", "ids": [plain.unk_token_id], "tokens": ["<unk>"]}}
    processor = dict(type="TemplateProcessing", single=[first, text], pair=[first, text], special_tokens=own)
    file = tmp_path / "tokenizer.json"
    write_file(file, read_json(file) | {"post_processor": processor})
    _, tokenizer = model.load_base(str(tmp_path))
    question, answer = model.example_ids(tokenizer, "cat", "gato", "")
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
    assert model.example_ids(fast, "where", "Paris") == ([3, 6, 4], [5, 1])


def test_the_mark_that_the_template_writes_after_an_answer_ends_it(tmp_path):
    """In Qwen's base models generation_config.json names another one."""
    tiny_llama().save_pretrained(tmp_path)
    tokenizer = model.load_base(model.TINY)[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    write_file(tmp_path / "generation_config.json", {"eos_token_id": 3})
    base, tokenizer = model.load_base(str(tmp_path))
    assert base.generation_config.eos_token_id == [3, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_instruction_is_in_the_prompt_if_a_flag_says_so(tmp_path, monkeypatch, capsys):
    instances, folder = [{"input": "cat dog", "output": ["dog cat"]}] * 5, tmp_path / "tasks"
    folder.mkdir()
    task = {"Definition": "red hat", "descriptions": ["Swap them."], "Instances": instances}
    write_file(folder / "swap.json", task)
    seen, real = set(), model.render
    monkeypatch.setattr(model, "render", lambda *a: seen.add(real(*a).removesuffix(" ->")) or real(*a))

    def prompts_of(module, *words) -> set[str]:
        seen.clear()
        assert command(module, *words) == 0
        return set(seen)

    for given, expected in ([], "cat dog"), (["--instruction"], model.instruct("red hat") + "\n\ncat dog"):
        net = tmp_path / f"net{len(given)}"
        words = [*SHORT, "--n_tasks", "0", "--max_steps", "1", "--tasks", folder, "--out_dir", net, *given]
        assert prompts_of(train, *words) == {expected}
        own = ["--hypernet", net, "--split", "train", "--tasks", folder]
        assert prompts_of(evaluation, *own, "--methods", "net") == {expected}  # as in training
        assert prompts_of(evaluation, *own, "--methods", "base,net") == {"cat dog", expected}
        words = ["--desc", "red hat", "--input", "cat dog", "--hypernet", net, "--out", tmp_path / "out"]
        assert prompts_of(generate, *words) == {expected}
    assert prompts_of(evaluation, *own, "--methods", "net", "--no-instruction") == {"cat dog"}
    one = ["--methods", "mt_lora", "--mt_lora", tmp_path / "out", "--tasks", folder, "--split", "train"]
    assert prompts_of(evaluation, *one) == {expected}  # an adapter, too, is asked as it was trained


def test_text_encoders_compute_in_float32_in_training_validation_and_use(monkeypatch):
    run, seen = run_of(*SHORT, "--dtype", "bfloat16"), []

    def embed(texts: list[str]) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return hash_texts(texts)

    monkeypatch.setattr(hub, "TransformerEncoder", lambda *_: embed)
    run.net.encoder = encoders.load("some encoder")
    in_bfloat16 = []
    run.net.mixer.register_forward_hook(lambda *_: in_bfloat16.append(torch.is_autocast_enabled("cpu")))
    train.validate(run)
    train.sft_step(run, run.net, drawn_in(run, 0))
    assert in_bfloat16 == [True, True]  # the network proper
    with torch.autocast("cpu", torch.bfloat16):
        generate.write_adapters(run.net, ["a text that is not cached"], run.base)
    assert seen and not any(seen)


def test_neftune_noise_has_the_published_size():
    """In units of the embeddings: those of Gemma are multiplied by the square root of its width."""
    for make, size in ((LlamaConfig, 1.0), (GemmaConfig, 32**0.5)):
        base, seen = tiny_llama(make, vocab_size=50, hidden_size=32), []
        base.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        ids = torch.randint(1, 50, (2, 25))
        examples = [(row[:5], row[5:]) for row in ids.tolist()]
        model.answer_logits(base, examples)
        model.answer_logits(base, examples, 5.0)
        noise = (seen[1] - seen[0]).abs().max() / size
        assert 0.98 * 5 / (25 * 32) ** 0.5 < noise <= 1.01 * 5 / (25 * 32) ** 0.5
