"""Fit how sure a hypernetwork's answers are, and keep what it was trained on beside its weights.

    python -m extras.calibrate --hypernet out/sft --tasks tiny

On validation tasks, the mean log-probability of an answer's tokens tells right answers from wrong ones. A
logistic function of it is fitted and written into config.json as `calibration`. known.json and
known.safetensors get a description of each training task with its task embedding, and all words of training
descriptions, so that generate.py can say which are new.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch

import data
import eval as evaluation
import generate
import model
from data import Task
from support import UserError, at_least, command, make_parser, read_json, write_file
from tasks import benchmarks, load_tasks

N_TEXTS = 200  # descriptions of a training task whose words are kept
LEAST = 20  # wrong answers for a calibration


def fit(log_probs: list[float], right: list[float]) -> tuple[float, float]:
    """Slope and offset of the logistic function: Newton's method, with Platt's targets instead of 0 and 1."""
    x, right = torch.tensor(log_probs, dtype=torch.double), torch.tensor(right, dtype=torch.double)  # [n]
    x, n_right = torch.stack([x, torch.ones_like(x)], 1), right.sum()  # [n, 2]
    target = torch.where(right > 0, (n_right + 1) / (n_right + 2), 1 / (len(right) - n_right + 2))
    weights = torch.tensor([1.0, 0.0], dtype=torch.double)
    for _ in range(50):
        p = (x @ weights).sigmoid()
        hessian = (x.mT * (p * (1 - p))) @ x + 1e-6 * torch.eye(2)
        weights = weights + torch.linalg.solve(hessian, x.mT @ (target - p))
    return tuple(weights.tolist())


@torch.no_grad()
def write_known(net, folder: Path, tasks: list[Task]) -> None:
    """A description of each training task with its embedding, and the words of all."""
    words, texts = set(), []
    for task in tasks:
        described = list(task.descriptions[:N_TEXTS])
        texts.append(described[0])
        words.update(re.findall(r"\w+", " ".join(described).lower()))
    embeddings = []
    for i in range(0, len(texts), 64):
        embeddings.append(net.embed_task(net.encode(texts[i : i + 64])).half())  # [64, d/2]
    write_file(folder / "known.json", {"descriptions": texts, "words": sorted(words)})
    write_file(folder / "known.safetensors", {"task_emb": torch.cat(embeddings)})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", required=True, help="those it was trained on")
    parser.add_argument("--n_examples", type=at_least(1), default=8, help="of each validation task (8)")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    args.max_new_tokens, args.batch_size, folder = None, 64, Path(args.hypernet or "")
    if not (folder / "config.json").exists():
        raise UserError("--hypernet must be the folder of a hypernetwork")
    device, splits = model.pick_device(args.device), load_tasks(args.tasks)
    tasks = [task for task in data.pick(splits, "val") if task.test]
    tasks = [replace(task, rules=benchmarks.Rules()) for task in tasks]
    reads = "documents" if tasks[0].is_document else "descriptions"
    net = generate.load_net(folder, reads, device, args.encoder)
    net.config.calibration = []
    base, tokenizer = generate.load_base_for([net.config], args, device)
    net.connect(base, tokenizer)
    exam = evaluation.Exam(args, tasks, [], {"hypernet": net}, {}, base, tokenizer)
    with torch.no_grad():
        rows = evaluation.score("net", exam)
    right, n_wrong = [row["score"] for row in rows], sum(not row["score"] for row in rows)
    if n_wrong < LEAST:
        print(f"{n_wrong} wrong answers are too few for a calibration")
    else:
        calibration = fit([math.log(max(row["sure"], 1e-300)) for row in rows], right)
        write_file(folder / "config.json", read_json(folder / "config.json") | {"calibration": calibration})
        print(f"{folder / 'config.json'}: slope {calibration[0]:.2f}, offset {calibration[1]:.2f}")
    if hasattr(net, "embed_task"):
        write_known(net, folder, splits["train"])


if __name__ == "__main__":
    command(main)
