"""New words by self-reconstruction."""

import random

import pytest
import torch

import hypernet
import model
from extras import reword
from support.files import read_file
from tasks import chores
from tests.helpers import command, small_config

CHAINS = [("name", "name-surname"), ("name", "any-bold"), ("name", "name-initials"), ("name", "any-quotes")]
CHAINS += [("name", "name-surname", "any-bold"), ("name", "name-initials", "any-quotes")]


@pytest.mark.parametrize("slots", ["1", "2"])
def test_a_copy_learns_words_for_what_the_network_writes(tmp_path, monkeypatch, capsys, slots):
    """From written descriptions it writes what the network writes from templates, slot by slot."""
    monkeypatch.setattr(chores, "load", chores.load.__wrapped__)  # not from the cache of the tests
    monkeypatch.setattr(chores, "all_chains", lambda: CHAINS)
    monkeypatch.setattr(chores, "N_VAL", 0)
    monkeypatch.setattr(chores, "N_TEST", 0)
    monkeypatch.setattr(reword, "TEMPLATES", 1)
    net = hypernet.TextToLoRA(small_config("large", input_size=8192, input_dropout=0, trunk_dropout=0))
    hypernet.save_hypernet(net, tmp_path / "start")
    words = [tmp_path / "start", tmp_path / "new", "--slots", slots, "--steps", "150"]
    assert command(reword, *words) == 0
    start, new = hypernet.load_hypernet(tmp_path / "start"), hypernet.load_hypernet(tmp_path / "new")
    config = read_file(tmp_path / "new" / "config.json")
    assert new.config.slots == config["slots"] == int(slots)
    assert command(reword, *words) == 2 and "is in use" in capsys.readouterr().err
    for name, head in new.heads.items():
        assert torch.equal(head.weight, start.heads[name].weight)

    encode = model.load_encoder("hash")

    def change(net, text: str) -> torch.Tensor:
        """What an adapter adds to the weights of q_proj."""
        A, B = net(encode([text]))["q_proj"]
        return (B @ A)[0]

    before, after = 0.0, 0.0  # distances from what is to be written
    for chain in CHAINS:

        def template(part):
            return chores.from_template(part, random.Random(f"{part} 0"))

        target = change(start, template(chain))
        if slots == "2" and len(chain) == 3:  # the sum of what is written for both chores
            parts = [change(start, template(part)) for part in (chain[:2], (chain[0], chain[2]))]
            target = reword.GATE * (parts[0] + parts[1])
        text = chores.description(chain, 3)
        before += (change(start, text) - target).norm()
        after += (change(new, text) - target).norm()
    assert after < 0.5 * before
