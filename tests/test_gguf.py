"""Adapters for llama.cpp (needs gguf; one test llama-cpp-python and T2L_GGUF)

T2L_GGUF names the GGUF file of SmolLM2-135M-Instruct, T2L_BASE and T2L_ENCODER the folders of both models.
"""

import os

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


def test_llama_cpp_answers_as_generate_does(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if not {"T2L_GGUF", "T2L_BASE", "T2L_ENCODER"} <= set(os.environ):
        pytest.skip("T2L_GGUF, T2L_BASE and T2L_ENCODER name no files")
    words = ["--base_model", os.environ["T2L_BASE"], "--encoder", os.environ["T2L_ENCODER"]]
    words += ["--desc", "Turn this record into JSON, please.", "--out", tmp_path / "adapter"]
    assert command(generate, *words) == 0
    options = ["--base_model", os.environ["T2L_BASE"]]
    assert command(converter, tmp_path / "adapter", tmp_path / "a.gguf", *options) == 0
    settings = dict(model_path=os.environ["T2L_GGUF"], n_ctx=256, verbose=False)
    model = llama_cpp.Llama(lora_path=str(tmp_path / "a.gguf"), **settings)
    record = "name: Ada Lovelace; city: London; age: 36; job: writer"
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": record}]
    answer = model.create_chat_completion(messages, temperature=0, max_tokens=64)["choices"][0]["message"]
    expected = '{"name": "Ada Lovelace", "city": "London", "age": "36", "job": "writer"}'
    assert answer["content"].strip() == expected
