"""The methods and scores of eval.py."""

import json
import re
import shutil
import types
from dataclasses import replace

import pytest
import torch

import data
import eval as evaluation
import generate
import hypernet
import lora
import model
from data import Example
from extras import plot
from support import read_json, write_file
from tasks import load_tasks
from tests.helpers import NAMES, TINY, close, command, refused, repeated

ARGS = dict(n_examples=None, batch_size=8, contains=False, max_new_tokens=None, base_model=None, encoder=None)
ARGS |= dict(methods=None, compare=[], hypernet=None, mt_lora=None, oracles=None, recon=None, n_tasks=0)
ARGS |= dict(tasks="tiny", split="test", descriptions=None, run_code=False, instruction=None)


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
    return evaluation.Exam(args(**changes), tasks, list(training), {"hypernet": net}, {}, base, tokenizer)


def test_which_descriptions_a_method_is_given(tiny, monkeypatch):
    """What is read, and what stands in the prompt."""
    tasks, read = load_tasks("tiny")["test"][:3], []
    real = generate.write_adapters
    note = lambda net, texts, *more: read.append(texts) or real(net, texts, *more)  # noqa: E731
    monkeypatch.setattr(generate, "write_adapters", note)

    def used(name, exam=exam_of(tasks, tiny), **changes) -> list[tuple[list[str], list[evaluation.Question]]]:
        """For each task: the texts that are read, and the questions."""
        exam.args, found = args(**changes), []
        for i, task in enumerate(exam.tasks):
            read.clear()
            given = evaluation.METHODS[name].function(exam, i)
            found.append((sum(read, []), evaluation.questions_of(exam, task, given)))
        return found

    def instructions(questions) -> list[str]:
        return [asked.prompt.removesuffix(f"\n\n{asked.example.input} ->") for asked in questions]

    known = {text for task in tasks for text in [*task.descriptions, *task.reworded]}
    for i, task in enumerate(tasks):
        texts, asked = used("net")[i]
        assert texts == list(task.descriptions[:25]) and len(asked) == 25
        assert used("net_reworded")[i][0] == task.reworded[:25]
        assert used("net_shuffled")[i][0] == list(tasks[(i + 1) % 3].descriptions[:25])
        assert not known & set(used("net_random")[i][0])
        assert set(instructions(used("prompt")[i][1])) <= set(task.descriptions)
        own = {model.instruct(text) for text in task.descriptions}
        assert set(instructions(used("net_shuffled", instruction=True)[i][1])) <= own
        texts, asked = used("net_reworded", instruction=True)[i]  # the prompt says what the network reads
        for question, text in zip(asked, instructions(asked)):
            assert text == model.instruct(texts[question.adapter])
    examples = [Example("cat", ["red"]) for i in range(30)]
    rules = data.Rules(start=lambda example: "so", most_examples=None, n_texts=3, with_instruction=False)
    task = data.Task("piqa", list("abc"), [], examples, rules=rules._replace(meaningless=["zzz"]))
    exam = exam_of([task], tiny)
    ((texts, asked),) = used("net", exam, instruction=True)
    assert texts == list("abc") and len(used("base", exam)[0][1]) == 30
    assert asked[0].prompt == "cat -> so"  # the start of the answer stands where the answer would
    assert sorted(question.adapter for question in asked) == 30 * [0] + 30 * [1] + 30 * [2]
    assert used("net_random", exam)[0][0] == ["zzz"]


def test_each_question_has_the_adapter_of_its_text(tiny, monkeypatch):
    """More questions than texts, in batches that do not go up in them."""
    task = load_tasks("tiny")["test"][0]
    task = replace(task, descriptions=task.descriptions[:3])
    exam, seen = exam_of([task], tiny, n_examples=10, batch_size=4), []
    real = lora.use
    monkeypatch.setattr(lora, "use", lambda base, *more: seen.append(more[0]) or real(base, *more))
    evaluation.score("net", evaluation.by_net, exam)
    given = evaluation.by_net(exam, 0)
    numbers = [question.adapter for question in evaluation.questions_of(exam, task, given)]
    assert sorted(numbers) == 4 * [0] + 3 * [1] + 3 * [2] and len(set(numbers[:4])) > 1
    A = torch.cat([adapter["q_proj"][0] for adapter in seen])
    close(A, given.adapters["q_proj"][0][numbers])


