"""Adapters for llama.cpp (needs gguf).

T2L_LLAMA_SERVER names the program llama-server, T2L_GGUF the GGUF file of SmolLM2-135M-Instruct, T2L_BASE and
T2L_ENCODER the folders of both models.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

import generate
import lora
from extras import gguf as converter
from tests.helpers import command, config_for, random_adapter


@pytest.fixture
def base(tmp_path):
    """Makes a folder with a config, and returns (folder, LoRAConfig of a random adapter)."""
    pytest.importorskip("gguf", reason="gguf is not installed")

    def make(config_class, names):
        sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=50)
        sizes |= dict(num_hidden_layers=2, num_key_value_heads=2, head_dim=8)
        config = config_class(**sizes)
        config.save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_config(config)
        return config_for(model, names, str(tmp_path / "base"), r=4)

    return make


@pytest.mark.parametrize("make, permuted", [(LlamaConfig, True), (Gemma2Config, False), (Qwen3Config, False)])
def test_the_file_holds_the_adapter(base, tmp_path, make, permuted):
    import gguf

    config = base(make, ["q_proj", "k_proj", "o_proj", "down_proj"])
    adapter = random_adapter(config, r=4)
    lora.save_adapter(tmp_path / "adapter", adapter, config)
    assert command(converter, tmp_path / "adapter", tmp_path / "new" / "a.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "new" / "a.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    assert len(tensors) == 2 * 2 * 4 and reader.fields["general.type"].contents() == "adapter"
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output", "down_proj": "ffn_down"}
    for name, (A, B) in adapter.items():
        for layer in range(2):
            key = f"blk.{layer}.{names[name]}.weight.lora"
            ours, rank = B[layer], A.shape[-2]
            if permuted and name in ("q_proj", "k_proj"):  # llama.cpp rotates neighbours, transformers halves
                rows = [
                    8 * head + half * 4 + i
                    for head in range(len(ours) // 8)
                    for i in range(4)
                    for half in (0, 1)
                ]
                ours = ours[rows]
            theirs = alpha / rank * tensors[f"{key}_b"] @ tensors[f"{key}_a"]
            torch.testing.assert_close(theirs, config.scaling * ours @ A[layer], rtol=1e-4, atol=1e-5)


def test_other_architectures_are_refused_in_words(base, tmp_path, capsys):
    config = base(LlamaConfig, ["q_proj"])
    lora.save_adapter(tmp_path / "adapter", random_adapter(config, r=4), config)
    GPTNeoXConfig(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    assert command(converter, tmp_path / "adapter", tmp_path / "a.gguf") == 2
    error = capsys.readouterr().err
    assert "no GGUF adapters for gpt_neox, but for llama" in error and not (tmp_path / "a.gguf").exists()


def test_llama_server_answers_as_generate_does(tmp_path):
    """Two adapters in one server, chosen by each request; without them the answers are others."""
    needed = ["T2L_LLAMA_SERVER", "T2L_GGUF", "T2L_BASE", "T2L_ENCODER"]
    if not set(needed) <= set(os.environ):
        pytest.skip(f"{', '.join(needed)} name no files")
    words = ["--base_model", os.environ["T2L_BASE"], "--encoder", os.environ["T2L_ENCODER"]]
    for i, text in enumerate(("Turn this record into JSON, please.", "just the family name please")):
        assert command(generate, *words, "--desc", text, "--out", tmp_path / "adapter") == 0
        assert command(converter, tmp_path / "adapter", tmp_path / f"{i}.gguf", *words[:2]) == 0
    adapters = f"{tmp_path / '0.gguf'},{tmp_path / '1.gguf'}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = [os.environ["T2L_LLAMA_SERVER"], "-m", os.environ["T2L_GGUF"], "--port", url.split(":")[-1]]
    start += ["--lora", adapters, "--lora-init-without-apply", "-c", "512"]
    server = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(text: str, *scales: float) -> str:
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": text}]
        chosen = [{"id": i, "scale": scale} for i, scale in enumerate(scales)]
        content = json.dumps(dict(messages=messages, lora=chosen, temperature=0, max_tokens=48)).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", content)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["choices"][0]["message"]["content"].strip()

    record = "name: Ada Lovelace; city: London; age: 36; job: writer"
    try:
        for _ in range(60):
            with contextlib.suppress(OSError):
                plain = ask(record, 0.0, 0.0)
                break
            time.sleep(1)
        as_json = '{"name": "Ada Lovelace", "city": "London", "age": "36", "job": "writer"}'
        assert ask(record, 1.0, 0.0) == as_json != plain
        assert ask("Ada Lovelace", 0.0, 1.0) == "Lovelace" != ask("Ada Lovelace", 0.0, 0.0)
    finally:
        server.kill()
