"""The methods and scores of eval.py."""

import json
import re
import types

import pytest
import torch

import data
import eval as evaluation
import hypernet
import lora
import model
from data import Example
from extras import plot
from support import read_json, write_file
from tasks import benchmarks, load_tasks
from tests.helpers import NAMES, TINY, close, command, refused, repeated

ARGS = dict(n_examples=None, batch_size=8, contains=False, max_new_tokens=None, base_model=None, encoder=None)
ARGS |= dict(methods=None, compare=[], hypernet=None, mt_lora=None, oracles=None, recon=None)
ARGS["instruction"] = None


def args(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**ARGS | changes)


@pytest.fixture(scope="module")
def tiny():
    """The tiny base model and its tokenizer."""
    return model.load_base(model.TINY)


def exam_of(tasks: list[data.Task], tiny, training=(), specs=None) -> evaluation.Exam:
    """These tasks, with the small shipped hypernetwork of the tiny world."""
    base, tokenizer = tiny
    net = hypernet.load_hypernet(TINY / "sft_small")
    net.connect(base, tokenizer)
    if not hasattr(base, "lora_layers"):
        lora.inject(base, NAMES)
    return evaluation.Exam(tasks, list(training), specs or {}, {"hypernet": net}, {}, base, tokenizer)


def test_which_descriptions_a_method_is_given(tiny):
    tasks = load_tasks("tiny")["test"][:3]

    def used(name, with_instruction=False, exam=exam_of(tasks, tiny)):
        method = evaluation.METHODS[name].function(exam)
        return evaluation.questions_of(exam, method, args(instruction=with_instruction))

    for question in used("net_reworded"):
        assert question.text in tasks[question.index].reworded
    for question in used("net_shuffled"):
        assert question.text in tasks[(question.index + 1) % 3].descriptions
    known = {text for task in tasks for text in [*task.descriptions, *task.reworded]}
    assert not known & {question.text for question in used("net_random")}
    assert len(used("net")) == 75

    def instruction(question) -> str:
        return question.prompt.removesuffix(f"\n\n{question.example.input} ->")

    assert all(instruction(asked) in tasks[asked.index].descriptions for asked in used("prompt"))
    for question in used("net_shuffled", True):  # the task's own instruction
        assert instruction(question) in [model.instruct(text) for text in tasks[question.index].descriptions]
    for name in ("net", "net_reworded"):  # the prompt says what the network reads
        for question in used(name, True):
            assert instruction(question) == model.instruct(question.text)
    examples = [Example("cat", ["red"]) for i in range(30)]
    piqa = benchmarks.BENCHMARKS["piqa"]._replace(start=lambda example: "so")
    exam = exam_of([data.Task("piqa", list("abcd"), [], examples)], tiny, specs={"piqa": piqa})
    asked = used("net", True, exam)
    assert len(used("base", exam=exam)) == 30
    assert asked[0].prompt == "cat -> so"  # the start of the answer stands where the answer would
    assert sorted(question.text for question in asked) == 30 * ["a"] + 30 * ["b"] + 30 * ["c"]


def test_scores_and_their_interval(monkeypatch, tiny):
    low, high = map(float, evaluation.interval([0.0, 1.0] * 50).split(" to "))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)  # the normal approximation
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)

    def goes_on(base, tokenizer, prompts, most):
        words = "red cat sun moon".split()
        return [" ".join(words[:n]) for n in most], [n > 4 for n in most]  # it ends after four words

    monkeypatch.setattr(model, "answer", goes_on)

    def score(*right: str, **changes) -> float:
        tasks = [data.Task("x", ["d"], [], [Example("cat dog", [answer]) for answer in right])]
        exam = exam_of(tasks, tiny)
        return evaluation.score("base", exam, evaluation.Method(), args(**changes))["x"]

    assert score("red cat sun moon") == 1 and score("red") == 0  # an answer that goes on is wrong
    assert score("red cat sun") == 0
    assert score("red cat sun moon", "moon", "red cat sun moon", "red cat sun moon") == 0.75
    assert score("cat sun", contains=True) == 1 and score("cat moon", contains=True) == 0


def test_each_of_several_processes_answers_its_share(monkeypatch, tiny):
    exam, given = exam_of(load_tasks("tiny")["test"][:1], tiny), []
    monkeypatch.setattr(evaluation.dist, "all_gather_object", lambda out, share: given.append(share))
    for process in 0, 1:
        with pytest.raises(TypeError):  # nobody fills in what the other one has
            evaluation.score("base", exam, evaluation.Method(), args(n_examples=20), process, 2)
    assert [len(hits) for hits, _ in given] == [12, 8]  # of batches of 8, 8 and 4


