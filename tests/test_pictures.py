"""The edits of pictures, the step, the strip."""

import random

from pictures import edits, pictures
from tests.helpers import *  # noqa: F403


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
    base, net = pictures.load_transformer(pictures.HERE), pictures.load_hypernet(pictures.HERE)
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


def test_the_strip_and_the_training(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    out, given, real = tmp_path / "new" / "strip.png", [], lora.use
    monkeypatch.setattr(lora, "use", lambda base, *a: given.append(a[0]) or real(base, *a))
    words = ["--desc", "Paint the hearts white.", "--desc", "Turn it grey.", "--out", out]
    assert command(pictures, *words) == 0
    first, second = [adapter["to_q"][0] for adapter in given if adapter]
    assert not torch.equal(first, second)  # each description has its own
    assert plt.imread(out).std() > 0.1
    monkeypatch.setattr(pictures, "BATCH", 4)
    for mode in "base", "hypernet":
        assert command(pictures, "--train", mode, "--steps", "2", "--weights", tmp_path / "a") == 0
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
