"""Generate missing answers about documents: python -m extras.answers FOLDER OUT_DIR --base_model NAME

FOLDER holds documents with questions, see the README. Questions without an answer are answered by the base
model with the document in its prompt, as published. OUT_DIR gets the same files with all answers; a second
call goes on with files that are not there yet.
"""

from pathlib import Path

from tqdm import tqdm

import model
from support import UserError, command, make_parser, read_json, write_file
from tasks import read_splits, read_task, task_files

ANSWER_TOKENS = 64  # the longest answer
PROMPT_TOKENS_AT_ONCE = 16_384  # of prompts that are answered together, to save memory


def answer_file(base, tokenizer, content: dict) -> int:
    """Answer the open questions of one file, in place, and drop the others. Returns how many are dropped."""
    asked, longest = [], 1  # (entry, prompt)
    for entry in content["questions"]:
        if "answer" not in entry:
            prompt = model.render(tokenizer, entry["question"].strip(), content["document"])
            n_tokens = len(model.tokenize(tokenizer, prompt))
            if n_tokens + ANSWER_TOKENS <= model.window_of(base):
                asked.append((entry, prompt))
                longest = max(longest, n_tokens)
    at_once = max(1, PROMPT_TOKENS_AT_ONCE // longest)
    for i in range(0, len(asked), at_once):
        entries, prompts = zip(*asked[i : i + at_once])
        answers, _ = model.answer(base, tokenizer, list(prompts), ANSWER_TOKENS)
        for entry, answer in zip(entries, answers):
            entry["answer"] = answer.strip()
    answered = [entry for entry in content["questions"] if entry.get("answer")]
    n_dropped = len(content["questions"]) - len(answered)
    content["questions"] = answered
    return n_dropped


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="documents and questions")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a new folder")
    parser.add_argument("--base_model", required=True, help="what answers: a preset, an id or a folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: a CUDA GPU if there is one")
    args = parser.parse_args()
    paths = task_files(args.folder)
    for path in paths.values():
        if not read_task(path).is_document:
            raise UserError(f"{path} is a task; only documents can have open questions")
    in_out = {path.stem for path in args.out_dir.glob("*")}
    if args.out_dir.resolve() == args.folder.resolve() or not in_out <= {*paths, "splits"}:
        raise UserError(f"{args.out_dir} is in use; choose another folder")
    splits = read_splits(args.folder)
    device = model.pick_device(args.device)
    base, tokenizer = model.load_base(model.resolve(args.base_model), device)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    n_left_out = 0
    for path in tqdm(paths.values(), desc="documents", unit="file"):
        if not (args.out_dir / path.name).exists():
            content = read_json(path)
            n_left_out += answer_file(base, tokenizer, content)
            if content["questions"]:
                write_file(args.out_dir / path.name, content)
    if (args.folder / "splits.json").exists():
        kept = task_files(args.out_dir)
        for split, names in splits.items():
            splits[split] = [name for name in names if name in kept]
        write_file(args.out_dir / "splits.json", splits)
    if n_left_out:
        print(f"left out: {n_left_out} questions; the document is too long, or the answer was empty")
    print(f"answered: {len(task_files(args.out_dir))} documents, in {args.out_dir} (train.py --tasks)")


if __name__ == "__main__":
    command(main)
