"""Measure the hypernetwork of pictures.py on unseen edits: python -m pictures.measure [FOLDER]"""

import random
import sys
from pathlib import Path

import numpy as np
import torch

import lora
import model
from pictures import pictures
from pictures.edits import EDITS, TEST, TRAIN, Edit, apply, describe, draw_scene, render
from support import command


@torch.no_grad()
def scores_of(
    base: pictures.Transformer, adapters: lora.Adapter, scaling: float, with_example: bool = False
) -> str:
    """Draw 8 pictures per test edit: edit i with adapter i, or each picture with an example."""
    errors, hits, whole_hits = [], [], []
    for i, edit in enumerate(TEST):
        rng = random.Random(f"measure {edit}")
        scenes = [draw_scene(edit, rng) for _ in range(8)]
        images = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
        source = pictures.to_patches(images).to(base.position.device)
        example = None
        if with_example:
            example = torch.cat(pictures.draw_pairs([edit] * 8, rng), -1).to(source.device)
        with lora.use(base, lora.select(adapters, [i]), scaling):
            images = pictures.sample(base, source, example).cpu().numpy()
        for scene, image in zip(scenes, images):
            right = apply(edit, scene)
            results = np.stack([apply(other, scene) for other in EDITS])  # [564, 24, 24, 3]
            nearest = abs(results - image).mean((1, 2, 3)).argmin()
            errors.append(abs(image - right).mean())
            hits.append((results[nearest] == right).all())
            whole_hits.append(EDITS[nearest].whole == edit.whole)
    scores = f"error per pixel {np.mean(errors):.3f}, right edit nearest {np.mean(hits):.2f}"
    return f"{scores}, at least in what happens to the whole picture {np.mean(whole_hits):.2f}"


@torch.no_grad()
def main() -> None:
    """Print the table: the hypernetwork on unseen edits, and controls."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else pictures.HERE
    device = model.pick_device()
    base, net = pictures.load_transformer(folder, device), pictures.load_hypernet(folder, device)
    rng = random.Random(0)

    def write(edits: list[Edit], withheld: bool = False) -> lora.Adapter:
        return net([describe(edit, rng, withheld) for edit in edits])

    meaningless = ["".join(rng.sample("abcdefghijklmnopqrstuvwxyz", 12)) for _ in TEST]
    rows = {
        "unseen edits": write(TEST),
        "unseen edits in withheld wordings": write(TEST, withheld=True),
        "another edit's description": write(TEST[1:] + TEST[:1]),
        "meaningless text": net(meaningless),
        "base model": {},
    }
    mean, _ = lora.statistics(write(TRAIN))
    for name, pair in mean.items():
        mean[name] = [matrix.to(device).float().expand(len(TEST), *matrix.shape) for matrix in pair]
    rows["the mean over training edits"] = mean
    for name, adapters in rows.items():
        print(f"{name:35} {scores_of(base, adapters, net.config.scaling)}", flush=True)
    print(f"{'base model, shown an example':35} {scores_of(base, {}, 1.0, with_example=True)}")


if __name__ == "__main__":
    command(main)
