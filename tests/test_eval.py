"""The methods and scores of eval.py."""

import contextlib
import json
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
from support import read_json, write_file
from tasks import benchmarks, load_tasks
from tests.helpers import TINY, close, command, refused, repeated, run_of

ARGS = dict(n_examples=None, batch_size=8, contains=False, max_new_tokens=None, base_model=None, encoder=None)


def args(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**ARGS | changes)


@pytest.fixture(scope="module")
def tiny():
    """The tiny base model and its tokenizer."""
    return model.load_base("tiny")


def test_which_descriptions_a_method_is_given(tiny):
    tasks = load_tasks("tiny")["test"][:3]

    def used(name, with_instruction=False):
        return evaluation.ask(tasks, evaluation.METHODS[name], with_instruction, args(), *tiny)

    for question in used("t2l_reworded"):
        assert question.description in question.task.reworded
    for question in used("t2l_shuffled"):
        assert question.description in tasks[(tasks.index(question.task) + 1) % 3].descriptions
    known = {text for task in tasks for text in [*task.descriptions, *task.reworded]}
    assert not known & {question.description for question in used("t2l_random")}
    assert len(used("t2l")) == 75

    def instruction(question) -> str:
        return question.prompt.removesuffix(f"\n\n{question.example.input} ->")

    assert all(instruction(question) in question.task.descriptions for question in used("prompt"))
    for question in used("t2l_shuffled", True):  # the task's own instruction
        assert instruction(question) in [model.instruct(text) for text in question.task.descriptions]
    for name in ("t2l", "t2l_reworded"):  # the prompt says what the network reads
        for question in used(name, True):
            assert instruction(question) == model.instruct(question.description)
    examples = [Example("cat", ["red"]) for i in range(30)]
    tasks = [benchmarks.Benchmark("piqa", list("abcd"), [], examples, spec=benchmarks.BENCHMARKS["piqa"])]
    assert len(used("base")) == 30 and used("t2l", True)[0].prompt == "cat ->"
    assert sorted(question.description for question in used("t2l")) == 30 * ["a"] + 30 * ["b"] + 30 * ["c"]


