"""The edits of pictures, the step, the strip."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lora
from pictures import edits, pictures
from tests.helpers import close, command, interrupted_in_call, losses_of, needs_time


def test_edits_of_pictures_do_what_they_say():
    things = [edits.Object("square", "red", 1, 1), edits.Object("circle", "blue", 13, 1)]
    scene = edits.Scene((0.0, 0.0, 0.0), things)

    def seen(*parts):
        return edits.apply(edits.Edit(*parts), scene)

    red, blue = edits.COLOURS["red"], edits.COLOURS["blue"]
    assert tuple(seen("square", "remove", "")[5, 5]) == (0, 0, 0)
    assert seen("circle", "remove", "")[5, 5] == pytest.approx(red)
    kept = seen("circle", "keep, paint white", "upside down")
    assert tuple(kept[23 - 17, 5]) == (1, 1, 1) and kept.sum() == 3 * edits.SHAPES["circle"].sum()
    assert seen("red", "paint green", "mirror")[17, 23 - 5] == pytest.approx(blue)
    assert seen("red", "paint white", "turn")[23 - 5, 17] == pytest.approx(blue)  # to the left
    assert not set(edits.TRAIN) & {*edits.TEST, *edits.VAL} and (len(edits.TEST), len(edits.VAL)) == (25, 8)
    for edit in edits.EDITS:
        source = edits.draw_scene(edit, random.Random(0))
        assert "green" in edit.how or (edits.apply(edit, source) != edits.render(source)).any()


@torch.no_grad()
def test_an_adapter_or_an_example_says_what_is_drawn():
    """5 edits, 3 pictures each, all in one batch; then each with the adapter or example of another edit."""
    base, net = pictures.load_base(pictures.HERE), pictures.load_hypernet(pictures.HERE)
    rng, asked, others = random.Random(0), edits.TEST[:5], edits.TEST[5:10]
    sources, rights = [], []
    for edit in asked:
        scenes = [edits.draw_scene(edit, rng) for _ in range(3)]
        sources += [edits.render(scene).tolist() for scene in scenes]
        rights += [edits.apply(edit, scene).tolist() for scene in scenes]
    source, right = pictures.to_patches(torch.tensor(sources)), torch.tensor(rights)
    second = torch.tensor(sources)[1, 4:8, 4:8].permute(2, 0, 1).flatten() * 2 - 1  # of the second row
    close(source[1, 7], second)
    close(pictures.to_images(source), torch.tensor(sources))
    assert torch.equal(pictures.sample(base, source[:1]), pictures.sample(base, source[:1]))

    def error(adapters, example=None) -> float:
        with lora.use(base, adapters, net.config.scaling):
            return (pictures.sample(base, source, example) - right).abs().mean()

    errors = {}
    for whose, chosen in (("own", asked), ("another's", others)):
        adapters = net([edits.describe(edit, rng) for edit in chosen])
        shown = [edit for edit in chosen for _ in range(3)]
        example = torch.cat(pictures.draw_pairs(shown, rng), -1)
        errors[whose] = error(adapters), error({}, example)
    assert errors["own"][0] < 0.1 and errors["own"][0] < 0.5 * errors["another's"][0]
    assert errors["own"][1] < 0.5 * errors["another's"][1]


def test_the_strip_and_ones_own_picture(tmp_path, capsys, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    mine, small, out = tmp_path / "mine.png", tmp_path / "small.png", tmp_path / "new" / "strip.png"
    plt.imsave(mine, edits.render(edits.draw_scene(edits.TEST[0], random.Random(0))))
    plt.imsave(small, torch.rand(8, 8, 3).numpy())
    words = ["--desc", "Paint the hearts white.", "--out", out]
    given, real = [], lora.use
    monkeypatch.setattr(lora, "use", lambda base, *a: given.append(a[0]) or real(base, *a))
    assert command(pictures, *words, "--desc", "Turn it grey.", "--input", mine) == 0
    first, second = [adapter["to_q"][0] for adapter in given if adapter]
    assert not torch.equal(first, second)  # each description has its own
    assert plt.imread(out).std() > 0.1
    assert command(pictures, *words, "--input", small) == 2
    assert "24 x 24 pixels" in capsys.readouterr().err


def test_training_on_pictures_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "BATCH", 4)
    assert command(pictures, "--train", "base", "--steps", "4", "--weights", tmp_path / "a") == 0
    step_loss, calls = interrupted_in_call(2, pictures.step_loss)
    monkeypatch.setattr(pictures, "step_loss", step_loss)
    monkeypatch.setattr(pictures, "SAVE_EVERY", 1)
    words = ["--train", "base", "--steps", "4", "--weights", tmp_path / "b"]
    assert command(pictures, *words) == 130
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "write_file", lambda *_: 1 / 0)  # as if the disk were full at the end
        assert command(pictures, *words) == 2
    assert command(pictures, *words) == 0 and len(calls) == 2 + 3
    weights = [load_file(tmp_path / name / "base.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert command(pictures, "--train", "hypernet", "--steps", "1", "--weights", tmp_path / "a") == 0
    assert pictures.load_hypernet(tmp_path / "a").config.r == 4


@needs_time
@pytest.mark.parametrize("mode", ["base", "hypernet"])
def test_the_command_repeats_its_first_steps(mode, tmp_path, monkeypatch, one_thread):
    step_loss, _ = interrupted_in_call(21, pictures.step_loss)
    monkeypatch.setattr(pictures, "step_loss", step_loss)
    if mode == "hypernet":
        shutil.copy(pictures.HERE / "base.safetensors", tmp_path)
    assert command(pictures, "--train", mode, "--weights", tmp_path, "--device", "cpu") == 130
    again, shipped = [losses_of(folder, file=f"{mode}.jsonl") for folder in (tmp_path, pictures.HERE)]
    close(again[:20], shipped[:20], 1e-3)
