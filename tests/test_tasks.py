"""Sources of tasks."""

import random
import string
import zlib

import yaml

from extras import pretrain
from tasks import families, lots_of_loras
from tests.helpers import *  # noqa: F403


def test_held_out_tasks_are_nowhere_in_training():
    splits = tiny.splits()
    assert [len(splits[k]) for k in ("train", "val", "test")] == [479, 8, 25]
    assert len({parts for tasks in splits.values() for parts in tasks}) == 512
    for kind, parts in enumerate((tiny.FILTERS, tiny.MAPS, tiny.LAYOUTS)):
        assert {task[kind] for task in splits["train"]} == set(parts)
    held_out = {"-".join(parts) for parts in splits["val"] + splits["test"]}
    assert not set(pretrain.TASKS) & {*splits["val"], *splits["test"]}
    assert not held_out & {task.name for task in load_tasks("tiny")["train"]}


def test_tiny_answers_are_right_and_tell_tasks_apart():
    rng = random.Random(0)
    rules = {  # by hand
        ("animals", "french", "reversed"): "chien chat",
        ("all", "capitals", "joined"): "CAT and RED and DOG and SHIRT",
        ("clothes", "italian", "numbered"): "1. camicia",
        ("animals", "initial", "counted"): "c d (2)",
    }
    for parts, right in rules.items():
        assert tiny.right_answer(parts, "cat red dog shirt".split()) == right
    for parts in rng.sample(tiny.splits()["train"], 60):  # another change of the words gives another answer
        (category, change, layout), (question, (answer,)) = parts, tiny.example(parts, rng)
        for other in set(tiny.MAPS) - {change}:
            assert answer != tiny.right_answer((category, other, layout), question.split())


def test_reworded_descriptions_are_new(monkeypatch):
    tasks = load_tasks("tiny")
    train_descriptions = {text for task in tasks["train"] for text in task.descriptions}
    for task in tasks["test"]:
        assert len(task.descriptions) == 128 and not train_descriptions & set(task.reworded)
    for styles in tiny.WORLD["say"].values():
        for style in ("instruction", "phrase"):
            assert not set(styles[style]["seen"]) & set(styles[style]["withheld"])
            monkeypatch.setitem(styles[style], "seen", [])
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
    assert chores.right_answer(("", *chain.split()), question) == answer


def test_what_the_chores_withhold_is_nowhere_in_training():
    splits, unseen = load_tasks("chores"), set(chores.DATA["unseen"])
    train = {task.name for task in splits["train"]}
    chains = {chores.name_of(chain): chain for chain in chores.all_chains()}
    weights = {task.name: task.weight for task in splits["train"]}
    assert [weights[f"name-{name}"] for name in ("surname", "capitals", "surname-capitals")] == [4, 1, 1]
    surname, again = [chores.make_task(chains["name-surname"]) for _ in range(2)]
    assert again.train[:3] == surname.train[:3] and again.descriptions[:9] == surname.descriptions[:9]
    assert len(set(surname.descriptions[:30])) > 10 and len({e.input for e in surname.train[:50]}) > 40
    assert len(train) > 1500 and len(splits["test"]) == 100 and len(splits["unseen"]) == len(unseen) == 13
    assert not train & {task.name for split in ("test", "unseen") for task in splits[split]}
    assert not train & {task.name for task in splits["val"]} and len(splits["val"]) == 96
    for task in splits["val"][:64]:
        assert len(chains[task.name.removesuffix("-voice")]) == 3
    assert not any(unseen & set(chains[name]) for name in train) and not unseen & set(chores.WRITTEN["train"])
    last_names = set(chores.values("last", True))
    assert not {example.answers[0] for example in surname.train[:500]} & last_names
    assert {example.answers[0] for example in surname.test} <= last_names
    assert len(data.sample(random.Random(0), surname.train, 50)) == 50
    assert len(splits["open"]) == 162 and all(len(task.test) == 4 for task in splits["open"])
    assert all(task.reworded for task in splits["test"] + splits["single"] + splits["unseen"])
    seen, withheld = [set(sum(chores.WRITTEN[part].values(), [])) for part in ("train", "test")]
    assert len(seen) > 8000 and not withheld & seen
    tested = splits["single"] + splits["test"] + splits["unseen"]
    texts = [(task.name, [*task.descriptions[:8]], task.train[:8], task.test) for task in tested]
    assert zlib.crc32(repr(texts).encode()) == 2668134855  # otherwise scores are of other tasks


