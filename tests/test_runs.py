"""Runs of train.py: learning rates, --resume, --init_from, what is kept."""

import time

from tests.helpers import *  # noqa: F403


def test_learning_rates():
    args = types.SimpleNamespace(lr=2.0, warmup=0.1, max_steps=100, schedule="linear")
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0
    assert abs(rates[55] - 1.0) < 1e-9 and 0 < rates[-1] < 0.03
    args.schedule = "cosine"
    rates = [train.learning_rate(step, args) for step in range(101)]
    assert abs(rates[55] - 1.0) < 1e-6 and rates[100] == pytest.approx(1e-7)
    args.schedule, args.warmup = "late", 0.3
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[30:67] == [2.0] * 37 and abs(rates[83] - 1.0) < 0.05 and rates[99] < 0.1


def test_which_parameters_have_weight_decay(reader):
    args = types.SimpleNamespace(lr=2.0, weight_decay=0.01)

    def without_decay(net) -> set[str]:
        names = {id(p): name for name, p in net.named_parameters()}
        none, some = train.make_optimizer(net, args).param_groups
        assert (none["weight_decay"], some["weight_decay"]) == (0, 0.01) and some["params"]
        assert {*names} == {id(p) for p in none["params"] + some["params"]}
        return {names[id(p)] for p in none["params"]}

    net = hypernet.TextToLoRA(small_config("small"))
    assert without_decay(net) == {name for name, p in net.named_parameters() if p.dim() == 1}
    net = hypernet.load_hypernet(reader)
    kept = {"b1", "b2", "perceiver.latents", "perceiver.queries"}
    kept |= {name for name, _ in net.named_parameters() if name.startswith(("scaler", "bias"))}
    assert without_decay(net) == kept | {name for name, p in net.named_parameters() if p.dim() == 1}


