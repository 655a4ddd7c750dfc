"""The methods and scores of eval.py."""

import contextlib
import re
import types

import pytest
import torch

import data
import eval as evaluation
import lora
import model
from data import Example
from extras import plot
from support import tables
from support.files import read_file, write_file
from tasks import checks, load_tasks
from tests.helpers import TINY, command, refused, repeated


def test_which_descriptions_a_method_is_given():
    args = types.SimpleNamespace(n_examples=None)
    tasks = load_tasks("tiny")["test"][:3]

    def used(name, with_instruction=False):
        return evaluation.make_questions(tasks, evaluation.METHODS[name], with_instruction, args)

    for question in used("t2l_reworded"):
        assert question.description in question.task.reworded
    for question in used("t2l_shuffled"):
        assert question.description in tasks[(tasks.index(question.task) + 1) % 3].descriptions
    known = {text for task in tasks for text in [*task.descriptions, *task.reworded]}
    assert not known & {question.description for question in used("t2l_random")}
    assert len(used("t2l")) == 75
    assert all(question.instruction == question.description for question in used("prompt"))
    for question in used("t2l_shuffled", True):  # the task's own instruction
        assert question.instruction in [model.instruct(text) for text in question.task.descriptions]
    for name in ("t2l", "t2l_reworded"):  # the prompt says what the network reads
        for question in used(name, True):
            assert question.instruction == model.instruct(question.description)
    examples = [Example(str(i), ["1"]) for i in range(30)]
    tasks = [data.Task("piqa", list("abc"), [], examples, n_scored=None, n_descriptions=3)]
    assert len(used("base")) == 30
    assert sorted(question.description for question in used("t2l")) == 30 * ["a"] + 30 * ["b"] + 30 * ["c"]


def test_scores_and_their_interval(monkeypatch):
    low, high = map(float, tables.interval([0.0, 1.0] * 50).split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)
    base, tokenizer = model.load_base("tiny")

    def goes_on(base, tokenizer, prompts, n):
        assert all(prompt.endswith("-> so") for prompt in prompts)
        return len(prompts) * [" ".join("red cat sun moon".split()[:n])]

    assert data.exact_match(Example("x", ["c", " a b "]), "a b")
    monkeypatch.setattr(model, "answer", goes_on)
    models = types.SimpleNamespace(tokenizer=tokenizer, base=base)
    models.has_instruction, models.use_adapters = lambda *_: False, lambda *_: contextlib.nullcontext()
    args = types.SimpleNamespace(n_examples=None, batch_size=8, contains=False, max_new_tokens=None)

    def score(*right: str) -> float:
        examples = [Example("cat dog", [answer]) for answer in right]
        task = data.Task("x", ["d"], [], examples, start=lambda example: " so")
        return evaluation.score(models, [task], "base", evaluation.METHODS["base"], args)["x"]

    assert score("red cat sun moon") == 1 and score("red") == 0  # an answer that goes on is wrong
    assert score("red cat sun moon", "moon", "red cat sun moon", "red cat sun moon") == 0.75
    args.contains = True
    assert score("red") == 1


def test_examples_in_the_prompt_are_not_those_asked():
    args = types.SimpleNamespace(n_examples=None)
    task = load_tasks("tiny")["test"][0]
    task = data.Task("x", ["d"], task.train[:4], [*task.test[:9], task.train[0]])  # one is in both parts
    for question in evaluation.make_questions([task], evaluation.METHODS["icl"], False, args):
        shown = [text for text, _ in question.shots]
        assert len(shown) == 3 and set(shown) <= {example.input for example in task.train}
        assert question.example.input not in shown


def test_a_description_may_stand_for_a_list_of_them(tmp_path):
    name = load_tasks("tiny")["test"][0].name
    write_file(tmp_path / "d.json", {name: "Reverse the words."})
    args = types.SimpleNamespace(tasks="tiny", split="test", n_tasks=0, run_code=False, instruction=None)
    args.descriptions = tmp_path / "d.json"
    (task,) = checks.choose_scored(args, [])
    assert task.descriptions == ["Reverse the words."]
    assert load_tasks("tiny")["test"][0].descriptions != task.descriptions  # the source keeps its own
    write_file(tmp_path / "d.json", {name: [3]})
    refused("must be a text or a list of texts", checks.choose_scored, args, [])


