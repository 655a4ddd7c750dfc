"""Make documents with questions and answers, to train Doc-to-LoRA on, from texts or from open questions.

    python -m extras.answers notes/ out/notes --base_model NAME
    python train.py @config/reader.args --tasks out/notes --init_from out/people --out_dir out/reader

FOLDER holds texts (.txt, .md), or documents with questions as JSON files (see extras/README.md). As in the
published recipe, the base model writes questions of several kinds about each text. It then answers them with
the text in its prompt. Each document also gets questions that have nothing to do with it, with the base
model's answers without the text, so that a reader learns to leave other text alone. Long texts are cut into
parts, at paragraphs if possible. Whole texts are held out for validation and testing. OUT_DIR gets a file for
each part, and splits.json. A second call continues with the missing parts. All answers are greedy, so a
second run gives the same answers.
"""

import argparse
import random
import re
from math import ceil
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

import model
from support import UserError, at_least, command, make_parser, read_json, write_file
from tasks import people, read_splits, read_task, task_files
from tasks.facts import OTHER

ANSWER_TOKENS = 64  # the longest answer, and so many for each question
N_OTHER = 160  # questions that have nothing to do with the documents
PROMPT_TOKENS_AT_ONCE = 16_384  # of prompts that are answered together, to save memory
KINDS = [  # of questions, each asked for in a prompt of its own
    "about facts that the text states",
    "about names, places and terms in the text",
    "about numbers, dates and amounts in the text",
    "that begin with why or how and that the text answers",
    "about the main point of the text",
]


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="texts, or documents with questions")
    add_shared_flags(parser)
    add("--questions", type=at_least(1), default=10, help="about each part of a text (default: 10)")
    add("--max_tokens", type=at_least(16), default=384, help="of a part of a text (default: 384)")
    add("--held_out", type=at_least(0, float), default=0.1, help="fraction of texts for val, and for test")
    args = parser.parse_args()
    if args.held_out >= 0.5:
        raise UserError("--held_out must be below 0.5: so much for val, and as much for test")
    return args


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of extras.describe, too."""
    add = parser.add_argument
    add("out_dir", metavar="OUT_DIR", type=Path, help="a new folder")
    add("--base_model", required=True, help="what is asked: a preset, an id or a folder")
    add("--device", default="auto", help="cpu, cuda, mps; auto: a CUDA GPU if there is one")


# -------------------- Texts -> parts --------------------


def read_texts(folder: Path) -> dict[str, str]:
    """{name: text} of the .txt and .md files of a folder. UserError for a file without text."""
    texts = {}
    for path in sorted([*folder.glob("*.txt"), *folder.glob("*.md")]):
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UserError(f"{path} is no text in UTF-8") from None
        if not text:
            raise UserError(f"{path} is empty")
        if path.stem in texts:
            raise UserError(f"{folder} holds two texts called {path.stem}")
        texts[path.stem] = text
    return texts


def split_text(tokenizer, text: str, max_tokens: int) -> list[str]:
    """Cut a text between paragraphs, sentences, words or letters into parts of at most so many tokens."""
    parts = [""]
    for piece, joint in pieces_of(tokenizer, text, max_tokens):
        longer = f"{parts[-1]}{joint}{piece}" if parts[-1] else piece
        if len(model.tokenize(tokenizer, longer)) <= max_tokens:
            parts[-1] = longer
        else:
            parts.append(piece)
    return [part for part in parts if part]


CUTS = [("\n\n", r"\s*\n\s*\n"), (" ", r"(?<=[.!?])\s+"), (" ", r"\s+")]  # paragraphs, sentences, words


def pieces_of(tokenizer, text: str, max_tokens: int, cuts=CUTS, joint: str = "") -> list[tuple[str, str]]:
    """A text, or the pieces that it must be cut into, each with what joins it to the piece before."""
    if len(model.tokenize(tokenizer, text)) <= max_tokens:
        return [(text, joint)]
    if not cuts:  # a word, or a text without spaces
        middle = len(text) // 2
        first = pieces_of(tokenizer, text[:middle], max_tokens, [], joint)
        return first + pieces_of(tokenizer, text[middle:], max_tokens, [], "")
    (its_joint, pattern), *finer_cuts = cuts
    pieces = []
    for piece in re.split(pattern, text.strip()):
        pieces += pieces_of(tokenizer, piece, max_tokens, finer_cuts, its_joint if pieces else joint)
    return pieces


# -------------------- Questions and answers --------------------


def ask_all(base, tokenizer, prompts: list[str], n_new: int) -> list[tuple[str, bool]]:
    """The greedy answers to prompts, a few at a time: (text, whether the model ended it itself).

    It is "" for a prompt that is too long for the model.
    """
    lengths = [len(model.tokenize(tokenizer, prompt)) for prompt in prompts]
    fitting = [i for i, length in enumerate(lengths) if length + n_new <= model.window_of(base)]
    at_once = max(1, PROMPT_TOKENS_AT_ONCE // (max(lengths, default=0) + n_new))
    answers = [("", False)] * len(prompts)
    for i in range(0, len(fitting), at_once):
        batch = fitting[i : i + at_once]
        said, ended = model.answer(base, tokenizer, [prompts[k] for k in batch], n_new)
        for k, text, has_ended in zip(batch, said, ended):
            answers[k] = (text.strip(), has_ended)
    return answers


def write_questions(base, tokenizer, document: str, n: int) -> list[dict]:
    """Up to n questions about a document, of all kinds in turn, none twice."""
    n_each = -(-n // len(KINDS))
    prompts = []
    for kind in KINDS:
        task = f"Write {n_each} short questions {kind}. Write one question per line and nothing else."
        prompts.append(model.render(tokenizer, f"{document}\n\n{task}"))
    questions = {}  # {question in small letters: question}
    for said, _ in ask_all(base, tokenizer, prompts, ANSWER_TOKENS * n_each):
        lines = [re.sub(r"^\s*(?:[-*]|\(?\d{1,2}[.)])\s+", "", line).strip() for line in said.splitlines()]
        whole = [line for line in lines if line.endswith("?")]  # no headings, no half a line
        for line in whole[:n_each]:
            questions.setdefault(line.lower(), line)
    return [{"question": question} for question in list(questions.values())[:n]]


def answer_questions(base, tokenizer, content: dict) -> int:
    """Answer the open questions of a file in place. Drop those without an answer; return their number."""
    open_ones = [entry for entry in content["questions"] if "answer" not in entry]
    prompts = []
    for entry in open_ones:
        prompts.append(model.render(tokenizer, entry["question"].strip(), content["document"]))
    for entry, (answer, has_ended) in zip(open_ones, ask_all(base, tokenizer, prompts, ANSWER_TOKENS)):
        entry["answer"] = answer if has_ended else ""
    answered = [entry for entry in content["questions"] if entry["answer"]]
    n_dropped = len(content["questions"]) - len(answered)
    content["questions"] = answered
    return n_dropped


def add_other_text(name: str, content: dict, other_texts: dict[str, str]) -> None:
    """Add some of these texts, {question: answer}, to a file, unless it has its own."""
    n = min(len(other_texts), ceil(OTHER * len(content["questions"])))
    if n and "other" not in content:
        chosen = random.Random(name).sample(list(other_texts.items()), n)
        content["other"] = [{"question": question, "answer": answer} for question, answer in chosen]


# -------------------- The folder --------------------


def hold_out(names: list[str], fraction: float) -> dict[str, list[str]]:
    """Whole texts for training, validation and testing, the same every time."""
    names, n = sorted(names), round(fraction * len(names))
    random.Random(0).shuffle(names)
    return {"train": names[2 * n :], "val": names[:n], "test": names[n : 2 * n]}


def documents_of(args, tokenizer) -> tuple[dict[str, dict], dict[str, list[str]]]:
    """({name: content of a file to be completed}, their splits), from texts or from JSON files."""
    texts, files = read_texts(args.folder), task_files(args.folder)
    if bool(texts) == bool(files):
        which = "both texts and JSON files" if texts else "neither texts (.txt, .md) nor JSON files"
        raise UserError(f"{args.folder} holds {which}")
    contents = {}
    if files:
        for name, path in files.items():
            if not read_task(path).is_document:
                raise UserError(f"{path} is a task; only documents can have open questions")
            contents[name] = read_json(path)
        return contents, read_splits(args.folder)
    names_of = {}  # {name of a text: names of its parts}
    for name, text in texts.items():
        parts = split_text(tokenizer, text, args.max_tokens)
        names_of[name] = [f"{name}-{i:03}" if len(parts) > 1 else name for i in range(len(parts))]
        for part_name, part in zip(names_of[name], parts):
            if part_name in contents:
                raise UserError(f"{args.folder}: a part of {name} and a text are both called {part_name}")
            contents[part_name] = {"document": part}
    splits = {}
    for split, names in hold_out(list(texts), args.held_out).items():
        splits[split] = [part for name in sorted(names) for part in names_of[name]]
    return contents, splits


def load_instruct_model(args, names: list[str]):
    """(base model, tokenizer). UserError for one without a chat template, or if OUT_DIR holds other files."""
    in_out = {path.stem for path in args.out_dir.glob("*")}
    if args.out_dir.resolve() == args.folder.resolve() or not in_out <= {*names, "splits"}:
        raise UserError(f"{args.out_dir} is in use; choose another folder")
    name = model.resolve(args.base_model)
    if AutoTokenizer.from_pretrained(name).chat_template is None:
        raise UserError(f"--base_model {args.base_model} has no chat template: take an instruct model")
    return model.load_base(name, model.pick_device(args.device))


def write_splits(out_dir: Path, splits: dict[str, list[str]]) -> dict[str, Path]:
    """Write splits.json of what is there. Returns these files."""
    kept, kept_splits = task_files(out_dir), {}
    for split, names in splits.items():
        kept_splits[split] = [name for name in names if name in kept]
    write_file(out_dir / "splits.json", kept_splits)
    return kept


def main() -> None:
    args = parse_args()
    contents, splits = documents_of(args, model.load_tokenizer(model.resolve(args.base_model)))
    base, tokenizer = load_instruct_model(args, list(contents))
    write_file(args.out_dir / "splits.json", splits)  # until all files are there, train.py refuses the folder
    other_texts = people.ask_other(base, tokenizer, random.Random(0).sample(people.QUESTIONS, N_OTHER))
    n_dropped = 0
    for name, content in tqdm(contents.items(), desc="documents", unit="part"):
        if (args.out_dir / f"{name}.json").exists():
            continue
        if "questions" not in content:
            content["questions"] = write_questions(base, tokenizer, content["document"], args.questions)
        n_dropped += answer_questions(base, tokenizer, content)
        if content["questions"]:
            add_other_text(name, content, other_texts)
            write_file(args.out_dir / f"{name}.json", content)
    kept = write_splits(args.out_dir, splits)
    if n_dropped:
        print(f"left out: {n_dropped} questions, because document or answer is too long, or the answer empty")
    if len(kept) < len(contents):
        print(f"left out: {len(contents) - len(kept)} parts, about which no question was found or answered")
    n_questions = sum(len(read_json(path)["questions"]) for path in kept.values())
    print(f"{n_questions} answers about {len(kept)} documents, in {args.out_dir} (train.py --tasks)")


if __name__ == "__main__":
    command(main)
