"""The methods and scores of eval.py."""

import contextlib
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
from tests.helpers import TINY, command, config_for, evaluate, fit, random_adapter, refused, repeated


def test_all_documents_are_scored_also_those_of_equal_names(tmp_path, monkeypatch):
    asked, real = [], evaluation.make_questions
    monkeypatch.setattr(evaluation, "make_questions", lambda *a: asked.extend(real(*a)) or real(*a))
    results = evaluate(tmp_path / "f.json", "--tasks", "facts", "--methods", "base", "--n_examples", "1")
    assert len(asked) == 100 and len(results["base"]["per_task"]) == 6


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
    for question in used("t2l_shuffled", True):  # the task's own instruction
        assert question.instruction in [model.instruct(text) for text in question.task.descriptions]
    for name in ("t2l", "t2l_reworded"):  # the prompt says what the network reads
        for question in used(name, True):
            assert question.instruction == model.instruct(question.description)
    benchmark = data.Task(
        "piqa", list("abc"), [], [Example(str(i), ["1"]) for i in range(30)], n_scored=None, n_descriptions=3
    )
    methods = [evaluation.METHODS[name] for name in ("base", "t2l")]
    counts = [len(evaluation.make_questions([benchmark], method, False, args)) for method in methods]
    assert counts == [30, 90]


def test_scores_and_their_interval(monkeypatch):
    low, high = map(float, tables.interval([0.0, 1.0] * 50).split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)
    base, tokenizer = model.load_base("tiny")

    def goes_on(base, tokenizer, prompts, n):
        return [" ".join("red cat sun moon".split()[:n])]

    monkeypatch.setattr(model, "answer", goes_on)
    models = types.SimpleNamespace(tokenizer=tokenizer, base=base)
    models.has_instruction, models.use_adapters = lambda *_: False, lambda *_: contextlib.nullcontext()
    args = types.SimpleNamespace(n_examples=None, batch_size=8, contains=False, max_new_tokens=None)

    def score(right: str) -> float:
        task = data.Task("x", ["d"], [], [Example("cat dog", [right])])
        return evaluation.score(models, [task], "base", evaluation.METHODS["base"], args)["x"]

    assert score("red cat sun moon") == 1 and score("red") == 0  # an answer that goes on is wrong
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


def test_eval_writes_the_promised_json_and_table(tmp_path, capsys):
    out = tmp_path / "scores.json"
    words = ["--hypernet", TINY / "sft_large", "--n_tasks", "12", "--n_examples", "4", "--out", out]
    same_name = tmp_path / "sft_small"  # as the folder of another one
    same_name.symlink_to(TINY / "sft_large")
    words += ["--methods", "base,t2l,t2l_shuffled", "--compare", TINY / "sft_small", same_name]
    assert command(evaluation, *words) == 0
    content, shown = read_file(out), capsys.readouterr().out
    rows = ["base", "t2l", "t2l_shuffled", str(TINY / "sft_small"), str(same_name)]
    assert list(content["results"]) == rows
    assert content["settings"]["split"] == "test"
    for row, scores in content["results"].items():
        values = list(scores["per_task"].values())
        mean = sum(values) / 12
        assert len(values) == 12 and abs(scores["mean"] - mean) < 1e-9
        assert f"| {row} | {mean:.3f} | {tables.interval(values)} | {min(values):.2f} |" in shown


def test_a_folder_named_like_a_method_or_a_flag_is_a_row_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["base", "t2l", "recon", "hypernet", "oracles"]
    for name in names:
        (tmp_path / name).symlink_to(TINY / "sft_small")
    words = ["--methods", "base", "--compare", *names, "--n_tasks", "2", "--n_examples", "2"]
    results = evaluate(tmp_path / "e.json", *words)
    assert list(results) == ["base", *(f"./{name}" for name in names)]
    assert all(results[f"./{name}"]["mean"] > results["base"]["mean"] for name in names)


def test_what_is_left_out_is_said(tmp_path, capsys):
    words = ["--hypernet", TINY / "sft_small", "--n_tasks", "1", "--n_examples", "1"]
    assert command(evaluation, *words) == 0
    left_out = "left out: mt_lora (needs --mt_lora DIR), oracle (needs --oracles DIR), t2l_shuffled (needs"
    assert left_out in capsys.readouterr().out


def test_few_tasks_have_a_column_each():
    results = {"t2l": {"16 lines": 0.5, "4 lines": 1.0}, "prompt": {"4 lines": 0.25}}
    lines = tables.make_table(results, "long").splitlines()
    assert lines[0] == "| method | 4 lines | 16 lines |"
    assert lines[2:] == ["| t2l | 1.00 | 0.50 |", "| prompt | 0.25 |  |"]


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


def test_a_lora_for_a_base_model_without_a_shipped_network(places, tmp_path, capsys):
    base, _ = model.load_base(str(places["base"]))
    config = config_for(base, base_model=str(places["base"]))
    lora.save_adapter(tmp_path / "mt", random_adapter(config), config)
    words = [
        "--base_model",
        places["base"],
        "--mt_lora",
        tmp_path / "mt",
        "--n_tasks",
        "2",
        "--n_examples",
        "2",
    ]
    results = evaluate(tmp_path / "e.json", *words)
    assert list(results) == ["base", "icl", "prompt", "mt_lora"]


def test_only_benchmarks_have_published_rows(tmp_path, capsys):
    """Also if a task of one's own is called like one."""
    task = {"name": "piqa", "descriptions": ["x"], "Instances": [{"input": "cat", "output": ["cat"]}] * 5}
    write_file(tmp_path / "a.json", task)
    words = ["--tasks", tmp_path, "--split", "train", "--methods", "base"]
    assert command(evaluation, *words) == 0
    assert "published" not in capsys.readouterr().out


def test_a_lora_is_asked_as_it_was_trained(tmp_path):
    """With the instruction in the prompt, if it was there in training."""
    words = ["--n_tasks", "4", "--tasks_per_batch", "4", "--max_steps", "1"]
    for name, given in (("plain", []), ("with", ["--instruction"])):
        fit(tmp_path / name, "@config/mt_lora.args", *words, *given)
        assert lora.load_adapter(tmp_path / name)[1].instruction == bool(given)
        args = types.SimpleNamespace(mt_lora=tmp_path / name, instruction=None, base_model=None, dtype=None)
        method = evaluation.METHODS["mt_lora"]
        models = evaluation.Models(args, {"mt_lora": method}, load_tasks("tiny")["val"], torch.device("cpu"))
        assert models.has_instruction("mt_lora", args) == bool(given)


def test_what_has_been_scored_is_written_if_a_later_method_fails(tmp_path, monkeypatch):
    real, calls = evaluation.score, []

    def score(*args):
        calls.append(1)
        return real(*args) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr(evaluation, "score", score)
    words = ["--n_tasks", "2", "--n_examples", "2", "--methods", "base,icl,t2l", "--out", tmp_path / "r.json"]
    with pytest.raises(ZeroDivisionError):
        command(evaluation, *words)
    assert list(read_file(tmp_path / "r.json")["results"]) == ["base", "icl"]


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


def test_answers_may_begin_or_end_with_a_space_and_tasks_with_a_number():
    assert data.exact_match(Example("x", [" a b "]), "a b")
    table = tables.make_table({"t2l": {"3-digit addition": 0.5, "16 lines": 1.0}}, "test")
    assert table.splitlines()[0] == "| method | 3-digit addition | 16 lines |"
