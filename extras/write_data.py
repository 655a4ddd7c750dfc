"""Write training data with an instruct model: descriptions of tasks, or questions about texts.

    python -m extras.write_data descriptions my_tasks/ out/described --base_model NAME
    python train.py @config/chores.args --tasks out/described --out_dir out/mine           # Text-to-LoRA

    python -m extras.write_data questions notes/ out/notes --base_model NAME
    python train.py @config/reader.args --tasks out/notes --init_from out/needle --out_dir out/reader

descriptions: a hypernetwork learns to follow descriptions only if each task has many; the paper has 128. The
model writes them in several manners, from examples of a task and its definition (or first description). One
is dropped if it exists already, or if it quotes an example that was shown.

questions: as in the published recipe of Doc-to-LoRA, the model writes questions of several kinds about each
text (.txt, .md), then answers them with the text in its prompt. Long texts are cut between paragraphs. Some
questions have nothing to do with the text, so that a reader learns to leave other text alone. Whole texts are
held out for validation and testing.

All answers are greedy and all draws have a seed, so a second run gives the same data.
"""

import random
import re
from math import ceil
from pathlib import Path
from textwrap import shorten

from tqdm import tqdm
from transformers import AutoTokenizer

import model
from data import Example, Task
from support import UserError, at_least, command, make_parser, read_json, write_file
from tasks import chores, load_folder, task_files
from tasks.facts import OTHER

PROMPT_TOKENS_AT_ONCE = 16_384  # of prompts that are answered together, to save memory


def ask_all(base, tokenizer, prompts: list[str], most: int) -> list[str]:
    """The greedy answers to prompts, a few at a time; "" if one is not whole, or its prompt is too long."""
    lengths = [len(model.tokenize(tokenizer, prompt)) for prompt in prompts]
    fitting = [i for i, length in enumerate(lengths) if length + most <= model.window_of(base)]
    at_once = max(1, PROMPT_TOKENS_AT_ONCE // (max(lengths, default=0) + most))
    texts = [""] * len(prompts)
    for start in range(0, len(fitting), at_once):
        batch = fitting[start : start + at_once]
        answers = model.answer(base, tokenizer, [prompts[i] for i in batch], most)
        for i, answer in zip(batch, answers):
            texts[i] = answer.text.strip() if answer.has_ended else ""
    return texts


# -------------------- Descriptions of tasks --------------------

MANNERS = [
    "Say in a few words, as a command that begins with a verb, what to do with any input.",
    "Explain in one full sentence how the output follows from the input.",
    "Write the question about the input that the output answers.",
    "Describe in one sentence what the output is.",
    "Write the instruction for a new colleague who has to do this, in one sentence.",
    "Say in one sentence what the input is and what to make of it.",
]
N_SHOWN = 4  # examples in a prompt


def description_prompt(tokenizer, definition: str, examples: list[Example], manner: str) -> str:
    """Examples of a task, its definition, and how to describe it."""
    lines = ["Here are some inputs with their outputs."]
    for example in examples:
        lines.append(f"Input: {shorten(example.input, 400)}\nOutput: {example.answers[0]}")
    if definition:
        lines.append(f"The instruction was: {definition}")
    lines.append(f"{manner} It must fit all inputs, so do not quote any. Write this text and nothing else.")
    return model.render(tokenizer, "\n\n".join(lines))


def quotes(text: str, definition: str, examples: list[Example]) -> bool:
    """Whether a text quotes an input or answer of these examples that the definition does not name."""
    for words in [example.input for example in examples] + [example.answers[0] for example in examples]:
        pattern = re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)
        if pattern.search(text) and not pattern.search(definition):
            return True
    return False


def describe(base, tokenizer, task: Task, known: list[str], n: int) -> list[str]:
    """Up to n new descriptions of a task, in all manners in turn, each round from other examples."""
    found, definition = [], task.definition or "".join(known[:1])
    for i in range(2 * ceil(n / len(MANNERS))):  # some of them are dropped
        rng = random.Random(f"{task.name} {i}")
        examples = rng.sample(task.train, min(N_SHOWN, len(task.train)))
        prompts = [description_prompt(tokenizer, definition, examples, manner) for manner in MANNERS]
        for said in ask_all(base, tokenizer, prompts, most=80):
            text, seen = said.strip("\"' \n"), [old.lower() for old in known + found]
            is_new = text and "\n" not in text and text.lower() not in seen
            if is_new and not quotes(text, definition, examples):
                found.append(text)
        if len(found) >= n:
            break
    return found[:n]


def write_descriptions(args, base, tokenizer) -> None:
    """The folder of tasks once more, with new descriptions after the old ones."""
    splits, files = load_folder(args.folder), task_files(args.folder)
    tasks = {task.name: task for split in splits.values() for task in split}
    counts = []
    for name, file in tqdm(files.items(), desc="descriptions", unit="task"):
        content = read_json(file)
        known = content.get("descriptions", [])
        task = tasks[content.get("name", name)]
        new = describe(base, tokenizer, task, known, args.descriptions)
        content["descriptions"] = known + new or task.descriptions
        write_file(args.out_dir / file.name, content)
        counts.append(len(new))
    if (args.folder / "splits.json").exists():
        write_file(args.out_dir / "splits.json", read_json(args.folder / "splits.json"))
    print(f"{min(counts)} to {max(counts)} new descriptions of {len(files)} tasks, in {args.out_dir}")


