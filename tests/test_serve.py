"""Descriptions as names of models, with a stand-in for vLLM and with vLLM (T2L_VLLM names its python)."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import nn

import generate
import hypernet
import lora
import model
from extras import serve
from support.files import read_file, write_file
from tasks import tiny
from tests.helpers import HERE, TINY, close, command, config_for, needs_models
from tests.test_prompts import CHATML


@pytest.fixture
def stand_in(monkeypatch):
    """What serve.py needs of vLLM. Its main() asks the resolver for each name in `asked`."""
    vllm = types.SimpleNamespace(asked=[], found={}, resolvers={})

    def main() -> None:
        vllm.words = sys.argv
        (resolver,) = vllm.resolvers.values()

        async def ask():
            return await asyncio.gather(*(resolver.resolve_lora("tiny", name) for name in vllm.asked))

        for name, request in zip(vllm.asked, asyncio.run(ask())):
            vllm.found[name] = request and lora.load_adapter(request[2])
        vllm.template = Path(sys.argv[sys.argv.index("--chat-template") + 1]).read_text()
        vllm.folder = Path(request[2])

    registry = types.SimpleNamespace(register_resolver=vllm.resolvers.__setitem__)
    monkeypatch.setattr(serve.runpy, "run_module", lambda *_, **__: main())
    monkeypatch.setattr(serve, "find_spec", lambda _: True)
    modules = {}
    modules["vllm.lora.request"] = dict(LoRARequest=lambda *fields: fields)
    modules["vllm.lora.resolver"] = dict(LoRAResolver=object, LoRAResolverRegistry=registry)
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    return vllm


def test_a_description_is_the_name_of_its_adapter(stand_in, monkeypatch):
    monkeypatch.setattr(serve, "MOST", 3)
    texts = ["Keep the fruits.", "Reverse the animals.", "Shout the colours."]
    names = [f"t2l: {text}" for text in texts]
    stand_in.asked = ["typo", "t2l: ", *names, *names, "t2l: more", "t2l:" + texts[0]]
    assert command(serve, "--port", "8123") == 0
    assert stand_in.words[-2:] == ["--port", "8123"] and "--enable-lora" in stand_in.words
    net = hypernet.load_hypernet(TINY / "sft_large")
    net.connect(None, None)
    for name in ("typo", "t2l: ", "t2l: more"):
        assert stand_in.found[name] is None
    for text in texts:
        adapter, _ = stand_in.found[f"t2l: {text}"]
        close(adapter["q_proj"], lora.select(net([text]), 0)["q_proj"])
    assert not stand_in.folder.exists()  # it went with the server


def test_prompts_are_those_of_training():
    tokenizer = model.load_base("tiny")[1]
    said = "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ m.content }}"
    dated = "{{ strftime_now('%d') }}{{ date_string }}{{ enable_thinking }}" + CHATML
    for template in (tokenizer.chat_template, dated, CHATML.replace("\n{{ m.content }}", "\n" + said)):
        tokenizer.chat_template = template
        asked = [{"role": "user", "content": "cat dog"}]
        settings = dict(add_generation_prompt=True, tokenize=False)
        settings["chat_template"] = serve.served_template(tokenizer)
        ours = model.render(tokenizer, model.chat(tokenizer, "cat dog"))
        assert tokenizer.apply_chat_template(asked, **settings) == ours


def test_a_network_that_needs_the_prompt_is_refused(tmp_path, stand_in, capsys):
    hypernet.save_hypernet(hypernet.load_hypernet(TINY / "sft_small"), tmp_path)
    write_file(tmp_path / "config.json", read_file(tmp_path / "config.json") | {"instruction": True})
    assert command(serve, "--hypernet", tmp_path) == 2
    assert "with the description in the prompt, too" in capsys.readouterr().err


@pytest.mark.skipif("T2L_VLLM" not in os.environ, reason="T2L_VLLM names no python with vllm")
@needs_models
def test_vllm_answers_as_generate_does(tmp_path, capsys):
    """Twenty descriptions, four at a time, with a random network for the real base model."""
    base, _ = model.load_base(os.environ["T2L_BASE"])
    config = config_for(base, base_model=os.environ["T2L_BASE"])
    net = hypernet.TextToLoRA(hypernet.TextConfig(**vars(config), input_size=model.HASH_WIDTH))
    net.start_as_lora()
    for head in net.heads.values():
        nn.init.normal_(head.weight, std=0.05)
    hypernet.save_hypernet(net, tmp_path / "net")
    own = ["--base_model", os.environ["T2L_BASE"], "--hypernet", str(tmp_path / "net"), "--dtype", "float32"]
    text, texts = "What is the capital of France?", [f"{word} it" for word in tiny.VOCABULARY[100:120]]
    words = [word for description in texts for word in ("--desc", description)]
    words += ["--input", text, "--out", tmp_path / "a", "--max_new_tokens", "8"]
    assert command(generate, *own, *words) == 0
    right = re.findall(r"with adapter  (.*)", capsys.readouterr().out)
    start = [os.environ["T2L_VLLM"], "-m", "extras.serve", *own, "--port", "8123", "--api-key", "secret"]
    start += ["--max-model-len", "128", "--enforce-eager", "--max-loras", "4"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(HERE)}
    server = subprocess.Popen(start, cwd=HERE, env=env)

    def ask(name: str, key: str = "secret"):
        """The answer of a model, or the status of an error; waits for the server."""
        messages = [{"role": "user", "content": text}]
        content = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 8}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        url = "http://127.0.0.1:8123/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(content).encode(), headers)
        while server.poll() is None:
            try:
                with urllib.request.urlopen(request) as reply:
                    return json.loads(reply.read())["choices"][0]["message"]["content"].strip()
            except urllib.error.HTTPError as e:
                return e.code
            except OSError:
                time.sleep(1)

    try:
        assert ask("typo") == ask("t2l:") == 404 and ask(f"t2l: {texts[0]}", key="wrong") == 401
        with ThreadPoolExecutor(4) as four:
            said = list(four.map(lambda description: ask(f"t2l: {description}"), texts))
        assert [answer.split("\n")[0] for answer in said] == right and len(set(right)) > 9
    finally:
        server.terminate()
