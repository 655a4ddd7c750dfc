"""The grammar of requests."""

import random
import re

from tasks import chores, requests, texts, wording
from tasks.requests import result
from tasks.texts import Draw, Piece, make_text, plain

NAME = [Piece("Ada", "first"), Piece(" "), Piece("Lovelace", "last")]
TIME = [Piece("09", "hour"), Piece(":"), Piece("59", "minute")]
RIGHT = [  # a text, the steps of a program, the answer: by hand
    (NAME, [("keep", ("last",))], "Lovelace"),
    (NAME, [("drop", ("first",))], "Lovelace"),
    (NAME, [("drop", ("last",))], "Ada"),
    (NAME, [("put", ("first", "Mrs"))], "Mrs Lovelace"),
    (NAME, [("sign", (" ", "_"))], "Ada_Lovelace"),
    (TIME, [("sign", (":", ""))], "0959"),
    (NAME, [("join", (" and ",))], "Ada and Lovelace"),
    (NAME, [("build", ("{last}, {first}",))], "Lovelace, Ada"),
    (NAME, [("as_json", (("last", "first"),))], '{"last": "Lovelace", "first": "Ada"}'),
    (NAME, [("wrap", ("last", ("<b>", "</b>")))], "Ada <b>Lovelace</b>"),
    (NAME, [("wrap", ("all", ("(", ")")))], "(Ada Lovelace)"),
    (NAME, [("before", ("last", "née "))], "Ada née Lovelace"),
    (NAME, [("behind", ("all", "!"))], "Ada Lovelace!"),
    (NAME, [("case", ("last", "upper"))], "Ada LOVELACE"),
    (NAME, [("mask", ("last", "*", 2))], "Ada ******ce"),
    (NAME, [("blot", ("first", "***"))], "*** Lovelace"),
    (NAME, [("swap", ("first", "last"))], "Lovelace Ada"),
    (TIME, [("reverse", ())], "59:09"),
    (NAME, [("cut", ("last", 4))], "Ada Love"),
    (NAME, [("cut", ("last", -4))], "Ada lace"),
    (TIME, [("spread", ("hour", "-"))], "0-9:59"),
    (TIME, [("add", ("hour", 1))], "10:59"),
    (TIME, [("add", ("hour", -1))], "08:59"),
    (NAME, [("count", ("all", "letters"))], "11"),
    (NAME, [("keep", ("last",)), ("case", ("all", "lower")), ("before", ("all", "@"))], "@lovelace"),
    (NAME, [("keep", ("middle",))], ""),
    (NAME, [("add", ("last", 1))], None),
]


def test_the_steps_do_what_they_say():
    for text, steps, answer in RIGHT:
        assert result(("", *steps), text) == answer
    assert {step for _, steps, _ in RIGHT for step, _ in steps} == set(requests.STEPS)


def test_the_forms_name_the_parts():
    for sort, entry in requests.TABLE["sorts"].items():
        text = make_text(sort, Draw("x"))
        assert set(texts.parts_of(text)) <= set(entry["parts"]) and "{" not in plain(text)
        assert make_text(sort, Draw("x")) == text != make_text(sort, Draw("x", test=True))


def test_each_step_of_a_program_matters():
    samples = [make_text("name", Draw(str(i))) for i in range(4)]
    last, capitals, idle = ("keep", ("last",)), ("case", ("all", "upper")), ("case", ("last", "capital"))
    for steps, expected in ([last, capitals], True), ([capitals, last], False), ([last, idle], False):
        assert requests.is_sensible(("name", *steps), samples) is expected


def test_what_is_withheld_is_nowhere_in_training():
    programs = requests.programs()
    assert programs == requests.programs()  # the same every time
    train, withheld = programs.pop("train"), requests.TABLE["withheld"]
    shapes = {requests.shape(program) for program in train}
    assert not set(train) & set(sum(programs.values(), []))
    for program in train:
        assert program[0] not in withheld
    assert {program[0] for program in programs["sorts"]} == set(withheld)
    assert not shapes & {requests.shape(program) for program in programs["test"]}
    assert shapes >= {requests.shape(program) for program in programs["values"] + programs["words"]}

    def words_of(split: list[requests.Program]) -> set[str]:
        return set(re.findall(r"[a-z]+", " ".join(sum(map(requests.free_words, split), [])).lower()))

    test_words = set(texts.pool("word", test=True))
    assert not words_of(train) & test_words and len(words_of(train)) > 500
    assert len(words_of(programs["words"]) & test_words) > 40


def test_descriptions_name_the_free_words():
    n = 0
    for i in range(200):
        program = requests.draw_program("order", 2, Draw(str(i)))
        text = wording.from_template(program, random.Random(i))
        for words in requests.free_words(program):
            n += 1
            assert words.strip() in text or words.strip().lower() in text.lower()
    assert n > 50


def test_a_task_has_examples_and_descriptions():
    program = ("name", ("keep", ("last",)))
    task = requests.make_task(program)
    assert task.name.startswith("name-keep-") and task.train[3] == requests.make_task(program).train[3]
    for example in [*task.train[:20], *task.test]:
        assert example.answers == [example.input.split()[1]]
    assert len({task.descriptions[i] for i in range(50)}) > 15


def test_written_descriptions_belong_to_programs():
    texts = sum(requests.WRITTEN.values(), [])
    assert len(requests.WRITTEN) > 3000 and len(texts) > 6000
    for program in requests.WRITTEN:
        assert requests.example(program, 0).answers[0]
    program = next(iter(requests.WRITTEN))
    task = requests.make_task(program)
    n_written = sum(task.descriptions[i] in requests.WRITTEN[program] for i in range(300))
    assert 150 < n_written < 250


def test_chores_are_trained_with_the_programs():
    splits, of_chores = requests.load(), chores.load()
    names = {task.name for task in splits["train"]}
    assert names > {task.name for task in of_chores["train"]} and len(splits["train"]) > 8000
    assert not names & {task.name for task in splits["chains"] + splits["unseen"]}


def test_open_requests_are_for_texts_of_all_sorts():
    tasks = requests.load()["open"]
    assert len(tasks) > 100 and {task.name.split("-")[1] for task in tasks} == set(requests.TABLE["sorts"])
    written = set(sum(requests.WRITTEN.values(), []))
    for task in tasks:
        assert len(task.test) == 4 and not set(task.descriptions) & written
        assert any(example.answers != [example.input] for example in task.test)
