"""Text encoders."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5EncoderModel

import data
import hypernet
import model
import train
from support import text_models
from support.files import write_file
from tests.helpers import SHORT, close, fit, run_of


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
    close(encode(texts), alone, 1e-5, 1e-6)
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

    def published(ids: list[int]) -> torch.Tensor:
        """The state at [CLS]; the published code turns by these angles per position."""
        inverse = 1 / (160000 * 2.0) ** (torch.arange(0, 16, 2) / 16) / 2.0 ** (2 / 16)
        angle = (torch.arange(len(ids))[:, None] * inverse).repeat(1, 2)[None]
        network.rotary_emb.forward = lambda *_, **__: (angle.cos(), angle.sin())
        return F.normalize(network(torch.tensor([ids])).last_hidden_state[0, 0], dim=0)

    encode = model.load_encoder(str(tmp_path), full_stop=True)
    close(encode(["one two"])[0], published([2, 5, 6, 9, 3]), 1e-4)  # with the full stop
    close(encode(["three four one ."])[0], published([2, 7, 8, 5, 9, 3]), 1e-4)


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
    RobertaModel(config).save_pretrained(tmp_path)
    longest = model.load_encoder(str(tmp_path))(["one two three four " * 9])
    assert longest.shape == (1, 16) and longest.isfinite().all()
    config = T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    network = T5EncoderModel(config).eval()
    network.save_pretrained(tmp_path)
    hidden = network(torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    close(model.load_encoder(str(tmp_path))(["one"])[0], F.normalize(hidden.mean(0), dim=0), 1e-5, 1e-6)


def test_a_frozen_encoder_reads_each_text_once_and_alone(tmp_path):
    bert_folder(tmp_path)
    encode, read = model.load_encoder(str(tmp_path)), []
    encode.embed.model.register_forward_hook(lambda *_: read.append(1))
    assert encode.embed_once.cache_info().maxsize * 16 == model.CACHED_NUMBERS  # bounded by memory
    first = encode(["one", "two three", "one"])
    assert torch.equal(first[0], first[2]) and len(read) == 2
    assert torch.equal(encode(["two three"])[0], first[1]) and len(read) == 2


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
