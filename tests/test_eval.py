"""The methods and scores of eval.py."""

from extras import plot
from tasks.benchmarks import Rules, is_exact
from tests.helpers import *  # noqa: F403

ARGS = dict(n_examples=None, batch_size=8, max_new_tokens=None, base_model=None, encoder=None, methods=None)
ARGS |= dict(hypernet=None, mt_lora=None, oracles=None, recon=None, n_tasks=0, tasks="tiny", split="test")
ARGS |= dict(descriptions=None, run_code=False, instruction=None)


def args(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**ARGS | changes)


@pytest.fixture(scope="module")
def tiny():
    """The tiny base model and its tokenizer."""
    return model.load_base(model.TINY)


def exam_of(tasks: list[data.Task], tiny, training=(), **changes) -> evaluation.Exam:
    """These tasks, with the small shipped hypernetwork of the tiny world."""
    base, tokenizer = tiny
    net = hypernet.load_hypernet(TINY / "sft_small")
    net.connect(base, tokenizer)
    if not hasattr(base, "lora_layers"):
        lora.inject(base, NAMES)
    tasks = [replace(task, rules=task.rules or Rules()) for task in tasks]
    return evaluation.Exam(args(**changes), tasks, list(training), {"hypernet": net}, {}, base, tokenizer)


def task_of(*right: str, **settings) -> data.Task:
    """A task whose questions have these right answers."""
    return data.Task("x", ["d"], [], [Example("cat dog", [answer]) for answer in right], **settings)


