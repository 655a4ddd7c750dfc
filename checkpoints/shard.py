"""The processes of torchrun, and a base model that is larger than one GPU: its layers are sharded over them.

    torchrun --nproc_per_node=8 train.py @config/llama-3.1-8b.args --shard

Each process holds its part of the parameters of every layer (FSDP2); a layer is gathered when it computes.
Embeddings and head stay whole. All processes must run the base model equally often, see `lockstep`.
The text encoder `base` works as well; `--merge` is refused, since no process holds the whole model.
"""

import atexit
import os
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import lora
import model
from lora import UserError

def start_processes() -> tuple[int, int, int, torch.device]:
    """(this process, its number on this machine, number of processes, device); one without torchrun."""
    process, local_process = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", local_process) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return process, local_process, n_processes, device

def start_copies(args) -> None:
    """For generate.py and eval.py: all processes compute the same, only the first one prints and writes."""
    if "RANK" not in os.environ:
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=N ...")
    start_processes()
    atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
        args.out, args.plot = tempfile.mkdtemp() + "/out", None

def load_sharded_base(name: str, target_modules: list[str], dropout: float, device: torch.device, dtype):
    """(injected base model, tokenizer), as model.load_base and lora.inject give them.

    The processes load one after another: then host memory holds the whole model only once, but loading takes
    as many times longer as there are processes.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            base, tokenizer = model.load_base(name, "cpu", dtype)
            lora.inject(base, target_modules, dropout)
            for layer in base.get_decoder().layers:
                fully_shard(layer, mesh=mesh)
            base.to(device)
        dist.barrier()
    return base, tokenizer

def is_sharded(base: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in base.modules())

def lockstep(base: nn.Module, n: int) -> int:
    """How often this process must run the base model so that n runs are done on every process."""
    if not is_sharded(base):
        return n
    most = torch.tensor(n, device=base.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
