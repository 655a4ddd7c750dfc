"""Sources of tasks."""

import copy
import email.message
import json
import random
import re
import time
import urllib.error

import pytest

import data
import eval as evaluation
import model
from data import Example
from extras import pretrain
from support import files
from support.files import UserError, read_file
from tasks import benchmarks, chores, folder, load_tasks, lots_of_loras, tiny
from tests.helpers import command, refused, repeated


def test_held_out_tasks_are_nowhere_in_training():
    splits = tiny.splits()
    assert [len(splits[k]) for k in ("train", "val", "test")] == [479, 8, 25]
    assert len({parts for tasks in splits.values() for parts in tasks}) == 512
    for kind, parts in enumerate((tiny.FILTERS, tiny.MAPS, tiny.LAYOUTS)):
        assert {task[kind] for task in splits["train"]} == set(parts)
    held_out = {"-".join(parts) for parts in splits["val"] + splits["test"]}
    assert not held_out & {task.name for task in load_tasks("tiny")["train"]}


def test_the_tiny_base_model_is_trained_on_what_the_chat_template_writes():
    held_out = set(tiny.splits()["val"] + tiny.splits()["test"])
    assert not held_out & set(pretrain.TASKS)
    texts = [text for step in range(2000, 20_000, 2000) for text in pretrain.draw(step, 20_000)]
    assert {len(example.input.split()) for text in texts for example in text} == {1, 2, 3, 4}
    _, tokenizer = model.load_base("tiny")
    for step in (8, 10_000, 10_001):  # lines to go on with, a task, and facts that are looked up
        for text in pretrain.draw(step, 20_000)[:3]:
            ids, labels = pretrain.tokenize(text)
            shots = [(example.input, example.answers[0]) for example in text[:-1]]
            chat = model.chat(tokenizer, text[-1].input, "", shots)
            prompt, answer = model.render(tokenizer, chat), model.render(tokenizer, chat, text[-1].answers[0])
            assert ids == model.tokenize(tokenizer, prompt) + model.tokenize(tokenizer, answer)
            n_answer_tokens = sum(len(example.answers[0].split()) + 1 for example in text)
            assert sum(label != -100 for label in labels) == n_answer_tokens


def test_tiny_answers_are_right_and_tell_tasks_apart():
    rng, words = random.Random(0), "cat red dog shirt".split()
    rules = {  # by hand
        ("animals", "french", "reversed"): "chien chat",
        ("all", "capitals", "joined"): "CAT and RED and DOG and SHIRT",
        ("clothes", "italian", "numbered"): "1. camicia",
        ("animals", "initial", "counted"): "c d (2)",
    }

    def keep(words, chosen):
        return [w for w in words if chosen == "all" or w in tiny.CATEGORIES[chosen]]

    def write(kept, change, layout):
        return " ".join(tiny.LAYOUTS[layout]([tiny.FORMS[w][change] for w in kept]))

    for (chosen, change, layout), right in rules.items():
        assert write(keep(words, chosen), change, layout) == right
    for parts in rng.sample(tiny.splits()["train"], 60):  # another part gives another answer
        chosen, change, layout = parts
        for _ in range(5):
            question, (answer,) = tiny.example(parts, rng)
            ours = keep(question.split(), chosen)
            assert answer == write(ours, change, layout) and len(set(question.split())) == 4
            assert all(other == change or answer != write(ours, other, layout) for other in tiny.MAPS)
            for other in tiny.LAYOUTS if len(ours) > 1 and change != "initial" else ():
                assert other == layout or answer != write(ours, change, other)


def test_reworded_descriptions_are_new(monkeypatch):
    tasks = load_tasks("tiny")
    train_words = {d for task in tasks["train"] for d in task.descriptions}
    for task in tasks["test"]:
        assert len(task.descriptions) == 128 and not train_words & set(task.reworded)
    for part, styles in tiny.WORLD["say"].items():
        for style in ("instruction", "phrase"):
            seen, withheld = styles[style]["seen"], styles[style]["withheld"]
            assert not set(seen) & set(withheld) and len(seen) + len(withheld) >= 14, part
    assert tiny.task(tiny.splits()["test"][0]) in tasks["test"]
    withheld_only = copy.deepcopy(tiny.WORLD)
    for styles in withheld_only["say"].values():
        for style in styles.values():
            style["seen"] = []
    monkeypatch.setattr(tiny, "WORLD", withheld_only)
    rng = random.Random(0)
    assert all(tiny.describe(parts, rng, reworded=True) for parts in tiny.splits()["test"])