# -------------------- Questions about texts --------------------

KINDS = [  # of questions, each asked for in a prompt of its own
    "about facts that the text states",
    "about names, places and terms in the text",
    "about numbers, dates and amounts in the text",
    "that begin with why or how and that the text answers",
    "about the main point of the text",
]


def split_text(tokenizer, text: str, max_tokens: int) -> list[str]:
    """Cut a text between paragraphs into parts of at most so many tokens, if the paragraphs allow it."""
    parts = [""]
    for paragraph in re.split(r"\s*\n\s*\n", text.strip()):
        longer = f"{parts[-1]}\n\n{paragraph}".strip()
        if parts[-1] and len(model.tokenize(tokenizer, longer)) > max_tokens:
            parts.append(paragraph)
        else:
            parts[-1] = longer
    return parts


def question_answers(base, tokenizer, document: str, n: int) -> list[dict]:
    """Up to n questions about a document, of all kinds in turn, none twice, with their answers."""
    n_each, questions = ceil(n / len(KINDS)), {}  # {question in small letters: question}
    prompts = []
    for kind in KINDS:
        task = f"Write {n_each} short questions {kind}. Write one question per line and nothing else."
        prompts.append(model.render(tokenizer, f"{document}\n\n{task}"))
    for said in ask_all(base, tokenizer, prompts, most=64 * n_each):
        lines = [re.sub(r"^\s*(?:[-*]|\(?\d{1,2}[.)])\s+", "", line).strip() for line in said.splitlines()]
        for line in [line for line in lines if line.endswith("?")][:n_each]:  # no headings
            questions.setdefault(line.lower(), line)
    questions = list(questions.values())[:n]
    answers = ask_all(base, tokenizer, [model.render(tokenizer, q, document) for q in questions], most=64)
    return [{"question": q, "answer": answer} for q, answer in zip(questions, answers) if answer]


def other_questions(base, tokenizer) -> list[dict]:
    """Requests that have nothing to do with any document, with the base model's answers."""
    requests = [f"{task.descriptions[0]}\n{task.test[0].input}" for task in chores.load()["open"]]
    answers = ask_all(base, tokenizer, [model.render(tokenizer, text) for text in requests], most=64)
    return [{"question": text, "answer": answer} for text, answer in zip(requests, answers) if answer]


def write_questions(args, base, tokenizer) -> None:
    """A folder of documents, one for each part of a text, with whole texts held out in splits.json."""
    files = sorted([*args.folder.glob("*.txt"), *args.folder.glob("*.md")])
    if len({path.stem for path in files}) < max(1, len(files)):
        raise UserError(f"{args.folder} holds no texts (.txt, .md), or two of the same name")
    random.Random(0).shuffle(files)
    other, n_held = other_questions(base, tokenizer), round(args.held_out * len(files))
    splits, n_questions = {"train": [], "val": [], "test": []}, 0
    for i, path in enumerate(tqdm(files, desc="questions", unit="text")):
        split = "val" if i < n_held else "test" if i < 2 * n_held else "train"
        text = path.read_text(encoding="utf-8-sig")
        for k, part in enumerate(split_text(tokenizer, text, args.max_tokens)):
            questions, name = question_answers(base, tokenizer, part, args.questions), f"{path.stem}-{k:03}"
            if questions:
                n_other = min(len(other), ceil(OTHER * len(questions)))
                content = {"document": part, "questions": questions}
                content["other"] = random.Random(name).sample(other, n_other)
                write_file(args.out_dir / f"{name}.json", content)
                splits[split].append(name)
                n_questions += len(questions)
    write_file(args.out_dir / "splits.json", splits)
    print(f"{n_questions} answers about {sum(map(len, splits.values()))} documents, in {args.out_dir}")


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("what", choices=["descriptions", "questions"])
    add("folder", metavar="FOLDER", type=Path, help="a folder of task files, or of texts")
    add("out_dir", metavar="OUT_DIR", type=Path, help="a new folder")
    add("--base_model", required=True, help="what is asked: a preset, an id or a folder")
    add("--device", default="auto", help=model.DEVICES)
    add("--descriptions", type=at_least(1), default=64, help="of each task (default: 64)")
    add("--questions", type=at_least(1), default=10, help="about each part of a text (default: 10)")
    add("--max_tokens", type=at_least(16), default=384, help="of a part of a text (default: 384)")
    add("--held_out", type=at_least(0, float), default=0.1, help="fraction of texts for val, and for test")
    args = parser.parse_args()
    if args.out_dir.exists():
        raise UserError(f"{args.out_dir} is there already; choose a new folder")
    name = model.resolve(args.base_model)
    if AutoTokenizer.from_pretrained(name).chat_template is None:
        raise UserError(f"--base_model {args.base_model} has no chat template: take an instruct model")
    base, tokenizer = model.load_base(name, model.pick_device(args.device))
    (write_descriptions if args.what == "descriptions" else write_questions)(args, base, tokenizer)


if __name__ == "__main__":
    command(main)
