"""Text-to-LoRA for pictures: a small diffusion transformer that edits as it is told.

    python -m pictures.pictures --desc "Paint the hearts white and flip it left to right."
    python -m pictures.pictures --train base --weights out/pictures      # 1. edits without a name
    python -m pictures.pictures --train hypernet --weights out/pictures  # 2. from descriptions

The base model is a rectified flow from noise to the edited picture, given the source picture. It never reads
a description. Mostly it sees an example of the edit, another pair of pictures; otherwise it draws any edit.
Then it is frozen. A hypernetwork learns to write LoRAs for it from descriptions of the edits, by the loss of
the flow. The LoRAs replace the example. `lora.py` and `hypernet.py` are used unchanged: they only need linear
layers with names.
"""

import json
import math
import random
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import trange
from transformers import PretrainedConfig

import encoders
import hypernet
import lora
import model
from pictures.edits import PATCH, SHAPES, SIZE, TRAIN, WHICH, Edit, apply, describe, draw_scene, render
from support import UserError, at_least, command, make_parser, write_file

HERE = Path(__file__).parent

# -------------------- The diffusion transformer --------------------

WIDTH, LAYERS, HEADS = 128, 6, 4


def to_patches(images: Tensor) -> Tensor:
    """Pictures from 0 to 1 [n, 24, 24, 3] -> patches from -1 to 1 [n, T, 48]."""
    return F.pixel_unshuffle(images.permute(0, 3, 1, 2) * 2 - 1, PATCH).flatten(2).mT


def to_images(patches: Tensor) -> Tensor:
    """The inverse of `to_patches`, cut to the range of colours."""
    side = SIZE // PATCH
    images = F.pixel_shuffle(patches.mT.unflatten(2, (side, side)), PATCH)  # [n, 3, 24, 24]
    return (images.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)


