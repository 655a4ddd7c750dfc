"""The device, the processes of torchrun, and a base model that is larger than one GPU.

    torchrun --nproc_per_node=8 train.py @config/llama-3.1-8b.args --shard

All processes draw the same tasks, and each computes its part of the loss (data.Batch). The gradients of the
parts are added up. The first process validates, writes and prints.

With --shard each process holds its part of the parameters of every decoder layer (FSDP2), and a layer is
gathered only while it computes. Embeddings and head stay whole. All processes must run the base model equally
often, so all of them validate.
"""

import gc
import os
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from support.files import UserError


class Process(NamedTuple):
    """This process among those of torchrun. Without torchrun there is only one."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0  # among the processes on this machine
    count: int = 1


def choose_device(name: str) -> torch.device:
    """The device that --device names, a GPU always with its index. Under torchrun each process has its own.

    Raises UserError if there is no such device, or if there are more processes than GPUs.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        known = "auto (a CUDA GPU if there is one), cpu, cuda, cuda:1 and so on, mps"
        raise UserError(f"--device {name}: there are {known}") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has none")
    if device.type == "mps" and "RANK" in os.environ:
        raise UserError("--device mps: a single process only, started with python and not torchrun")
    if device.type == "cuda":
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        index = int(os.environ["LOCAL_RANK"]) if n_local > 1 else device.index or 0
        if max(n_local, index + 1) > n_gpus:
            asked = f"{n_local} processes" if n_local > 1 else f"--device {name}"
            raise UserError(f"{asked}, but the number of GPUs on this machine is {n_gpus} (or --device cpu)")
        device = torch.device("cuda", index)
    return device


def default_dtype(device) -> torch.dtype:
    """float32 on a CPU and on GPUs that only emulate bfloat16 (before Ampere), otherwise bfloat16."""
    kind = torch.device(device).type
    if kind == "cpu" or (kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.float32
    return torch.bfloat16


def use_device(name: str) -> torch.device:
    """Choose the device; a GPU becomes the current one."""
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention, the default on an H100, would plan anew for every length of a batch
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def start(device_name: str) -> Process:
    """Join the processes of torchrun, if there are any, and choose the device."""
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        raise UserError("RANK is set and LOCAL_RANK is not: start several processes with torchrun")
    device = use_device(device_name)
    if "RANK" not in os.environ:
        return Process(device)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device_id)
    return Process(device, dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size())


def start_single(device_name: str) -> torch.device:
    """The device of a command that has a single process."""
    if "RANK" in os.environ:
        raise UserError("this command needs a single process: python, not torchrun")
    return use_device(device_name)


def name_of(device: torch.device) -> str:
    """A device in words: a GPU by its name, so that nobody overlooks that it was not found."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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


@contextmanager
def in_turn(process: Process):
    """One process after another: each passes as many barriers as there are processes."""
    for _ in range(process.rank):
        dist.barrier()
    yield
    for _ in range(process.rank, process.count):
        dist.barrier()


def total(process: Process, value: torch.Tensor) -> torch.Tensor:
    """The sum of a value over all processes."""
    if process.count > 1:
        dist.all_reduce(value)
    return value


def parallel(net: nn.Module, process: Process) -> nn.Module:
    """`net` in DDP, with several processes: their gradients are added up, not averaged as by default."""
    if process.count == 1:
        return net
    net = nn.parallel.DistributedDataParallel(net)

    def add_up(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda sums: sums.value()[0])

    net.register_comm_hook(None, add_up)
    return net


# -------------------- A sharded base model --------------------
# FSDP is imported where it is used, because that takes most of a second.


def make_mesh(process: Process):
    """The processes, as FSDP takes them. All of them make it at the same time."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(process.device.type, (process.count,))


def shard_layers(decoder: nn.Module, layers: nn.ModuleList, mesh) -> None:
    """Leave each process its part of the parameters of every decoder layer."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # one root for all layers: they share its streams, and so the memory in which layers are gathered
    whole = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def most(n: int, base: nn.Module) -> int:
    """The largest n of all processes, if they share a sharded base model; otherwise n."""
    if not hasattr(base.get_decoder(), "unshard"):
        return n
    value = torch.tensor(n, device=base.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)