def test_an_answer_is_cut_at_its_own_limit_and_counts_if_the_model_ended_it(tiny):
    """Also in a batch with longer ones; otherwise "right, and more" would be cut to what is right."""
    examples = [Example("cat", ["a"]), Example("cat", ["a b c d e f g"])]
    assert [evaluation.most_tokens(tiny[1], example, None, args()) for example in examples] == [3, 9]
    assert evaluation.is_right(examples[0], " a ", True)
    assert not evaluation.is_right(examples[0], " a ", False)
    (whole,), _ = model.answer(*tiny, ["cat ->"], 64)
    n = len(whole.split())
    texts, ended = model.answer(*tiny, 3 * ["cat ->"], [n - 1, n, n + 1])
    assert ended == [False, False, True] and [len(text.split()) for text in texts] == [n - 1, n, n]


def test_examples_in_the_prompt_are_not_those_asked(tiny):
    task = load_tasks("tiny")["test"][0]
    task = data.Task("x", ["d"], task.train[:4], [*task.test[:9], task.train[0]])  # one is in both parts
    exam = exam_of([task], tiny)
    for question in evaluation.questions_of(exam, evaluation.Method(n_shots=3), args()):
        *shown, asked = question.prompt.split("<eos>\n")
        shots = [shot.split(" ->")[0] for shot in shown]
        assert len(shots) == 3 and set(shots) <= {example.input for example in task.train}
        assert asked == f"{question.example.input} ->" and question.example.input not in shots


def test_a_description_may_stand_for_a_list_of_them(tmp_path):
    name = load_tasks("tiny")["test"][0].name
    write_file(tmp_path / "d.json", {name: "Reverse the words."})
    chosen = args(tasks="tiny", split="test", n_tasks=0, descriptions=tmp_path / "d.json")
    (task,), _ = evaluation.tasks_to_judge(chosen, {})
    assert task.descriptions == ["Reverse the words."]
    assert load_tasks("tiny")["test"][0].descriptions != task.descriptions  # the source keeps its own
    write_file(tmp_path / "d.json", {name: [3]})
    refused("must be a text or a list of texts", evaluation.tasks_to_judge, chosen, {})


def test_eval_writes_the_promised_json_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net", "hypernet"):  # a folder named like a method or a flag is a row of its own
        (tmp_path / name).symlink_to(TINY / "sft_small")
    words = ["--hypernet", TINY / "sft_large", "--n_tasks", "12", "--n_examples", "4", "--out", "scores.json"]
    assert command(evaluation, *words, "--compare", "net", "hypernet") == 0
    content, shown = read_json("scores.json"), capsys.readouterr().out
    assert command(evaluation, *words, "--tasks", tmp_path, "--methods", "net") == 2
    assert read_json("scores.json") == content  # a run that fails leaves the results of the last one
    assert "left out: mt_lora (needs --mt_lora DIR), oracle (needs --oracles DIR), recon (needs" in shown
    methods = [name for name in evaluation.METHODS if name not in ("mt_lora", "oracle", "recon")]
    assert list(content["results"]) == [*methods, "./net", "./hypernet"]
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


def test_methods_without_adapters_leave_the_base_model_as_it_is(monkeypatch):
    """No layer is replaced. The former names of methods are known."""
    seen, real = [], evaluation.score
    monkeypatch.setattr(evaluation, "score", lambda *a: seen.append(a[:2]) or real(*a))
    words = ["--n_tasks", "2", "--n_examples", "2", "--methods"]
    assert command(evaluation, *words, "base,prompt") == 0
    assert not any(hasattr(exam.base, "lora_layers") for _, exam in seen)
    seen.clear()
    assert command(evaluation, *words, "t2l,t2l_shuffled") == 0
    assert [name for name, _ in seen] == ["net", "net_shuffled"]


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
    example = Example("cat", [repeated("cat ", 99)])

    def most(spec=None, **changes) -> int:
        return evaluation.most_tokens(tiny[1], example, spec, args(**changes))

    assert (most(), most(max_new_tokens=7), most(contains=True, max_new_tokens=7)) == (101, 7, 7)
    assert most(benchmarks.BENCHMARKS["gsm8k"]) == 256


def test_the_mean_adapter_is_that_of_the_training_tasks(tiny):
    tasks = load_tasks("tiny")["train"][:3]
    exam = exam_of(tasks, tiny, training=tasks)
    with torch.no_grad():
        written = exam.nets["hypernet"]([task.descriptions[0] for task in tasks])
    mean = evaluation.by_net_mean(exam).adapters([])
    for name, (A, B) in written.items():
        close(mean[name], (A.mean(0, keepdim=True), B.mean(0, keepdim=True)), 1e-4)
    names = {*evaluation.METHODS} - {"mt_lora", "oracle", "recon"}
    assert {*evaluation.methods_to_run(args(), exam)} == names
    exam = exam_of(tasks[:1], tiny)
    assert {*evaluation.methods_to_run(args(), exam)} == names - {"net_mean", "net_shuffled"}
    chosen = args(methods=["net_shuffled"])
    refused("net_shuffled needs a second task", evaluation.methods_to_run, chosen, exam)
    chosen = args(base_model="mistralai/x", methods=["net"])
    none = exam._replace(nets=evaluation.load_nets(chosen, tasks, "cpu"))
    refused("the method net needs --hypernet DIR", evaluation.methods_to_run, chosen, none)
