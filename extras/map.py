"""What a hypernetwork has learned, in one picture (needs matplotlib).

    python -m extras.map --out map.png
    python -m extras.map --hypernet out/sft --split train --out map.png

Each dot is a task. The left plot shows task embeddings, the right plot the written changes of the weights.
Both are projected onto their first two principal components. In the tiny world the colour is the category on
the left and the layout on the right. For other tasks it is the first part of the name.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import data
import generate
import model
from support import UserError, command, make_parser
from tasks import load_tasks

ENTRIES = 4096  # of each layer's change of the weights: a strided sample


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", default="tiny", help="as for train.py")
    parser.add_argument("--split", default="all", help="train, val, test, or all")
    parser.add_argument("--n_tasks", type=int, default=512, help="at most so many of them")
    parser.add_argument("--out", default="map.png", help="the picture to write")
    parser.add_argument("--device", default="auto", help=model.DEVICES)
    generate.add_net_flags(parser)
    args = parser.parse_args()
    args.base_model = args.base_model and model.resolve(args.base_model)
    return args


def projection(x: Tensor) -> Tensor:
    """The first two principal components of n vectors. [n, d] -> [n, 2]"""
    x = x - x.mean(0)
    _, _, directions = torch.pca_lowrank(x, q=2, center=False, niter=8)  # [d, 2]
    return x @ directions


@torch.no_grad()
def vectors_of(net, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Task embeddings [n, d/2], and a sample of the entries of scaling * B A in all layers [n, entries]."""
    text_emb, changes = net.encode(texts), []
    for emb in text_emb:
        entries = []
        for A, B in net.write(emb[None]).values():  # [1, L, r, in], [1, L, out, r]
            delta_w = (B[0] @ A[0]).flatten(1)  # [L, out * in]
            stride = max(1, delta_w.shape[1] // ENTRIES)
            entries.append(delta_w[:, ::stride].flatten())
        changes.append(torch.cat(entries) * net.config.scaling)
    return net.embed_task(text_emb), torch.stack(changes)


def main() -> None:
    args = parse_args()
    from matplotlib import pyplot as plt

    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = model.pick_device(args.device)
    folder = generate.net_folder(args, "descriptions")
    net = generate.load_net(folder, "descriptions", device, args.encoder)
    if not hasattr(net, "embed_task"):
        raise UserError("the map is of Text-to-LoRA: this network has no task embedding")
    splits = load_tasks(args.tasks)
    chosen = splits if args.split == "all" else {args.split: data.pick(splits, args.split)}
    tasks = {task.name: task for split in chosen.values() for task in split}
    tasks = list(tasks.values())[: args.n_tasks]
    if len(tasks) < 3 or tasks[0].is_document:
        raise UserError("a map needs at least three tasks, with descriptions")
    base, tokenizer = None, None
    if net.config.encoder == "base":
        base, tokenizer = model.load_base(args.base_model or net.config.base_model, device)
    net.connect(base, tokenizer)
    embeddings, changes = vectors_of(net, [task.descriptions[0] for task in tasks])

    parts = [task.name.split("-") for task in tasks]
    last = -1 if args.tasks == "tiny" else 0  # of the tiny world: category on the left, layout on the right
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    sides = [("task embeddings", embeddings, 0), ("written changes of the weights", changes, last)]
    for ax, (title, vectors, part) in zip(axes, sides):
        points = projection(vectors.float()).cpu()  # [n, 2]
        labels = [names[part] for names in parts]
        colours = plt.get_cmap("tab20" if len(set(labels)) > 10 else "tab10")
        for i, label in enumerate(sorted(set(labels))):
            chosen = points[[k for k, other in enumerate(labels) if other == label]]
            ax.scatter(chosen[:, 0], chosen[:, 1], s=14, color=colours(i % colours.N), label=label)
        ax.set(title=title, xticks=[], yticks=[])
        ax.legend(frameon=False, fontsize=8, markerscale=1.5, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(args.out, dpi=110)
    print(f"{len(tasks)} tasks: {args.out}")


if __name__ == "__main__":
    command(main)
