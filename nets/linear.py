"""The first question that comes to mind: why not a linear map from the text encoder's output to all A and B?

    python train.py --arch linear --out_dir out/low                                # low-rank: 1.5M parameters
    python train.py --arch linear --latent_size 0 --lr 5e-4 --out_dir out/linear   # one map: 117M parameters

The card of the tiny world compares them with Text-to-LoRA. This file is also the example of a new network;
the end of hypernet.py says what else one may have.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import encoders
import lora
from hypernet import HypernetConfig, setting
from lora import Adapter


@dataclass
class LinearConfig(HypernetConfig):
    """Settings of the linear map."""

    encoder: str = "hash"  # that of train.py's --encoder
    input_size: int = 1024  # E, the width of the text encoder's output
    latent_size: int = setting(64, "width between two linear maps; 0: a single map")
    input_dropout: float = setting(0.1, "dropout of the text encoder's output")

    def fit_to(self, base: nn.Module) -> None:
        self.input_size = encoders.width(self.encoder, base)


class Net(nn.Module):
    """A and B of all layers and modules are a linear function of the text encoder's output."""

    arch, reads, modes, config_class = "linear", "descriptions", ("sft", "recon"), LinearConfig

    def __init__(self, config: LinearConfig):
        super().__init__()
        self.config, self.sizes = config, {}
        for name, target in config.targets.items():
            L = len(target.layers)
            self.sizes[name] = [(L, config.r, target.n_in), (L, target.n_out, config.r)]  # of A and B
        n_numbers = sum(torch.Size(shape).numel() for pair in self.sizes.values() for shape in pair)
        width = config.latent_size or config.input_size
        self.first = nn.Linear(config.input_size, width) if config.latent_size else nn.Identity()
        self.map = nn.Linear(width, n_numbers)

    def connect(self, base, tokenizer) -> None:
        self.encoder = encoders.load(self.config.encoder, self.map.weight.device, base, tokenizer)

    def forward(self, texts: list[str]) -> Adapter:
        """n descriptions -> A [n, L, r, in], B [n, L, out, r]."""
        text_emb = F.normalize(self.encoder(texts), dim=-1)  # [n, E], of length 1
        numbers = self.map(self.first(F.dropout(text_emb, self.config.input_dropout, self.training)))
        return self.split(numbers)

    def split(self, numbers: Tensor) -> Adapter:
        """All numbers of n adapters, side by side [n, ...] -> the adapters."""
        adapter = {}
        for name, shapes in self.sizes.items():
            pair = []
            for shape in shapes:
                n = torch.Size(shape).numel()
                pair.append(numbers[:, :n].unflatten(1, shape))
                numbers = numbers[:, n:]
            adapter[name] = tuple(pair)
        return adapter

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """The bias is LoRA's initialisation, with B = 0."""
        self.map.weight.zero_()
        self.map.bias.zero_()
        for A, _ in self.split(self.map.bias[None]).values():
            lora.init_A_(A)

    @torch.no_grad()
    def start_at(self, mean: Adapter, std: Adapter) -> None:
        """The bias is the mean of the oracles."""
        self.map.weight.zero_()
        for name, pair in self.split(self.map.bias[None]).items():
            for part, value in zip(pair, mean[name]):
                part.copy_(value)