def test_scores_and_their_interval(monkeypatch, tiny):
    low, high = map(float, evaluation.interval([0.0, 1.0] * 50).split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)

    def goes_on(base, tokenizer, prompts, most):
        words = "red cat sun moon".split()  # it ends after four words
        return [" ".join(words[:most]) for _ in prompts], [most > 4 for _ in prompts]

    monkeypatch.setattr(model, "answer", goes_on)

    def score(*right: str, rules=data.EXACT, **changes) -> float:
        task = data.Task("x", ["d"], [], [Example("cat dog", [answer]) for answer in right], rules=rules)
        return evaluation.score("base", evaluation.by_base, exam_of([task], tiny, **changes))["x"]

    contains = data.EXACT._replace(is_right=evaluation.contains_right)
    assert score("red cat sun moon") == 1 and score("red") == 0  # an answer that goes on is wrong
    assert score("red cat sun") == 0
    assert score("red cat sun moon", "moon", "red cat sun moon", "red cat sun moon") == 0.75
    assert score("cat sun", rules=contains, contains=True) == 1
    assert score("cat moon", rules=contains, contains=True) == 0


def test_each_of_several_processes_takes_some_of_the_tasks(monkeypatch, tiny):
    """The scores come in the order of the tasks, so that their interval is that of one process."""
    exam, given = exam_of(load_tasks("tiny")["test"][:3], tiny, n_examples=4), []
    monkeypatch.setattr(evaluation.dist, "all_gather_object", lambda out, share: given.append(share))
    for process in 0, 1:
        with pytest.raises(TypeError):  # nobody fills in what the other one has
            evaluation.score("base", evaluation.by_base, exam, process, 2)
    assert [list(outcomes) for outcomes in given] == [[0, 2], [1]]

    def gather(out, share):
        out[:] = given[::-1]

    monkeypatch.setattr(evaluation.dist, "all_gather_object", gather)
    scores = evaluation.score("base", evaluation.by_base, exam, 0, 2)
    assert list(scores) == [task.name for task in exam.tasks]


def test_an_answer_counts_if_the_model_ended_it(tiny):
    """Otherwise "right, and more" would be cut to what is right."""
    examples = [Example("cat", ["a"]), Example("cat", ["a b c d e f g"])]
    exam = exam_of([data.Task("x", ["d"], [], examples)], tiny)
    assert evaluation.most_tokens(exam, exam.tasks[0]) == 9
    assert data.is_exact(examples[0], " a ", True) and not data.is_exact(examples[0], " a ", False)
    (whole,), _ = model.answer(*tiny, ["cat ->"], 64)
    n = len(whole.split())  # words and, besides, the end mark
    for most, ended in (n, False), (n + 1, True):
        texts, has_ended = model.answer(*tiny, ["cat ->"], most)
        assert has_ended == [ended] and len(texts[0].split()) == min(most, n)


def test_examples_in_the_prompt_are_not_those_asked(tiny):
    task = load_tasks("tiny")["test"][0]
    task = data.Task("x", ["d"], task.train[:4], [*task.test[:9], task.train[0]])  # one is in both parts
    exam = exam_of([task], tiny)
    for question in evaluation.questions_of(exam, task, evaluation.Given(n_shots=3)):
        *shown, asked = question.prompt.split("<eos>\n")
        shots = [shot.split(" ->")[0] for shot in shown]
        assert len(shots) == 3 and set(shots) <= {example.input for example in task.train}
        assert asked == f"{question.example.input} ->" and question.example.input not in shots


def test_another_place_of_the_text_encoder_is_that_of_one_network(tiny):
    """The networks of --recon and --compare may have been trained with others."""
    chosen = args(hypernet=str(TINY / "sft_large"), compare=[str(TINY / "sft_small")], encoder="./moved")
    nets = evaluation.load_nets(chosen, load_tasks("tiny")["test"], "cpu")
    assert [net.config.encoder for net in nets.values()] == ["./moved", "hash"]


def test_a_description_may_stand_for_a_list_of_them(tmp_path, capsys):
    name = load_tasks("tiny")["test"][0].name
    write_file(tmp_path / "d.json", {name: "Reverse the words."})
    chosen = args(descriptions=tmp_path / "d.json")
    (task,), _ = evaluation.tasks_to_judge(chosen)
    assert "d.json has descriptions of 1 of 25 tasks" in capsys.readouterr().out
    assert task.descriptions == ["Reverse the words."]
    assert load_tasks("tiny")["test"][0].descriptions != task.descriptions  # the source keeps its own
    write_file(tmp_path / "d.json", {name: [3]})
    refused("must be a text or a list of texts", evaluation.tasks_to_judge, chosen)


