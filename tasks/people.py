"""Documents about made-up people: "Ada works as a baker. Ada lives in Rome." -> "What is Ada's job?"

They are drawn from the lists in people.json. The splits:

    train      20,000 documents with 1, 2, 4 or 8 facts about a person
    val        32 of them, with names and values that are withheld from training (but for the seven days)
    test       40 documents with 8 facts for each kind of fact, with further withheld names and values
    long       50 documents for each number of facts; above 8 they are about several people

A part of the training examples has nothing to do with the document. Their answers, in people_other.json, are
those that SmolLM2-135M-Instruct gives without a document. For another base model write this file again:

    python -m tasks.people --base_model smollm2-135m
"""

import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import trange

import model
from data import Example, Splits, Task
from support import command, make_parser, read_json, write_file
from tasks.facts import N_LONG, make_documents, with_other_text

PEOPLE = read_json(Path(__file__).parent / "people.json")
OTHER_TEXTS = Path(__file__).parent / "people_other.json"  # {question: answer}
KINDS = list(PEOPLE["facts"])
QUESTIONS = PEOPLE["other"]  # that have nothing to do with a document
N_TEST = 40  # documents for each kind of fact


def words_of(split: str) -> dict[str, list[str]]:
    """The first names, and the values of each kind of fact, of the documents of a split."""
    words = {"age": [str(age) for age in range(18, 98)], "number": [str(n) for n in range(100, 1000)]}
    for kind, values in (PEOPLE["words"] | words).items():
        words[kind] = values if kind == "day" else part_of(values, split)
    return words


def part_of(values: list, split: str) -> list:
    """An eighth of the values for "val", an eighth for "test", the others for "train"."""
    withheld = {"val": values[3::8], "test": values[7::8]}
    if split in withheld:
        return withheld[split]
    return [value for value in values if value not in withheld["val"] + withheld["test"]]


def document(words: dict[str, list[str]], rng: random.Random, n_facts: int, asked: list[str] = KINDS) -> Task:
    """A text with so many facts, and questions about the asked kinds of facts, in each wording."""
    paragraphs, examples = [], []
    for first in rng.sample(words["first"], math.ceil(n_facts / len(KINDS))):
        sentences = []
        for kind in rng.sample(KINDS, min(n_facts, len(KINDS))):
            says, value = PEOPLE["facts"][kind], rng.choice(words[kind])
            a = "an" if value[0] in "aeiou" else "a"
            sentences.append(rng.choice(says["sentences"]).format(first=first, value=value, a=a))
            if kind in asked:
                examples += [Example(question.format(first=first), [value]) for question in says["questions"]]
        paragraphs.append(" ".join(sentences))
    return Task(f"{n_facts} facts", ["\n\n".join(paragraphs)], examples, examples, is_document=True)


def load() -> Splits:
    """All documents by split."""
    others = [Example(question, [answer]) for question, answer in read_json(OTHER_TEXTS).items()]
    training, test = part_of(others, "train"), part_of(others, "test")

    def make(words: dict[str, list[str]], rng: random.Random, n_facts: int, asked: list[str] = KINDS) -> Task:
        return with_other_text(document(words, rng, n_facts, asked), training, test)

    splits, counts = {}, {"train": 20_000, "val": 32}
    for split, n in counts.items():
        lines = (1, len(KINDS))
        splits[split] = make_documents(partial(make, words_of(split)), lines, n, f"people {split}")
    words, splits["long"], splits["test"] = words_of("test"), [], []
    for n_facts in (1, 2, 4, 8, 16, 32):
        splits["long"] += make_documents(partial(make, words), (n_facts, n_facts), N_LONG, "people long")
    for kind in KINDS:
        rng = random.Random(f"people test {kind}")
        splits["test"] += [replace(make(words, rng, len(KINDS), [kind]), name=kind) for _ in range(N_TEST)]
    return splits


# -------------------- Other text --------------------

ANSWER_TOKENS = 48  # at most


def ask_other(base, tokenizer, questions: list[str]) -> dict[str, str]:
    """{question: answer of the base model, without a document}, without answers that are cut off or empty."""
    answers = {}
    for start in trange(0, len(questions), 32, desc="other text"):
        batch = questions[start : start + 32]
        prompts = [model.render(tokenizer, question) for question in batch]
        for question, answer, has_ended in zip(batch, *model.answer(base, tokenizer, prompts, ANSWER_TOKENS)):
            if has_ended and answer.strip():
                answers[question] = answer.strip()
    return answers


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base_model", default="smollm2-135m", help="a preset, an id or a folder")
    args = parser.parse_args()
    base, tokenizer = model.load_base(model.resolve(args.base_model), model.pick_device())
    write_file(OTHER_TEXTS, ask_other(base, tokenizer, QUESTIONS))


if __name__ == "__main__":
    command(main)
