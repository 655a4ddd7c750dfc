"""The models that generate.py and eval.py work with: the flags that name them, and how they are loaded."""

import argparse

import torch

import hypernet
import lora
import model
from checkpoints import locate, shard
from lora import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which models answer, and how; eval.py has them, too."""
    add = parser.add_argument
    add("--base_model", help=f"{', '.join(locate.PRESETS)}, a hub id or a folder; default: the net's")
    add("--hypernet", help="a folder, or USER/REPO/FOLDER on the hub; default: the shipped one")
    add("--module_order", help="order of a published checkpoint's target modules (checkpoints/README.md)")
    add("--encoder", help="where the text encoder is, if not under its name in training")
    switch = argparse.BooleanOptionalAction
    add("--instruction", action=switch, help="put the description before inputs; default: as in training")
    add("--max_new_tokens", type=int, default=64, help="longest answer")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, otherwise float32")
    add("--shard", action="store_true", help="shard the base model over the processes of torchrun")

def load_net(name: str | None, args, reads: str = "descriptions") -> torch.nn.Module:
    """The hypernetwork of a folder, or of a folder on the hub; without a name the shipped one."""
    folder = name or str(locate.shipped_hypernet(args.base_model or "tiny", reads))
    order = args.module_order.split(",") if args.module_order else None
    net = hypernet.load_hypernet(locate.fetch(folder, hypernet.FILES), order).to(DEVICE)
    if net.reads != reads:
        raise UserError(f"the hypernetwork in {folder} reads {net.reads}, not {reads}")
    return net

def load_base_for(configs: list[lora.LoRAConfig], args):
    """Load the base model of these configs, or --base_model, and inject LoRA layers: (base, tokenizer)."""
    base_model = args.base_model or (configs[0].base_model if configs else "tiny")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    names = sorted({name for config in configs for name in config.paths})
    if args.shard:
        shard.start_copies(args)
        base, tokenizer = shard.load_sharded_base(base_model, names, 0.0, torch.device(DEVICE), dtype)
    else:
        base, tokenizer = model.load_base(base_model, DEVICE, dtype)
        lora.inject(base, names)
    for config in configs:
        locate.check_base(config, base_model, lora.base_shape(base.config))
    return base, tokenizer

def load_encoder_for(net: torch.nn.Module, base: torch.nn.Module, tokenizer, args):
    """The text encoder of a hypernetwork that reads descriptions; None for documents."""
    if net.reads == "documents":
        return None
    name = args.encoder or net.config.encoder
    return model.load_encoder(name, DEVICE, (base, tokenizer), net.config.full_stop)
