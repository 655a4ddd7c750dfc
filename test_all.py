"""The method, as tests. Everything else is in tests/: python -m pytest -q

Numbers of the published implementations (assets/golden, and the folder that T2L_GOLDEN names) are matched in
tests/test_published.py. PEFT is used where it is installed, a GPU where there is one, and real models where
T2L_BASE and T2L_ENCODER name their folders.
"""

from tasks.benchmarks import is_exact
from tests.helpers import *  # noqa: F403

# -------------------- The adapter --------------------


def test_injected_layer_is_the_equation_and_so_are_its_gradients():
    holder = one_layer(nn.Linear(12, 20))
    W, bias = holder["layers"][0]["q_proj"].weight, holder["layers"][0]["q_proj"].bias
    layer = lora.inject(holder, ["q_proj"])["layers"][0]["q_proj"]
    A, B = torch.randn(1, 4, 12, requires_grad=True), torch.randn(1, 20, 4, requires_grad=True)
    x = torch.randn(3, 5, 12, requires_grad=True)
    with lora.use(holder, {"q_proj": (A[None], B[None])}, 1.7):
        y, expected = layer(x), F.linear(x, W + 1.7 * B[0] @ A[0], bias)
        close(y, expected)
        weight = torch.randn_like(y)
        close(*[torch.autograd.grad((out * weight).sum(), (A, B, x)) for out in (y, expected)], 1e-4, 1e-4)
    close(layer(x), F.linear(x, W, bias), 0, 0)


