"""The commands in extras, and a network of one's own.

Optional: matplotlib.
"""

import asyncio
from itertools import islice

from transformers import Gemma2Config, GPTNeoXConfig, Qwen3Config

from extras import calibrate, doc_page, one_page, serve, write_data
from extras import map as mapping
from nets import linear
from tests.helpers import *  # noqa: F403
from tests.test_texts import CHATML

# -------------------- The method on one page is that of the scripts --------------------


def test_shipped_weights_load_and_write_the_same_adapters():
    net, ours = one_page.TextToLoRA().eval(), hypernet.load_hypernet(TINY / "sft_large")
    ours.connect(None, None)
    weights = load_file(TINY / "sft_large" / "hypernet.safetensors")
    weights = {key: tensor.float() for key, tensor in weights.items()}
    net.load_state_dict(weights)
    texts = ["Keep only the animals, in French.", "The fruits; last first!"]
    for name, pair in net(texts).items():
        close(pair, ours(texts)[name])


def first_steps(page, net_class, run: train.Run, monkeypatch) -> tuple[list, list]:
    """(examples and loss, texts that were read) of three steps of a page; run.net starts from its network."""
    seen, read, real, real_forward = [], [], page.task_loss, net_class.forward

    def forward(self, *inputs):
        if not read:
            run.net.load_state_dict(self.state_dict())
        read.append(inputs[-1])
        return real_forward(self, *inputs)

    def task_loss(base, tokenizer, examples):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append((examples, real(base, tokenizer, examples)))
        return seen[-1][1]

    monkeypatch.setattr(net_class, "forward", forward)
    monkeypatch.setattr(page, "task_loss", task_loss)
    with pytest.raises(KeyboardInterrupt):
        page.main()
    return seen, read


