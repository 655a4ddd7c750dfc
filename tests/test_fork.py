"""What the end of hypernet.py lists is all that a new network needs."""

from dataclasses import dataclass

import torch
from torch import nn

import generate
import hypernet
import lora
import model
from support.flags import setting
from tests.helpers import LORA, close, command, fit


@dataclass
class ScaledConfig(hypernet.HypernetConfig):
    width: int = setting(16, "numbers per description", least=1)
    dropout: float = 0.0  # has the name of a flag


class Scaled(nn.Module):
    """One LoRA for all tasks, times a number that depends on the description."""

    reads, modes, config_class = "descriptions", ("sft", "recon"), ScaledConfig

    def __init__(self, config):
        super().__init__()
        self.config, self.ranks, self.lr_factors = config, config.r, {"scale": 2.0}
        self.bank = lora.LoRABank(config, 1)
        self.scale = nn.Sequential(nn.Linear(model.HASH_WIDTH, config.width), nn.Linear(config.width, 1))

    def connect(self, base, tokenizer):
        self.encoder = model.load_encoder("hash")

    def forward(self, texts):
        scale = self.scale(self.encoder(texts))[..., None, None]  # [n, 1, 1, 1]
        return {name: (A * (1 + scale), B * (1 + scale)) for name, (A, B) in self.bank([0]).items()}

    def start_as_lora(self):
        pass

    def start_at(self, mean, std):
        for name in self.config.targets:
            self.bank.A[name].data[0], self.bank.B[name].data[0] = mean[name]


def test_a_new_network_is_trained_both_ways_and_used(tmp_path, monkeypatch):
    monkeypatch.setitem(hypernet.ARCHS, "scaled", Scaled)
    words = ["--arch", "scaled", "--n_tasks", "4", "--tasks_per_batch", "4", "--width", "8"]
    fit(tmp_path / "sft", *words, "--max_steps", "8", "--dropout", "0.25")
    fit(tmp_path / "oracles", *LORA, "--n_tasks", "4", "--tasks_per_batch", "4", "--max_steps", "4")
    recon = ["--mode", "recon", "--oracles", tmp_path / "oracles", "--max_steps", "8"]
    losses = fit(tmp_path / "recon", *words, *recon)
    assert losses[-1] < losses[0]
    for name in ("sft", "recon"):
        net = hypernet.load_hypernet(tmp_path / name)
        assert net.config.width == 8
        net.connect(None, None)
        with torch.no_grad():
            (first, _), (again, _) = net(["Swap them."])["q_proj"], net(["Swap them."])["q_proj"]
        close(first, again, 0, 0)
    assert hypernet.load_hypernet(tmp_path / "sft").config.dropout == 0.25
    out = ["--hypernet", tmp_path / "sft", "--desc", "Swap them.", "--out", tmp_path / "adapter"]
    assert command(generate, *out) == 0 and lora.load_adapter(tmp_path / "adapter")[1].r == 8
