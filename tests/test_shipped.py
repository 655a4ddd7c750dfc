"""Shipped weights, and real models."""

import itertools
import time

from extras import pretrain
from tests.helpers import *  # noqa: F403

SMOLLM2 = TINY.parent / "smollm2-135m"
README_SCORES = {"sft_large": 0.99, "sft_small": 0.95}
README_FACTS = {4: 0.95, 16: 0.78}  # by the number of facts


def test_shipped_checkpoints_are_as_good_as_the_readme_says(tmp_path):
    for name, score in README_SCORES.items():
        results = evaluate(tmp_path / "s.json", "--hypernet", TINY / name, "--methods", "net,net_random")
        assert results["net"]["mean"] >= score - 0.03 and len(results["net"]["per_task"]) == 25
        assert results["net_random"]["mean"] < 0.1


N_REPEATED = 10  # steps


def test_the_command_of_the_base_model_repeats_its_first_steps(one_thread, tmp_path):
    losses = itertools.islice(pretrain.train(pretrain.make_model(), 20_000), N_REPEATED)
    close(list(losses), losses_of(TINY)[:N_REPEATED], 1e-3)
    assert command(pretrain, tmp_path / "base", "--steps", 1, "--device", "cpu") == 0
    ids, answer = model.example_ids(model.load_base(str(tmp_path / "base"))[1], "cat", "red", "")
    assert pretrain.tokenize([data.Example("cat", ["red"])])[0] == ids + answer


COMMANDS = {name: TINY / name / "train.args" for name in ("sft_large", "sft_small")}
COMMANDS["d2l"] = HERE / "config" / "d2l.args"  # the first of its two commands
SLOW = [pytest.param(name, marks=needs_time) for name in ("sft_small", "d2l")]


@pytest.mark.parametrize("name", ["sft_large", *SLOW])
def test_the_command_of_a_hypernetwork_repeats_its_first_steps(name, tmp_path, monkeypatch, one_thread):
    sft_step, _ = interrupted_in_call(N_REPEATED + 1, train.sft_step)
    monkeypatch.setattr(train, "sft_step", sft_step)
    words = [f"@{COMMANDS[name]}", "--device", "cpu", "--out_dir", tmp_path / "again"]
    assert command(train, *words) == 130
    close(losses_of(tmp_path / "again"), losses_of(TINY / name)[:N_REPEATED], 1e-3)


def test_the_shipped_reader_is_as_good_as_the_readme_says(tmp_path, monkeypatch):
    of_two_lengths = []
    for n_lines in README_FACTS:
        of_length = [task for task in load_tasks("facts")["long"] if task.name == f"{n_lines} lines"]
        of_two_lengths += of_length[:20]
    monkeypatch.setattr(facts, "load", lambda: {"long": of_two_lengths})
    words = ["--tasks", "facts", "--split", "long", "--n_examples", "3"]
    results = evaluate(tmp_path / "d.json", *words, "--methods", "net,net_shuffled,base_other,net_other")
    for n_lines, expected in README_FACTS.items():
        assert results["net"]["per_task"][f"{n_lines} lines"] >= expected - 0.1
        assert results["net_shuffled"]["per_task"][f"{n_lines} lines"] < 0.05
    assert results["net_other"]["mean"] >= results["base_other"]["mean"] - 0.1 > 0.5


@needs_models
@torch.no_grad()
def test_the_card_shows_what_the_network_does():
    """Its rows of a visitor's description, an input and the answer, right or wrong."""
    rows = re.findall(r"^\| (.+) \| `(.+)` \| `(.+)` \|", (SMOLLM2 / "README.md").read_text(), re.M)
    texts, inputs, shown = zip(*rows)
    net, (base, tokenizer) = hypernet.load_hypernet(SMOLLM2 / "sft_large"), model.load_base(REAL[1])
    net.config.encoder = REAL[3]
    lora.inject(base, list(net.config.targets))
    net.connect(base, tokenizer)
    prompts = [model.render(tokenizer, text) for text in inputs]
    with lora.use(base, net(list(texts)), net.config.scaling):
        said = model.answer(base, tokenizer, prompts, 48)
    assert len(rows) == 12 and [answer.text.strip() for answer in said] == list(shown)


@needs_models
@needs_time
def test_the_last_command_for_smollm2_repeats_its_first_steps(tmp_path):
    """From the weights of the command before, which are in the history. In bfloat16, whose kernels differ."""
    first = tmp_path / "first"
    first.mkdir()
    for name in hypernet.FILES:
        show = ["git", "show", f"3b1fcf3:checkpoints/smollm2-135m/sft_large/{name}"]
        found = subprocess.run(show, cwd=HERE, capture_output=True)
        if found.returncode:
            pytest.skip("the history is not here")
        (first / name).write_bytes(found.stdout)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py"]
    start += [f"@{SMOLLM2 / 'sft_large' / 'train.args'}", *REAL, "--device", "cpu"]
    start += ["--init_from", first, "--out_dir", tmp_path / "again"]
    run = subprocess.Popen(start, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "again" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        time.sleep(0.1)
    run.terminate()
    run.wait()
    shipped, steps = losses_of(SMOLLM2 / "sft_large"), losses_of(SMOLLM2 / "sft_large", "step")
    begins = steps.index(1, 1)  # after the rows of the first command
    close(losses_of(tmp_path / "again")[:5], shipped[begins : begins + 5], 3e-2)


@needs_models
def test_the_program_for_peft(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    words = [*REAL, "--out", tmp_path / "adapter"]
    assert command(generate, *words, "--desc", "just the family name please") == 0
    page = (HERE / "extras" / "README.md").read_text()
    program = page.split("## Using an adapter")[1].split("```python\n")[1].split("```")[0]
    program = program.replace("HuggingFaceTB/SmolLM2-135M-Instruct", REAL[1])
    capsys.readouterr()
    with warnings.catch_warnings():  # of a deprecated name in peft
        warnings.simplefilter("ignore")
        exec(program.replace("out/smollm2", str(tmp_path / "adapter")), {})
    assert capsys.readouterr().out == "Lovelace\n"


@pytest.mark.parametrize("name", ["T2L_BASE", "T2L_GEMMA", "T2L_QWEN"])
def test_a_real_model_learns_and_stops(name, tmp_path, capsys):
    """SmolLM2-135M; Gemma-3-270m: sliding windows, no chat template; Qwen2.5-Coder-0.5B: biases."""
    if name not in os.environ:
        pytest.skip(f"{name} names no folder")
    pairs = itertools.product(("red", "blue", "green"), ("cat", "dog", "cow"))
    instances = [{"input": f"{a} {b}", "output": [f"{b} {a}"]} for a, b in pairs]
    write_file(tmp_path / "swap.json", {"descriptions": ["Swap the two words."], "Instances": instances})
    own = ["--base_model", os.environ[name], "--encoder", "base"]
    words = "--dropout 0 --lr 1e-3 --max_steps 25 --neftune_alpha 5".split()
    words += [*own, "--tasks", tmp_path, "--examples_per_task", "8", "--tasks_per_batch", "1"]
    losses = fit(tmp_path / "net", *words)
    assert losses[-1] < 0.3 * losses[0]
    words = ["--desc", "Swap the two words.", "--hypernet", tmp_path / "net", "--input", "red cat"]
    assert command(generate, *own, *words, "--out", tmp_path / "adapter") == 0
    assert "with adapter  cat red\n" in capsys.readouterr().out  # and nothing after the end mark