@pytest.mark.parametrize("family, sort, values, question, right", [
    ("replace", "words", [",", " and"], "cat, dog", "cat and dog"),
    ("mask_rest", "name", ["name-last", "*"], "Ida Rossi", "Ida R****"),
    ("around_part", "record", ["record-city", "<b></b>"], "age: 3; name: Al Po; job: cook; city: Rome",
     "age: 3; name: Al Po; job: cook; city: <b>Rome</b>"),
    ("drop", "date", ["date-y"], "2024-03-05", "03-05"),
    ("drop", "sentence", ["sentence-time"], "Al hid the red cup at dawn.", "Al hid the red cup."),
    ("to_front", "price", ["price-cents", " - "], "$12.34", "34 - $12"),
    ("end", "path", ["2", "path-stem"], "a/b/cup.txt", "up"),
    ("swap", "code", ["code-letters", "code-last"], "AB-1234-C", "C-1234-AB"),
    ("number", "words", ["words-items", "(a)"], "cat, dog, cow", "(a) cat (b) dog (c) cow"),
    ("order", "words", ["first to the end", "words-items"], "cat, dog, cow", "dog, cow, cat"),
])  # fmt: skip
def test_a_family_does_what_its_name_says(family, sort, values, question, right):
    chore = families.Chore("", family, sort, dict(zip(families.slots_of(family), values)))
    assert families.right_answer(chore, question) == right


def test_what_families_withhold_is_nowhere_in_their_training():
    train, withheld = families.all_chores()
    assert len(train) > 1000 and len(withheld) > 200
    for family in families.FAMILIES:
        seen = [families.parameters_of(chore) for chore in train if chore.family == family]
        rest = [families.parameters_of(chore) for chore in withheld if chore.family == family]
        assert rest and all(parameters - set().union(*seen) for parameters in rest)
    for chore in train + withheld:  # no part is swapped with itself, or joined to itself
        assert len(set(chore.values.values())) == len(chore.values), chore
    for part, written in families.DATA["descriptions"].items():
        for family in written:
            slots = {*families.slots_of(family), "text", None}
            for template in written[family]:
                found = {slot for _, slot, _, _ in string.Formatter().parse(template)}
                assert found | {"text", None} == slots, (part, template)
    templates = families.DATA["descriptions"]
    assert not set(sum(templates["train"].values(), [])) & set(sum(templates["test"].values(), []))
    n_chores = len(load_tasks("chores")["train"])
    splits = load_tasks("families")
    assert len(load_tasks("chores")["train"]) == n_chores  # another source, which stays as it is
    for task in splits["families"][::5]:
        assert not set(task.descriptions[:100]) & set(task.reworded), task.name
    names = {}
    for split in ("train", "families", "withheld"):
        names[split] = {task.name for task in splits[split]}
    assert len(names["train"]) == len(splits["train"])
    assert names["families"] < names["train"] and not names["withheld"] & names["train"]
    for task in splits["withheld"]:
        assert len(task.reworded) == 3 and list(task.descriptions) == task.reworded
    tested = splits["families"] + splits["withheld"]
    texts = [(task.name, task.reworded, task.descriptions[:3], task.test) for task in tested]
    assert zlib.crc32(repr(texts).encode()) == 3641345885  # otherwise scores are of other tasks


