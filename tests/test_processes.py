"""Several processes, sharding and GPUs."""

import contextlib
import importlib
import socket

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.helpers import *  # noqa: F403


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work() -> None:
    """One of the two processes."""
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for tasks in ("tiny", "facts"):  # both at once; the commands let the first one go ahead
        load_tasks(tasks)
    commands, ports = read_json(folder / "commands.json"), read_json(folder / "ports.json")
    for (name, (module, *words)), port in zip(commands.items(), ports):
        os.environ["MASTER_PORT"] = str(port)
        with open(folder / f"{name}-{rank}.txt", "w") as out:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                print("exit code", command(importlib.import_module(module), *words))


def is_root(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule) and bool(module._get_fsdp_state()._is_root)


def main() -> None:
    """Count the layers of a sharded base model that are whole, and the bytes of its layers."""
    torch.distributed.init_process_group("gloo")
    base, _ = model.load_sharded(model.TINY, "cpu", torch.float32, ["q_proj"], 0.0)
    layers = base.get_decoder().layers

    def is_whole(layer) -> bool:
        return not any(isinstance(p, DTensor) for p in layer.parameters())

    def n_whole() -> int:
        return sum(map(is_whole, layers))

    whole = [n_whole()]
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            base(torch.tensor([[1, 2, 3]]))
        whole.append(n_whole())
    roots = [module for module in base.modules() if is_root(module)]
    local = sum(p.to_local().nbytes for p in layers.parameters() if isinstance(p, DTensor))
    print(json.dumps({"roots": len(roots), "whole": whole, "bytes": local}))
    torch.distributed.destroy_process_group()