def test_eval_writes_the_promised_json_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("t2l", "hypernet"):  # a folder named like a method or a flag is a row of its own
        (tmp_path / name).symlink_to(TINY / "sft_small")
    words = ["--hypernet", TINY / "sft_large", "--n_tasks", "12", "--n_examples", "4", "--out", "scores.json"]
    assert command(evaluation, *words, "--compare", "t2l", "hypernet") == 0
    content, shown = read_file("scores.json"), capsys.readouterr().out
    assert "left out: mt_lora (needs --mt_lora DIR), oracle (needs --oracles DIR), recon (needs" in shown
    methods = [name for name in evaluation.METHODS if name not in ("mt_lora", "oracle", "recon")]
    assert list(content["results"]) == [*methods, "./t2l", "./hypernet"]
    assert content["settings"]["split"] == "test"
    for row, scores in content["results"].items():
        values = list(scores["per_task"].values())
        mean = sum(values) / 12
        assert len(values) == 12 and abs(scores["mean"] - mean) < 1e-9
        assert f"| {row} | {mean:.3f} | {tables.interval(values)} | {min(values):.2f} |" in shown
    cost = r"^(\S+) +[.\d]+   (\d+) tokens in a prompt, \d+ ms for an answer"
    lengths = dict(re.findall(cost, shown, re.M))
    assert lengths["t2l"] == lengths["base"] == "5"  # four words and a mark
    assert int(lengths["icl"]) > 4 * 5
    results = {"t2l": {"16 lines": 0.5, "3-digit sums": 1.0}, "base": {"3-digit sums": 0}}
    table = tables.make_table(results, "test")
    assert table.splitlines()[0] == "| method | 3-digit sums | 16 lines |"
    assert table.splitlines()[2:] == ["| t2l | 1.00 | 0.50 |", "| base | 0.00 |  |"]


@pytest.mark.parametrize("names", ["ab", ["4 lines", "16 lines"]])
def test_scores_are_drawn(tmp_path, names):
    pytest.importorskip("matplotlib")
    results = {"base": {"mean": 0.1, "per_task": dict.fromkeys(names, 0.1)}}
    write_file(tmp_path / "r.json", {"settings": {"split": "test"}, "results": results})
    assert command(plot, tmp_path / "r.json", tmp_path / "new" / "r.png") == 0
    assert (tmp_path / "new" / "r.png").stat().st_size > 5000
    write_file(tmp_path / "r.json", {})
    assert command(plot, tmp_path / "r.json", tmp_path / "r.png") == 2


def test_an_answer_may_be_as_long_as_the_right_one():
    """More than the 64 tokens that generate.py writes."""
    _, tokenizer = model.load_base("tiny")
    task = data.Task("x", ["d"], [], [Example("cat", [repeated("cat ", 99)])])
    question = evaluation.Question(task, task.test[0], "", "", [])
    args = types.SimpleNamespace(contains=False, max_new_tokens=None)
    assert evaluation.answer_tokens(tokenizer, question, args) == 101
    args.max_new_tokens = 7
    assert evaluation.answer_tokens(tokenizer, question, args) == 7
    args.contains, args.max_new_tokens, task.metric, task.answer_tokens = True, None, max, 256
    assert evaluation.answer_tokens(tokenizer, question, args) == 256  # of a benchmark


def test_the_mean_adapter_is_that_of_the_training_tasks():
    tasks = load_tasks("tiny")["train"][:3]
    args = types.SimpleNamespace(training_tasks=tasks, base_model=None, encoder=None, hypernet="x")
    base, tokenizer = model.load_base("tiny")
    source = evaluation.MeanWritten(str(TINY / "sft_small"), tasks, args, "cpu")
    lora.inject(base, list(source.config.targets))
    source.net.connect(base, tokenizer)
    for name, (A, B) in source.net([task.descriptions[0] for task in tasks]).items():
        found = source.adapters(base, [])[name]
        expected = [A.mean(0, keepdim=True), B.mean(0, keepdim=True)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    args.training_tasks = []
    lacks = evaluation.what_is_missing(evaluation.METHODS["t2l_mean"], args, tasks)
    assert lacks == "needs descriptions of training tasks"
    assert evaluation.what_is_missing(evaluation.METHODS["t2l_shuffled"], args, tasks[:1])
    args.hypernet, args.base_model = None, "mistral-7b"
    assert "no hypernetwork" in evaluation.what_is_missing(evaluation.METHODS["t2l"], args, tasks)
