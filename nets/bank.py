"""Ordinary LoRAs as a network: what train.py --mode lora trains, and the LoRA on a text encoder."""

import torch
from torch import nn

from lora import Adapter, LoRAConfig, init_A_, no_dots


class LoRABank(nn.Module):
    """Ordinary LoRAs, all from the same random A; one optimizer trains them as a batch.

    bank([3, 5]) is a batch of LoRAs 3 and 5. A bank with a single LoRA returns it for every number. The
    gradients of all LoRAs are clipped together.
    """

    reads = "numbers"

    def __init__(self, config: LoRAConfig, n: int):
        super().__init__()
        self.config = config
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, target in config.targets.items():
            L = len(target.layers)
            A = init_A_(torch.empty(L, config.r, target.n_in))
            self.A[no_dots(name)] = nn.Parameter(A.repeat(n, 1, 1, 1))  # [n, L, r, in]
            self.B[no_dots(name)] = nn.Parameter(torch.zeros(n, L, target.n_out, config.r))

    def forward(self, indices: list[int]) -> Adapter:
        n, adapter = len(next(iter(self.A.values()))), {}
        indices = [0] * len(indices) if n == 1 else indices
        for name in self.config.targets:
            adapter[name] = (self.A[no_dots(name)][indices], self.B[no_dots(name)][indices])
        return adapter
