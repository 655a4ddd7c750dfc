"""Teach a hypernetwork new words: python -m extras.reword FROM OUT_DIR

FROM was trained by SFT on chores that are described by templates, and hears little else. A copy of it learns
to write, from the descriptions of tasks/chores_descriptions.json, the adapters that FROM writes from
templates: reconstruction, with the network itself as its oracle. It takes no base model, and little time:
1,500 steps are half an hour on one core. SFT can go on from the result (train.py --init_from).

The heads stay as they are. So it is enough to compare their inputs, by what a head W makes of a difference d:
the squared length of W d.
"""

import random

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hypernet
import model
from support import flags, processes
from support.files import command
from support.state import bfloat16_if_fast
from tasks import chores

BATCH = 64  # descriptions per step
LAYERS = 8  # layers of the base model per step, drawn at random, to save time
TEMPLATES = 12  # descriptions from templates that the targets of a task are averaged over
LR = 1e-3


def metric(net: hypernet.TextToLoRA) -> list[Tensor]:
    """For each head W a matrix C [head_in, head_in] with |d C| = |W d| for every d."""
    factors = []
    for name in net.names:
        W = net.heads[name].weight.detach().cpu().double()
        gram = W.T @ W + 1e-9 * torch.eye(W.shape[1])
        factors.append(torch.linalg.cholesky(gram).float().to(net.heads[name].weight.device))
    return factors


def head_inputs(net: hypernet.TextToLoRA, factors: list[Tensor], text_emb: Tensor, layers) -> Tensor:
    """What the heads are given, in the metric above. [n, E] -> [n, layers, M, head_in]"""
    rows = net.rows(net.embed_task(text_emb))[:, layers]  # [n, layers, M, d]
    x = net.trunk(rows)
    return torch.stack([x[:, :, m] @ C for m, C in enumerate(factors)], 2)


@torch.no_grad()
def make_targets(net, factors, encode, chains: list[chores.Chain]) -> dict[chores.Chain, Tensor]:
    """What the network makes of the templates of each task. {chain: [L, M, head_in]}"""
    targets = {}
    for chain in tqdm(chains, desc="targets"):
        texts = [chores.from_template(chain, random.Random(f"{chain} {i}")) for i in range(TEMPLATES)]
        targets[chain] = head_inputs(net, factors, encode(texts), slice(None)).mean(0)
    return targets


def main() -> None:
    parser = flags.Parser(__doc__)
    parser.add_argument("start", metavar="FROM", help="folder of the hypernetwork to start from")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder for the new one")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--encoder", help="where the text encoder is, if not under its name in training")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: a GPU if there is one")
    args = parser.parse_args()
    steps, device = args.steps, processes.choose_device(args.device)
    torch.manual_seed(0)
    net = hypernet.load_hypernet(args.start).to(device)  # in eval mode
    encode = model.load_encoder(args.encoder or net.config.encoder, device, full_stop=net.config.full_stop)
    factors = metric(net)
    names = {task.name for task in chores.load()["train"]}
    chains = [chain for chain in chores.all_chains() if chores.name_of(chain) in names]
    weights = [chores.weight(chain) for chain in chains]
    targets = make_targets(net, factors, encode, chains)
    stacked = torch.stack(list(targets.values()))
    variance = (stacked - stacked.mean(0)).square().mean()

    net.train()
    parameters = [p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("head")]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=1e-2)
    bar = tqdm(range(steps), desc="reword")
    for step in bar:
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        rng = random.Random(step)
        batch = rng.choices(chains, weights, k=BATCH)
        layers = rng.sample(range(net.config.n_layers), LAYERS)
        text_emb = encode([chores.description(chain, rng.randrange(1000)) for chain in batch])
        with bfloat16_if_fast(device):
            x = head_inputs(net, factors, text_emb, layers).float()
        target = torch.stack([targets[chain][layers] for chain in batch])
        loss = (x - target).square().mean() / variance  # 1 for the mean adapter of all tasks
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    hypernet.save_hypernet(net, args.out_dir)


if __name__ == "__main__":
    command(main)
