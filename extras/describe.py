"""Write many descriptions of each task of a folder, to train Text-to-LoRA on.

    python -m extras.describe my_tasks/ out/described --base_model NAME --descriptions 64
    python train.py @config/chores.args --tasks out/described --out_dir out/mine

A hypernetwork learns to follow descriptions only if each task has many; the paper has 128. Here an instruct
model writes them in several manners, from some examples of a task and its definition (or first description).
A description is dropped if it exists already, or if it quotes an input or an answer of an example that was
shown (unless the definition names it, such as "yes" or "no"). OUT_DIR gets a file for each task, with the
new descriptions after the old ones. A second call continues with the missing files. All texts are greedy and
examples are drawn with a seed, so a second run gives the same texts.
"""

import argparse
import random
import re
from pathlib import Path
from textwrap import shorten

from tqdm import tqdm

import model
from data import Example, Task
from extras.answers import add_shared_flags, ask_all, load_instruct_model, write_splits
from support import UserError, at_least, command, make_parser, read_json, write_file
from tasks import read_splits, read_task, task_files

MANNERS = [
    "Say in a few words, as a command that begins with a verb, what to do with any input.",
    "Explain in one full sentence how the output follows from the input.",
    "Write the question about the input that the output answers.",
    "Describe in one sentence what the output is.",
    "Write the instruction for a new colleague who has to do this, in one sentence.",
    "Say in one sentence what the input is and what to make of it.",
]
N_SHOWN = 4  # examples in a prompt
MOST_LETTERS = 400  # of a text in a prompt
MOST_TOKENS = 80  # of a description


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", metavar="TASKS", type=Path, help="a folder of task files")
    add_shared_flags(parser)
    parser.add_argument("--descriptions", type=at_least(1), default=64, help="of each task (default: 64)")
    return parser.parse_args()


def prompt_for(tokenizer, definition: str, examples: list[Example], manner: str) -> str:
    """Examples of a task, its definition, and how to describe it."""
    lines = ["Here are some inputs with their outputs."]
    for example in examples:
        lines.append(f"Input: {shorten(example.input, MOST_LETTERS)}\nOutput: {example.answers[0]}")
    if definition:
        lines.append(f"The instruction was: {definition}")
    lines.append(f"{manner} It must fit all inputs, so do not quote any. Write this text and nothing else.")
    return model.render(tokenizer, "\n\n".join(lines))


def gives_away(text: str, definition: str, examples: list[Example]) -> bool:
    """Whether a text quotes an input or an answer of these examples that the definition does not name."""
    quoted = [example.input for example in examples] + [example.answers[0] for example in examples]
    for words in quoted:
        pattern = re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)
        if pattern.search(text) and not pattern.search(definition):
            return True
    return False


def describe(base, tokenizer, task: Task, known: list[str], n: int) -> list[str]:
    """Up to n new descriptions of a task, in all manners in turn, each round from other examples."""
    found, seen, definition = [], {text.lower() for text in known}, task.definition or "".join(known[:1])
    for i in range(2 * -(-n // len(MANNERS))):  # some of them are dropped
        rng = random.Random(f"{task.name} {i}")
        examples = rng.sample(task.train, min(N_SHOWN, len(task.train)))
        prompts = [prompt_for(tokenizer, definition, examples, manner) for manner in MANNERS]
        for said, has_ended in ask_all(base, tokenizer, prompts, MOST_TOKENS):
            text = said.strip("\"' \n")
            is_new = has_ended and text and "\n" not in text and text.lower() not in seen
            if is_new and not gives_away(text, definition, examples):
                found.append(text)
                seen.add(text.lower())
        if len(found) >= n:
            break
    return found[:n]


def main() -> None:
    args = parse_args()
    files, splits = task_files(args.folder), read_splits(args.folder)
    if not files:
        raise UserError(f"{args.folder} holds no task files (NAME.json)")
    tasks = {name: read_task(path) for name, path in files.items()}
    for name, task in tasks.items():
        if task.is_document:
            raise UserError(f"{files[name]} is a document; only tasks are described")
    base, tokenizer = load_instruct_model(args, list(tasks))
    write_file(args.out_dir / "splits.json", splits)  # until all files are there, train.py refuses the folder
    counts = []
    for name, task in tqdm(tasks.items(), desc="descriptions", unit="task"):
        content = read_json(files[name])
        known = list(task.descriptions) if "descriptions" in content else []
        if not (args.out_dir / f"{name}.json").exists():
            new = describe(base, tokenizer, task, known, args.descriptions)
            content["descriptions"] = known + new or list(task.descriptions)
            write_file(args.out_dir / f"{name}.json", content)
        counts.append(len(read_json(args.out_dir / f"{name}.json")["descriptions"]) - len(known))
    write_splits(args.out_dir, splits)
    new = f"{min(counts)} to {max(counts)} new descriptions of {len(tasks)} tasks"
    print(f"{new}, in {args.out_dir} (train.py --tasks)")


if __name__ == "__main__":
    command(main)