def test_one_adapter_per_row_equals_a_loop_over_rows():
    base = lora.inject(tiny_llama(), NAMES)
    config = config_for(base)
    assert list(base.state_dict()) == list(tiny_llama().state_dict())
    batch, ids = random_adapter(config, 3), torch.randint(160, (6, 7))
    together = logits_of(base, ids, batch)  # six rows, three adapters: rows 0 and 1 have the first
    for row in range(6):
        close(together[row], logits_of(base, ids[row : row + 1], lora.select(batch, [row // 2]))[0])


def test_dropout_is_on_the_lora_branch_in_training_only():
    holder = lora.inject(one_layer(nn.Linear(50, 50)), ["q_proj"], dropout=0.5)
    layer, x = holder["layers"][0]["q_proj"], torch.ones(1, 50)
    plain = layer(x)
    with lora.use(holder, {"q_proj": (torch.eye(50)[None, None], torch.eye(50)[None, None])}, 1.0):
        assert set((layer(x) - plain).round(decimals=3).unique().tolist()) == {0.0, 2.0}
        close(layer.eval()(x) - plain, torch.ones(1, 50))


# -------------------- Text-to-LoRA --------------------


@pytest.mark.parametrize("size", SIZES)
def test_sft_starts_as_a_fresh_lora_and_learns(size):
    net = hypernet.TextToLoRA(small_config(size))
    net.start_as_lora()
    adapter = net.write(torch.randn(2, 7))
    for A, B in adapter.values():
        assert not B.any() and 0.4 / 10**0.5 < A.std() < 0.7 / 10**0.5  # uniform in +-1/sqrt(in)
        assert not torch.equal(A[0, 0], A[0, 1]) and not torch.equal(A[0, 0, 0], A[0, 0, 1])
    sum((A.sum() + B.sum()) for A, B in adapter.values()).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in net.heads.values())


@pytest.mark.parametrize("size", SIZES)
def test_the_papers_sizes(size):
    """The number of trained parameters for the paper's base models, rank 8 on q_proj and v_proj."""
    i = SIZES.index(size)
    mistral = [[55_424_000, 55_317_504], [34_412_288, 34_346_752], [4_996_096, 4_987_904]][i]
    gemma = [[137_706_752, 137_645_312], [87_353_600, 87_316_736], [21_266_176, 21_261_568]][i]

    def trained(net) -> int:
        """Without the offset, which is not published."""
        return sum(p.numel() for name, p in net.named_parameters() if not name.startswith(("offset", "std")))

    def counts(L: int, d: int, q: int, v: int, latent: int, head_in: int) -> list[int]:
        targets = {name: lora.Target("", list(range(L)), d, n) for name, n in (("q_proj", q), ("v_proj", v))}
        sizes = dict(n_layers=L, r=8, input_size=1024, latent_size=latent, head_in_size=head_in)
        with torch.device("meta"):
            configs = [small_config(size, **sizes, targets=targets, recon_loss=z) for z in ("", "z_score")]
            nets = [hypernet.TextToLoRA(config) for config in configs]
        return list(map(trained, nets))

    assert counts(32, 4096, 4096, 1024, 128, 512) == mistral
    assert counts(26, 2304, 2048, 1024, 512, 2048) == gemma


@pytest.mark.parametrize("size", SIZES)
def test_hypernet_files(tmp_path, size):
    net = hypernet.TextToLoRA(small_config(size)).eval()
    for p in net.parameters():
        p.data = p.data.bfloat16().float()
    hypernet.save_hypernet(net, tmp_path)
    again, emb = hypernet.load_hypernet(tmp_path), torch.randn(2, 7)
    assert again.config == net.config and not again.training
    assert all(torch.equal(a, b) for k in NAMES for a, b in zip(net.write(emb)[k], again.write(emb)[k]))
    write_file(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"latent_size": 32})
    with pytest.raises(RuntimeError, match="size mismatch"):
        hypernet.load_hypernet(tmp_path)


# -------------------- Prompts and answers --------------------


def test_a_batch_of_answers_is_that_of_each_prompt_alone():
    base, tokenizer = model.load_base(model.TINY)
    shots = [("cat red", "cat"), ("dog blue", "dog")]
    prompts = [model.render(tokenizer, "wolf silver", "", shots[:n]) for n in (0, 1, 2)]
    assert prompts[1] == "cat red -> cat<eos>\nwolf silver ->"
    together = model.answer(base, tokenizer, prompts, 5)
    for prompt, answer in zip(prompts, together):
        (alone,) = model.answer(base, tokenizer, [prompt], 5)
        assert answer[:3] == alone[:3] and answer.has_ended
        assert answer.log_prob == pytest.approx(alone.log_prob, abs=1e-4)
    assert not any(answer.has_ended for answer in model.answer(base, tokenizer, prompts, 1))


# -------------------- Tasks, and the examples of a step --------------------


def test_a_folder_of_task_files(tmp_path):
    instances = [{"id": str(i), "input": f" in {i}", "output": [f"out {i}", "x"]} for i in range(10)]
    content = {"name": "a", "descriptions": ["do a", "do it"], "Instances": instances}
    write_file(tmp_path / "a.json", content)
    write_file(tmp_path / "b.json", {"Definition": ["do b"], "Instances": instances})
    assert [t.name for t in load_tasks(tmp_path)["train"]] == ["a", "b"]
    write_file(tmp_path / "splits.json", {"train": ["b"], "test": ["a"]})
    tasks = load_tasks(tmp_path)
    assert [t.name for t in tasks["train"]] == ["b"] and not tasks["val"]
    assert tasks["train"][0].descriptions == ["do b"] and tasks["train"][0].definition == "do b"
    assert [len(tasks["train"][0].train), tasks["train"][0].test[0]] == [8, Example("in 8", ["out 8", "x"])]
    assert len(tasks["test"][0].test) == 10  # nothing in it is trained on
    refused('no split "val"', data.pick, tasks, "val")


def test_what_a_step_draws(monkeypatch):
    run = run_of(*SHORT, "--n_tasks", "6", "--tasks_per_batch", "3")
    drawn = [item for step in range(50) for item in drawn_in(run, step)]
    assert {item.index for item in drawn} == set(range(6)) and len({item.description for item in drawn}) > 50
    assert drawn_in(run, 7) == drawn_in(run, 7) != drawn_in(run, 8)
    often = replace(run, pool=9 * [0] + [1, 2, 3, 4, 5])
    drawn = [item.index for step in range(50) for item in drawn_in(often, step)]
    assert 80 < drawn.count(0) < 120  # of 150: nine of fourteen
    again, run.args.seed = drawn_in(run, 7), 1
    assert again != drawn_in(run, 7)
    for n in "0", "6", "128":  # all of them, once
        whole = run_of(*SHORT, "--n_tasks", "6", "--tasks_per_batch", n)
        assert sorted(item.index for item in drawn_in(whole, 7)) == list(range(6))
    monkeypatch.setattr(run.tasks[2], "weight", 3)
    assert run_of(*SHORT, "--n_tasks", "6", "--tasks_per_batch", "3").pool == [0, 1, 2, 2, 2, 3, 4, 5]
    few, more, every = (data.pick({"train": list(range(20))}, "train", n) for n in (3, 9, 0))
    assert few == more[:3] == every[:3]
    refused("has 20 tasks", data.pick, {"train": list(range(20))}, "train", 21)


def test_each_layer_has_the_adapter_of_its_own_row():
    """Also if only some layers have a target. With `skip` the heads see the task embedding directly."""
    config = small_config("large", skip=0.5)
    config.targets["v_proj"] = replace(config.targets["v_proj"], layers=[0, 2])
    net, emb = hypernet.TextToLoRA(config).eval(), torch.randn(2, 7)
    task_emb = net.embed_task(emb)
    x = net.trunk(net.rows(task_emb))  # [2, 3 layers, 2 modules, 20]
    x[..., :12] += 0.5 * task_emb[:, None, None]
    for i, layer in enumerate((0, 2)):
        A, B = net.heads["v_proj"](x[:, layer, 1]).split([4 * 10, 4 * 6], -1)
        close(net.write(emb)["v_proj"][0][:, i], A.view(2, 4, 10))
        close(net.write(emb)["v_proj"][1][:, i], B.view(2, 4, 6).mT)
    published = hypernet.TextToLoRA(replace(config, skip=0.0)).eval()
    published.load_state_dict(net.state_dict())  # it has no parameters
    x = net.trunk(net.rows(task_emb))
    close(published.write(emb)["q_proj"][0].flatten(2), net.heads["q_proj"](x[:, :, 0])[..., :40])
    refused("not a string", net, "one text")


@pytest.mark.parametrize("words", [SHORT, [*D2L, "--tasks_per_batch", "3"], [*LORA, "--n_tasks", "3"]])
def test_a_step_in_micro_batches_is_the_step_of_one_backward_pass(words):
    """Neither detached adapters nor --gradient_checkpointing change the loss or gradients."""
    run = run_of(*words, "--dropout", "0")
    if run.args.mode == "lora":
        assert torch.equal(run.net.A["q_proj"][0], run.net.A["q_proj"][2])  # all begin alike
    run.args.l1 = run.args.l2 = 0.1
    for p in run.net.parameters():  # away from B = 0
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    drawn = drawn_in(run, 0)
    written = run.net(run.inputs(drawn))
    ((examples, adapters),) = train.micro_batches(drawn, written, 100)
    lengths = [ids.n_tokens for ids in examples]
    assert lengths == sorted(lengths)
    sizes = [train.weight_size(written, norm) for norm in (torch.abs, torch.square)]
    with lora.use(run.base, adapters, run.net.config.scaling):
        whole = train.task_loss(run, examples, None) + 0.1 * sum(sizes)
        expected = torch.autograd.grad(whole, list(run.net.parameters()))
    passes, layer = [], run.base.get_decoder().layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))  # (reading has none)
    assert not any(layer.A is not None for layer in lora.injected_layers(run.base))  # nothing is left in it
    for run.args.micro_batch in (1, 100, 3):
        if run.args.micro_batch == 3:
            model.recompute_layers(run.base)
            run.net.recompute = True  # of Doc-to-LoRA the Perceiver, too
        passes.clear()
        loss, grads = gradients(run)
        close(loss, whole.detach(), 1e-4)
        close(grads, expected, 1e-3, 1e-5)
    assert sum(passes) == 2 * math.ceil(len(examples) / 3)  # the layers are computed again


