"""The script that trained the tiny base model."""

import random

import torch

import model
from extras import pretrain
from tests.helpers import command


def test_the_base_model_learns_to_go_on(tmp_path, monkeypatch):
    """Its loss is that of transformers, and falls."""
    monkeypatch.setattr(pretrain, "TEXTS", 4)
    losses = []
    for steps in (1, 40):
        assert command(pretrain, tmp_path / str(steps), "--steps", steps, "--device", "cpu") == 0
        base, _ = model.load_base(str(tmp_path / str(steps)))
        text = [pretrain.tiny.example(pretrain.TASKS[0], random.Random(0), 2) for _ in range(8)]
        ids, labels = pretrain.tokenize(text)
        losses.append(base(torch.tensor([ids]), labels=torch.tensor([labels])).loss)
    assert losses[1] < 0.9 * losses[0]