def test_its_first_losses_are_those_of_train(monkeypatch):
    """On the examples that it draws, without dropout."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    monkeypatch.setattr(F, "dropout", lambda x, *_, **__: x)
    run = run_of("--lr", str(one_page.LR), "--max_steps", str(one_page.STEPS), "--l2", "0")
    run.args.tasks_per_batch = one_page.BATCH
    seen, texts = first_steps(one_page, one_page.TextToLoRA, run, monkeypatch)
    optimizer = train.make_optimizer(run.net, run.args)
    for step, (examples, loss) in enumerate(seen):
        drawn = [drawn_as(run, 0, text, [example]) for text, example in zip(texts[step], examples)]
        follow(run, optimizer, step, drawn, loss)


@needs_time
@pytest.mark.parametrize("page", [one_page, doc_page])
def test_the_pages_get_as_much_right_as_the_readme_says(page, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(HERE)
    page.main()
    out, readme = capsys.readouterr().out, (HERE / "README.md").read_text()
    if page is one_page:
        right = out.split("right answers on unseen tasks: ")[1]
        said = re.search(r"gets (\d+)% right on 25 unseen tasks", readme)
    else:
        right = re.search(r"4 facts: right ([.\d]+)", out)[1]
        said = re.search(r"(\d+)% of questions\s+about four facts", readme)
    margin = 0.06 if page is one_page else 0.2  # processors round in different ways
    assert float(right) > int(said[1]) / 100 - margin


# -------------------- Doc-to-LoRA on a page --------------------


def test_the_shipped_reader_loads_into_its_page_and_its_first_losses_are_those_of_train(monkeypatch):
    monkeypatch.chdir(HERE)
    run = run_of("@config/d2l.args", "--l2", "0", "--lr", str(doc_page.LR))
    shipped = hypernet.load_hypernet(TINY / "d2l")
    shipped.connect(run.base, run.tokenizer)
    net, texts = doc_page.DocToLoRA(), ["cat lamp <eos>\nstar knives <eos>", "dog red <eos>"]
    net.load_state_dict(shipped.state_dict())
    with torch.no_grad():
        written = net(run.base, run.tokenizer, texts)
        close((written["A"], written["B"]), shipped(texts)["down_proj"])
    monkeypatch.setattr(doc_page, "STEPS", 4500)
    seen, read = first_steps(doc_page, doc_page.DocToLoRA, run, monkeypatch)
    optimizer = train.make_optimizer(run.net, run.args)
    for step, (examples, loss) in enumerate(seen):
        asked = iter(examples)
        drawn = [drawn_as(run, 0, text, list(islice(asked, doc_page.QUESTIONS))) for text in read[step]]
        follow(run, optimizer, step, drawn, loss)


def follow(run: train.Run, optimizer, step: int, drawn: list[data.Drawn], loss: torch.Tensor) -> None:
    """The same step by train.py, whose loss is that of a page."""
    for group in optimizer.param_groups:
        group["lr"] = train.learning_rate(step, run.args)
    optimizer.zero_grad()
    close(train.sft_step(run, run.net, drawn)["task"], loss.detach(), 1e-4)
    nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    optimizer.step()


# -------------------- The program of extras/README.md --------------------


def test_the_path_from_python(tmp_path, monkeypatch, capsys):
    page = (HERE / "extras" / "README.md").read_text()
    program = page.split("## From Python")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert capsys.readouterr().out == "chat chien\nshirt dog red cat\n"
    assert lora.load_adapter("out/one")[1].r == 8


# -------------------- A new network: nets/linear.py --------------------


def test_a_new_network_is_trained_both_ways_and_used(tmp_path):
    words = "--arch linear --n_tasks 4 --latent_size 8 --input_dropout 0".split()
    losses = fit(tmp_path / "sft", *words, "--max_steps", "8")
    assert losses[-1] < losses[0]
    fit(tmp_path / "oracles", *LORA, "--n_tasks", "4", "--max_steps", "4")
    recon = ["--mode", "recon", "--oracles", tmp_path / "oracles", "--max_steps", "20"]
    losses = fit(tmp_path / "recon", *words, *recon)
    assert losses[-1] < losses[0]
    for name in ("sft", "recon"):
        net = hypernet.load_hypernet(tmp_path / name)
        assert type(net) is linear.Net and net.config.latent_size == 8
        net.connect(None, None)
        A, B = net(["Swap them.", "Reverse the fruits."])["v_proj"]
        assert A.shape == (2, 4, 8, 128) and B.shape == (2, 4, 64, 8)
        assert (B[0] - B[1]).abs().max() > 0
    net.start_as_lora()
    A, B = net(["x", "y"])["q_proj"]
    assert torch.equal(A[0], A[1]) and A.std() > 0.3 / 128**0.5 and not B.any()
    out = ["--hypernet", tmp_path / "sft", "--desc", "Swap them.", "--out", tmp_path / "adapter"]
    assert command(generate, *out) == 0 and lora.load_adapter(tmp_path / "adapter")[1].r == 8


# -------------------- Descriptions as names of models --------------------


def test_a_description_is_the_name_of_its_adapter(tmp_path):
    net = hypernet.load_hypernet(TINY / "sft_large")
    net.connect(None, None)
    writer, text = serve.Writer(net.requires_grad_(False), tmp_path), "Keep the fruits."
    assert asyncio.run(writer.folder_of("typo")) is asyncio.run(writer.folder_of("t2l: ")) is None
    adapter, _ = lora.load_adapter(asyncio.run(writer.folder_of(f"t2l: {text}")))
    close(adapter["q_proj"], net([text])["q_proj"])


def test_prompts_are_those_of_training():
    tokenizer = model.load_base(model.TINY)[1]
    dated = "{{ strftime_now('%d') }}{{ date_string }}{{ enable_thinking }}" + CHATML
    for template in (tokenizer.chat_template, dated):
        tokenizer.chat_template = template
        asked = [{"role": "user", "content": "cat dog"}]
        settings = dict(add_generation_prompt=True, tokenize=False)
        settings["chat_template"] = serve.served_template(tokenizer)
        ours = model.render(tokenizer, "cat dog")
        assert tokenizer.apply_chat_template(asked, **settings) == ours


# -------------------- The map of what was learned --------------------


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


# -------------------- Training data by an instruct model, whose words are given here --------------------


def answers_of(say, prompts: list[str]):
    """In place of model.answer. None is an answer that is cut."""

    def answer(base, tokenizer, batch, most):
        prompts.extend(batch)
        return [model.Answer(text or "cut", text is not None, 1, 0.0) for text in say(batch)]

    return answer


def test_descriptions_are_written_for_each_task(tmp_path, monkeypatch, capsys):
    folder, out, prompts = tmp_path / "tasks", tmp_path / "out", []
    instances = [{"input": f"in {i}", "output": ["nein"]} for i in range(10)]
    write_file(folder / "a.json", {"Definition": ["Say nein or ja."], "Instances": instances})
    write_file(folder / "b.json", {"descriptions": ["do b"], "Instances": instances})
    write_file(folder / "splits.json", {"train": ["a"], "val": ["b"]})

    def say(batch):
        return ['"Say yes if so."', "say YES if so.", "do b", None, "Write nein.", f"In words {len(prompts)}"]

    monkeypatch.setattr(model, "answer", answers_of(say, prompts))
    words = ["descriptions", folder, out, "--base_model", "tiny", "--descriptions", "4"]
    assert command(write_data, *words) == 0
    assert "new descriptions of 2 tasks" in capsys.readouterr().out
    tasks = load_tasks(out)
    (task,), (other,) = tasks["train"], tasks["val"]
    assert task.descriptions == ["Say yes if so.", "do b", "Write nein.", "In words 6"]
    assert other.descriptions == ["do b", "Say yes if so.", "In words 12", "In words 18"]  # nobody says nein
    assert "The instruction was: Say nein or ja." in prompts[0] and "Output: " in prompts[0]
    assert command(write_data, *words) == 2 and "is there already" in capsys.readouterr().err


def test_texts_become_documents_with_questions(tmp_path, monkeypatch):
    """Whole texts are held out; a quarter of the questions has nothing to do with them."""
    folder, out, prompts = tmp_path / "notes", tmp_path / "out", []
    folder.mkdir()
    for i in range(5):
        (folder / f"n{i}.txt").write_text(f"cow cow\n\nred blue\n\n{repeated('hat ', 19)}{i}")
    asks = "Here they are:\n1. Is it red?\n2) is it red?\n- Is it blue?\n\n* Is it a cat?\nIs it"
    say = lambda batch: [asks if "questions" in prompt else "sun" for prompt in batch]  # noqa: E731
    monkeypatch.setattr(model, "answer", answers_of(say, prompts))
    words = ["questions", folder, out, "--base_model", "tiny", "--max_tokens", "16", "--held_out", "0.2"]
    assert command(write_data, *words) == 0
    parts = [read_json(out / f"n0-00{i}.json") for i in range(2)]
    assert parts[0]["document"] == "cow cow\n\nred blue" and parts[1]["document"].endswith("hat 0")
    assert parts[0]["questions"] == [{"question": "Is it red?", "answer": "sun"}]  # none twice
    (other,) = parts[0]["other"]
    assert other["answer"] == "sun" and f"{other['question']} ->" in prompts  # without the text
    splits = load_tasks(out)
    assert {split: len(tasks) for split, tasks in splits.items()} == dict(train=6, val=2, test=2)
    assert {task.name[:2] for task in splits["train"]} & {task.name[:2] for task in splits["val"]} == set()
    n_tokens = len(model.tokenize(model.load_base(model.TINY)[1], "cat ->"))
    monkeypatch.setattr(model, "window_of", lambda base: n_tokens + 5)
    assert write_data.ask_all(*model.load_base(model.TINY), ["cat ->"], 6) == [""]  # no room for the answer


# -------------------- How sure a network is --------------------


def test_a_calibration_is_fitted_and_used(tmp_path, monkeypatch, capsys):
    """Answers that are right with probability sigmoid(3 x + 2) give these numbers back."""
    generator = torch.Generator().manual_seed(0)
    x = -2 * torch.rand(4000, generator=generator)
    right = (torch.rand(4000, generator=generator) < (3 * x + 2).sigmoid()).float()
    assert calibrate.fit(x.tolist(), right.tolist()) == pytest.approx((3, 2), abs=0.3)
    folder = tmp_path / "net"
    shutil.copytree(TINY / "sft_small", folder)
    words = ["--hypernet", folder, "--tasks", "tiny", "--n_examples", "2"]
    assert command(calibrate, *words) == 0 and "too few for a calibration" in capsys.readouterr().out
    monkeypatch.setattr(calibrate, "LEAST", 0)
    assert command(calibrate, *words) == 0
    slope, offset = read_json(folder / "config.json")["calibration"]
    words = ["--hypernet", folder, "--desc", "Reverse the list.", "--out", tmp_path / "out"]
    assert command(generate, *words) == 0
    for config in hypernet.load_hypernet(folder).config, lora.load_adapter(tmp_path / "out")[1]:
        assert config.certainty(-1.0) == pytest.approx(1 / (1 + math.exp(slope - offset)))
    known = read_json(folder / "known.json")
    assert len(known["descriptions"]) == len(load_file(folder / "known.safetensors")["task_emb"]) == 479
    assert "animals" in known["words"] and "japanese" not in known["words"]
