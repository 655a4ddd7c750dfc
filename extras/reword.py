"""Teach a hypernetwork new words, and give each of two chores a slot: python -m extras.reword FROM OUT_DIR

FROM is Text-to-LoRA (--arch t2l or slots) of size large, trained by SFT on chores. A copy of it, of --arch
slots, learns to write, from the descriptions of tasks/chores_descriptions.json, the adapters that FROM writes
from templates: reconstruction, with the network itself as its oracle. It takes no base model, and little
time. SFT can go on from the result (train.py --init_from, with the same --slots and --encoder_rank).

With --slots 2, if FROM has one slot, the first slot learns to write what FROM writes for the first chore of a
chain alone, the second one what it writes for the second chore alone. The sum of the two does the whole chain
in many cases already.

The heads stay as they are. So it is enough to compare their inputs, by what a head W makes of a difference d:
the squared length of W d.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hypernet
import lora
from support import flags, processes
from support.files import UserError, command
from tasks import chores

BATCH = 64  # descriptions per step
LAYERS = 8  # layers of the base model per step, drawn at random, to save time
TEMPLATES = 12  # descriptions from templates that the targets of a task are averaged over
LR = 1e-3
GATE = 0.7  # what the gates of both slots learn if a task has two chores: better than 1 before any SFT


def load_copy(args, device: torch.device):
    """(FROM, a copy with the slots and the LoRA that are asked for, what reads descriptions for each)."""
    start = hypernet.load_hypernet(args.start).to(device)  # in eval mode
    if getattr(start.config, "size", "") != "large":
        raise UserError(f"{args.start} is not Text-to-LoRA of size large")
    fields = vars(start.config)
    n_before, rank_before = fields.get("slots", 1), fields.get("encoder_rank", 0)
    changes = {"slots": max(args.slots, n_before), "encoder_rank": rank_before or args.encoder_rank}
    config = hypernet.SlotConfig(**fields | changes)
    name = args.encoder or config.encoder
    if name == "base":
        raise UserError(f"{args.start} has the base model as its text encoder, which is not loaded here")
    reader = start.load_reader(replace(start.config, encoder=name), None, None, device)
    new_reader = hypernet.SlotTextToLoRA.load_reader(replace(config, encoder=name), None, None, device)
    config.encoder_lora = new_reader.recorded.get("encoder_lora", {})
    net = hypernet.SlotTextToLoRA(config).to(device)
    weights = start.state_dict()
    for key in ("task_encoder.0.weight", "task_encoder.0.bias"):
        weights[key] = torch.cat([weights[key]] * (config.slots // n_before))
    net.load_state_dict(weights, strict=False)  # gates and the LoRA may be new
    return start, net, (reader, new_reader)


def metric(net: hypernet.TextToLoRA) -> list[Tensor]:
    """For each head W a matrix C [head_in, head_in] with |d C| = |W d| for every d."""
    factors = []
    for name in net.names:
        W = net.heads[lora.key(name)].weight.detach().cpu().double()
        gram = W.T @ W + 1e-9 * torch.eye(W.shape[1])
        factors.append(torch.linalg.cholesky(gram).float().to(net.heads[lora.key(name)].weight.device))
    return factors


class Written(NamedTuple):
    """What a network writes for n tasks, as the inputs of its heads in the metric above."""

    x: Tensor  # [n, S, L, M, head_in]
    gate: Tensor  # how much each slot counts [n, S]


def write(net: hypernet.TextToLoRA, factors: list[Tensor], reader, texts: list[str], layers) -> Written:
    """What a network writes from descriptions, for some of the layers (a slice or a list of numbers)."""
    has_slots = isinstance(net, hypernet.SlotTextToLoRA)
    task_emb = net.embed_task(net.condition(texts, reader))  # [n, S, d/2]
    task_emb = task_emb if has_slots else task_emb[:, None]
    x = net.trunk(net.rows(task_emb.flatten(0, 1))[:, layers])  # [n * S, layers, M, head_in]
    x = torch.stack([x[:, :, m] @ C for m, C in enumerate(factors)], 2).unflatten(0, task_emb.shape[:2])
    gate = net.gate(task_emb)[..., 0].sigmoid() if has_slots else x.new_ones(x.shape[:2])
    return Written(x.float(), gate.float())


@torch.no_grad()
def make_targets(net, factors, reader, chains: list[chores.Chain]) -> dict[chores.Chain, Written]:
    """What a network writes from the templates of each task: x [S, L, M, head_in], gate [S]."""
    targets = {}
    for chain in tqdm(chains, desc="targets"):
        texts = [chores.from_template(chain, random.Random(f"{chain} {i}")) for i in range(TEMPLATES)]
        x, gate = write(net, factors, reader, texts, slice(None))
        targets[chain] = Written(x.mean(0), gate.mean(0))
    return targets


def split_targets(targets: dict[chores.Chain, Written], chains: list[chores.Chain]):
    """Targets of two slots, one for each chore, from those of single chores with one slot."""
    of_chore = {}  # several for a chore for any text, which is a task for each sort of input
    for (_, chore), target in targets.items():
        of_chore.setdefault(chore, []).append(target.x)
    mean = {chore: torch.stack(xs).mean(0) for chore, xs in of_chore.items()}  # [1, L, M, head_in]
    split = {}
    for chain in chains:
        first = targets[chain[:2]].x
        if len(chain) == 2:  # the second slot is closed, whatever it writes
            split[chain] = Written(torch.cat([first, first]), torch.tensor([1.0, 0.0]))
        else:
            split[chain] = Written(torch.cat([first, mean[chain[2]]]), torch.tensor([GATE, GATE]))
    return split


def main() -> None:
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("start", metavar="FROM", help="folder of the hypernetwork to start from")
    add("out_dir", metavar="OUT_DIR", type=Path, help="a new folder")
    add("--steps", type=flags.at_least(1), default=1500, help="training steps")
    add("--slots", type=int, choices=[1, 2], default=1, help="slots, if FROM has one")
    add("--encoder_rank", type=flags.at_least(0), default=0, help="of the encoder's LoRA, if FROM has none")
    add("--encoder", help="where the text encoder is, if not under its name in training")
    add("--device", default="auto", help="cpu, cuda, mps; auto: a GPU if there is one")
    args = parser.parse_args()
    if args.out_dir.exists() and any(args.out_dir.iterdir()):
        raise UserError(f"{args.out_dir} is in use; choose another folder")
    device = processes.start_single(args.device)
    torch.manual_seed(0)
    start, net, (reader, new_reader) = load_copy(args, device)
    factors = metric(net)
    names = {task.name for task in chores.load()["train"]}
    chains = [chain for chain in chores.all_chains() if chores.name_of(chain) in names]
    weights = [chores.weight(chain) for chain in chains]
    if net.config.slots > getattr(start.config, "slots", 1):
        single = [chain for chain in chains if len(chain) == 2]
        targets = split_targets(make_targets(start, factors, reader, single), chains)
    else:
        targets = make_targets(start, factors, reader, chains)
    stacked = torch.stack([target.x[0] for target in targets.values()])
    variance = (stacked - stacked.mean(0)).square().mean()

    net.train()
    parameters = [p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("head")]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=1e-2)
    bar = tqdm(range(args.steps), desc="reword")
    for step in bar:
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 50, 2 * (1 - step / args.steps))
        rng = random.Random(step)
        batch = rng.choices(chains, weights, k=BATCH)
        layers = rng.sample(range(len(net.layers)), min(LAYERS, len(net.layers)))
        texts = [chores.description(chain, rng.randrange(1000)) for chain in batch]
        with processes.bfloat16_if_fast(device):
            x, gate = write(net, factors, new_reader, texts, layers)
        target_x = torch.stack([targets[chain].x[:, layers] for chain in batch])
        target_gate = torch.stack([targets[chain].gate for chain in batch]).to(device)
        error = (x - target_x).square().mean((2, 3, 4)) / variance  # [n, S]; 1 if all got the mean target
        loss = (target_gate * error).sum() / target_gate.sum() + (gate - target_gate).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    hypernet.save_hypernet(net, args.out_dir)


if __name__ == "__main__":
    command(main)
