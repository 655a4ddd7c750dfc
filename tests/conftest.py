"""Fixtures of the tests."""

import io
import json
import types
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn

import hypernet
import lora
import model
from nets import d2l
from tasks import download, load_tasks, tiny
from tests.helpers import TINY, config_for, needs_gpu, random_adapter, small_config, tiny_llama


@pytest.fixture(autouse=True)
def seed(request, monkeypatch):
    """The same random numbers, and no GPU for a test that does not need one."""
    torch.manual_seed(0)
    if needs_gpu.mark not in request.node.iter_markers():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def one_thread():
    """One thread, as in the shipped runs: with several, sums are added up in another order each time."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> Path:
    """A random Doc-to-LoRA hypernetwork for the tiny base, in its folder."""
    torch.manual_seed(0)
    base, _ = model.load_base(model.TINY)
    config = config_for(base, ["down_proj"], model.TINY, alpha=2 * 8**2)
    sizes = dict(input_size=128, latent_size=32, n_blocks=1, n_heads=4, chunk_len=6)
    net = d2l.DocToLoRA(d2l.DocConfig(**vars(config) | sizes))
    for p in [*net.scaler.values(), *net.bias.values()]:
        nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("reader")
    hypernet.save_hypernet(net, folder)
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Sends server.replies [(content, status)] one after another; notes addresses and waits in server."""
    server = types.SimpleNamespace(replies=[], asked=[], waits=[])

    def urlopen(url: str, timeout: int):
        """The next reply, in place of that of urllib."""
        server.asked.append(url)
        content, status = server.replies.pop(0)
        if status != 200:
            raise urllib.error.HTTPError(url, status, "no", {"Retry-After": "7"}, None)
        return io.BytesIO(content)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(download, "urlopen", urlopen)
    monkeypatch.setattr(download.time, "sleep", server.waits.append)
    return server


@pytest.fixture(scope="session")
def places(tmp_path_factory, reader) -> dict[str, Path]:
    """Folders and files with which commands go wrong."""
    tmp = tmp_path_factory.mktemp("mistakes")
    tiny_llama(vocab_size=len(tiny.VOCABULARY)).save_pretrained(tmp / "base")
    model.load_base(model.TINY)[1].save_pretrained(tmp / "base")
    net = hypernet.TextToLoRA(small_config("small", base_model=str(tmp / "base"), input_size=8192))
    hypernet.save_hypernet(net, tmp / "other")
    task = {"Definition": ["Swap."], "Instances": [{"input": "Paris Rome", "output": ["Rome Paris"]}]}
    texts = {
        "note.txt": "cat -> red",
        "foreign/precious.txt": "mine",
        "tasks/swap.json": json.dumps(task),
        "mine.json": '{"a": ["do it"]}',
    }
    for file, text in texts.items():
        (tmp / file).parent.mkdir(exist_ok=True)
        (tmp / file).write_text(text)
    config = config_for(tiny_llama(), base_model="base")
    name = load_tasks("tiny")["train"][0].name
    lora.save_adapter(tmp / "oracles" / name, random_adapter(config), config)
    own = dict(base=tmp / "base", other=tmp / "other", foreign=tmp / "foreign", reader=reader)
    own["adapter"] = tmp / "oracles" / name
    own |= dict(note=tmp / "note.txt", mine=tmp / "mine.json")
    return own | dict(tmp=tmp, net=TINY / "sft_large", tiny=TINY)
