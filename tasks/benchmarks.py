"""The paper's ten benchmarks: their rows, prompts and scores.

    python eval.py --tasks benchmarks --base_model gemma-2-2b --hypernet DIR [--run_code]
    python eval.py --tasks arc_easy,gsm8k ...                                       some of them

Rows come from the hub's rows service. Each benchmark has three descriptions that training never used. All
benchmarks share three meaningless texts. All texts are from the published repository. Published scores are in
benchmarks.json.
"""

import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from tqdm import tqdm

from data import Example, Splits, Task
from support import UserError, read_json, say, write_file
from tasks import as_texts
from tasks.download import PUBLISHED, cache_folder, download, published

ROWS_SERVICE = "https://datasets-server.huggingface.co/rows"
SCORES = Path(__file__).parent / "benchmarks.json"
CONFIG = "configs/hyper_lora_decontam_lol_tasks.yaml"  # of the published repository

# -------------------- Records of a dataset -> (Example, the answer to show as a shot) --------------------


def multiple_choice(question: str, choices: list[tuple], what: str, right) -> tuple[Example, str]:
    """A question with labelled choices, to be answered with the label only."""
    lines = "\n".join(f"{label}. {text}" for label, text in choices)
    text = f"{question}\n\n{lines}\n\nAnswer with the {what} of the right choice only."
    return Example(text, [str(right)]), str(right)


def arc(record: dict) -> tuple[Example, str]:
    """ARC and OpenBookQA."""
    question = record.get("question") or record["question_stem"]
    choices = list(zip(record["choices"]["label"], record["choices"]["text"]))
    return multiple_choice(question, choices, "letter", record["answerKey"])


def hellaswag(record: dict) -> tuple[Example, str]:
    return multiple_choice(record["ctx"], list(enumerate(record["endings"])), "number", record["label"])


def piqa(record: dict) -> tuple[Example, str]:
    choices = [(0, record["sol1"]), (1, record["sol2"])]
    return multiple_choice(record["goal"], choices, "number", record["label"])


def winogrande(record: dict) -> tuple[Example, str]:
    choices = [(1, record["option1"]), (2, record["option2"])]
    return multiple_choice(record["sentence"], choices, "number", record["answer"])


def boolq(record: dict) -> tuple[Example, str]:
    text = f"{record['passage']}\n\n{record['question']}?\n\nAnswer with true or false only."
    right = str(record["answer"]).lower()
    return Example(text, [right]), right


def gsm8k(record: dict) -> tuple[Example, str]:
    steps, right = record["answer"].split("####")
    right = right.strip()
    return Example(record["question"], [right]), f"{steps}The answer is {right}."


def humaneval(record: dict) -> tuple[Example, str]:
    """The head of a function to complete. The right answer is its tests."""
    head = record["prompt"]
    tests = f"{record['test']}\ncheck({record['entry_point']})"
    text = f"Complete this Python function.\n\n{CODE_START}{head}```"
    return Example(text, [tests]), f"{CODE_START}{head}{record['canonical_solution']}```"


def mbpp(record: dict) -> tuple[Example, str]:
    """A function to write, with one of its tests. The right answer is all of them."""
    tests = "\n".join([record.get("test_setup_code") or "", *record["test_list"]])
    text = f"{record['text']}\nThe code should pass this test:\n{record['test_list'][0]}"
    return Example(text, [tests]), f"{CODE_START}{record['code']}\n```"


CODE_START = "```python\n"


def with_head(example: Example) -> str:
    """The start of the answer: the head of the function that the input shows."""
    return CODE_START + example.input.split(CODE_START)[1].removesuffix("```")


# -------------------- Scores --------------------


def is_exact(example: Example, answer: str, has_ended: bool) -> bool:
    """Whether an answer is one of the right ones, and the model has ended it itself."""
    return has_ended and answer.strip() in [right.strip() for right in example.answers]


def first_character(example: Example, answer: str, has_ended: bool) -> bool:
    """Whether the answer begins with the right letter or number."""
    return answer.strip()[:1].casefold() == example.answers[0][:1].casefold()


def true_or_false(example: Example, answer: str, has_ended: bool) -> bool:
    """Whether the first of true, yes, false and no in the answer agrees with the right one."""
    word = re.search(r"\b(true|yes|false|no)\b", answer.lower())
    if not word:
        return False
    return (word[1] in ("true", "yes")) == (example.answers[0] == "true")