def test_validation_measures_what_greedy_answers_give():
    run = run_of()
    run.net = hypernet.load_hypernet(TINY / "sft_small")
    run.net.connect(run.base, run.tokenizer)
    run.validation, hits = run.validation[:3], []
    validated = train.validate(run)
    for item, task in zip(run.validation, load_tasks("tiny")["val"]):
        assert item.description == task.descriptions[0]
        prompts = [model.render(run.tokenizer, example.input) for example in task.test[:8]]
        with lora.use(run.base.eval(), run.net.eval()(task.descriptions[:1]), run.net.config.scaling):
            answers = model.answer(run.base, run.tokenizer, prompts)
        hits += [is_exact(example, said.text, said.has_ended) for example, said in zip(task.test, answers)]
    assert validated["val_accuracy"] == sum(hits) / 24 > 0.5 and 0 < validated["val_loss"] < 0.5
    run.args.micro_batch, run.args.neftune_alpha, run.args.label_smoothing = 5, 5.0, 0.5  # of training alone
    n_texts = []
    run.net.register_forward_pre_hook(lambda _, args: n_texts.append(len(args[0])))
    assert train.validate(run) == pytest.approx(validated, rel=1e-5, abs=1e-5)
    assert n_texts == [1, 1, 1]  # not all adapters at once: those of documents are large


