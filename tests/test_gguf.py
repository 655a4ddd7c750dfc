"""Adapters for llama.cpp (needs gguf)."""


import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

import lora
from extras import gguf as converter
from tests.helpers import command, config_for, random_adapter


@pytest.mark.parametrize("make, permuted", [(LlamaConfig, True), (Gemma2Config, False), (Qwen3Config, False)])
def test_the_file_holds_the_adapter(tmp_path, capsys, make, permuted):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=50)
    config = make(**sizes, num_hidden_layers=2, num_key_value_heads=2, head_dim=8)
    config.save_pretrained(tmp_path / "base")
    base, names = AutoModelForCausalLM.from_config(config), ["q_proj", "k_proj", "o_proj", "down_proj"]
    config = config_for(base, names, str(tmp_path / "base"), r=4)
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
                heads = ours.view(-1, 2, 4, rank)  # [heads, half, place in it, r]
                ours = torch.stack([heads[:, 0], heads[:, 1]], 2).reshape(-1, rank)
            theirs = alpha / rank * tensors[f"{key}_b"] @ tensors[f"{key}_a"]
            torch.testing.assert_close(theirs, config.scaling * ours @ A[layer], rtol=1e-4, atol=1e-5)
    GPTNeoXConfig(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    assert command(converter, tmp_path / "adapter", tmp_path / "b.gguf") == 2
    assert "no GGUF adapters for gpt_neox, but for llama" in capsys.readouterr().err
    assert not (tmp_path / "b.gguf").exists()
