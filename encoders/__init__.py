"""Text encoders: functions of n descriptions -> [n, E], frozen, in float32.

`--encoder` is one of NAMES, each a file here, or an id on the Hugging Face hub, or a folder (hub.py). A file
has two functions:

    width(name, base)                                       E, without loading weights
    load(name, device, base, tokenizer, full_stop)          the encoder

`base` and `tokenizer` are those of the base model. With `full_stop`, descriptions that end in a letter get a
full stop, as published.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Encoder = Callable[[list[str]], Tensor]
NAMES = ("hash", "base")


def find(name: str):
    """The file of an encoder."""
    return importlib.import_module(f"encoders.{name if name in NAMES else 'hub'}")


def width(name: str, base) -> int:
    """E of the text encoder of this name."""
    return find(name).width(name, base)


def load(name: str, device="cpu", base=None, tokenizer=None, full_stop: bool = False) -> Encoder:
    """The text encoder of this name."""
    return find(name).load(name, device, base, tokenizer, full_stop)


def one_by_one(encode: Encoder, device, full_stop: bool) -> Encoder:
    """An encoder that reads texts one by one, so that results do not depend on the batch, and caches them."""

    @lru_cache(2**13)
    @torch.no_grad()
    def encode_one(text: str) -> Tensor:
        with torch.autocast(torch.device(device).type, enabled=False):
            return encode([end_sentence(text, full_stop)])[0]

    return lambda texts: torch.stack([encode_one(text.strip()) for text in texts])


def end_sentence(text: str, full_stop: bool) -> str:
    """With `full_stop`, a text that ends in a letter gets one."""
    return f"{text}." if full_stop and text[-1:].isalpha() else text
