"""The small Text-to-LoRA of some published checkpoints: a rank is a rotation, not a learned embedding.

`python -m extras.published` writes such networks.
"""

import torch
from torch import Tensor

import hypernet
from support import UserError


def rotate(x: Tensor, positions: int) -> Tensor:
    """A copy of every row per rank, rotated by its position (RoPE, base 10000). [..., d] -> [..., r, d]"""
    half = x.shape[-1] // 2
    frequency = 10000 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(positions, device=x.device)[:, None] * frequency  # [r, d/2]
    x1, x2 = x[..., None, :half], x[..., None, half:]  # [..., 1, d/2]
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], -1)


class Net(hypernet.TextToLoRA):
    """TextToLoRA of size small with mlp2(rotated x) in place of x + mlp2(rank embedding)."""

    arch = "rotary"

    def __init__(self, config: hypernet.TextConfig):
        if config.size != "small":
            raise UserError("--arch rotary is only for --size small")
        super().__init__(config)
        del self.rank_emb

    def add_ranks(self, x: Tensor) -> Tensor:
        return self.mlp2(rotate(x, self.config.r))
