"""The method on one page is that of the scripts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import hypernet
import train
from extras import one_page
from support.files import read_file
from tests.helpers import HERE, TINY, close, run_of


def test_shipped_weights_load_and_write_the_same_adapters():
    net, ours = one_page.TextToLoRA().eval(), hypernet.load_hypernet(TINY / "sft_large")
    ours.connect(None, None)
    weights = read_file(TINY / "sft_large" / "hypernet.safetensors")
    weights = {key: tensor.float() for key, tensor in weights.items()}
    missing, others = net.load_state_dict(weights, strict=False)
    constants = [key for key in others if key.startswith("deviation.") or key.endswith("_B")]
    assert not missing and others == constants
    texts = ["Keep only the animals, in French.", "The fruits; last first!"]
    for name, pair in net(texts).items():
        close(pair, ours(texts)[name], 1e-6, 1e-6)


def test_its_first_losses_are_those_of_train(monkeypatch):
    """On the examples that it draws, without dropout."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    monkeypatch.setattr(F, "dropout", lambda x, *_, **__: x)
    run = run_of("--lr", str(one_page.LR), "--max_steps", str(one_page.STEPS), "--l2", "0")
    run.args.tasks_per_batch = one_page.BATCH
    seen, texts, real, real_forward = [], [], one_page.task_loss, one_page.TextToLoRA.forward

    def forward(self, descriptions):
        if not texts:  # the same start
            run.net.load_state_dict(run.net.state_dict() | self.state_dict())
        texts.append(descriptions)
        return real_forward(self, descriptions)

    def task_loss(base, tokenizer, examples):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append((examples, real(base, tokenizer, examples)))
        return seen[-1][1]

    monkeypatch.setattr(one_page.TextToLoRA, "forward", forward)
    monkeypatch.setattr(one_page, "task_loss", task_loss)
    with pytest.raises(KeyboardInterrupt):
        one_page.main()
    optimizer = train.make_optimizer(run.net, run.args)
    for step, (examples, loss) in enumerate(seen):
        drawn = [data.DrawnTask(0, text, [example]) for text, example in zip(texts[step], examples)]
        monkeypatch.setattr(data, "draw", lambda *_: drawn)
        close(torch.tensor(train.update(run, run.net, optimizer, step)["loss"]), loss.detach(), 1e-4)
