"""Text encoders of the Hugging Face hub, or in folders: gte, sentence-transformers, decoders, T5, ..."""

import sys

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import cached_file

import model
from encoders import one_by_one
from support import UserError, read_json


def width(name: str, base) -> int:
    """Only the config is read."""
    model.check_reachable(name)
    fields, _ = PretrainedConfig.get_config_dict(name)
    if "hidden_size" in fields:  # also of gte-*-v1.5, whose type AutoConfig does not know
        return fields["hidden_size"]
    return transformers.AutoConfig.from_pretrained(name).hidden_size


def load(name: str, device, base, tokenizer, full_stop: bool):
    return one_by_one(TransformerEncoder(name, device), device, full_stop)


class TransformerEncoder:
    """A text encoder of the hub, pooled as its own 1_Pooling/config.json says: mean, CLS or last token."""

    def __init__(self, name: str, device="cpu"):
        model.check_reachable(name)
        self.tokenizer, self.pooling = AutoTokenizer.from_pretrained(name), read_pooling(name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.model = load_text_model(name).to(device).requires_grad_(False).eval()
        positions = getattr(self.model.config, "max_position_embeddings", 0)  # T5 and XLNet have no limit
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        unused = getattr(table, "padding_idx", None)  # RoBERTa-style models start at padding_idx + 1
        positions -= 0 if unused is None else unused + 1
        self.max_length = min(8192, positions) if positions > 0 else 8192  # tokens

    def __call__(self, texts: list[str]) -> Tensor:
        settings = dict(padding=True, padding_side="right", truncation=True, max_length=self.max_length)
        batch = self.tokenizer(texts, return_tensors="pt", **settings).to(self.model.device)
        if batch["input_ids"].shape[1] == self.max_length:
            print(f"note: the text encoder reads {self.max_length} tokens of a description", file=sys.stderr)
        h = self.model(**batch).last_hidden_state.float()  # [n, T, E]
        mask = batch["attention_mask"]  # [n, T]
        if self.pooling == "cls":
            h = h[:, 0]
        elif self.pooling == "lasttoken":
            h = h[torch.arange(len(h)), mask.sum(1) - 1]
        else:
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(h, dim=-1)  # [n, E]


def read_pooling(name: str) -> str:
    """cls, lasttoken or mean, in the old or the new format of sentence-transformers; mean without a file."""
    file = cached_file(name, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    fields = read_json(file) if file else {}
    modes = [fields["pooling_mode"]] if "pooling_mode" in fields else []  # "cls"
    for key, active in fields.items():
        if key.startswith("pooling_mode_") and active:  # "pooling_mode_cls_token": true
            modes.append(key.removeprefix("pooling_mode_").removesuffix("s").removesuffix("_token"))
    mode, *others = modes or ["mean"]
    if others or mode not in ("mean", "cls", "lasttoken"):
        raise UserError(f"--encoder {name}: pooling by {', '.join(map(str, modes))} is not implemented")
    return mode


def load_text_model(name: str) -> nn.Module:
    """The network of a text encoder in float32; that of gte-*-v1.5 without the code of its repository."""
    fields, _ = PretrainedConfig.get_config_dict(name)
    if fields.get("model_type") == "new":
        if not hasattr(transformers, "GteModel"):
            raise UserError(f"{name} needs transformers 5.18 or newer")
        config = gte_config(fields)
        return model.load_weights(transformers.GteModel, name, config=config, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(name)
    of_encoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # of T5 only its encoder
    loader = transformers.AutoModelForTextEncoding if of_encoder else transformers.AutoModel
    return model.load_weights(loader, name, dtype=torch.float32)


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