def test_which_descriptions_a_method_is_given(tiny, monkeypatch):
    """What is read, and what stands in the prompt."""
    tasks, read = load_tasks("tiny")["test"][:3], []
    real = generate.write_adapters
    note = lambda net, texts, *more: read.append(texts) or real(net, texts, *more)  # noqa: E731
    monkeypatch.setattr(generate, "write_adapters", note)

    def used(name, exam, i=0, **changes) -> tuple[list[str], list[evaluation.Question]]:
        """The texts that are read for task i, and its questions."""
        exam.args = args(**changes)
        read.clear()
        questions, _ = evaluation.questions_of(exam, name, i)
        return sum(read, []), questions

    def instructions(questions) -> list[str]:
        return [asked.prompt.removesuffix(f"\n\n{asked.example.input} ->") for asked in questions]

    exam, known = exam_of(tasks, tiny), set()
    for task in tasks:
        known |= {*task.descriptions, *task.reworded}
    for i, task in enumerate(tasks):
        texts, asked = used("net", exam, i)
        assert texts == list(task.descriptions[:25]) and len(asked) == 25
        assert used("net_reworded", exam, i)[0] == task.reworded[:25]
        assert used("net_shuffled", exam, i)[0] == list(tasks[(i + 1) % 3].descriptions[:25])
        assert not known & set(used("net_random", exam, i)[0])
        assert set(instructions(used("prompt", exam, i)[1])) <= set(task.descriptions)
        own = {model.instruct(text) for text in task.descriptions}
        assert set(instructions(used("net_shuffled", exam, i, instruction=True)[1])) <= own
        texts, asked = used("net_reworded", exam, i, instruction=True)  # the prompt has what is read
        assert instructions(asked) == [model.instruct(texts[k % len(texts)]) for k in range(25)]
    rules = Rules(start=lambda example: "so", most_examples=None, n_texts=3, with_instruction=False)
    task = data.Task("piqa", list("abc"), [], [Example("cat", ["red"])] * 30)
    exam = exam_of([replace(task, rules=rules._replace(meaningless=["zzz"]))], tiny)
    texts, asked = used("net", exam, instruction=True)
    assert texts == list("abc") and len(used("base", exam)[1]) == 30
    assert asked[0].prompt == "cat -> so"  # the start of the answer stands where the answer would
    with torch.no_grad():
        A, _ = exam.nets["hypernet"](texts)["q_proj"]
    for k, question in enumerate(asked):  # each question with all three texts
        close(question.adapter["q_proj"][0][0], A[(k // 3 + k % 3) % 3])
    assert used("net_random", exam)[0] == ["zzz"]


def test_each_question_has_the_adapter_of_its_text(tiny, monkeypatch):
    """Of several tasks, together, in batches by length."""
    tasks, seen, sizes, real = [], [], [], model.answer
    for task in load_tasks("tiny")["test"][:3]:
        test = []
        for k, example in enumerate(task.test[:5]):
            test.append(example._replace(input=" ".join(example.input.split()[k % 4 :])))
        tasks.append(replace(task, descriptions=task.descriptions[:3], test=test))
    exam = exam_of(tasks, tiny, n_examples=5, batch_size=10)

    def answer(base, tokenizer, prompts, most):
        sizes.append(len(prompts))
        A = torch.stack([layer.A for layer in base.lora_layers["q_proj"]], 1)  # [n, L, r, in]
        seen.extend(zip(prompts, A))
        return real(base, tokenizer, prompts, most)

    monkeypatch.setattr(model, "answer", answer)
    rows = evaluation.score("net", exam)
    assert sizes == [10, 5] and [row["task"] for row in rows[::5]] == [task.name for task in tasks]
    for i, task in enumerate(tasks):
        for k, example in enumerate(task.test[:5]):
            assert rows[5 * i + k]["input"] == example.input and rows[5 * i + k]["right"] == example.answers
            with torch.no_grad():
                own, _ = exam.nets["hypernet"]([task.descriptions[k % 3]])["q_proj"]
            used = [A for prompt, A in seen if prompt == f"{example.input} ->"]
            assert min((A - own[0]).abs().max() for A in used) < 1e-5


def test_scores_and_their_interval(monkeypatch, tiny):
    low, high = map(float, evaluation.interval([0.0, 1.0] * 50).split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)

    def goes_on(base, tokenizer, prompts, most):
        text = " ".join("red cat sun moon".split()[:most])  # it ends after four words
        return [model.Answer(text, most > 4, 5, -0.1) for _ in prompts]

    monkeypatch.setattr(model, "answer", goes_on)

    def score(*right: str, **changes) -> float:
        rows = evaluation.score("base", exam_of([task_of(*right)], tiny, **changes))
        return evaluation.task_scores(rows)["x"]

    assert score("red cat sun moon") == 1 and score("red") == 0  # an answer that goes on is wrong
    assert score("red cat sun") == 0 and score("red cat sun moon", max_new_tokens=4) == 0
    assert score("red cat sun moon", "moon", "red cat sun moon", "red cat sun moon") == 0.75
    rules = Rules(is_right=lambda example, answer, has_ended: has_ended)
    two = [task_of("red", rules=rules), task_of("red cat sun moon", rules=rules)]  # with 3 and 6 tokens
    assert [row["score"] for row in evaluation.score("base", exam_of(two, tiny))] == [0, 1]
    sure, right = [0.95, 0.85, 0.85, 0.05], [1, 1, 0, 0]  # pairs: 3.5 of 4 in order
    rows = [{"sure": a, "score": b} for a, b in zip(sure, right)]
    assert evaluation.certainty_scores(rows) == pytest.approx((0.875, (0.05 + 0.7 + 0.05) / 4, 1.0))


def test_how_sure_an_answer_is():
    """The mean log-probability of its tokens, with the end mark, from the logits of the whole text."""
    base, tokenizer = model.load_base(model.TINY)
    prompts = ["wolf silver ->", "cat -> red<eos>\ndog ->"]
    for prompt, answer in zip(prompts, model.answer(base, tokenizer, prompts, 8)):
        ids = model.tokenize(tokenizer, prompt)
        said = model.tokenize(tokenizer, answer.text) + [tokenizer.eos_token_id]
        logits, _, labels = model.answer_logits(base, [(ids, said)])
        expected = logits.log_softmax(-1)[range(len(said)), labels].mean().item()
        assert answer.has_ended and answer.log_prob == pytest.approx(expected, abs=1e-4)
    assert lora.LoRAConfig().certainty(-0.5) == pytest.approx(0.6065, abs=1e-4)
    assert lora.LoRAConfig(calibration=[2.0, 1.0]).certainty(-0.5) == 0.5


def test_an_answer_counts_if_the_model_ended_it(tiny):
    """Otherwise "right, and more" would be cut to what is right. It may be as long as the right one."""
    examples = [Example("cat", ["a"]), Example("cat", [repeated("cat ", 99)])]
    for changes, most in ({}, 101), ({"max_new_tokens": 7}, 7):
        exam = exam_of([data.Task("x", ["d"], [], examples)], tiny, **changes)
        assert {question.most for question in evaluation.questions_of(exam, "base", 0)[0]} == {most}
    assert is_exact(examples[0], " a ", True) and not is_exact(examples[0], " a ", False)
    n = len(model.answer(*tiny, ["cat ->"], 64)[0].text.split())  # words and, besides, the end mark
    for most, ended in (n, False), (n + 1, True):
        (answer,) = model.answer(*tiny, ["cat ->"], most)
        assert answer.has_ended == ended and len(answer.text.split()) == min(most, n)


def test_examples_in_the_prompt_are_not_those_asked(tiny):
    task = load_tasks("tiny")["test"][0]
    task = data.Task("x", ["d"], task.train[:4], [*task.test[:9], task.train[0]])  # one is in both parts
    for question in evaluation.questions_of(exam_of([task], tiny), "icl", 0)[0]:
        *shown, asked = question.prompt.split("<eos>\n")
        shots = [shot.split(" ->")[0] for shot in shown]
        assert len(shots) == 3 and set(shots) <= {example.input for example in task.train}
        assert asked == f"{question.example.input} ->" and question.example.input not in shots


def test_tasks_of_a_folder_and_their_descriptions(tmp_path, capsys):
    """All instances of a task that is not for training are asked, but not those that its oracle has seen."""
    instances = [{"input": str(i), "output": [str(i)]} for i in range(5)]
    for name, n in ("a", 4), ("b", 5):
        write_file(tmp_path / f"{name}.json", {"descriptions": ["d"], "Instances": instances[:n]})
    write_file(tmp_path / "splits.json", {"test": ["a", "b"]})
    own, both = dict(tasks=str(tmp_path)), {"a": 4, "b": 5}
    tasks, _ = evaluation.tasks_to_judge(args(**own))
    assert {task.name: len(task.test) for task in tasks} == both
    refused("a has no test part: the last fifth", evaluation.tasks_to_judge, args(**own, oracles="x"))
    write_file(tmp_path / "splits.json", {"train": ["b"], "test": ["a"]})
    (task,), _ = evaluation.tasks_to_judge(args(**own, split="train"))
    assert [example.input for example in task.test] == ["4"]
    write_file(tmp_path / "d.json", {"a": "Reverse the words."})
    (task,), _ = evaluation.tasks_to_judge(args(**own, descriptions=tmp_path / "d.json"))
    assert "d.json has descriptions of 1 of 1 tasks" in capsys.readouterr().out
    assert task.descriptions == ["Reverse the words."]
    write_file(tmp_path / "d.json", {"a": [3]})
    own["descriptions"] = tmp_path / "d.json"
    refused("must be a text or a list", evaluation.tasks_to_judge, args(**own))


LEFT_OUT = {"mt_lora", "oracle", "recon", "base_other", "net_other"}  # of tasks with descriptions alone


def test_eval_writes_the_promised_json_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--n_tasks", "12", "--n_examples", "2", "--out", "scores.json"]
    assert command(evaluation, *words) == 0
    content, shown = read_json("scores.json"), capsys.readouterr().out
    assert command(evaluation, *words, "--tasks", tmp_path, "--methods", "net") == 2
    assert read_json("scores.json") == content  # a run that fails leaves the results of the last one
    assert "left out: mt_lora (needs --mt_lora DIR), oracle (needs --oracles DIR), base_other (needs" in shown
    assert list(content["results"]) == [name for name in evaluation.METHODS if name not in LEFT_OUT]
    assert content["settings"]["split"] == "test"
    answers = read_json("scores.answers.json")
    for row, scores in content["results"].items():
        values = list(scores["per_task"].values())
        mean = sum(values) / 12
        assert len(values) == 12 and abs(scores["mean"] - mean) < 1e-9
        assert f"| {row} | {mean:.3f} | {evaluation.interval(values)} | {min(values):.2f} |" in shown
        assert len(answers[row]) == 24 and abs(sum(said["score"] for said in answers[row]) / 24 - mean) < 1e-9
        for said in answers[row]:
            assert (said["answer"].strip() in said["right"]) >= said["score"] and 0 <= said["sure"] <= 1
    cost = r"^(\S+) +[.\d]+   (\d+) tokens in a prompt, \d+ ms for an answer"
    lengths = dict(re.findall(cost, shown, re.M))
    assert lengths["net"] == lengths["base"] == "5"  # four words and a mark
    assert int(lengths["icl"]) > 4 * 5
    results = {"net": {"16 lines": 0.5, "3-digit sums": 1.0}, "base": {"3-digit sums": 0}}
    table = evaluation.make_table(results, "test")
    assert table.splitlines()[0] == "| method | 3-digit sums | 16 lines |"
    assert table.splitlines()[2:] == ["| net | 1.00 | 0.50 |", "| base | 0.00 |  |"]


def test_methods_without_adapters_leave_the_base_model_as_it_is(monkeypatch, tmp_path, capsys):
    """No layer is replaced. Which base model it is follows from the network that is named."""
    seen, real = [], evaluation.score
    monkeypatch.setattr(evaluation, "score", lambda *a: seen.append(a[1]) or real(*a))
    words = ["--n_tasks", "2", "--n_examples", "2", "--methods", "base,prompt"]
    assert command(evaluation, *words) == 0
    assert len(seen) == 2 and not any(hasattr(exam.base, "lora_layers") for exam in seen)
    shutil.copytree(TINY / "sft_small", tmp_path / "net")
    config = read_json(tmp_path / "net" / "config.json")
    write_file(tmp_path / "net" / "config.json", config | {"base_model": "./nowhere"})
    capsys.readouterr()
    assert command(evaluation, *words, "--hypernet", tmp_path / "net") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["ab", ["4 lines", "16 lines"]])
def test_scores_are_drawn(tmp_path, names):
    pytest.importorskip("matplotlib")
    results = {"base": {"mean": 0.1, "per_task": dict.fromkeys(names, 0.1)}}
    write_file(tmp_path / "r.json", {"settings": {"split": "test"}, "results": results})
    assert command(plot, tmp_path / "r.json", tmp_path / "new" / "r.png") == 0
    assert (tmp_path / "new" / "r.png").stat().st_size > 5000
    rows = [{"sure": 0.9, "score": 1.0}, {"sure": 0.2, "score": 0.0}]
    write_file(tmp_path / "r.answers.json", {"net": rows})
    assert command(plot, tmp_path / "r.answers.json", tmp_path / "s.png") == 0
    assert (tmp_path / "s.png").stat().st_size > 5000
    row = {"step": 1, "loss": 2.0, "val_loss": 1.0, "val_accuracy": 0.5}
    write_file(tmp_path / "run" / "metrics.jsonl", "\n".join(map(json.dumps, [row, row | {"step": 2}])))
    assert command(plot, tmp_path / "run", tmp_path / "run.png") == 0
    assert (tmp_path / "run.png").stat().st_size > 5000


def test_the_mean_adapter_and_what_methods_lack(tiny, monkeypatch):
    tasks = load_tasks("tiny")["train"][:3]
    exam = exam_of(tasks, tiny, training=tasks)
    with torch.no_grad():
        written = exam.nets["hypernet"]([task.descriptions[0] for task in tasks])
        mean, _ = evaluation.adapters_of(exam, evaluation.METHODS["net_mean"], 0)
    for name, (A, B) in written.items():
        close(mean[name], (A.mean(0, keepdim=True), B.mean(0, keepdim=True)), 1e-4)

    def possible(exam) -> set[str]:
        return {name for name in evaluation.METHODS if not evaluation.lacks(exam, name)}

    assert possible(exam) == {*evaluation.METHODS} - LEFT_OUT
    few = exam_of(tasks[:1], tiny)
    assert possible(few) == possible(exam) - {"net_mean", "net_shuffled"}
    assert evaluation.lacks(few, "net_shuffled") == "a second task"
    few.nets = evaluation.load_nets(args(base_model="mistralai/x", methods=["net"]), tasks, "cpu")
    assert evaluation.lacks(few, "net") == "--hypernet DIR"
    read = []
    many = exam_of(tasks, tiny, training=[data.Task(str(i), [str(i)], [], []) for i in range(1200)])
    monkeypatch.setattr(generate, "write_adapters", lambda net, texts, base: (read.append(texts[0]) or {}, 0))
    assert many.mean == {} and read == [str(i) for i in range(0, 1200, 3)]  # of all kinds, not the first ones
