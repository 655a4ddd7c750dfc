"""What trainings share: the state that --resume continues from, Ctrl-C, and bfloat16 where it is fast."""

import signal
from pathlib import Path

import torch
from torch import nn

from support.files import read_file, write_file


def save_state(path: Path, step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write step, weights and moments. Randomness follows from the step, the best loss from metrics.jsonl."""
    tensors = {"step": torch.tensor(step)}
    for name, tensor in net.state_dict().items():
        tensors[f"net {name}"] = tensor
    for name, p in net.named_parameters():
        for key, tensor in optimizer.state.get(p, {}).items():
            tensors[f"{key} {name}"] = tensor
    write_file(path, tensors)


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state into net and optimizer; returns the number of steps done."""
    tensors = read_file(path)
    step = int(tensors["step"])
    net.load_state_dict({name: tensors[f"net {name}"] for name in net.state_dict()})
    for name, p in net.named_parameters():
        if p.requires_grad and step > 0:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[p][key] = tensors[f"{key} {name}"].to(p.device)
    return step


def on_ctrl_c() -> list:
    """Catch Ctrl-C once. Returns a list that it fills, so that the loop can end after a step."""
    interrupts = []

    def note(number, frame) -> None:
        interrupts.append(number)
        signal.signal(number, signal.default_int_handler)  # the second one ends the run at once

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return interrupts


def bfloat16_if_fast(device: torch.device) -> torch.autocast:
    """bfloat16 computation with float32 weights; float32 on CPUs without AVX-512, where it is much faster."""
    is_fast = device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_fast)