@pytest.mark.parametrize("chain, question, answer", [
    ("email-domain any-capitals", "ida.rossi@post.org", "POST.ORG"),
    ("name-comma", "Ida Rossi", "Rossi, Ida"),
    ("date-long_us", "2024-03-05", "March 5, 2024"),
    ("time-ampm", "00:05", "12:05 am"),
    ("sentence-no_place sentence-did", "Al hid the red cup at school.", "Did Al hide the red cup?"),
    ("record-name name-initials", "age: 30; job: cook; city: Bonn; name: Ida Rossi", "I.R."),
    ("path-backslash", "a/b/c.txt", "a\\b\\c.txt"),
    ("words-no_last words-quoted", "cat, dog, cow", '"cat", "dog"'),
])  # fmt: skip
def test_a_chore_does_what_its_name_says(chain, question, answer):
    assert chores.answer(("", *chain.split()), question) == answer


def test_what_the_chores_withhold_is_nowhere_in_training():
    splits, unseen = load_tasks("chores"), set(chores.DATA["unseen"])
    train = {task.name for task in splits["train"]}
    chains = {chores.name_of(chain): chain for chain in chores.all_chains()}
    assert len(train) > 1500 and len(splits["test"]) == 100 and len(splits["unseen"]) == len(unseen) == 13
    assert not train & {task.name for split in ("test", "unseen") for task in splits[split]}
    assert not train & {task.name for task in splits["val"]} and len(splits["val"]) == 96
    for task in splits["val"][:64]:
        assert len(chains[task.name.removesuffix("-voice")]) == 3
    assert not any(unseen & set(chains[name]) for name in train) and not unseen & set(chores.WRITTEN["train"])
    surnames = next(task.train for task in splits["train"] if task.name == "name-surname")
    assert not {example.answers[0] for example in surnames[:500]} & set(chores.pool("last", True))
    for task in splits["train"][:300]:
        assert [example.input for example in task.test] != [example.input for example in task.train[:10]]
        if task.name == "name-surname":
            assert {example.answers[0] for example in task.test} <= set(chores.pool("last", True))
    assert len(splits["open"]) == 162 and all(len(task.test) == 4 for task in splits["open"])
    assert all(task.reworded for task in splits["test"] + splits["single"] + splits["unseen"])
    seen, withheld = [set(sum(chores.WRITTEN[part].values(), [])) for part in ("train", "test")]
    assert len(seen) > 8000 and not withheld & seen


def test_a_lazy_list_is_the_same_every_time():
    tasks, again = load_tasks("chores")["train"][:40], load_tasks("chores")["train"][:40]
    for task, other in zip(tasks, again):
        assert task.train[:3] == other.train[:3] and task.descriptions[:9] == other.descriptions[:9]
        assert len(set(task.descriptions[:30])) > 10
    rng, task = random.Random(0), tasks[0]
    assert len({example.input for example in data.sample(rng, task.train, 50)}) > 40
    with pytest.raises(IndexError):
        task.train[len(task.train)]


def test_lots_of_loras_is_downloaded_once_and_whole(tmp_path, monkeypatch, server):  # noqa: F811
    splits = read_file(lots_of_loras.NAMES)
    assert [len(splits[k]) for k in ("train", "val")] == [479, 11]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lots_of_loras, "URL", server.url)
    task = {"Definition": ["Do it."], "Instances": [{"id": "1", "input": "a", "output": ["b"]}] * 5}
    task = json.dumps(task).encode()
    server.files = {f"/{name}.json": (task, len(task)) for names in splits.values() for name in names}
    first, second = (f"/{name}.json" for name in splits["train"][:2])
    server.files[second] = (task[:-9], len(task))  # cut off
    refused(f"of 490 task files are not in .*{server.url}{second}", load_tasks, "lots-of-loras")
    server.files[second] = (task, len(task))
    tasks = load_tasks("lots-of-loras")
    assert [t.name for t in tasks["train"]] == splits["train"] and tasks["val"][0].definition == "Do it."
    assert server.asked.count(first) == 1 and server.asked.count(second) == 2
    assert load_tasks("lots-of-loras") == tasks and server.asked.count(first) == 1


def test_single_chores_are_drawn_as_often_as_four_chains():
    weights = {task.name: task.weight for task in load_tasks("chores")["train"]}
    for chain in chores.all_chains():
        if chores.name_of(chain) in weights:
            is_single = len(chain) == 2 and not chain[1].startswith("any")
            assert weights[chores.name_of(chain)] == (4 if is_single else 1)


