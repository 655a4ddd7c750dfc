"""AdamW, with learning rates and weight decay by parameter."""

import torch
from torch import nn

NO_DECAY = ("scaler", "bias", "latents", "queries", "b1", "b2")


def make_optimizer(net: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW. Some parameters have a learning rate of their own (`net.lr_factors`).

    Scales, biases, norms and latents have no weight decay.
    """
    groups = {}  # {(factor on lr, weight decay): parameters}; a fused kernel takes a whole group at once
    for name, p in net.named_parameters():
        lr_factor = net.lr_factors.get(name.split(".")[0], 1.0)
        decays = p.dim() > 1 and not any(word in name for word in NO_DECAY)
        weight_decay = args.weight_decay if decays else 0.0
        groups.setdefault((lr_factor, weight_decay), []).append(p)
    settings = []
    for (lr_factor, weight_decay), parameters in groups.items():
        settings.append({"params": parameters, "lr_factor": lr_factor, "weight_decay": weight_decay})
    return torch.optim.AdamW(settings, lr=args.lr, betas=(0.9, 0.999), fused=True)
