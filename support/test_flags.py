"""Settings as flags, files of flags, what a run records: python -m pytest -q support"""

import re
import sys

import pytest

import eval as evaluation
import generate
import lora
import train
from support import flags
from test_all import (
    D2L,
    HERE,
    NAMES,
    command,
    random_adapter,
    seed,  # noqa: F401 (a fixture)
    tiny_llama,
)


def test_help_shows_the_values_of_the_run(capsys):
    def shown(*words):
        assert command(train, *words, "--help") == 0
        text = capsys.readouterr().out
        return dict(re.findall(r"^  --(\w+) +(\S+)  ", text, re.M))

    text = shown("@config/gemma-2-2b.args", "--lr", "1e-3")
    assert (text["max_steps"], text["lr"], text["latent_size"]) == ("1180000", "0.001", "512")
    assert text["encoder"] == "Alibaba-NLP/gte-large-en-v1.5" and text["full_stop"] == "True"
    text = shown("@config/mistral-7b-recon.args")
    assert text["recon_loss"] == "delta_w" and text["size"] == "medium" and text["dtype"] == "float32"
    text = shown(*D2L, "--seed", "5")
    assert (text["n_blocks"], text["target_modules"], text["seed"]) == ("1", "down_proj", "5")
    for module in (generate, evaluation):
        assert command(module, "--help") == 0 and "default: 64" in capsys.readouterr().out


@pytest.mark.parametrize("file", [*HERE.glob("config/*.args"), *HERE.glob("checkpoints/*/*/train.args")])
def test_every_file_of_flags_is_a_run(file, monkeypatch, tmp_path):
    """Each setting is known, and what a run records is what it was given."""
    monkeypatch.chdir(HERE)
    config = lora.config_for(tiny_llama(), NAMES, "tiny")
    lora.save_adapter(tmp_path / "oracles" / "one", random_adapter(config), config)
    words = ["--out_dir", str(tmp_path / "new"), "--oracles", str(tmp_path / "oracles")]
    monkeypatch.setattr(sys, "argv", ["train.py", f"@{file}", *words])
    args = train.parse_args()
    (tmp_path / "train.args").write_text(args.as_text)
    monkeypatch.setattr(sys, "argv", ["train.py", f"@{tmp_path / 'train.args'}"])
    assert vars(train.parse_args()) == vars(args) and args.lr < 1
    assert args.dtype != "auto" and args.encoder != "preset"


def test_only_leading_words_name_files_of_flags(tmp_path, monkeypatch):
    (tmp_path / "a.args").write_text("@b.args\n--lr 2  # a comment\n--out_dir 'a b'\n")
    (tmp_path / "b.args").write_text("--lr 1 --seed 3\n")
    monkeypatch.chdir(tmp_path)
    words = ["@a.args", "--desc", "@ sign, please"]
    expected = "--lr 1 --seed 3 --lr 2 --out_dir".split() + ["a b", "--desc", "@ sign, please"]
    assert flags.expand(words) == expected


def test_a_run_by_reconstruction_records_what_its_oracles_are(tmp_path, monkeypatch):
    config = lora.config_for(tiny_llama(), ["v_proj", "o_proj"], "tiny", r=3, alpha=5.0)
    lora.save_adapter(tmp_path / "one", random_adapter(config, r=3), config)
    start = ["train.py", "--mode", "recon", "--oracles", str(tmp_path)]
    for given in [], ["--target_modules", "v_proj,o_proj", "--rank", "3"]:
        monkeypatch.setattr(sys, "argv", [*start, *given])
        args = train.parse_args()
        assert (args.rank, args.alpha, args.target_modules) == (3, 5.0, "o_proj,v_proj")
        assert "--rank 3\n" in args.as_text and "--target_modules o_proj,v_proj\n" in args.as_text