def test_scores_and_their_interval(monkeypatch, tiny):
    low, high = map(float, evaluation.interval([0.0, 1.0] * 50).split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)

    def goes_on(base, tokenizer, prompts, most):
        assert all(prompt.endswith("-> so") for prompt in prompts)
        words = "red cat sun moon".split()
        return [" ".join(words[:n]) for n in most], [n > 4 for n in most]  # it ends after four words

    monkeypatch.setattr(model, "answer", goes_on)
    monkeypatch.setattr(lora, "use", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(data.Task, "start", lambda self, example: " so")

    def score(*right: str, **changes) -> float:
        examples = [Example("cat dog", [answer]) for answer in right]
        tasks, method = [data.Task("x", ["d"], [], examples)], evaluation.METHODS["base"]
        questions = evaluation.ask(tasks, method, False, args(**changes), *tiny)
        source = evaluation.Source(lora.LoRAConfig(), None, lambda *_: {})
        return evaluation.score("base", questions, source, args(**changes), *tiny)["x"]

    assert score("red cat sun moon") == 1 and score("red") == 0  # an answer that goes on is wrong
    assert score("red cat sun") == 0
    assert score("red cat sun moon", "moon", "red cat sun moon", "red cat sun moon") == 0.75
    assert score("cat sun", contains=True) == 1 and score("cat moon", contains=True) == 0


def test_an_answer_is_cut_at_its_own_limit_and_counts_if_the_model_ended_it():
    """Also in a batch with longer ones; otherwise "right, and more" would be cut to what is right."""
    run = run_of()
    task = data.Task("x", ["d"], [], [Example("cat", ["a"]), Example("cat", ["a b c d e f g"])])
    assert [task.most_tokens(run.tokenizer, example) for example in task.test] == [3, 9]
    assert task.is_right(task.test[0], " a ", True) and not task.is_right(task.test[0], " a ", False)
    (whole,), _ = model.answer(run.base, run.tokenizer, ["cat ->"], 64)
    n = len(whole.split())
    texts, ended = model.answer(run.base, run.tokenizer, 3 * ["cat ->"], [n - 1, n, n + 1])
    assert ended == [False, False, True] and [len(text.split()) for text in texts] == [n - 1, n, n]


def test_examples_in_the_prompt_are_not_those_asked(tiny):
    task = load_tasks("tiny")["test"][0]
    task = data.Task("x", ["d"], task.train[:4], [*task.test[:9], task.train[0]])  # one is in both parts
    for question in evaluation.ask([task], evaluation.METHODS["icl"], False, args(), *tiny):
        *shown, asked = question.prompt.split("<eos>\n")
        shots = [shot.split(" ->")[0] for shot in shown]
        assert len(shots) == 3 and set(shots) <= {example.input for example in task.train}
        assert asked == f"{question.example.input} ->" and question.example.input not in shots


def test_a_description_may_stand_for_a_list_of_them(tmp_path):
    name = load_tasks("tiny")["test"][0].name
    write_file(tmp_path / "d.json", {name: "Reverse the words."})
    chosen = args(tasks="tiny", split="test", n_tasks=0, run_code=False, instruction=None)
    chosen.descriptions = tmp_path / "d.json"
    (task,), _ = evaluation.choose_tasks(chosen)
    assert task.descriptions == ["Reverse the words."]
    assert load_tasks("tiny")["test"][0].descriptions != task.descriptions  # the source keeps its own
    write_file(tmp_path / "d.json", {name: [3]})
    refused("must be a text or a list of texts", evaluation.choose_tasks, chosen)


def test_eval_writes_the_promised_json_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("t2l", "hypernet"):  # a folder named like a method or a flag is a row of its own
        (tmp_path / name).symlink_to(TINY / "sft_small")
    words = ["--hypernet", TINY / "sft_large", "--n_tasks", "12", "--n_examples", "4", "--out", "scores.json"]
    assert command(evaluation, *words, "--compare", "t2l", "hypernet") == 0
    content, shown = read_json("scores.json"), capsys.readouterr().out
    assert command(evaluation, *words, "--tasks", tmp_path, "--methods", "t2l") == 2
    assert read_json("scores.json") == content  # a run that fails leaves the results of the last one
    assert "left out: mt_lora (needs --mt_lora DIR), oracle (needs --oracles DIR), recon (needs" in shown
    methods = [name for name in evaluation.METHODS if name not in ("mt_lora", "oracle", "recon")]
    assert list(content["results"]) == [*methods, "./t2l", "./hypernet"]
    assert content["settings"]["split"] == "test"
    for row, scores in content["results"].items():
        values = list(scores["per_task"].values())
        mean = sum(values) / 12
        assert len(values) == 12 and abs(scores["mean"] - mean) < 1e-9
        assert f"| {row} | {mean:.3f} | {evaluation.interval(values)} | {min(values):.2f} |" in shown
    cost = r"^(\S+) +[.\d]+   (\d+) tokens in a prompt, \d+ ms for an answer"
    lengths = dict(re.findall(cost, shown, re.M))
    assert lengths["t2l"] == lengths["base"] == "5"  # four words and a mark
    assert int(lengths["icl"]) > 4 * 5
    results = {"t2l": {"16 lines": 0.5, "3-digit sums": 1.0}, "base": {"3-digit sums": 0}}
    table = evaluation.make_table(results, "test")
    assert table.splitlines()[0] == "| method | 3-digit sums | 16 lines |"
    assert table.splitlines()[2:] == ["| t2l | 1.00 | 0.50 |", "| base | 0.00 |  |"]


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
    task = data.Task("x", ["d"], [], [Example("cat", [repeated("cat ", 99)])])

    def most(task=task, **changes) -> int:
        (question,) = evaluation.ask([task], evaluation.METHODS["base"], False, args(**changes), *tiny)
        return question.most_tokens

    assert (most(), most(max_new_tokens=7), most(contains=True, max_new_tokens=7)) == (101, 7, 7)
    spec = benchmarks.BENCHMARKS["gsm8k"]
    assert most(benchmarks.Benchmark("x", ["d"], [], [Example("cat", ["1"])], spec=spec)) == 256


def test_the_mean_adapter_is_that_of_the_training_tasks(tiny):
    tasks = load_tasks("tiny")["train"][:3]
    config, net, _ = evaluation.hypernetwork(str(TINY / "sft_small"), tasks, args(), "cpu")
    base, tokenizer = model.load_base("tiny")
    lora.inject(base, list(config.targets))
    net.connect(base, tokenizer)
    mean = evaluation.mean_adapter(base, net, tasks)
    with torch.no_grad():
        written = net([task.descriptions[0] for task in tasks])
    for name, (A, B) in written.items():
        close(mean[name], [A.mean(0, keepdim=True), B.mean(0, keepdim=True)], 1e-4)
    chosen = args(methods=None, compare=[], hypernet=None, mt_lora=None, oracles=None, recon=None)
    names = {*evaluation.METHODS} - {"mt_lora", "oracle", "recon"}
    assert {*evaluation.choose_methods(chosen, tasks, tasks)} == names
    assert {*evaluation.choose_methods(chosen, tasks[:1], [])} == names - {"t2l_mean", "t2l_shuffled"}
    chosen.base_model, chosen.methods = "mistral-7b", "t2l"
    refused("no hypernetwork for mistral-7b", evaluation.choose_methods, chosen, tasks, tasks)