LEFT_OUT = {"mt_lora", "oracle", "recon", "base_other", "net_other"}  # of tasks with descriptions alone


def test_eval_writes_the_promised_json_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net", "hypernet"):  # a folder named like a method or a flag is a row of its own
        (tmp_path / name).symlink_to(TINY / "sft_small")
    words = ["--hypernet", TINY / "sft_large", "--n_tasks", "12", "--n_examples", "2", "--out", "scores.json"]
    assert command(evaluation, *words, "--compare", "net", "hypernet") == 0
    content, shown = read_json("scores.json"), capsys.readouterr().out
    assert command(evaluation, *words, "--tasks", tmp_path, "--methods", "net") == 2
    assert read_json("scores.json") == content  # a run that fails leaves the results of the last one
    assert "left out: mt_lora (needs --mt_lora DIR), oracle (needs --oracles DIR), base_other (needs" in shown
    methods = [name for name in evaluation.METHODS if name not in LEFT_OUT]
    assert list(content["results"]) == [*methods, "net of net", "net of hypernet"]
    assert content["settings"]["split"] == "test"
    for row, scores in content["results"].items():
        values = list(scores["per_task"].values())
        mean = sum(values) / 12
        assert len(values) == 12 and abs(scores["mean"] - mean) < 1e-9
        assert f"| {row} | {mean:.3f} | {evaluation.interval(values)} | {min(values):.2f} |" in shown
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
    monkeypatch.setattr(evaluation, "score", lambda *a: seen.append(a[2]) or real(*a))
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
    row = {"step": 1, "loss": 2.0, "val_loss": 1.0, "val_accuracy": 0.5}
    write_file(tmp_path / "run" / "metrics.jsonl", "\n".join(map(json.dumps, [row, row | {"step": 2}])))
    assert command(plot, tmp_path / "run", tmp_path / "run.png") == 0
    assert (tmp_path / "run.png").stat().st_size > 5000
    assert command(plot, tmp_path / "r.json", tmp_path / "r.txt") == 2


def test_an_answer_may_be_as_long_as_the_right_one(tiny):
    """More than the 64 tokens that generate.py writes."""

    def most(n_words: int, most_tokens: int = 0, **changes) -> int:
        rules = data.Rules(most_tokens=most_tokens)
        task = data.Task("x", ["d"], [], [Example("cat", [repeated("cat ", n_words)])], rules=rules)
        return evaluation.most_tokens(exam_of([task], tiny, **changes), task)

    assert (most(99), most(99, max_new_tokens=7), most(99, contains=True, max_new_tokens=7)) == (101, 7, 7)
    assert most(99, 256) == 256 and most(99, contains=True) == 101 and most(9, contains=True) == 64


def test_the_mean_adapter_is_that_of_the_training_tasks(tiny, monkeypatch):
    tasks = load_tasks("tiny")["train"][:3]
    exam = exam_of(tasks, tiny, training=tasks)
    with torch.no_grad():
        written = exam.nets["hypernet"]([task.descriptions[0] for task in tasks])
        mean = evaluation.by_net_mean(exam, 0).adapters
    for name, (A, B) in written.items():
        close(mean[name], (A.mean(0, keepdim=True), B.mean(0, keepdim=True)), 1e-4)
    names = {*evaluation.METHODS} - LEFT_OUT
    assert {*evaluation.methods_to_run(args(), exam)} == names
    few = exam_of(tasks[:1], tiny)
    assert {*evaluation.methods_to_run(args(), few)} == names - {"net_mean", "net_shuffled"}
    chosen = args(methods=["net_shuffled"])
    refused("net_shuffled needs a second task", evaluation.methods_to_run, chosen, few)
    few.nets = evaluation.load_nets(args(base_model="mistralai/x", methods=["net"]), tasks, "cpu")
    refused("the method net needs --hypernet DIR", evaluation.methods_to_run, args(methods=["net"]), few)
    read = []
    many = exam_of(tasks, tiny, training=[data.Task(str(i), [str(i)], [], []) for i in range(1200)])
    monkeypatch.setattr(generate, "write_adapters", lambda net, texts, base: (read.append(texts[0]) or {}, 0))
    assert many.mean == {} and read == [str(i) for i in range(0, 1200, 3)]  # of all kinds, not the first ones
