"""Commands: their flags, what users do wrong, files."""

import importlib
import shlex
from urllib.error import URLError

from safetensors.torch import save_file

from tests.helpers import *  # noqa: F403

# -------------------- Flags --------------------


@pytest.mark.parametrize("file", [*HERE.glob("config/*.args"), *HERE.glob("checkpoints/*/*/train.args")])
def test_every_file_of_flags_is_a_run(file, monkeypatch, tmp_path):
    """Each setting is known, and what a run records is what it was given."""
    monkeypatch.chdir(HERE)
    args, settings = train.parse_args([f"@{file}", "--out_dir", str(tmp_path / "new")])
    (tmp_path / "train.args").write_text(settings)
    again, _ = train.parse_args([f"@{tmp_path / 'train.args'}"])
    assert vars(again) == vars(args) and args.lr < 1
    assert args.dtype != "auto" and getattr(args, "encoder", "") != "preset"


UNUSED = {  # flags that count for nothing in a kind of run
    "--mode lora": ["oracles x", "encoder base", "init_from x", "size small", "distill 4"],
    "": ["oracles x", "multi_task", "distill 4", "recon_loss delta_w"],
    "--mode recon --oracles x": ["l1 1", "label_smoothing 0.1", "rank 8", "no-shard"],
    "@config/d2l.args": ["instruction", "encoder hash", "shard"],
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_flag_that_counts_for_nothing_is_refused(kind, monkeypatch, capsys):
    """Also if it has its default value."""
    monkeypatch.chdir(HERE)
    for flag in UNUSED[kind]:
        name = flag.split()[0].removeprefix("no-")
        refused(f"--{name} has no use in a run", train.parse_args, [*kind.split(), *f"--{flag}".split()])
    with pytest.raises(SystemExit):  # of another network
        train.parse_args(["--arch", "linear", "--head_in_size", "8"])


# -------------------- What users do wrong: one line on stderr, exit code 2 --------------------

MISTAKES = """
generate | | one of the arguments --desc --doc --adapter is required
generate | --desc x --input '' | a text of --desc or --input is empty
generate | --desc x --merge {foreign} | is no new folder
generate | --desc x --out {foreign} | holds more than this command writes (precious.txt)
generate | --desc x --out {adapter} | holds more than this command writes (adapter_
generate | --desc x --base_model mistral-7b | no hypernetwork that reads descriptions is shipped for mistralai
generate | --desc x --hypernet {tiny} | holds no hypernetwork
generate | --desc x --hypernet nowhere | nowhere holds no hypernetwork: hypernet.safetensors and config.json
generate | --adapter nowhere | nowhere holds no adapter: adapter_model.safetensors and adapter_config.json
generate | --desc x --base_model folder | there is no such folder, nor an id USER/REPO on the hub
generate | --desc x --hypernet {net} --base_model {base} | cannot be used with
generate | --desc x --hypernet {other} --base_model {base} | another model
generate | --desc x --hypernet {reader} | reads documents
generate | --desc x --encoder base | is 128 wide; this network was trained with 8192
generate | --desc x --input 'cat unicorn gnu' | no token for gnu, unicorn; the tiny one knows animals (cat)
generate | --desc x --device cuda | torch finds no CUDA GPU
generate | --adapter {adapter} --out {tmp}/m | go with --desc or --doc
generate | --doc {tmp}/none.txt | FileNotFoundError
generate | --doc {note} --instruction | go with --desc
generate | --desc x --max_new_tokens 0 | must be at least 1
eval | --methods net,magic | there is no method 'magic'
eval | --methods oracle | needs --oracles DIR
eval | --tasks facts --n_tasks 2 --methods net_reworded | needs other wordings
eval | --oracles {tmp}/oracles | 25 of 25 adapters are missing
eval | --recon {net} --methods recon | was trained by SFT
eval | --tasks facts --instruction | into the prompt
eval | --out {mine} | does not hold results of eval.py
train | --base_model {adapter} | is an adapter, not a model
train | --base_model ./nowhere | OSError
train | --micro_batch 0 | must be at least 1, not 0
train | --warmup 2 | is a fraction
train | --skip 1 --head_in_size 8 | --skip needs --head_in_size 64
train | --arch encoder_lora | needs a text encoder of the hub
train | --resume --out_dir {foreign} | train.args
train | --shard | --shard needs several processes
train | --arch foo-bar | there is no such network, but t2l, d2l, encoder_lora
train | --arch d2l --tasks facts --target_modules down_proj --chunk_len 600 | base model's window of 512
train | --tasks {tmp}/tasks | no token for Paris, Rome
train | --tasks benchmarks | neither chores, facts
train | --tasks facts | cannot be used with --arch t2l
train | --mode lora --tasks facts | tasks of equal names
train | --mode recon --oracles {foreign} | holds no adapters of the train
train | --mode recon --oracles {tmp}/oracles | another model
train | --mode recon --oracles {tmp}/oracles --arch d2l | is trained with --mode sft
train | --init_from {reader} | other settings (arch: d2l, not t2l)
train | --out_dir {foreign} | is in use
pictures.pictures | --train base | is there already
extras.published | {foreign} {tmp}/new | is no published checkpoint
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_bad_input_is_one_line_and_exit_code_2(places, monkeypatch, capsys, line, tmp_path):
    module, words, message = map(str.strip, line.split("|"))
    monkeypatch.chdir(tmp_path)  # what a default would write is seen, and a user's out/ not in the way
    before = sorted(places["tmp"].rglob("*"))
    words = [word.format(**places) for word in shlex.split(words)]
    assert command(importlib.import_module(module), *words) == 2
    error = capsys.readouterr().err
    lines = [said for said in error.strip().splitlines() if said.startswith("error:") or " error: " in said]
    assert message in error and "Traceback" not in error and len(lines) == 1
    assert sorted(places["tmp"].rglob("*")) == before and not [*tmp_path.rglob("*.*")]


def test_without_a_network_a_model_of_the_hub_is_refused_at_once(monkeypatch):
    def urlopen(request, timeout: int):
        assert timeout < 10 and request.full_url.endswith("/some/one/resolve/main/config.json")
        raise URLError("no network")

    monkeypatch.setattr(model, "urlopen", urlopen)
    for load in (model.load_base, encoders.load):
        refused("hub cannot be reached .*no network.* --base_model and --encoder also take", load, "some/one")


def test_a_description_outside_of_what_was_learned_is_said_to_be_a_guess(capsys, monkeypatch, tmp_path):
    words = ["--input", "cat red dog shirt", "--out", tmp_path / "out"]
    assert command(generate, *SAY, *words) == 0
    shown = capsys.readouterr().out
    assert "note:" not in shown and re.search(r"\n  sure +(9\d|100)%\n", shown)
    assert command(generate, "--desc", "Translate the animals to Japanese.", *words) == 0
    assert "no training description has the words: japanese\n" in capsys.readouterr().out
    monkeypatch.setattr(generate, "SURE", 1.01)
    known = read_json(TINY / "sft_large" / "known.json")["descriptions"]
    assert command(generate, "--desc", known[7], *words, "--instruction") == 0
    shown = capsys.readouterr()
    assert f'probably a guess; the nearest that training had is "{known[7]}"' in shown.out
    assert "prompts in training had none" in shown.err
    assert command(generate, *SAY, "--hypernet", TINY / "sft_small", *words) == 0
    assert "note: this is probably a guess\n" in capsys.readouterr().out  # nothing is known of its training


def test_an_error_of_a_library_is_one_line_and_a_later_process_says_which_it_is(capsys, monkeypatch):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(SystemExit) as stop:
        support.command(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said == "error: OutOfMemoryError: CUDA out of memory. Tried to allocate\n"
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        support.command(main)
    assert capsys.readouterr().err.startswith("error in process 3: ")
    monkeypatch.setenv("T2L_TRACEBACK", "1")
    with pytest.raises(torch.OutOfMemoryError):
        support.command(main)


# -------------------- Files: nothing half-written, nothing of somebody else's lost --------------------


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link"
    write_file(file, {"a": 1})
    os.link(file, link)
    write_file(file, {"a": 2})
    assert read_json(file) == {"a": 2} and json.loads(link.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_file(file, {"a": object()})
    assert read_json(file) == {"a": 2} and not list(tmp_path.glob("*.tmp"))
    write_file(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == file.stat().st_mode


def test_what_the_last_call_wrote_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert command(generate, *SAY, "--desc", "Reverse the fruits.", "--out", out) == 0
    assert (out / "0" / "adapter_config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_adapter", lambda *_: 1 / 0)  # as if the disk were full
        assert command(generate, *SAY, "--out", out) == 2
    assert (out / "1" / "adapter_config.json").exists()  # still there
    assert command(generate, *SAY, "--out", out) == 0  # one adapter in place of two
    assert {file.name for file in out.iterdir()} == generate.OUR_FILES
    assert (out / "description.txt").read_text() == DESC + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert command(generate, *SAY, "--out", tmp_path) == 2  # it holds a folder of ours, and is none


def test_a_merged_model_answers_as_the_base_model_with_the_adapter(tmp_path):
    """Its settings of generation are the base model's own, and it says what stood in the prompts."""
    own, merged = tmp_path / "own", tmp_path / "merged"
    shutil.copytree(TINY, own, ignore=shutil.ignore_patterns("sft_*", "d2l", "recon"))
    tokenizer = model.load_base(model.TINY)[1]
    tokenizer.chat_template = dict.fromkeys(("default", "tool_use"), model.PLAIN_TEMPLATE)
    tokenizer.save_pretrained(own)
    write_file(own / "generation_config.json", {"temperature": 0.7, "do_sample": True, "eos_token_id": 1})
    words = [*SAY, "--base_model", own, "--out", tmp_path / "one", "--merge", merged]
    assert command(generate, *words) == 0
    (templates,) = [path for path in merged.iterdir() if path.is_dir()]
    assert templates.stat().st_mode & 0o111 == 0o111  # others can look into it
    again = ["--adapter", tmp_path / "one", "--base_model", own, "--merge", tmp_path / "one" / "merged"]
    assert command(generate, *again) == 0  # of an adapter that is there, beside its files
    assert read_json(merged / "generation_config.json")["temperature"] == 0.7
    assert read_json(merged / "prompt.json")["instruction"] is False
    assert (merged / "description.txt").read_text() == DESC + "\n"
    assert (merged / "model.safetensors").stat().st_mode == (merged / "description.txt").stat().st_mode
    base, tokenizer = model.load_base(str(merged))
    prompt = model.render(tokenizer, "cat red dog shirt")
    assert model.answer(base, tokenizer, [prompt], 8)[0][:2] == (" chat chien", True)


def test_a_base_model_that_is_not_whole_is_one_line(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)  # its lm_head is not missing
    base.save_pretrained(tmp_path)
    model.load_base(model.TINY)[1].save_pretrained(tmp_path)
    write_file(tmp_path / "generation_config.json", {"eos_token_id": 0})
    assert model.load_base(str(tmp_path))[0].generation_config.eos_token_id[0] == 0
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if "layers.2." not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    layer = "model.layers.2.input_layernorm.weight"
    refused(f"9 weights are missing, such as {layer}", model.load_base, str(tmp_path))