def last_number(example: Example, answer: str, has_ended: bool) -> bool:
    """Whether the last number of the answer is the right one."""
    numbers = re.findall(r"(?:(?<!\d)-)?\d[\d,]*\.?\d*", answer)  # "3-5" has no minus five
    if not numbers:
        return False
    found = numbers[-1].replace(",", "").rstrip(".")
    return float(found) == float(example.answers[0].replace(",", ""))


def passes_tests(example: Example, answer: str, has_ended: bool) -> bool:
    """Whether the code of the answer passes the tests. Runs it!"""
    head = with_head(example).removeprefix(CODE_START) if CODE_START in example.input else ""
    code = head + answer.split("```")[0]
    return run_program(f"{code}\n{example.answers[0]}")


# Removes the usual ways to start or signal processes. A program that runs to its end leaves the file TOKEN.
RUNNER = """import os, shutil, subprocess, sys, types
for name in ("fork", "forkpty", "posix_spawn", "kill", "killpg", "system", "setsid", "chmod", "rmdir"):
    setattr(os, name, None)
subprocess.Popen = shutil.rmtree = None
program = sys.modules["program"] = types.ModuleType("program")
exec(compile(open("program.py").read(), "program.py", "exec"), program.__dict__)
open(TOKEN, "w")
"""


def run_program(program: str, seconds: int = 10) -> bool:
    """Whether a program runs to its end, in a process with limited time and memory, in an empty folder,
    without input and environment. This is no sandbox against hostile code."""
    import resource  # not on Windows

    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: 2**31,
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_CORE: 0,
    }

    def set_limits() -> None:
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))

    with tempfile.TemporaryDirectory() as folder:
        # a program that exits early does not write this file
        token = Path(folder) / random.SystemRandom().randbytes(16).hex()
        (Path(folder) / "program.py").write_text(program, encoding="utf-8")
        command = [sys.executable, "-I", "-c", RUNNER.replace("TOKEN", repr(str(token)))]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=set_limits,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes it has started
        process.wait()
        return token.exists()


# -------------------- The benchmarks --------------------


class Rules(NamedTuple):
    """How eval.py asks and scores the questions of a task; and where the records of a benchmark are."""

    is_right: Callable[[Example, str, bool], bool] = is_exact  # takes an answer and if the model ended it
    most_tokens: int = 0  # of an answer; 0: two more than the longest right answer
    start: Callable[[Example], str] = lambda example: ""  # the given start of the answer
    most_examples: int | None = 25  # unless --n_examples is given; None: all
    n_texts: int = 1  # number of texts with which each question is asked
    with_instruction: bool = True  # whether the prompt may contain an instruction
    meaningless: Sequence[str] = ()  # texts for net_random
    to_example: Callable[[dict], tuple[Example, str]] | None = None  # of a record
    records: tuple[str, str, str, int] = ("", "", "", 0)  # dataset, config, split, number


# prompts have no instruction, because the inputs say what to do
PUBLISHED_RULES = Rules(first_character, 8, most_examples=None, n_texts=3, with_instruction=False)


def benchmark(to_example, *records, **rules) -> Rules:
    return PUBLISHED_RULES._replace(to_example=to_example, records=records, **rules)


STEPS = dict(is_right=last_number, most_tokens=256, start=lambda example: "Let's think step by step.")
CODE = dict(is_right=passes_tests, most_tokens=512)
BENCHMARKS = {
    "arc_challenge": benchmark(arc, "allenai/ai2_arc", "ARC-Challenge", "test", 1172),
    "arc_easy": benchmark(arc, "allenai/ai2_arc", "ARC-Easy", "test", 2376),
    "boolq": benchmark(boolq, "google/boolq", "default", "validation", 3270, is_right=true_or_false),
    "gsm8k": benchmark(gsm8k, "openai/gsm8k", "main", "test", 1319, **STEPS),
    "hellaswag": benchmark(hellaswag, "Rowan/hellaswag", "default", "validation", 10042),
    "humaneval": benchmark(
        humaneval, "openai/openai_humaneval", "openai_humaneval", "test", 164, start=with_head, **CODE
    ),
    "mbpp": benchmark(  # the paper used 399 of them, MBPP+
        mbpp, "google-research-datasets/mbpp", "full", "test", 500, start=lambda example: CODE_START, **CODE
    ),
    "openbookqa": benchmark(arc, "allenai/openbookqa", "main", "test", 500),
    "piqa": benchmark(piqa, "ybisk/piqa", "plain_text", "validation", 1838),
    "winogrande": benchmark(winogrande, "allenai/winogrande", "winogrande_debiased", "validation", 1267),
}


