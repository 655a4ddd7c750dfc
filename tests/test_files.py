"""Files and folders: nothing half-written, nothing of somebody else's lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import generate
import lora
import model
from support import hub
from support.files import read_file, write_file
from tests.helpers import DESC, HERE, SAY, TINY, command, refused, tiny_llama


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link"
    write_file(file, {"a": 1})
    os.link(file, link)
    write_file(file, {"a": 2})
    assert read_file(file) == {"a": 2} and json.loads(link.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_file(file, {"a": object()})
    assert read_file(file) == {"a": 2} and not list(tmp_path.glob("*.tmp"))
    write_file(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == file.stat().st_mode


def test_two_models_of_one_shape_are_told_apart_by_their_ids():
    hub.check_base("User/a", [1, 2, 3], "user/A", [1, 2, 3])
    hub.check_base("./some/folder", [1, 2, 3], "user/b", [])
    refused("cannot be used with", hub.check_base, "u/a", [1, 2, 3], "u/b", [1, 2, 3])


# -------------------- What generate.py overwrites --------------------


@pytest.mark.parametrize("flag", ["--out", "--merge"])
def test_a_users_folder_is_never_taken_for_one_of_ours(tmp_path, flag):
    """An adapter of somebody else has the same names, but no description.txt."""
    oracle = ["adapter_config.json", "definition.txt"]
    for i, names in enumerate((["description.txt", "notes.md"], ["adapter_config.json"], oracle)):
        mine = tmp_path / str(i)
        mine.mkdir()
        for name in names:
            (mine / name).write_text("mine")
        words = [*SAY, "--out", tmp_path / "out"] if flag == "--merge" else SAY
        assert command(generate, *words, flag, mine) == 2
        assert sorted(file.name for file in mine.iterdir()) == sorted(names)
        assert all(file.read_text() == "mine" for file in mine.iterdir())


def test_what_the_last_call_wrote_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert command(generate, *SAY, "--desc", "Reverse the fruits.", "--out", out) == 0
    assert (out / "0" / "adapter_config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_adapter", lambda *_: 1 / 0)  # as if the disk were full
        with pytest.raises(ZeroDivisionError):
            command(generate, *SAY, "--out", out)
    assert (out / "1" / "adapter_config.json").exists()  # still there
    assert command(generate, *SAY, "--out", out) == 0  # one adapter in place of two
    assert {file.name for file in out.iterdir()} == generate.OUR_FILES
    assert (out / "description.txt").read_text() == DESC + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_merged_model_answers_as_the_base_model_with_the_adapter(tmp_path):
    """Its settings of generation are the base model's own, and it says what stood in the prompts."""
    own, merged = tmp_path / "own", tmp_path / "merged"
    shutil.copytree(TINY, own, ignore=shutil.ignore_patterns("sft_*", "d2l", "recon"))
    write_file(own / "generation_config.json", {"temperature": 0.7, "do_sample": True, "eos_token_id": 1})
    words = [*SAY, "--base_model", own, "--out", tmp_path / "one", "--merge", merged]
    assert command(generate, *words) == 0
    assert read_file(merged / "generation_config.json")["temperature"] == 0.7
    assert read_file(merged / "prompt.json") == {"instruction": False}
    assert (merged / "description.txt").read_text() == DESC + "\n"
    assert (merged / "model.safetensors").stat().st_mode == (merged / "description.txt").stat().st_mode
    base, tokenizer = model.load_base(str(merged))
    prompt = model.render(tokenizer, model.chat(tokenizer, "cat red dog shirt"))
    assert model.answer(base, tokenizer, [prompt], 8) == [" chat chien"]


def test_a_base_model_that_is_not_whole_is_one_line(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)  # its lm_head is not missing
    base.save_pretrained(tmp_path)
    model.load_base("tiny")[1].save_pretrained(tmp_path)
    write_file(tmp_path / "generation_config.json", {"eos_token_id": 0})
    assert model.load_base(str(tmp_path))[0].generation_config.eos_token_id[0] == 0
    weights, config = read_file(tmp_path / "model.safetensors"), read_file(tmp_path / "config.json")
    kept = {key: tensor for key, tensor in weights.items() if "layers.2." not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    layer = "model.layers.2.input_layernorm.weight"
    refused(f"9 weights are missing, such as {layer}", model.load_base, str(tmp_path))
    for broken in config | {"intermediate_size": 64}, [1]:
        write_file(tmp_path / "config.json", broken)
        refused("cannot be loaded", model.load_base, str(tmp_path))


def test_what_only_shards_need_is_not_imported():
    """It takes most of a second."""
    program = "import sys, generate; sys.exit('torch.distributed.fsdp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE).returncode == 0