SWAP = {"descriptions": ["Swap."], "Instances": [{"input": "a b", "output": ["b a"]}]}
MISTAKES = {  # files, and what the one line of error says; {f} is the folder
    "splits as a list": ({"splits.json": ["a"]}, 'splits.json must be {"train": [...], "val"'),
    "a text for a list": ({"splits.json": {"train": "a"}}, '"train" must be a list of file names'),
    "names with .json": ({"splits.json": {"train": ["a.json"]}}, 'write "a" instead of "a.json"'),
    "unknown split": ({"splits.json": {"dev": ["a"]}}, 'there is no split "dev", but train, val and test'),
    "in two splits": ({"splits.json": {"train": ["a"], "val": ["a"]}}, "a is both in train and in val"),
    "missing file": ({"splits.json": {"train": ["b"]}}, "b.json is missing"),
    "two of a name": ({"b.json": SWAP | {"name": "a"}}, 'have the same "name": a'),
    "name of no folder": (
        {"a.json": SWAP | {"name": "../a"}},
        '"name" must be a text that can name a folder',
    ),
    "name of a file of a run": ({"a.json": SWAP | {"name": "metrics.jsonl"}}, "can name a folder"),
    "a name that is too long": ({"a.json": SWAP | {"name": repeated("Ü", 140)}}, "can name a folder"),
    "half a surrogate pair": ({"a.json": '{"descriptions": ["\\ud800"], "Instances": []}'}, "cannot be read"),
    "other keys": ({"a.json": {"task": "x", "items": []}}, "it has task, items"),
    "number for a name": ({"a.json": SWAP | {"name": 3}}, '"name" must be a text'),
    "no descriptions": ({"a.json": {"Instances": SWAP["Instances"]}}, '"descriptions" is missing'),
    "empty list": ({"a.json": SWAP | {"descriptions": []}}, '"descriptions" must be a text or a list'),
    "an empty one": ({"a.json": SWAP | {"descriptions": ["x", " "]}}, "none of them empty"),
    "numbers": ({"a.json": SWAP | {"descriptions": [1]}}, '"descriptions" must be a text or a list'),
    "no instances": ({"a.json": SWAP | {"Instances": []}}, '"Instances" must be a list such as [{"input"'),
    "no output": ({"a.json": SWAP | {"Instances": [{"input": "x"}]}}, '"output" of instance 0 must be'),
    "a number as input": ({"a.json": SWAP | {"Instances": [{"input": 3}]}}, "must be a text, not 3"),
    "document of a number": (
        {"a.json": {"document": 5, "questions": [{"question": "x"}]}},
        '"document" must',
    ),
    "no questions": ({"a.json": {"document": "x"}}, '"questions" must be a list such as'),
    "a list": ({"a.json": [SWAP]}, 'a.json must be {"descriptions": [...], "Instances"'),
    "trailing comma": ({"a.json": '{"descriptions": ["x"],\n}'}, "line 2 column 1"),
    "both kinds": (
        {"b.json": {"document": "x", "questions": [{"question": "q"}]}},
        "both documents and tasks",
    ),
    "nothing": ({"a.json": None}, "holds no NAME.json files"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_task_file_is_one_line_that_names_it(tmp_path, case):
    made, message = MISTAKES[case]
    for name, content in ({"a.json": SWAP} | made).items():
        if content is not None:
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        load_tasks(tmp_path)
    text = str(error.value)
    assert message in text and str(tmp_path) in text and "\n" not in text


def test_what_a_folder_holds_is_said_in_one_line(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.json").write_text(json.dumps(SWAP | {"name": name}))
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c"]}))
    said = folder.summary(str(tmp_path), load_tasks(tmp_path))
    assert said == f"tasks in {tmp_path}: 2 train, 1 val; splits.json does not name 1 files"
    (tmp_path / "documents").mkdir()
    document = {"document": " x ", "questions": [{"question": "q ", "answer": "Paris "}]}
    (tmp_path / "documents" / "a.json").write_text(json.dumps(document))
    assert load_tasks(tmp_path / "documents")["train"][0].train == [Example("q", ["Paris"])]


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


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmarks_row_as_prompt_and_score(name):
    row, right, wrong = ROWS[name]
    example, shown = benchmarks.BENCHMARKS[name].to_example(row)
    metric = benchmarks.BENCHMARKS[name].metric
    texts = {value for value in row.values() if isinstance(value, str) and value in example.input}
    assert texts and metric(example, right) and not metric(example, wrong)
    assert metric is benchmarks.passes_tests or metric(example, shown)


def test_a_range_has_no_negative_number():
    example = Example("", ["5"])
    assert benchmarks.last_number(example, "It is between 3-5.") and benchmarks.last_number(example, "3 - 5")
    assert not benchmarks.last_number(example, "It is -5.")
    assert benchmarks.last_number(Example("", ["-5"]), "It is -5.")


def test_the_answer_of_humaneval_starts_with_the_head_of_the_function():
    example, _ = benchmarks.humaneval(ROWS["humaneval"][0])
    assert benchmarks.with_head(example) == "```python\ndef f(x):\n"


def test_benchmarks_are_downloaded_once_and_whole(tmp_path, monkeypatch, server):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(benchmarks, "ROWS_SERVICE", server.url + "/rows")
    monkeypatch.setitem(benchmarks.BENCHMARKS, "piqa", benchmarks.BENCHMARKS["piqa"]._replace(n_records=150))
    waits, entry = [], {"row": ROWS["piqa"][0]}

    def page(n, total=150):
        return {"num_rows_total": total, "rows": [entry] * n}

    monkeypatch.setattr(files.time, "sleep", waits.append)

    def send(content, status=200):
        return server.replies.append((json.dumps(content).encode(), status))

    cut, wrong, short = (json.dumps(page(100)).encode()[:-9], 200), page(100, 151), page(99)
    server.replies = [cut]
    send(wrong), send(short)
    for _ in range(3):  # cut off, of another length, too short
        with pytest.raises(UserError, match=f"rows 0 to 100 of 150 are not in {tmp_path}"):
            benchmarks.load(["piqa"])
    send({}, 429), send(page(100)), send({}, 500)
    with pytest.raises(UserError, match="rows 100 to 150 of 150"):
        benchmarks.load(["piqa"])
    send(page(50))
    (task,) = benchmarks.load(["piqa"])["test"]
    assert waits == [7] and not server.replies and len(task.test) == 150 and len(task.descriptions) == 3
    assert [re.search(r"offset=(\d+)", path)[1] for path in server.asked] == ["0"] * 5 + ["100"] * 2
    assert benchmarks.load(["piqa"])["test"] == [task] and len(server.asked) == 7


def test_right_code_passes_whatever_its_main_block_does():
    program = 'import sys\ndef f(): return 3\nif __name__ == "__main__":\n    f(input()); sys.exit(1)\n'
    assert benchmarks.run_program(program + "assert f() == 3")
    threads = "import threading\nfor _ in range(20): threading.Thread(target=print).start()\n"
    assert benchmarks.run_program(threads)  # however many processes the user has


def test_a_server_may_name_a_date_to_wait_for(monkeypatch):
    waits, headers = [], email.message.Message()
    headers["Retry-After"] = "Wed, 21 Oct 2015 07:28:00 GMT"

    def refuse(url, timeout):
        raise urllib.error.HTTPError(url, 429, "too many requests", headers, None)

    monkeypatch.setattr(files, "urlopen", refuse)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    with pytest.raises(UserError, match="x is missing, and http://y cannot be read: .*429"):
        files.download("http://y", "x is missing")
    assert waits == [1, 2, 4, 8]


HOSTILE = ["while True: pass", "import sys; sys.exit(0)", "import os; os._exit(0)", "input()", "1 / 0"]
HOSTILE += ["while True: print('x' * 999)", "import os\nwhile True: os.fork()", "x = 'a' * 10**10"]
HOSTILE += ["open('x', 'w').write('a' * 10**8)", "import os; os.environ['PATH']"]


@pytest.mark.parametrize("program", HOSTILE)
def test_generated_code_cannot_pass_or_hurt(program, monkeypatch):
    assert benchmarks.run_program("from __future__ import annotations\nassert 1 + 1 == 2")
    started = time.perf_counter()
    assert not benchmarks.run_program(program, seconds=1) and time.perf_counter() - started < 5


def test_the_table_of_benchmarks(tmp_path, monkeypatch, capsys):
    """A base model's own answers are right; code is left out without --run_code."""
    base, tokenizer = model.load_base("tiny")
    (said,) = [text.strip() for text in model.answer(base, tokenizer, ["cat ->"])]
    made = dict(descriptions=["d"] * 3, train=[], n_scored=None, n_descriptions=3, has_instruction=False)
    piqa = data.Task("piqa", test=[Example("cat", [said])], metric=benchmarks.first_character, **made)
    fails = [Example("cat", ["assert False"])]
    mbpp = data.Task("mbpp", test=fails, metric=benchmarks.passes_tests, **made)
    both = {name: benchmarks.BENCHMARKS[name] for name in ("mbpp", "piqa")}
    monkeypatch.setattr(benchmarks, "BENCHMARKS", both)
    monkeypatch.setattr(benchmarks, "benchmark_task", {"piqa": piqa, "mbpp": mbpp}.get)
    for flags, columns in ([], "piqa | average"), (["--run_code"], "mbpp | piqa | average"):
        words = ["--tasks", "benchmarks", "--methods", "base,t2l", *flags, "--out", tmp_path / "b.json"]
        assert command(evaluation, *words) == 0
        shown = capsys.readouterr().out
        assert f"| method | {columns} |" in shown and ("without --run_code" in shown) == (not flags)
        assert read_file(tmp_path / "b.json")["results"]["base"]["per_task"]["piqa"] == 1.0
    assert command(evaluation, "--tasks", "mbpp") == 2
    assert "error: mbpp is scored by running code" in capsys.readouterr().err
    beside = benchmarks.beside_published({"base": {"piqa": 0.5}}, "mistral-7b")
    assert "| t2l (published) | 0.82 |  |" in evaluation.make_table(beside, "test")
