"""The map of what was learned."""

import pytest
import torch

import hypernet
from extras import map as mapping
from tests.helpers import SCALING, TINY, close, command


@torch.no_grad()
def test_the_changes_are_those_of_the_weights(monkeypatch):
    x = torch.randn(50, 6) * torch.tensor([9.0, 0.1, 5.0, 0.1, 0.1, 0.1]) + 3
    widest = torch.linalg.svdvals(x - x.mean(0))[:2]
    close(mapping.projection(x).square().sum(0), widest.square(), 1e-3)
    monkeypatch.setattr(mapping, "ENTRIES", 10**9)  # all of them
    net, texts = hypernet.load_hypernet(TINY / "sft_small"), ["Keep the fruits.", "Reverse the list."]
    net.connect(None, None)
    embeddings, changes = mapping.vectors_of(net, texts)
    A, B = net(texts)["q_proj"]
    close(changes[:, : 4 * 128 * 128], SCALING * (B @ A).flatten(1), 1e-4, 1e-4)
    close(embeddings, net.embed_task(net.encode(texts)))


def test_the_map_of_the_tiny_world(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "map.png"
    assert command(mapping, "--n_tasks", "40", "--out", out) == 0
    assert out.stat().st_size > 5000 and "40 tasks" in capsys.readouterr().out
    assert command(mapping, "--hypernet", TINY / "d2l", "--out", out) == 2
    assert "reads documents, not descriptions" in capsys.readouterr().err