# -------------------- Commands, end to end --------------------


def test_oracles_and_reconstruction_end_to_end(tmp_path, capsys):
    """A hypernetwork that learnt to write four oracles writes them back."""
    oracles, tasks = tmp_path / "oracles", data.pick(load_tasks("tiny"), "train", 4)
    fit(oracles, *LORA, "--n_tasks", "4", "--max_steps", "10")
    targets, _ = lora.load_adapters([oracles / task.name for task in tasks])
    assert all(B.abs().amax((1, 2, 3)).min() > 0 for _, B in targets.values())
    for task in tasks:
        assert (oracles / task.name / "definition.txt").read_text() == task.descriptions[0] + "\n"
    run = run_of(*LORA, "--n_tasks", "4")
    run.net.B["q_proj"].data[2] = 1
    train.save(run, tmp_path / "saved")
    assert lora.load_adapter(tmp_path / "saved" / tasks[2].name)[0]["q_proj"][1].min() == 1
    train.sft_step(run, run.net, [drawn_as(run, 2, "", tasks[2].train[:1])])
    assert run.net.B["v_proj"].grad.flatten(1).any(1).tolist() == [False, False, True, False]
    fit(tmp_path / "mt", "@config/mt_lora.args", *"--n_tasks 4 --tasks_per_batch 4 --max_steps 3".split())
    A, B = lora.load_adapter(tmp_path / "mt")[0]["q_proj"]
    assert A.shape == (1, 4, 8, 128) and B.abs().max() > 0
    words = ["@config/recon.args", "--oracles", oracles, "--tasks_per_batch", "16", "--max_steps", "200"]
    losses = fit(tmp_path / "recon", *words, "--n_tasks", "4")
    assert losses[-1] < 0.1 * losses[0]
    net = hypernet.load_hypernet(tmp_path / "recon")
    net.connect(None, None)
    made = net([task.descriptions[0] for task in tasks])["q_proj"][1]
    target = targets["q_proj"][1]
    assert (made - target).abs().mean() < 0.5 * (target.mean(0) - target).abs().mean()
    losses = fit(tmp_path / "delta_w", *words, "--recon_loss", "delta_w", "--max_steps", "30")
    assert losses[-1] < losses[0]
    losses = fit(tmp_path / "single", *words, "--n_tasks", "1", "--max_steps", "2")
    assert all(map(math.isfinite, losses))  # one oracle has no std
    words = ["--methods", "mt_lora,oracle", "--mt_lora", tmp_path / "mt", "--oracles", oracles]
    words += ["--split", "train", "--n_tasks", "4", "--n_examples", "2"]
    results = evaluate(tmp_path / "e.json", *words)
    assert set(results) == {"mt_lora", "oracle"}
    adapters = {"oracles": lora.load_adapters([oracles / task.name for task in tasks])}
    exam = evaluation.Exam(types.SimpleNamespace(instruction=None), tasks, [], {}, adapters, None, None)
    for name, (_, B) in evaluation.adapters_of(exam, evaluation.METHODS["oracle"], 2)[0].items():
        close(B[0], targets[name][1][2])  # each task has its own
    other = tmp_path / "oracles" / tasks[0].name  # one of another scaling is refused
    config = lora.load_adapter(other)[1]
    config.alpha = 64
    lora.save_adapter(other, lora.load_adapter(other)[0], config)
    folders = [oracles / task.name for task in tasks]
    refused("differ in base model, modules, rank, alpha", lora.load_adapters, folders)


