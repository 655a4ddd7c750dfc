"""Benchmarks: their rows as prompts, their scores, code that models write."""

import time
from functools import partial

import yaml

from tasks import benchmarks
from tests.helpers import *  # noqa: F403

TWO = dict(label=["A", "B"], text=["two", "one"])
FUNCTION = dict(prompt="def f(x):\n", canonical_solution="    return x\n", entry_point="f")
ROWS = {  # a row of each kind of benchmark, an answer that is right and one that is wrong
    "arc_easy": (dict(question="2?", choices=TWO, answerKey="A"), "a. two", "B"),
    "openbookqa": (dict(question_stem="2?", choices=TWO, answerKey="B"), " b", "A"),
    "hellaswag": (dict(ctx="He runs", endings=["a", "b", "c", "d"], label="3"), "3", "2"),
    "piqa": (dict(goal="Sit", sol1="on a chair", sol2="on air", label=0), "0: on a chair", "1"),
    "winogrande": (dict(sentence="_ ran", option1="Al", option2="Bo", answer="2"), "2", "1"),
    "boolq": (dict(passage="Ice is cold.", question="is ice cold", answer=True), "Yes, it is.", "False"),
    "gsm8k": (dict(question="2 + 1000?", answer="It is\n#### 1,002"), "2 + 1000 = 1002.", "1,002 is not 3"),
    "humaneval": (FUNCTION | dict(test="def check(f):\n    assert f(3) == 3"), "    return x\n```", "    1"),
    "mbpp": (dict(text="Add.", code="", test_list=["assert g(1) == 2"]), "def g(x): return x + 1", "g = 0"),
}


CHOICES = {"arc_easy": "A. two\nB. one", "hellaswag": "0. a\n1. b\n", "piqa": "0. on a chair\n1. on air"}
CHOICES["winogrande"] = "1. Al\n2. Bo"


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmarks_row_as_prompt_and_score(name):
    row, right, wrong = ROWS[name]
    example, shown = benchmarks.BENCHMARKS[name].to_example(row)
    metric = partial(benchmarks.BENCHMARKS[name].is_right, has_ended=True)
    texts = {value for value in row.values() if isinstance(value, str) and value in example.input}
    assert texts and metric(example, right) and not metric(example, wrong)
    assert CHOICES.get(name, "") in example.input
    assert metric.func is benchmarks.passes_tests or metric(example, shown)
    if name == "humaneval":
        assert benchmarks.with_head(example) == "```python\ndef f(x):\n"
    if name == "gsm8k":  # a range has no negative number
        assert metric(Example("", ["5"]), "between 3-5.") and not metric(Example("", ["5"]), "It is -5.")


def test_benchmarks_are_downloaded_once_and_whole(server, monkeypatch):
    piqa = benchmarks.BENCHMARKS["piqa"]._replace(records=("ybisk/piqa", "plain_text", "validation", 150))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "piqa", piqa)

    def page(n: int, total: int = 150) -> tuple[bytes, int]:
        content = {"num_rows_total": total, "rows": [{"row": ROWS["piqa"][0]}] * n}
        return json.dumps(content).encode(), 200

    config = {"additional_eval_descs": ["ggg", "7@9"], "eval_ds_info": {}}
    for name in benchmarks.BENCHMARKS:
        config["eval_ds_info"][name] = {"descriptions": [f"{name} {i}" for i in range(3)]}
    lacking = config | {"eval_ds_info": {}}
    server.replies = [(yaml.safe_dump(lacking).encode(), 200)]
    refused("tasks.yaml: arc_challenge must be a text or", benchmarks.load, "piqa", False)
    server.replies = [(yaml.safe_dump(config).encode(), 200)]
    for wrong in (page(100)[0][:-9], 200), page(100, 151), page(99):  # cut off, of another length, too short
        server.replies.append(wrong)
        refused("rows 0 to 100 of 150 are not in", benchmarks.load, "piqa", False)
    server.replies = [(b"", 429), page(100), (b"", 500)]
    refused("rows 100 to 150 of 150", benchmarks.load, "piqa", False)
    server.replies = [page(50)]
    (task,) = benchmarks.load("piqa", False)["test"]
    assert server.waits == [7] and len(task.test) == 150
    assert task.descriptions == ["piqa 0", "piqa 1", "piqa 2"] and task.rules.meaningless == ["ggg", "7@9"]
    offsets = [re.search(r"offset=(\d+)", path)[1] for path in server.asked if "offset" in path]
    assert offsets == ["0"] * 5 + ["100"] * 2
    assert benchmarks.load("piqa", False)["test"] == [task] and len(server.asked) == 9
    assert benchmarks.load("tiny", False) is None
    refused("there is no benchmark nonsense", benchmarks.load, "piqa,nonsense", False)


HOSTILE = ["while True: pass", "import sys; sys.exit(0)", "import os; os._exit(0)", "input()", "1 / 0"]
HOSTILE += ["import os\nwhile True: os.fork()", "x = 'a' * 10**10", "open('x', 'w').write('a' * 10**8)"]
HOSTILE += ["import os; os.environ['PATH']"]


RIGHT = """
from __future__ import annotations
import os, sys
from dataclasses import dataclass
if __name__ == "__main__": sys.exit(1)
@dataclass
class Point:
    x: int
os.chdir("/")
assert Point(1) == Point(1)
"""


@pytest.mark.parametrize("program", HOSTILE)
def test_generated_code_cannot_pass_or_hurt(program):
    assert benchmarks.run_program(RIGHT)
    started = time.perf_counter()
    assert not benchmarks.run_program(program, seconds=1) and time.perf_counter() - started < 5


def test_the_table_of_benchmarks(tmp_path, monkeypatch, capsys):
    """A base model's own answers are right; code is left out without --run_code."""
    base, tokenizer = model.load_base(model.TINY)
    (said,) = model.answer(base, tokenizer, ["cat ->"])
    both, tasks = {name: benchmarks.BENCHMARKS[name] for name in ("mbpp", "piqa")}, {}
    for name, right in (("piqa", said.text.strip()), ("mbpp", "assert False")):
        rules = both[name]._replace(most_tokens=64)
        tasks[name] = data.Task(name, ["d"] * 3, [], [Example("cat", [right])], rules=rules)
    monkeypatch.setattr(benchmarks, "BENCHMARKS", both)
    monkeypatch.setattr(benchmarks, "benchmark_task", tasks.get)
    for flags, columns in ([], "piqa | average"), (["--run_code"], "mbpp | piqa | average"):
        words = ["--tasks", "benchmarks", "--methods", "base,net", *flags, "--out", tmp_path / "b.json"]
        assert command(evaluation, *words) == 0
        shown = capsys.readouterr().out
        assert f"| method | {columns} |" in shown and ("without --run_code" in shown) == (not flags)
        assert read_json(tmp_path / "b.json")["results"]["base"]["per_task"]["piqa"] == 1.0
    assert command(evaluation, "--tasks", "mbpp") == 2
    assert "error: mbpp is scored by running code" in capsys.readouterr().err
    beside = benchmarks.beside_published({"base": {"piqa": 0.5}}, model.resolve("mistral-7b"))
    assert "| t2l (published) | 0.82 |  |" in evaluation.make_table(beside, "test")
