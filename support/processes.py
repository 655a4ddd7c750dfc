"""The device, the processes of torchrun, and a base model that is larger than one GPU.

    torchrun --nproc_per_node=8 train.py @config/llama-3.1-8b.args --shard

In training all processes draw the same tasks, and each takes every n-th of them (data.make_batch). Each
returns its part of the loss; DDP averages the gradients, and the loop of train.py turns averages into sums.
The first process validates, writes and prints.

With --shard each process holds its part of the parameters of every decoder layer (FSDP2), and a layer is
gathered only while it computes. Embeddings and head stay whole. All processes must run the base model equally
often (`lockstep`), so all of them validate. In generate.py and eval.py all processes compute the same.
"""

import gc
import os
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from support.files import UserError


class Process(NamedTuple):
    """This process among those of torchrun. Without torchrun there is only one."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0  # among the processes on this machine
    count: int = 1


def choose_device(name: str) -> torch.device:
    """The device that --device names. Under torchrun each process has a GPU of its own.

    Raises UserError if there is no such device, or if there are more processes than GPUs.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: there are auto, cpu, cuda, cuda:1 and so on, and mps") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has none")
    if device.type == "cuda":
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if n_local > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if max(n_local, (device.index or 0) + 1) > n_gpus:
            asked = f"{n_local} processes" if n_local > 1 else f"--device {name}"
            raise UserError(f"{asked}, but the number of GPUs on this machine is {n_gpus} (or --device cpu)")
    return device


def start(device_name: str) -> Process:
    """Join the processes of torchrun, if there are any, and choose the device."""
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Process(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return Process(device, dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size())


def leave() -> None:
    """Leave the processes of torchrun, if there are any."""
    if dist.is_initialized():
        # Python objects go first: if DDP's reducer were the last to hold the group, it would free it while
        # holding Python's lock, for which gloo's threads may be waiting.
        gc.collect()
        dist.destroy_process_group()


def launcher() -> str:
    """How this process was started: python, or torchrun with so many processes."""
    n_local = os.environ.get("LOCAL_WORLD_SIZE")
    return f"torchrun --nproc_per_node={n_local}" if n_local else "python"


@contextmanager
def first_goes_ahead(process: Process):
    """The first process of each machine goes first: it downloads, and the others find what it downloaded."""
    if process.local_rank > 0:
        dist.barrier()
    yield
    if process.local_rank == 0 and process.count > 1:
        dist.barrier()


def gather(process: Process, value) -> list:
    """The values of all processes."""
    if process.count == 1:
        return [value]
    values = [None] * process.count
    dist.all_gather_object(values, value)
    return values


# -------------------- A base model that is sharded over the processes --------------------


def check_shard(shard: bool) -> None:
    """Raise UserError if --shard is given without torchrun."""
    if shard and "RANK" not in os.environ:
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=N ...")


@contextmanager
def in_turn(process: Process):
    """One process after another: each passes as many barriers as there are processes."""
    for _ in range(process.rank):
        dist.barrier()
    yield
    for _ in range(process.rank, process.count):
        dist.barrier()


def make_mesh(process: Process) -> DeviceMesh:
    """All processes in a row, as `shard_layers` needs them."""
    return init_device_mesh(process.device.type, (process.count,))


def shard_layers(layers: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Leave each process its part of the parameters of every decoder layer."""
    for layer in layers:
        # each layer is a root of FSDP, and a root would stay gathered after its forward pass
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def is_sharded(base: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in base.modules())


def lockstep(base: nn.Module, n: int) -> int:
    """How often this process has to run the base model, if it needs n runs itself.

    If the model is sharded, all processes must run it equally often: as often as the one that needs it most.
    """
    if not is_sharded(base):
        return n
    most = torch.tensor(n, device=base.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