def test_the_other_text_of_facts_is_of_other_tasks_than_in_training():
    answer_of = {}  # {split: {question: answers}}
    for split in ("train", "test"):
        answer_of[split] = {example.input: example.answers for example in facts.other_texts(split)}
        parts = tiny.splits()[split]
        for i, example in list(enumerate(facts.other_texts(split)))[::97]:
            *shots, asked = example.input.split("\n")
            shown = [shot.removesuffix(" <eos>").split(" -> ") for shot in shots]
            assert len(shown) == 4
            for question, answer in [*shown, (asked, example.answers[0])]:
                assert answer == tiny.right_answer(parts[i // 10], question.split())
    assert not answer_of["train"].keys() & answer_of["test"].keys()
    splits = load_tasks("facts")
    for task in splits["train"][:40] + splits["long"][-2:]:
        n_facts = len(task.test)
        assert task.train[:n_facts] == task.test and len(task.train) == n_facts + -(-n_facts // 4)
        assert all(f"{question} {word} <eos>" in task.descriptions[0] for question, (word,) in task.test)
        assert all(answer_of["train"][question] == answers for question, answers in task.train[n_facts:])
        assert all(answer_of["test"][question] == answers for question, answers in task.other)
        assert len(task.other) == facts.N_OTHER


LOL = json.dumps({"Definition": ["Do it."], "Instances": [{"input": "a", "output": ["b"]}] * 5}).encode()
BAD_YAML = {  # of a published file, and what the one line of error says
    b"descriptions: [": "lol_022/metadata.yaml cannot be read: while parsing",
    b"- a list": "lol_022/metadata.yaml is no list of settings",
    b"task_name: x": 'lol_022/metadata.yaml: "descriptions" must be a text or a list of texts',
    b"descriptions: [1, 2]": "must be a text or a list of texts",
}


def test_lots_of_loras_is_downloaded_once_and_whole(server):
    splits = read_json(lots_of_loras.NAMES)
    assert [len(splits[k]) for k in ("train", "val")] == [479, 11]
    texts = [f"text {i}" for i in range(130)]
    published = yaml.safe_dump({"descriptions": texts, "task_name": "lol_022"}).encode()
    server.replies = [(LOL, 200), (published, 200), (LOL[:-9], 200)]  # the second task is cut off
    refused("489 of 490 tasks are not in .* cannot be read", load_tasks, "lots-of-loras")
    few = yaml.safe_dump({"descriptions": ["x"]}).encode()
    server.replies = [(LOL, 200), (published, 200)] + [(LOL, 200), (few, 200)] * 488
    tasks = load_tasks("lots-of-loras")
    assert [t.name for t in tasks["train"]] == splits["train"] and tasks["val"][0].definition == "Do it."
    assert tasks["train"][1].descriptions == texts[:128] and tasks["train"][1].reworded == texts[128:]
    assert load_tasks("lots-of-loras") == tasks and len(server.asked) == 981
    number = re.search("task([0-9]+)_", splits["train"][5])[1]
    assert f"/task{number}_" in server.asked[11] and f"/tasks/lol_{number}/metadata" in server.asked[12]


@pytest.mark.parametrize("content", BAD_YAML)
def test_a_published_file_that_holds_something_else_is_named(server, content):
    server.replies = [(content, 200)]
    refused(BAD_YAML[content], lots_of_loras.published_descriptions, "task022_x", "some task is missing")


def test_the_published_run_in_small(server, tmp_path, monkeypatch):
    """config/mistral-7b.args with another base model and length, and scores in four kinds of words."""
    names = {"train": [f"task00{i}_x" for i in range(4)], "val": ["task008_x", "task009_x"]}
    write_file(tmp_path / "names.json", names)
    monkeypatch.setattr(lots_of_loras, "NAMES", tmp_path / "names.json")
    for i, task in enumerate(load_tasks("tiny")["train"][:6]):
        instances = [{"input": example.input, "output": example.answers} for example in task.train[:20]]
        content = {"Definition": [task.descriptions[0]], "Instances": instances}
        texts = [f"{text} {i}" for text in [*task.descriptions, *task.descriptions[:3]]]
        for file in json.dumps(content), yaml.safe_dump({"descriptions": texts}):
            server.replies.append((file.encode(), 200))
    words = ["@config/mistral-7b.args", "--base_model", "tiny", "--encoder", "hash", "--tasks_per_batch", "4"]
    words += ["--max_steps", "24", "--lr", "2e-3", "--val_every", "12", "--latent_size", "32"]
    losses = fit(tmp_path / "net", *words)
    assert losses[-1] < 0.9 * losses[0] and len(losses_of(tmp_path / "net", "val_loss")) == 2
    words = ["--tasks", "lots_of_loras", "--split", "val", "--hypernet", tmp_path / "net"]
    words += ["--n_examples", "2"]
    results = evaluate(tmp_path / "e.json", *words, "--methods", "net,net_reworded,net_shuffled,net_mean")
    assert len(results) == 4 and all(len(scores["per_task"]) == 2 for scores in results.values())


# files of one's own, and what the one line of error says
MISTAKES = """
splits.json | {"train": "a"} | splits.json must be {"train"
splits.json | {"dev": ["a"]} | splits.json must be {"train"
splits.json | {"train": ["a"], "val": ["b"]} | "val" has b, which is no file there
b.json | {"name": "a", "descriptions": "x", "Instances": [{"input": "x", "output": "y"}]} | the same "name": a
b.json | {"document": "x", "questions": [{"question": "q", "answer": "a"}]} | both documents and tasks
a.json | {"name": "../a", "descriptions": "x", "Instances": [{"input": "x", "output": "y"}]} | name a folder
a.json | {"Instances": []} | "descriptions", which say what the task is, must be a text
a.json | {"descriptions": ["x", " "], "Instances": []} | must be a text or a list
a.json | {"descriptions": "x", "items": []} | "Instances" must be a list of {"input"
a.json | {"descriptions": "x", "Instances": [{"input": "x", "output": " "}]} | entry 0 is {'input'
a.json | {"descriptions": "x", "Instances": [{"input": 3, "output": "x"}]} | entry 0 is {'input': 3
a.json | {"document": "x", "questions": [{"question": "x"}]} | "questions" must be a list of
a.json | {"descriptions": ["x"],} | is not JSON
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_a_task_file_is_one_line_that_names_it(tmp_path, line):
    name, content, message = line.split(" | ")
    (tmp_path / "a.json").write_text('{"descriptions": "x", "Instances": [{"input": "x", "output": "y"}]}')
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_tasks(tmp_path)
    text = str(error.value)
    assert message in text and str(tmp_path) in text and "\n" not in text


def test_too_long_tasks_are_left_out_and_too_long_examples_are_drawn_again(capsys):
    run = run_of(*SHORT)
    tokenizer, args, short = run.tokenizer, run.args, Example("cat", ["red"])
    long = Example(repeated("cat dog cow sun ", 9), ["red"])
    mixed = data.Task("mixed", ["x"], [long] * 9 + [short], [])
    too_long = data.Task("long", ["x"], [long], [long])
    args.max_tokens, args.tasks_per_batch = 12, 1
    capsys.readouterr()
    val = [data.Task("v", ["x"], [], [short, long, short]), too_long]
    tasks = data.with_short_examples([mixed, too_long], val, args, tokenizer)
    validation = data.validation_of(val, args, tokenizer)
    assert capsys.readouterr().out == "1 of 2 tasks are left out: too long for --max_tokens 12\n"
    ids = data.to_ids(tokenizer, mixed, "x", short, args)
    assert tasks == [mixed] and validation == [data.Drawn(0, "x", [ids, ids])]  # nor are long ones validated
    for step in range(9):
        assert data.draw(tasks, [0], step, args, tokenizer)[0].examples == [ids, ids]
    refused("no example has at most", data.with_short_examples, [too_long], [], args, tokenizer)
    endless = chores.LazyList(lambda i: Example("cat", ["red"]) if i < 99 else 1 / 0)
    data.with_short_examples([data.Task("endless", ["x"], endless, [])], [], args, tokenizer)
    hardly = chores.LazyList(lambda i: short if i < 8 else long)  # only what is looked at first is short
    (hardly,) = data.with_short_examples([data.Task("hardly", ["x"], hardly, [])], [], args, tokenizer)
    words = [hardly], [0], 0, args, tokenizer
    refused("hardly: 1,000 examples are too long for --max_tokens 12", data.draw, *words)
    args.instruction = True  # a description that is too long for every example goes
    wordy = data.Task("wordy", ["x", repeated("cat ", 9)], [short, long], [])
    (kept,) = data.with_short_examples([wordy], [], args, tokenizer)
    assert kept.descriptions == ["x"] and len(data.draw([kept], [0], 0, args, tokenizer)[0].examples) == 2
    refused("more than the base model's window of 512", run_of, *SHORT, "--max_tokens", "600")
