"""The base model itself as text encoder."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
from encoders import one_by_one


def width(name: str, base) -> int:
    return base.config.get_text_config().hidden_size


def load(name: str, device, base, tokenizer, full_stop: bool):
    return one_by_one(partial(last_states, base, tokenizer), device, full_stop)


def last_states(base: nn.Module, tokenizer, texts: list[str]) -> Tensor:
    """The base model as text encoder: its last state at the last token (paper, section 3). [n, E]"""
    model.check_known(tokenizer, texts)
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    ids = model.pad(sequences, 0).to(base.device)  # [n, T]
    h = base.base_model(input_ids=ids).last_hidden_state.float()  # [n, T, E]
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    return F.normalize(h[torch.arange(len(texts)), last], dim=-1)