def test_a_frozen_base_model_has_no_dropout_of_its_own():
    """In training only the adapters' inputs have dropout, and in validation nothing."""
    run = run_of(*SHORT, "--dropout", "0.5")
    training = {name for name, module in run.base.named_modules() if module.training}
    assert training and all("q_proj" in name or "v_proj" in name for name in training)
    assert train.validate(run)["val_accuracy"] == 0  # an answer with two wrong tokens is one wrong answer
    for head in run.net.heads.values():  # away from B = 0
        nn.init.normal_(head.weight, std=0.1)
    assert train.validate(run) == train.validate(run)
    assert training == {name for name, module in run.base.named_modules() if module.training}


def test_generate_writes_what_it_shows(tmp_path, capsys):
    inputs = ["cat red dog shirt", "lemon bear wolf chair"]
    words = ["--input", inputs[0], "--input", inputs[1], "--out", tmp_path / "two"]
    assert command(generate, *SAY, "--desc", "Reverse the fruits.", *words) == 0
    shown = capsys.readouterr().out
    answers = re.findall(r"with adapter  (.*)", shown)
    assert len(answers) == 4 and re.search(r"2 adapters written in \d+\.\d ms", shown)
    base, tokenizer = model.load_base(model.TINY)
    lora.inject(base, NAMES)
    prompts = [model.render(tokenizer, text) for text in inputs]

    def said() -> list[str]:
        return [answer.text.strip() for answer in model.answer(base, tokenizer, prompts)]

    assert re.findall(r"base model    (.*)", shown) == 2 * said()
    for i in range(2):
        adapter, config = lora.load_adapter(tmp_path / "two" / str(i))
        with lora.use(base, adapter, config.scaling):
            assert said() == answers[2 * i : 2 * i + 2]
    assert answers[:2] == ["chat chien", "ours loup"]
    named = read_json(tmp_path / "two" / "0" / "adapter_config.json")["base_model_name_or_path"]
    assert named == str(TINY)  # where PEFT finds it
    args = types.SimpleNamespace(max_new_tokens=3)
    n_fit = model.window_of(base) - args.max_new_tokens - 1  # words; the prompt has a mark, too
    (cut,) = generate.ask(base, tokenizer, [repeated("cat ", n_fit)], {}, 1.0, "", args)
    assert cut.text.endswith("[cut: --max_new_tokens]")
    too_long = [repeated("cat ", n_fit + 1)]
    asked = (base, tokenizer, too_long, {}, 1.0, "", args)
    refused("do not fit into the base model's window", generate.ask, *asked)
    words = ["--adapter", tmp_path / "two" / "0", "--input", inputs[0]]
    assert command(generate, *words) == 0 and "with adapter  chat chien" in capsys.readouterr().out
