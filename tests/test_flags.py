"""Settings as flags, files of flags, what a run records."""

import re
import sys

import pytest

import train
from support import flags
from tests.helpers import HERE, command, refused


def test_help_shows_the_values_of_the_run(capsys):
    for words, values in {
        "@config/gemma-2-2b.args --lr 1e-3": "max_steps 1180000 lr 0.001 dropout 0.05",
        "@config/mistral-7b-recon.args": "recon_loss delta_w size medium dtype float32",
        "@config/d2l.args --seed 5": "n_blocks 1 target_modules down_proj seed 5",
    }.items():
        assert command(train, *words.split(), "--help") == 0
        shown = dict(re.findall(r"^  --(\w+) +(\S+)  ", capsys.readouterr().out, re.M))
        values = values.split()
        assert [shown[name] for name in values[::2]] == values[1::2]


@pytest.mark.parametrize("file", [*HERE.glob("config/*.args"), *HERE.glob("checkpoints/*/*/train.args")])
def test_every_file_of_flags_is_a_run(file, monkeypatch, tmp_path):
    """Each setting is known, and what a run records is what it was given."""
    monkeypatch.chdir(HERE)
    words = ["--out_dir", str(tmp_path / "new")]
    if "recon" in str(file):
        words += ["--oracles", str(tmp_path / "oracles")]
    monkeypatch.setattr(sys, "argv", ["train.py", f"@{file}", *words])
    args = train.parse_args()
    (tmp_path / "train.args").write_text(args.as_text)
    monkeypatch.setattr(sys, "argv", ["train.py", f"@{tmp_path / 'train.args'}"])
    assert vars(train.parse_args()) == vars(args) and args.lr < 1
    assert args.dtype != "auto" and args.encoder != "preset"


def test_files_of_flags_stand_first_and_may_begin_with_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """@b.args
    --tasks 'a#b' # comment with an apostrophe's end
    #another
    --out_dir 'a # b' --x "it's"
    """
    (tmp_path / "a.args").write_text(text, encoding="utf-8-sig")
    (tmp_path / "b.args").write_text("--lr 1 --seed 3\n")
    found = flags.expand(["@a.args", "--desc", "@ sign, please"])
    assert found[:4] == ["--lr", "1", "--seed", "3"] and found[-2:] == ["--desc", "@ sign, please"]
    assert found[4:-2] == ["--tasks", "a#b", "--out_dir", "a # b", "--x", "it's"]
    (tmp_path / "a.args").write_text("--x 'a b")
    refused("No closing quotation", flags.expand, ["@a.args"])


UNUSED = {  # flags that count for nothing in a kind of run
    "--mode lora": ["--offset_lr 1", "--oracles x", "--encoder base", "--init_from x"],
    "": ["--oracles x", "--multi_task", "--distill 4", "--n_heads 4"],
    "--mode recon --oracles x": ["--l1 1", "--label_smoothing 0.1", "--rank 4", "--shard", "--offset_lr 1"],
    "@config/d2l.args": ["--instruction", "--label_smoothing 0.1", "--encoder hash"],
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_flag_that_counts_for_nothing_is_refused(kind, capsys):
    for flag in UNUSED[kind]:
        assert command(train, *kind.split(), *flag.split()) == 2
        assert f"{flag.split()[0]} is not a setting of --mode " in capsys.readouterr().err