def test_gradients_are_clipped_and_each_term_of_the_loss_has_a_column(tmp_path, monkeypatch):
    norms, real = [], torch.optim.AdamW.step

    def note(optimizer, *args):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.get_total_norm(gradients))
        return real(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    losses = fit(tmp_path / "run", *SHORT, "--l1", "0.1", "--max_steps", "2")
    assert len(norms) == 2 and max(norms) < 1.001 < max(losses_of(tmp_path / "run", "grad_norm"))
    terms = [losses_of(tmp_path / "run", f"loss_{name}") for name in ("task", "l1", "l2")]
    assert [sum(values) for values in zip(*terms)] == pytest.approx(losses)
    for flag, value in ("--label_smoothing", "0.5"), ("--neftune_alpha", "5"):  # each changes the loss
        other = fit(tmp_path / flag, *SHORT, "--l1", "0.1", flag, value, "--max_steps", "1")
        assert abs(other[0] - losses[0]) > 1e-3


def test_resume_after_kill_is_exact(tmp_path, capsys):
    words = [*SHORT, "--dropout", "0.1", "--neftune_alpha", "5", "--max_steps", "24", "--val_every", "5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, *words)
    start = [sys.executable, "train.py", *words, "--out_dir", str(cut)]
    run, metrics = subprocess.Popen(start, cwd=HERE, stderr=subprocess.DEVNULL), cut / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 9):
        time.sleep(0.01)
    assert command(train, *words, "--resume", "--out_dir", cut) == 2  # while it goes on
    assert "is in use by a run that goes on" in capsys.readouterr().err
    run.kill()
    run.wait()
    assert (cut / "state.pt").exists(), "the run had ended before it was killed"
    metrics.write_text(metrics.read_text() + '{"step": 99, "lo')  # a kill may leave half a line
    before = {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, *words, "--out_dir", cut) == command(train, *words, "--out_dir", whole) == 2
    assert command(train, "--out_dir", cut, "--resume", "--max_steps", "3") == 2  # it is past that
    assert command(train, "--out_dir", cut, "--resume", "--rank", "4") == 2
    assert "--resume: this run has --rank 8, not 4" in capsys.readouterr().err
    assert command(train, "--out_dir", whole, "--resume") == 2  # it is finished
    assert before == {file: file.read_bytes() for folder in (whole, cut) for file in folder.iterdir()}
    assert command(train, "--out_dir", cut, "--resume") == 0  # the settings are those of the run
    assert losses_of(cut) == losses_of(whole) and losses_of(cut, "val_loss") == losses_of(whole, "val_loss")
    ours, theirs = (load_file(folder / "hypernet.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert sorted(file.name for file in cut.iterdir()) == sorted(file.name for file in whole.iterdir())


def test_ctrl_c_stops_at_once_and_says_how_to_continue(tmp_path, monkeypatch, capsys):
    """A run that goes on does not read the network that it started from."""
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    run, start = tmp_path / "my run", ["--init_from", tmp_path / "first", "--val_every", "2"]
    monkeypatch.setattr(train, "sft_step", interrupted_in_call(6, train.sft_step)[0])
    assert command(train, *SHORT, *start, "--max_steps", "2000", "--out_dir", run) == 130
    assert f"train.py --resume --out_dir '{run}'" in capsys.readouterr().out
    assert len(losses_of(run)) == 5
    shutil.rmtree(tmp_path / "first")
    state = torch.load(run / "state.pt", weights_only=True)
    assert state["step"] == 4
    torch.save(state | {"n_processes": 2}, run / "state.pt")
    assert command(train, "--resume", "--out_dir", run) == 2
    assert "this run has 2 processes, not 1" in capsys.readouterr().err
    torch.save(state, run / "state.pt")
    assert command(train, "--resume", "--max_steps", "4", "--out_dir", run) == 0  # it was at its end
    assert len(losses_of(run)) == 4 and "--max_steps 4\n" in (run / "train.args").read_text()


def test_a_run_without_a_state_is_started_again(tmp_path, monkeypatch, capsys):
    words = [*SHORT, "--max_steps", "3", "--out_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "sft_step", interrupted_in_call(2, train.sft_step)[0])
        assert command(train, *words) == 130
    assert "--resume" not in capsys.readouterr().out
    assert command(train, *words, "--resume") == 2
    with monkeypatch.context() as patch:  # nor is the folder of a run that failed in use
        patch.setattr(train, "sft_step", lambda *_: 1 / 0)
        assert command(train, *words) == 2
    assert command(train, *words) == 0 and len(losses_of(tmp_path / "run")) == 3
    assert command(train, *words) == 2


def test_randomness_differs_from_step_to_step(monkeypatch, tmp_path):
    """The same tasks, twice: only the noise differs."""
    real = data.draw
    monkeypatch.setattr(data, "draw", lambda tasks, pool, step, *more: real(tasks, pool, 0, *more))
    words = [*SHORT, "--neftune_alpha", "5", "--lr", "0"]
    first, second = fit(tmp_path / "run", *words, "--max_steps", "2")
    assert abs(first - second) > 1e-4
    assert fit(tmp_path / "again", *words, "--max_steps", "1") == [first]


def test_a_loss_that_diverges_stops_the_run(tmp_path, capsys, monkeypatch):
    words, calls = [*SHORT, "--max_steps", "9", "--val_every", "2", "--out_dir", tmp_path / "run"], []

    def task_loss(*asked, real=train.task_loss):
        calls.append(1)
        return real(*asked) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(train, "task_loss", task_loss)
    assert command(train, *words) == 2 and "the loss is nan in step 6" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 4
    assert len(fit(tmp_path / "run", "--resume", "--lr", "1e-3")) == 9
    assert "--lr 0.001\n" in (tmp_path / "run" / "train.args").read_text()


def test_the_best_weights_are_kept_also_if_the_run_is_killed(tmp_path, monkeypatch):
    """Those with the lowest validation loss, to the last bit; neither the first nor the last ones."""
    values, states, real, kills = {2: 0.5, 4: 0.2, 6: 0.9, 8: 0.4}, {}, train.save_state, [4, 6]

    def validate(run):
        step = len(losses_of(folder)) + 1
        weights = {key: tensor.clone() for key, tensor in run.net.state_dict().items()}
        states.setdefault(step, []).append(weights)
        return {"val_loss": values[step], "val_accuracy": 0.0}

    def save_state(*args):
        """Killed before the state of step 4, whose weights are written already, and before that of step 6."""
        if args[3]["step"] in kills:
            kills.remove(args[3]["step"])
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "save_state", save_state)
    folder = tmp_path / "run"
    assert command(train, *SHORT, "--max_steps", "8", "--val_every", "2", "--out_dir", folder) == 2
    assert command(train, "--resume", "--out_dir", folder) == 2
    fit(folder, "--resume")
    assert losses_of(folder, "val_loss") == [0.5, 0.2, 0.9, 0.4] and len(states[4]) == 2
    kept = load_file(folder / "hypernet.safetensors")
    for computed in states[4]:  # before and after the kill
        assert all(torch.equal(kept[name], computed[name]) for name in kept)


def test_oracles_say_what_stands_in_the_prompts(tmp_path):
    fit(tmp_path / "with", *LORA, "--instruction", *"--n_tasks 2 --tasks_per_batch 2 --max_steps 1".split())
    recon = ["@config/recon.args", "--oracles", tmp_path / "with", "--max_steps", "1"]
    fit(tmp_path / "net", *recon)
    assert read_json(tmp_path / "net" / "config.json")["instruction"] is True
    write_file(next((tmp_path / "with").glob("*/prompt.json")), {"instruction": False})
    assert command(train, *recon, "--out_dir", tmp_path / "mixed") == 2  # they differ


def test_a_start_from_a_network_of_other_settings_is_refused(tmp_path):
    fit(tmp_path / "first", *SHORT, "--max_steps", "1")
    start = [*SHORT, "--init_from", tmp_path / "first"]
    run = run_of(*start, "--base_model", TINY)
    assert read_json(tmp_path / "first" / "config.json")["base_model"] == "tiny"  # wherever the project is
    started, saved = run.net.state_dict(), hypernet.load_hypernet(tmp_path / "first").state_dict()
    assert all(torch.equal(started[name], saved[name]) for name in saved)
    other = ["--alpha", "8"], ["--target_modules", "v_proj,q_proj"], ["--skip", "0.1"]
    for changed in other:  # with weights of equal shapes
        refused("that network has other settings", run_of, *start, *changed)
    config = read_json(tmp_path / "first" / "config.json")
    write_file(tmp_path / "first" / "config.json", config | {"encoder": "some/encoder"})
    refused("other settings .encoder: some/encoder, not hash", run_of, *start)
    assert model.is_same_base("User/a", [1, 2, 3], "user/A", [1, 2, 3])
    assert not model.is_same_base("u/a", [1, 2, 3], "u/b", [1, 2, 3])  # two ids, one shape