def load_records(name: str) -> list[dict]:
    """The records of a benchmark, downloaded once in pages of 100; a second call continues the first."""
    dataset, config, split, n = BENCHMARKS[name].records
    folder, records = cache_folder(f"benchmarks/{name}"), []
    for offset in tqdm(range(0, n, 100), desc=name, unit="page", leave=False):
        file, expected = folder / f"{offset}.json", min(100, n - offset)
        if not file.exists():
            needed_for = f"--tasks {name}: rows {offset} to {offset + expected} of {n} are not in {folder}"
            query = dict(dataset=dataset, config=config, split=split, offset=offset, length=100)
            page = download(f"{ROWS_SERVICE}?{urlencode(query)}", needed_for)
            total, received = page["num_rows_total"], len(page["rows"])
            if total != n or received != expected:
                raise UserError(f"{needed_for}; {dataset} sent {received} of {total} rows")
            write_file(file, page)
        records += [entry["row"] for entry in read_json(file)["rows"]]
    return records


def published_texts() -> dict[str, list[str]]:
    """{benchmark: its three descriptions, "meaningless": three texts}, downloaded once."""
    file = cache_folder("benchmarks") / "texts.json"
    if not file.exists():
        content = published(CONFIG, f"--tasks benchmarks: {file} is missing")
        texts = {"meaningless": content.get("additional_eval_descs")}
        for name in BENCHMARKS:
            texts[name] = content.get("eval_ds_info", {}).get(name, {}).get("descriptions")
        for name in texts:
            texts[name] = as_texts(texts[name], f"{PUBLISHED}/{CONFIG}: {name}")
        write_file(file, texts)
    return read_json(file)


def benchmark_task(name: str) -> Task:
    """One benchmark as a task: all records, shuffled, to test on, and four of them as shots."""
    rules, texts, records, test, shots = BENCHMARKS[name], published_texts(), load_records(name), [], []
    random.Random(0).shuffle(records)
    for record in records:
        example, shown = rules.to_example(record)
        test.append(example)
        shots.append(Example(example.input, [shown]))
    rules = rules._replace(meaningless=texts["meaningless"])
    return Task(name, texts[name], shots[-4:], test, rules=rules)


def load(tasks: str, run_code: bool) -> Splits | None:
    """The benchmarks that --tasks names, in the split "test"; None if it names another source.

    Without run_code those that run code are left out. Raises UserError for unknown names, or if none is left.
    """
    names = list(BENCHMARKS) if tasks == "benchmarks" else tasks.split(",")
    unknown = [name for name in names if name not in BENCHMARKS]
    if len(unknown) == len(names):
        return None
    if unknown:
        raise UserError(f"--tasks {tasks}: there is no benchmark {', '.join(unknown)}")
    allowed = [name for name in names if run_code or BENCHMARKS[name].is_right is not passes_tests]
    if not allowed:
        raise UserError(f"{tasks} is scored by running code that the model writes: pass --run_code")
    if len(allowed) < len(names):
        say("without --run_code there are no scores for humaneval and mbpp")
    return {"train": [], "val": [], "test": [benchmark_task(name) for name in allowed]}


def beside_published(results: dict[str, dict[str, float]], base_model: str) -> dict[str, dict[str, float]]:
    """Add averages to {method: {benchmark: score}}, and the paper's scores for this base model."""
    measured = {name for scores in results.values() for name in scores}
    if not measured or not measured <= BENCHMARKS.keys():
        return results
    table = {}
    for method, scores in results.items():
        table[method] = scores | {"average": statistics.fmean(scores.values())}
    if all(len(scores) == len(BENCHMARKS) for scores in results.values()):
        measured.add("average")  # otherwise averages are not comparable
    for method, percents in read_json(SCORES).get(base_model, {}).items():
        scores = {name: percents[name] / 100 for name in percents if name in measured}
        if scores:
            table[f"{method} (published)"] = scores
    return table
