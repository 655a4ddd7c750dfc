"""Text encoders of the hub: their networks, how long a text they read, how they pool it."""

import sys

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
)

from support.files import UserError, read_object
from support.hub import fetch, from_pretrained, load_weights


class TransformerEncoder:
    """A text encoder of the hub, pooled as its own 1_Pooling/config.json says: mean, CLS or last token."""

    def __init__(self, name: str, device="cpu"):
        self.tokenizer = from_pretrained(AutoTokenizer, name, flag="--encoder")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.model = load_text_model(name).to(device).requires_grad_(False).eval()
        self.max_length = min(8192, longest_text(self.model))  # tokens
        pooling = fetch(name, flag="--encoder") / "1_Pooling" / "config.json"
        self.pooling = read_object(pooling) if pooling.exists() else {}
        self.has_cut = False

    def __call__(self, texts: list[str]) -> Tensor:
        out = []
        for i in range(0, len(texts), 64):
            batch = self.tokenize(texts[i : i + 64]).to(self.model.device)
            h = self.model(**batch).last_hidden_state.float()  # [n, T, E]
            mask = batch["attention_mask"]  # [n, T]
            if self.pooling.get("pooling_mode_cls_token"):
                h = h[:, 0]
            elif self.pooling.get("pooling_mode_lasttoken"):
                h = h[torch.arange(len(h)), mask.sum(1) - 1]
            else:
                h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out.append(F.normalize(h, dim=-1))  # [n, E]
        return torch.cat(out)

    def tokenize(self, texts: list[str]):
        """Token ids and mask [n, T]. Says once if a text is longer than the network can read."""
        settings = dict(padding=True, padding_side="right", truncation=True, max_length=self.max_length)
        batch = self.tokenizer(texts, return_tensors="pt", **settings)
        if batch["input_ids"].shape[1] == self.max_length and not self.has_cut:
            self.has_cut = True
            message = f"note: the text encoder reads {self.max_length} tokens of a description, not more:"
            print(message, max(texts, key=len)[:60], "...", file=sys.stderr)
        return batch


def load_text_model(name: str) -> nn.Module:
    """The network of a text encoder in float32; that of gte-*-v1.5 without the code of its repository."""
    settings = {"flag": "--encoder", "dtype": torch.float32}
    fields = read_object(fetch(name, flag="--encoder") / "config.json")
    if fields.get("model_type") == "new":
        if not hasattr(transformers, "GteModel"):
            raise UserError(f"{name} needs transformers 5.18 or newer")
        return load_weights(transformers.GteModel, name, config=gte_config(fields), **settings)
    config = from_pretrained(AutoConfig, name, flag="--encoder")
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:  # of T5 only its encoder
        return load_weights(AutoModelForTextEncoding, name, **settings)
    return load_weights(AutoModel, name, **settings)


def text_width(name: str) -> int:
    """The width of a text encoder's output, from its config."""
    fields = read_object(fetch(name, flag="--encoder") / "config.json")
    if "hidden_size" in fields:  # also of gte-*-v1.5, whose type AutoConfig does not know
        return fields["hidden_size"]
    return from_pretrained(AutoConfig, name, flag="--encoder").hidden_size


def longest_text(text_model: nn.Module) -> int:
    """How many tokens a text encoder has positions for."""
    n_positions = getattr(text_model.config, "max_position_embeddings", 0)
    if n_positions <= 0:  # no limit: T5, XLNet
        return 8192
    table = getattr(getattr(text_model, "embeddings", None), "position_embeddings", None)
    unused = getattr(table, "padding_idx", None)  # RoBERTa-style models start positions at padding_idx + 1
    return n_positions if unused is None else n_positions - unused - 1


def gte_config(config: dict):
    """The config of gte-*-v1.5 for transformers' implementation of it."""
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if config.get("rope_scaling"):  # NTK scaling by k: theta * k, and all frequencies by k^(-2 / head size)
        k = config["rope_scaling"]["factor"]
        head_size = config["hidden_size"] // config["num_attention_heads"]
        rope = {"rope_type": "linear", "factor": k ** (2 / head_size), "rope_theta": config["rope_theta"] * k}
    replaced = ("auto_map", "rope_scaling", "rope_theta", "model_type")
    kept = {key: value for key, value in config.items() if key not in replaced}
    return transformers.GteConfig(**kept, rope_parameters=rope)