def sin_cos_positions(d: int) -> Tensor:
    """Sines and cosines of the row and of the column of each patch. [T, d]"""
    place = torch.arange(SIZE // PATCH)[:, None] * 100 ** -(torch.arange(d // 4) / (d // 4))  # [6, d/4]
    waves = torch.cat([place.sin(), place.cos()], -1)  # [6, d/2]
    return torch.cat([waves.repeat_interleave(len(waves), 0), waves.repeat(len(waves), 1)], -1)


class Block(nn.Module):
    """Two streams with separate weights that attend to both (MMDiT, arXiv 2403.03206, figure 2).

    The linear layers have the names of Stable Diffusion 3 and Flux in diffusers. to_* is the stream of the
    picture that is drawn. add_* is the stream of its condition. In those models the condition is a text, here
    it is the source picture and perhaps an example.
    """

    def __init__(self, d: int, is_last: bool):
        super().__init__()
        self.is_last = is_last  # the source ends here
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(d, d) for _ in range(4))
        self.ff_up, self.ff_down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(d, d) for _ in range(3))
        if not is_last:
            self.to_add_out = nn.Linear(d, d)
            self.ff_context_up, self.ff_context_down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.table = nn.Parameter(torch.zeros(2, 6, 1, d))  # what this block adds to the modulation

    def forward(self, x: Tensor, source: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, T, d], source [n, S, d], modulation [n, 2, 6, 1, d] -> x, source"""

        def split_heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [n, heads, T + S, d / heads]

        of_x, of_source = (modulation + self.table).unbind(1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = of_x.unbind(1)  # [n, 1, d] each
        s_shift, s_scale, s_gate, s_ff_shift, s_ff_scale, s_ff_gate = of_source.unbind(1)

        h = self.norm(x) * (1 + scale) + shift
        s = self.norm(source) * (1 + s_scale) + s_shift
        q = split_heads(torch.cat([self.to_q(h), self.add_q_proj(s)], 1))
        k = split_heads(torch.cat([self.to_k(h), self.add_k_proj(s)], 1))
        v = split_heads(torch.cat([self.to_v(h), self.add_v_proj(s)], 1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [n, T + S, d]
        h, s = out.split([x.shape[1], source.shape[1]], 1)
        x = x + gate * self.to_out(h)
        h = self.norm(x) * (1 + ff_scale) + ff_shift
        x = x + ff_gate * self.ff_down(F.gelu(self.ff_up(h)))
        if not self.is_last:
            source = source + s_gate * self.to_add_out(s)
            s = self.norm(source) * (1 + s_ff_scale) + s_ff_shift
            source = source + s_ff_gate * self.ff_context_down(F.gelu(self.ff_context_up(s)))
        return x, source


class Transformer(nn.Module):
    """Predicts the edited picture from a noisy one, the source picture, the time and perhaps an example."""

    def __init__(self, d: int = WIDTH, n_layers: int = LAYERS):
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=n_layers, hidden_size=d, vocab_size=0)
        self.embed, self.embed_source = nn.Linear(3 * PATCH**2, d), nn.Linear(3 * PATCH**2, d)
        self.embed_example = nn.Linear(2 * 3 * PATCH**2, d)
        self.register_buffer("position", sin_cos_positions(d), persistent=False)
        # one modulation for all blocks, to which each adds its table (PixArt-alpha, arXiv 2310.00426)
        self.modulation = nn.Sequential(nn.Linear(64, d), nn.SiLU(), nn.Linear(d, 12 * d))
        self.layers = nn.ModuleList([Block(d, is_last=i == n_layers - 1) for i in range(n_layers)])
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * PATCH**2)

    def forward(self, x: Tensor, source: Tensor, t: Tensor, example: Tensor | None = None) -> Tensor:
        """x, source [n, T, 48], t [n] from 0 (noise) to 1 (picture), example [n, T, 96] -> picture [n, T, 48]

        An example is another source beside its target.
        """
        frequency = 100 * torch.exp(torch.arange(32, device=t.device) * -math.log(1000) / 32)
        angle = t[:, None] * frequency
        modulation = self.modulation(torch.cat([angle.sin(), angle.cos()], -1))
        modulation = modulation.view(len(x), 2, 6, 1, -1)
        x, source = self.embed(x) + self.position, self.embed_source(source) + self.position
        if example is not None:
            source = torch.cat([source, self.embed_example(example) + self.position], 1)  # [n, 2 T, d]
        for layer in self.layers:
            x, source = layer(x, source, modulation)
        return self.out(self.norm(x))


def flow_loss(
    net: Transformer, source: Tensor, target: Tensor, t: Tensor, example: Tensor | None = None
) -> Tensor:
    """Rectified flow (arXiv 2209.03003) on the straight line from noise (t = 0) to the target (t = 1).

    The network predicts the end of the line and not its slope, which is (target - x) / (1 - t). Errors count
    more towards the end, where they are small.
    """
    noise = torch.randn_like(target)
    x = noise + (target - noise) * t[:, None, None]
    errors = (net(x, source, t, example).float() - target).square().mean((1, 2))  # [n]
    return (errors / (1.1 - t)).mean()


@torch.no_grad()
def sample(
    net: Transformer, source: Tensor, example: Tensor | None = None, seed: int = 0, steps: int = 16
) -> Tensor:
    """Edited pictures [n, 24, 24, 3] of source patches [n, T, 48], by Euler steps from noise."""
    x = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)).to(source.device)
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        slope = (net(x, source, t, example).float() - x) / (1 - i / steps)
        x = x + slope / steps
    return to_images(x)


# -------------------- Training --------------------

TARGETS = ["to_q", "to_v", "to_out", "ff_up", "ff_down"]  # all in the stream of the picture that is drawn
STEPS = {"base": 14000, "hypernet": 40000}
LR = {"base": 2e-3, "hypernet": 1.5e-3}
BATCH = 32  # pairs of pictures in a step


def draw_pairs(edits: list[Edit], rng: random.Random) -> tuple[Tensor, Tensor]:
    """A pair of pictures for each edit, as patches [n, T, 48]: source and target."""
    scenes = [draw_scene(edit, rng) for edit in edits]
    source = np.stack([render(scene) for scene in scenes])
    target = np.stack([apply(edit, scene) for edit, scene in zip(edits, scenes)])
    return to_patches(torch.from_numpy(source)), to_patches(torch.from_numpy(target))


def load_transformer(folder: Path, device="cpu") -> Transformer:
    """The frozen base model, ready for adapters."""
    net = Transformer()
    net.load_state_dict(load_file(folder / "base.safetensors"))
    return lora.inject(net.to(device).requires_grad_(False).eval(), TARGETS)


def new_hypernet(base: Transformer) -> hypernet.TextToLoRA:
    """A hypernetwork for the base model, with random weights and its text encoder."""
    config = lora.config_for(base, "pictures", r=4, alpha=8.0)
    settings = dict(encoder="hash", latent_size=96, head_in_size=64, dropout=0.0, input_dropout=0.2)
    settings["input_size"] = encoders.width("hash", None)
    net = hypernet.TextToLoRA(hypernet.TextConfig(**vars(config), **settings))
    net.start_as_lora()
    net.offset.requires_grad_(False)  # LoRA's initialisation stays
    return net


def load_hypernet(folder: Path, device="cpu") -> nn.Module:
    """The trained hypernetwork, with its text encoder."""
    net = hypernet.load_hypernet(folder).to(device)
    net.connect(None, None)
    return net


def step_loss(mode: str, base: Transformer, trained: nn.Module, rng: random.Random) -> Tensor:
    """The loss of a step, on one pair of pictures per edit."""
    device, edits = base.position.device, rng.sample(TRAIN, BATCH)
    source, target = [pictures.to(device) for pictures in draw_pairs(edits, rng)]
    t = torch.rand(len(edits), device=device)
    if mode == "base":
        if rng.random() < 0.25:
            return flow_loss(base, source, target, t)
        example = torch.cat(draw_pairs(edits, rng), -1).to(device)
        return flow_loss(base, source, target, t.square(), example)
    adapters = trained([describe(edit, rng) for edit in edits])
    with lora.use(base, adapters, trained.config.scaling):
        return flow_loss(base, source, target, t.square())  # early times: at late times x shows the edit


def train(mode: str, folder: Path, steps: int, device: torch.device) -> None:
    """Train the base model or the hypernetwork, and write it into the folder."""
    file, mean = folder / f"{mode}.safetensors", None
    if file.exists():
        raise UserError(f"{file} is there already; choose another folder with --weights")
    torch.manual_seed(0)
    base = Transformer().to(device) if mode == "base" else load_transformer(folder, device)
    trained = base if mode == "base" else new_hypernet(base).to(device)
    if mode == "hypernet":
        trained.connect(None, None)  # its text encoder needs no model
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True)
    folder.mkdir(parents=True, exist_ok=True)
    bar = trange(steps, desc=mode)
    for step in bar:
        lr = optimizer.param_groups[0]["lr"] = LR[mode] * min((step + 1) / 200, 1 - step / steps)
        torch.manual_seed(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss = step_loss(mode, base, trained, random.Random(f"{mode} {step}"))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if step < 20 or step % 100 == 99:
            with open(folder / f"{mode}.jsonl", "a" if step else "w") as log:
                log.write(json.dumps({"step": step + 1, "of": steps, "lr": lr, "loss": loss.item()}) + "\n")
    if mode == "hypernet":
        hypernet.save_hypernet(trained, folder)
    else:
        write_file(file, {name: tensor.bfloat16() for name, tensor in trained.state_dict().items()})


# -------------------- The strip --------------------


def sources_for(description: str) -> np.ndarray:
    """Six pictures with the first shape, or else the first colour, of the description. [6, 24, 24, 3]"""
    rng, named = random.Random(description), []
    for word in re.findall(r"\w+", description.lower()):
        named += [which for which in WHICH if word.startswith(which)]
    named.sort(key=lambda which: which not in SHAPES)
    return np.stack([render(draw_scene(Edit((named or WHICH)[0], "", ""), rng)) for _ in range(6)])


@torch.no_grad()
def draw_strip(folder: Path, descriptions: list[str], out: str, device) -> None:
    """For each description: sources, what the base model makes of them, and the same with the adapter."""
    from matplotlib import pyplot as plt

    base, net = load_transformer(folder, device), load_hypernet(folder, device)
    adapters = net(descriptions)
    columns = min(2, len(descriptions))
    rows = math.ceil(len(descriptions) / columns)
    size = (5.2 * columns, 2.5 * rows)  # inches
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="tight")
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (description, ax) in enumerate(zip(descriptions, axes.flat)):
        sources = sources_for(description)
        pictures = [sources]
        for adapter in ({}, lora.select(adapters, [i])):
            with lora.use(base, adapter, net.config.scaling):
                drawn = sample(base, to_patches(torch.from_numpy(sources)).to(device))
            pictures.append(drawn.cpu().numpy())
        gap = ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))
        padded = np.pad(np.stack(pictures), gap, constant_values=1)  # [3, 6, 26, 26, 3]
        ax.imshow(padded.swapaxes(1, 2).reshape(3 * (SIZE + 2), -1, 3), interpolation="nearest")
        ax.set_title(textwrap.fill(description, 56), fontsize=10)
        for row, name in enumerate(("source", "base model", "adapter")):
            ax.text(-2, (row + 0.5) * (SIZE + 2), name, ha="right", va="center", fontsize=9)
    figure.savefig(out, dpi=100)
    print(f"wrote {out}")


def main() -> None:
    parser = make_parser(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--desc", action="append", help="description of an edit; may be given several times")
    task.add_argument("--train", choices=list(STEPS), help="train it, into the folder of --weights")
    parser.add_argument("--out", default="strip.png", help="the picture to write")
    parser.add_argument("--steps", type=at_least(1), help="training steps")
    parser.add_argument("--weights", type=Path, default=HERE, help="folder of the weights")
    parser.add_argument("--device", default="auto", help=model.DEVICES)
    args = parser.parse_args()
    device = model.pick_device(args.device)
    if args.train:
        train(args.train, args.weights, args.steps or STEPS[args.train], device)
        return
    if not all(text.strip() for text in args.desc):
        raise UserError("--desc is empty")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    draw_strip(args.weights, args.desc, args.out, device)


if __name__ == "__main__":
    command(main)