DOCS = [*D2L, *"--n_tasks 200 --tasks_per_batch 4 --latent_size 32 --l1 0.1 --l2 0.1".split()]
LONG = [*SHORT, *"--micro_batch 3 --max_tokens 16 --l1 0.1 --gradient_checkpointing".split()]
MULTI = ["@config/mt_lora.args", *"--n_tasks 8 --tasks_per_batch 4 --shard".split()]
JUDGE = "--n_tasks 4 --n_examples 5 --methods base,net,net_mean".split()
RUNS = {"sft": SHORT, "documents": DOCS, "sharded": [*LONG, "--shard"], "multi_sharded": MULTI}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(folder, what the first process has printed about layers): RUNS and `main` on the same two processes.

    They are started as torchrun would start them, once for all commands, since that takes most of the time.
    """
    folder, commands = tmp_path_factory.mktemp("pair"), {"layers": ["tests.test_processes"]}
    for name, words in RUNS.items():
        commands[name] = ["train", *words, "--max_steps", "3", "--out_dir", str(folder / name)]
    judge = ["eval", *JUDGE, "--batch_size", "7"]
    commands["judge"] = [*judge, "--out", str(folder / "scores.json")]
    commands["odd"] = ["train", *SHORT, "--tasks_per_batch", "3", "--out_dir", str(folder / "odd")]
    write_file(folder / "commands.json", commands)
    write_file(folder / "ports.json", [free_port() for _ in commands])
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, "-c", "from tests.test_processes import work; work()", str(folder)]
    ranks = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    running = [subprocess.Popen(start, cwd=HERE, env=rank) for rank in ranks]
    try:
        assert [process.wait(150) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return folder, json.loads((folder / "layers-0.txt").read_text().splitlines()[0])


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(pair, tmp_path, name, one_thread):
    """Losses, validation and weights; also with shards."""
    folder, _ = pair
    words = [word for word in RUNS[name] if word != "--shard"]
    one, two = fit(tmp_path / "one", *words, "--max_steps", "3"), losses_of(folder / name)
    assert len(one) == 3 and one[0] != one[-1]
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-5 * max(1, max(one))
    values = [losses_of(place, "val_loss") for place in (tmp_path / "one", folder / name)]
    assert values[0] == pytest.approx(values[1], rel=1e-4) and len(values[0]) == 1
    file = "adapter_model.safetensors" if name == "multi_sharded" else "hypernet.safetensors"
    files = [load_file(place / file) for place in (tmp_path / "one", folder / name)]
    assert max((files[0][key] - files[1][key]).abs().max() for key in files[0]) < 5e-4


def test_two_processes_give_the_scores_of_one(pair, tmp_path):
    folder, _ = pair
    alone = evaluate(tmp_path / "one.json", *JUDGE, "--batch_size", "7")
    assert read_json(folder / "scores.json")["results"] == alone and alone["net"]["mean"] > 0.5
    first, second = [(folder / f"judge-{process}.txt").read_text() for process in (0, 1)]
    assert first.count("| net |") == 1 and "| net |" not in second


def test_a_step_that_processes_cannot_share_equally_is_refused(pair):
    said = [(pair[0] / f"odd-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("a step has 3 tasks (--tasks_per_batch), no multiple of 2 processes" in text for text in said)


def test_a_sharded_base_model_is_never_whole(pair):
    """After a forward pass at most one layer is gathered; each process keeps half of the bytes."""
    _, seen = pair
    assert seen["roots"] == 1 and seen["whole"][0] == 0 and max(seen["whole"]) <= 1
    whole = sum(p.nbytes for p in model.load_base(model.TINY)[0].get_decoder().layers.parameters())
    assert whole / 2 <= seen["bytes"] < 0.55 * whole


# -------------------- On a GPU --------------------


@needs_gpu
def test_a_step_on_cuda_is_that_of_the_cpu():
    words = [*SHORT, "--dropout", "0", "--dtype", "float32"]
    runs = [run_of(*words, device=device) for device in ("cpu", "cuda")]
    runs[1].net.load_state_dict(runs[0].net.state_dict())
    (loss, grads), (cuda_loss, cuda_grads) = map(gradients, runs)
    close(cuda_loss.cpu(), loss, 1e-4)
    close([grad.cpu() for grad in cuda_grads], grads, 1e-3, 1e-5)


@needs_gpu
def test_every_command_on_cuda(tmp_path):
    steps = ["--max_steps", "4", "--val_every", "2"]
    for name, words in {"sft": SHORT, "documents": DOCS, "mt": [*LORA, "--multi_task", *SHORT[:4]]}.items():
        assert len(fit(tmp_path / name, *words, *steps)) == 4
    fit(tmp_path / "oracles", *LORA, "--n_tasks", "4", *steps)
    recon = ["@config/recon.args", "--oracles", tmp_path / "oracles", "--tasks_per_batch", "4", *steps]
    fit(tmp_path / "recon", *recon)
    assert command(generate, *SAY, "--hypernet", tmp_path / "sft", "--out", tmp_path / "adapter") == 0
    methods = ["--methods", "base,icl,net,mt_lora,recon", "--mt_lora", tmp_path / "mt", "--split", "val"]
    methods += ["--recon", tmp_path / "recon", "--n_examples", "2"]
    assert command(evaluation, *methods) == 0
    long = ["--tasks", "facts", "--split", "long", "--n_tasks", "3", "--n_examples", "3"]
    assert command(evaluation, *long, "--hypernet", TINY / "d2l") == 0


PRETEND = os.environ.get("T2L_PRETEND", "")  # a program that runs another one on a pretended GPU


@pytest.mark.skipif(not PRETEND, reason="T2L_PRETEND names no pretended GPU")
@pytest.mark.parametrize("name", ["sft", "documents", "pictures", "generate", "eval"])
def test_no_tensor_is_on_the_wrong_device(name, tmp_path):
    out = ["--out_dir", tmp_path / "run", "--max_steps", "2", "--val_every", "1"]
    commands = {"sft": ["train.py", *SHORT, *out], "documents": ["train.py", *DOCS, *out]}
    commands["pictures"] = "-m pictures.pictures --train hypernet --steps 1 --weights".split() + [tmp_path]
    commands["generate"] = ["generate.py", *SAY, "--input", "cat red dog shirt", "--out", tmp_path / "a"]
    commands["eval"] = ["eval.py", "--n_tasks", "2", "--n_examples", "2"]
    shutil.copy(HERE / "pictures" / "base.safetensors", tmp_path)
    words = [sys.executable, PRETEND, *map(str, commands[name])]
    run = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0 and "DeviceMismatch" not in run.stderr, run.stderr[-2000:]


# -------------------- Devices, without a GPU --------------------


def test_which_device_a_process_takes(monkeypatch):
    """A GPU has an index, which torch.cuda.set_device needs; bfloat16 is not emulated on a T4."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    for name, index in ("auto", 0), ("cuda", 0), ("cuda:1", 1):
        assert model.pick_device(name) == torch.device("cuda", index) == chosen[-1]
    assert model.default_dtype("cuda") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert model.default_dtype("cuda:1") == torch.bfloat16
    assert model.default_dtype("cpu") == torch.float32
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert model.pick_device("auto") == torch.device("cuda", 1)
    assert model.pick_device("cpu") == torch.device("cpu")
    refused("--shard needs a text encoder", train.parse_args, [*SHORT, "--shard", "--encoder", "base"])
