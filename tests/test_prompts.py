"""Chat templates, and what stands in prompts."""

from transformers import PreTrainedTokenizerFast

import data
import eval as evaluation
import generate
import model
import train
from support.files import read_file, write_file
from tests.helpers import SHORT, command, refused, tiny_llama

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
