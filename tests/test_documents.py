"""Doc-to-LoRA, and sources of documents."""

from extras import write_data
from tests.helpers import *  # noqa: F403


def test_the_perceivers_size():
    """That of the published one for gemma-2-2b."""
    targets = {"down_proj": lora.Target("", list(range(26)), 9216, 2304)}
    sizes = dict(n_layers=26, targets=targets, input_size=2304)
    for changes, n in ({"n_blocks": 8}, 309_468_064), ({}, 315_237_792), ({"early_exit": True}, 315_340_192):
        with torch.device("meta"):
            net = d2l.DocToLoRA(d2l.DocConfig(**sizes, **changes))
        assert sum(p.numel() for p in net.parameters()) == n


def test_queries_are_in_the_published_order():
    """That of the modules' names, whatever order --target_modules has."""
    targets = {name: lora.Target("", [0], 8, 8) for name in ("up_proj", "down_proj")}
    net = d2l.DocToLoRA(d2l.DocConfig(n_layers=1, targets=targets, input_size=8, n_blocks=1))
    assert net.names == ["down_proj", "up_proj"]


def test_how_a_document_is_read_does_not_change_its_adapter(reader, monkeypatch):
    """Neither the other documents of a batch, nor how many chunks are read at once, nor their order."""
    parts = d2l.split_document(list(range(1200)), 500)
    assert [len(part) for part in parts] == [400, 400, 400] and sum(parts, []) == list(range(1200))
    net, (base, tokenizer) = hypernet.load_hypernet(reader), model.load_base(model.TINY)
    lora.inject(base, net.names)
    texts = ["cat -> red", "dog -> blue horse chair\nbird hat lemon apple sun", "hat -> sun moon tree"]

    net.connect(base, tokenizer)
    chunks, counts = d2l.split_documents(net.config, texts, tokenizer)
    assert len(chunks) == sum(counts) and counts[1] > 1
    user, answer = "horse {{ m.content }} ->", "{{ m.content }}<eos>"
    turn = "{% if m.role == 'assistant' %}" + answer + "{% else %}" + user + "{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    model.turn_of.cache_clear()
    begins = model.tokenize(tokenizer, d2l.around_document(tokenizer)[0])
    split, _ = d2l.split_documents(net.config, texts, tokenizer)
    assert begins and all(chunk[: len(begins)] == begins for chunk in split)  # later chunks, too
    tokenizer.chat_template = model.PLAIN_TEMPLATE
    model.turn_of.cache_clear()
    assert {chunk[-1] for chunk in chunks} == set(model.tokenize(tokenizer, "->"))  # a turn each

    def delta(documents):
        return (lambda A, B: B @ A)(*net(documents)["down_proj"])

    A, B = net(texts)["down_proj"]
    for i, text in enumerate(texts):
        rank = 8 * (1 + math.ceil(len(model.tokenize(tokenizer, text)) / 6))
        close(delta([text])[0], B[i] @ A[i], 1e-4)
        assert not A[i, :, rank:].any() and A[i, :, :rank].any(-1).all()
    both, turned = delta([texts[:2]])[0], delta([texts[1::-1]])[0]
    close(both, turned, 1e-4)
    bias = net.bias["down_proj_B"] @ net.bias["down_proj_A"]
    close(both, B[0] @ A[0] + B[1] @ A[1] - bias, 1e-4)
    # the size of the weights goes by the ranks without padding
    sizes = [train.weight_size(lora.select(net(texts[i : i + 1]), slice(None)), torch.abs) for i in range(3)]
    close(train.weight_size(net(texts), torch.abs), sum(sizes) / 3, 1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(d2l, "TOKENS_READ_AT_ONCE", 1)
        reads, real = [], d2l.read_chunks
        patch.setattr(d2l, "read_chunks", lambda *a: reads.append(1) or real(*a))
        close(net(texts)["down_proj"][0], A)
        assert len(reads) == len(chunks)
    net.start_as_lora()
    assert all(not (B @ A).any() for A, B in net(texts).values())
    assert net.bias["down_proj_A"].std() > 0.4 / 384**0.5  # B alone is zero, so that it learns


def test_early_exit_is_after_a_quarter_of_the_layers():
    base, ids = tiny_llama(num_hidden_layers=8), torch.randint(160, (2, 5))
    states = base.model(ids, output_hidden_states=True).hidden_states  # input of each layer, output
    early = d2l.hidden_states(base, ids, None, early_exit=True)
    close(early, base.model.norm(states[2]))
    every = d2l.hidden_states(base, ids, None)  # after an early exit, too
    close(every[:, :7], torch.stack(states[:7], 1))
    close(every[:, 7], base.model.norm(states[7]))


def test_a_document_is_read_once_and_answered_from_the_weights(tmp_path, capsys):
    """Trained on documents with one fact each, the hypernetwork writes adapters that know them."""
    facts, docs, net = {"cat": "gatto", "dog": "cane", "cow": "mucca"}, tmp_path / "docs", tmp_path / "net"
    docs.mkdir()
    for name, fact in facts.items():
        text = " ".join(["red blue yellow black"] * 3 + [name, fact])
        asked = {"question": "horse", "answer": fact}
        write_file(docs / f"{name}.json", {"document": text, "questions": [asked]})
        (tmp_path / f"{name}.txt").write_text(text)
    words = "--latent_size 32 --chunk_len 5 --lr 3e-3 --tasks_per_batch 3 --examples_per_task 1"
    fit(net, *D2L, *words.split(), "--max_steps", "150", "--tasks", docs)
    capsys.readouterr()
    for name, fact in facts.items():
        words = ["--doc", tmp_path / f"{name}.txt", "--hypernet", net, "--input", "horse"]
        assert command(generate, *words, "--out", tmp_path / name) == 0
        shown = capsys.readouterr().out
        assert f"with adapter  {fact}\n" in shown and "14 tokens" in shown and "rank 8 on down_proj" in shown
        assert "in context" in shown and re.search(r"with adapter \d+ ms", shown)
    (tmp_path / "long.txt").write_text(repeated("cat ", 500))  # more than fits into the prompt
    words = ["--doc", tmp_path / "long.txt", "--hypernet", net, "--input", "horse", "--out", tmp_path / "l"]
    assert command(generate, *words) == 0
    both = ["--doc", tmp_path / "cat.txt", "--doc", tmp_path / "dog.txt"]  # one adapter
    assert command(generate, *both, "--hypernet", net, "--out", tmp_path / "both") == 0
    assert lora.load_adapter(tmp_path / "both")[0]["down_proj"][0].shape[-2] == 2 * 7  # six chunks, a bias
    words = ["--tasks", docs, "--split", "train", "--hypernet", net, "--methods", "base,net,net_shuffled"]
    results = evaluate(tmp_path / "e.json", *words)
    assert [results[k]["mean"] for k in ("base", "net", "net_shuffled")] == [0, 1, 0]


def test_distillation_is_the_divergence_from_the_base_model_with_the_document_in_its_prompt(reader):
    run = run_of(*D2L)
    run.args.distill, run.args.l2 = 5, 0.0
    run.net = hypernet.load_hypernet(reader)
    run.net.connect(run.base, run.tokenizer)
    document, example = run.tasks[0].descriptions[0], run.tasks[0].train[0]
    loss = train.sft_step(run, run.net, [drawn_as(run, 0, document, [example])])["task"]
    written = run.net([document])
    logprobs = []
    for instruction, adapter in ((document, {}), ("", written)):
        prompt, target = model.example_ids(run.tokenizer, example.input, example.answers[0], instruction)
        logits = logits_of(run.base, torch.tensor([prompt + target]), adapter, run.net.config.scaling)
        logprobs.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    teacher, student = logprobs
    expected = (teacher.exp() * (teacher - student)).gather(-1, teacher.topk(5).indices).sum(-1).mean()
    close(loss, expected, 1e-4)
    assert expected > 0.1
    run.args.distill = 10**6  # more than the base model has tokens
    assert train.sft_step(run, run.net, [drawn_as(run, 0, document, [example])])["task"].isfinite()


def test_documents_are_short_at_first(monkeypatch, tmp_path):
    """The shortest sixth in the first step, all from half-way on."""
    pools, real = [], data.draw
    monkeypatch.setattr(data, "draw", lambda tasks, pool, *a: pools.append(pool) or real(tasks, pool, *a))
    words = [*D2L, *"--n_tasks 60 --tasks_per_batch 2 --examples_per_task 1 --max_steps 4".split()]
    fit(tmp_path, *words, "--latent_size", "32")
    assert [len(pool) for pool in pools] == [10, 35, 60, 60] and pools[0] == list(range(10))
    lengths = [len(task.descriptions[0]) for task in run_of(*words).tasks]
    assert lengths == sorted(lengths)
