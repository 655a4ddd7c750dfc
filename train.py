"""Train everything in this project with one loop.

    python train.py --mode sft                                         # one process
    torchrun --nproc_per_node=2 train.py --mode sft                    # two processes, the same batches
    torchrun --nnodes=2 --nproc_per_node=4 --node_rank=0 --master_addr=HOST train.py --mode sft --base_model mistral-7b --tasks lots-of-loras

--mode says what is trained, and by which loss:

    pretrain   the tiny base model itself, from scratch, on in-context examples
    lora       ordinary LoRAs, one a task, all in one batch (the oracles), or one for all tasks (--multi_task)
    recon      a hypernetwork, to write the same adapters as the oracles (paper, section 3.1)
    sft        a hypernetwork, by the task loss through the frozen base model (paper, section 3.2)
"""

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import data
import hypernet
import lora
import model
from lora import Adapter, UserError

# ---------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------

# The paper's hyper-parameters (its appendix) from memory, for its models and for any other.
PAPER = {
    "lora": dict(max_steps=2500, lr=8e-5, tasks_per_batch=8, examples_per_task=1),
    "recon": dict(max_steps=100_000, lr=1e-3, tasks_per_batch=8, examples_per_task=1),
    "sft": dict(max_steps=20_000, lr=2.5e-5, tasks_per_batch=8, examples_per_task=1, l2=1e-3),
}
PAPER_COMMON = dict(
    latent_size=128, head_in_size=512, head_scale=1.0, warmup=0.1, dropout=0.05, neftune_alpha=5.0, label_smoothing=0.1, l2=0.0, tell_apart=0
)  # fmt: skip
D2L = dict(tasks="facts", n_latents=8, chunk_batch=128, max_pieces=1, distill=0)
PAPER_D2L = dict(latent_size=512, n_blocks=9, n_heads=16, chunk_len=512, l2=0.0)  # Doc-to-LoRA's network; the rest is that of sft
# The tiny world learns the same things in minutes.
TINY = {
    "pretrain": dict(max_steps=8000, lr=3e-3, tasks_per_batch=16, examples_per_task=8),
    "lora": dict(max_steps=240, lr=3e-3, tasks_per_batch=32, examples_per_task=4),
    "recon": dict(max_steps=3000, lr=4e-3, tasks_per_batch=64, examples_per_task=1),
    "sft": dict(max_steps=1000, lr=3e-3, tasks_per_batch=128, examples_per_task=1, dropout=0.1, l2=1e-3),
}
TINY_D2L = dict(  # every line of a document is a piece of its own
    max_steps=2600, lr=2e-3, warmup=0.04, tasks_per_batch=32, examples_per_task=4, dropout=0.0, latent_size=128, n_blocks=1, n_heads=4, chunk_len=4
)  # fmt: skip
TINY_COMMON = dict(
    latent_size=128, head_in_size=256, head_scale=256**-0.5, warmup=0.1, dropout=0.0, neftune_alpha=0.0, label_smoothing=0.0, l2=0.0, tell_apart=1
)  # fmt: skip
# Where flags have an effect, if not everywhere.
PRETRAIN, LORA, RECON, SFT, DOC = "--mode pretrain", "--mode lora", "--mode recon", "--mode sft", "--arch d2l"
SERVES = {
    ("n_blocks", "n_latents", "n_heads", "chunk_len", "chunk_batch", "max_pieces", "early_exit", "distill"): (DOC,),
    ("multi_task", "own_init", "one_A", "split"): (LORA,),
    ("delta_w", "mixup", "oracles"): (RECON,),
    ("start_from",): (SFT, DOC),
    ("size", "head_in_size", "head_scale", "tell_apart", "encoder"): (RECON, SFT),
    ("latent_size",): (RECON, SFT, DOC),
    ("rank", "alpha", "target_modules", "max_tokens", "row_groups", "compile", "gradient_checkpointing", "neftune_alpha", "l1", "l2"): (LORA, SFT, DOC),
    ("n_tasks", "dropout"): (LORA, RECON, SFT, DOC),
    ("prompt_with_definition",): (LORA, RECON, SFT),
    ("examples_per_task", "label_smoothing"): (PRETRAIN, LORA, SFT, DOC),
}


def document_flags(p: argparse.ArgumentParser) -> None:
    """The flags of Doc-to-LoRA."""
    g = p.add_argument_group("Doc-to-LoRA (--arch d2l)")
    g.add_argument("--n_blocks", type=lora.positive, help="Cross-attention blocks of the Perceiver.")
    g.add_argument("--n_heads", type=lora.positive, help="Heads of that attention, of size 128 each.")
    g.add_argument("--n_latents", type=lora.positive, help="Vectors that a piece of a document is read into.")
    g.add_argument("--chunk_len", type=lora.positive, help="Tokens of a document that are read at once.")
    g.add_argument("--chunk_batch", type=lora.positive, help="Pieces of documents that are read at once.")
    g.add_argument("--max_pieces", type=lora.positive, help="Cut the documents of a step into 1, 2, 4 ... pieces, at most that many, at random; into more where --chunk_len says so.")
    g.add_argument("--early_exit", action="store_true", help="Read the states of one early layer in place of every layer's.")
    g.add_argument("--distill", type=lora.positive, metavar="K", help="Learn the base model's K likeliest tokens with the document in its prompt, in place of the answers.")


def parse_args() -> argparse.Namespace:
    """The flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what is trained")
    g.add_argument("--mode", required=True, choices=["pretrain", "lora", "recon", "sft"])
    g.add_argument("--arch", default="t2l", choices=["t2l", "d2l"], help="Text-to-LoRA, or Doc-to-LoRA (with --mode sft).")
    g.add_argument("--base_model", default="tiny", help=f"One of {', '.join(model.PRESETS)}, a Hugging Face id or a folder.")
    g.add_argument("--encoder", help="Text encoder: hash, base, a Hugging Face id or a folder. Default: the base model's preset.")
    g.add_argument("--size", default="large", choices=hypernet.SIZES, help="Size of the hypernetwork.")
    g.add_argument("--latent_size", type=lora.positive, help="Width of the hypernetwork's trunk; the paper's is 128, for d2l 512.")
    g.add_argument("--head_in_size", type=lora.positive, help="Width of what enters the hypernetwork's heads; the paper's is 512.")
    g.add_argument("--tell_apart", type=int, choices=[0, 1], help="1 starts the hypernetwork's task encoder with what tells the training tasks' descriptions apart (linear discriminants), 0 at random as published. Default: 1 in the tiny world, else 0.")
    g.add_argument("--head_scale", type=lora.amount, help="Factor on what enters the heads. Published 1; 1/sqrt(head_in_size) stands higher learning rates.")
    g.add_argument("--target_modules", help="Linear layers that get an adapter. Default: q_proj,v_proj, for d2l down_proj.")
    g.add_argument("--rank", type=lora.positive, default=8, help="Rank of the adapters; for d2l of each piece of a document.")
    g.add_argument("--alpha", type=lora.amount, help="LoRA alpha; the scaling is alpha / sqrt(rank). Default: 16, for d2l 2 rank^2.")
    g.add_argument("--multi_task", action="store_true", help="lora: one adapter for all tasks in place of one for each.")
    g.add_argument("--own_init", action="store_true", help="lora: start each adapter from a random A of its own, in place of a common one.")
    g.add_argument("--one_A", action="store_true", help="lora: one A for all adapters, trained by all tasks together; each has its own B.")
    g.add_argument("--delta_w", action="store_true", help="recon: compare the products BA in place of z-scored A and B.")
    g.add_argument("--mixup", action="store_true", help="recon: learn what lies between two descriptions, too, as what lies between their oracles.")
    g = p.add_argument_group("on what")
    g.add_argument("--tasks", help="tiny, lots-of-loras (the paper's, downloaded), for d2l facts or needle, or a folder of task files. Default: tiny, for d2l facts.")
    g.add_argument("--split", default="train", choices=["train", "val", "test"], help="lora: tasks of which split; hypernetworks are trained on train.")
    g.add_argument("--n_tasks", type=lora.positive, help="Use that many of the tasks.")
    g.add_argument("--max_tokens", type=lora.positive, help="Leave out examples that are longer, with their prompt and answer; tasks of none but such, too.")
    g.add_argument("--prompt_with_definition", type=lora.share, nargs="?", const=1.0, default=0.0, metavar="SHARE", help="Put the task's definition before each input, as the paper does, or before that share of them.")
    g.add_argument("--oracles", help="recon: the folder that --mode lora wrote.")
    g.add_argument("--start_from", help="sft: go on from the hypernetwork in this folder, of the same settings, be it of --mode recon; or from an adapter, as what every description gives at first.")
    g = p.add_argument_group("how")
    g.add_argument("--max_steps", type=lora.positive)
    g.add_argument("--lr", type=lora.amount, help="Highest learning rate.")
    g.add_argument("--warmup", type=lora.share, help="Part of the steps in which the learning rate rises; then it falls to 0.")
    g.add_argument("--tasks_per_batch", type=lora.positive, help="Over all processes.")
    g.add_argument("--examples_per_task", type=lora.positive, help="In each step.")
    g.add_argument("--dropout", type=lora.share, help="On the input of the adapters, and in the hypernetwork.")
    g.add_argument("--neftune_alpha", type=lora.amount, help="Noise on the base model's input embeddings (NEFTune).")
    g.add_argument("--label_smoothing", type=lora.share)
    g.add_argument("--l2", type=lora.amount, help="Weight of the mean squares of the generated A and B in the loss.")
    g.add_argument("--l1", type=lora.amount, default=0.0, help="Weight of the mean magnitudes of the generated A and B in the loss.")
    g.add_argument("--weight_decay", type=lora.amount, default=0.01)
    g.add_argument("--max_grad_norm", type=lora.amount, default=1.0, help="Longer gradients are clipped to that; 0: none are.")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", type=lora.device, help="Default: a GPU where there is one.")
    g.add_argument("--dtype", choices=["float32", "bfloat16"], help="Of the computation; trained weights stay float32. Default: float32 on CPU, bfloat16 on GPU.")
    g.add_argument("--row_groups", type=lora.positive, default=1, help="Compute a batch in that many parts, with rows of like length together: less padding, the same loss.")
    g.add_argument("--compile", action="store_true", help="Compile the layers of the base model: the first step takes half a minute, the others two thirds of their time.")
    g.add_argument("--gradient_checkpointing", action="store_true", help="Compute the base model's layers again in the backward pass, to save memory.")
    g = p.add_argument_group("where to")
    g.add_argument("--out_dir", help="A new folder, or with --resume that of the run. Default: out/MODE, for pretrain out/tiny.")
    g.add_argument("--save_every", type=lora.positive, default=100, help="Steps between two saves of the resumable state.")
    g.add_argument("--resume", action="store_true", help="Go on with the run in --out_dir.")
    g.add_argument("--wandb", action="store_true", help="Log to Weights & Biases as well.")
    document_flags(p)
    return check(p.parse_args(), p)


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Refuse flags that would have no effect, or a wrong one."""
    lora.refuse_idle(args, parser, DOC if args.arch == "d2l" else f"--mode {args.mode}", SERVES)
    if args.mode == "lora" and args.tasks_per_batch and not args.multi_task:
        raise UserError("--tasks_per_batch goes with --multi_task: otherwise every task takes part in every step")
    if args.own_init + args.one_A + args.multi_task > 1:
        raise UserError("--own_init, --one_A and --multi_task exclude one another: each says what the tasks have in common")
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb needs wandb: pip install wandb")
    if (args.dropout or 0) > 0.99:
        raise UserError(f"--dropout {args.dropout}: 0.99 is the most")
    if args.distill and args.label_smoothing:
        raise UserError("--label_smoothing is for learning the answers, --distill learns what the base model says")
    if args.alpha == 0:
        raise UserError("--alpha 0: the adapters would do nothing")
    if args.gradient_checkpointing and args.row_groups > 1:  # the layers would be computed again with the last group's adapters
        raise UserError("--gradient_checkpointing goes with --row_groups 1")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler: g++, or the one that the variable CXX names")
    return args


def start_config(args: argparse.Namespace) -> dict:
    """The settings of the hypernetwork in --start_from; none where that is an adapter, or not given."""
    file = Path(args.start_from or "") / "config.json"
    return lora.read_json(file) if args.start_from and file.exists() else {}


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """What is not given takes the value of the tiny world, or of the paper for any other base model."""
    tiny = model.preset_name(args.base_model) == "tiny"
    settings = TINY_COMMON | TINY[args.mode] if tiny else PAPER_COMMON | PAPER.get(args.mode, {})
    if args.arch == "d2l":
        settings |= D2L | (TINY_D2L if tiny else PAPER_D2L)
    settings.setdefault("tasks", "tiny")
    if start_config(args):
        if args.tell_apart:
            raise UserError("--tell_apart 1 is how a new hypernetwork starts; that of --start_from has its weights")
        settings["tell_apart"] = 0
    for key, value in settings.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.encoder = args.encoder or model.PRESETS.get(model.preset_name(args.base_model), (None, "base"))[1]
    args.out_dir = args.out_dir or ("out/tiny" if args.mode == "pretrain" else f"out/{args.mode}")  # that name counts as the tiny world's
    args.target_modules = (args.target_modules or ("down_proj" if args.arch == "d2l" else "q_proj,v_proj")).replace(" ", "")
    if args.alpha is None:
        args.alpha = 2 * args.rank**2 if args.arch == "d2l" else 16.0
    if args.arch == "d2l" and args.mode != "sft":
        raise UserError("--arch d2l is trained with --mode sft")
    if args.arch == "d2l" and args.n_heads % 4:
        raise UserError(f"--n_heads {args.n_heads} is not a multiple of 4 (four heads share their keys and values)")
    if args.arch != "d2l" and args.tasks in data.DOCUMENTS:
        raise UserError(f"--tasks {args.tasks} are documents; they go with --arch d2l")
    if args.mode == "pretrain" and not (tiny and args.tasks == "tiny"):
        raise UserError("--mode pretrain makes the tiny base model; it goes with --base_model tiny and --tasks tiny")
    if args.mode == "recon" and not args.oracles:
        raise UserError("--mode recon needs --oracles DIR, a folder that --mode lora wrote")
    return args


# ---------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------


def answer_logits(base: nn.Module, input_ids: Tensor, labels: Tensor, neftune_alpha: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where there is an answer token to predict (labels other than -100) and nowhere else.

    input_ids, labels [rows, T], padded on the right: a causal model never looks there, so no mask is needed.
    Returns logits [answer tokens, vocabulary], the row of each, and the token that is right there.
    """
    x = base.get_input_embeddings()(input_ids)  # [rows, T, d]
    if neftune_alpha:  # NEFTune (arXiv 2310.05914): uniform noise of a size that does not depend on T and d
        x = x + torch.empty_like(x).uniform_(-1, 1) * neftune_alpha / (x.shape[1] * x.shape[2]) ** 0.5
    h = base.base_model(inputs_embeds=x, use_cache=False).last_hidden_state  # [rows, T, d]
    rows, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # [answer tokens]
    return model.lm_head(base, h[rows, at]).float(), rows, labels[rows, at + 1]


def row_mean(losses: Tensor, rows: Tensor) -> Tensor:
    """Losses of tokens, averaged over each row's, then over the rows, so that each example weighs the same."""
    per_row = torch.bincount(rows)
    return (losses / per_row[rows]).sum() / len(per_row)


def answer_loss(base: nn.Module, input_ids: Tensor, labels: Tensor, smoothing: float = 0.0, neftune_alpha: float = 0.0) -> Tensor:
    """Cross-entropy of the answers. input_ids, labels [rows, T]."""
    logits, rows, targets = answer_logits(base, input_ids, labels, neftune_alpha)
    return row_mean(F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing), rows)


def distill_loss(logits: Tensor, teacher: Tensor, rows: Tensor, k: int) -> Tensor:
    """KL divergence from a teacher, over the k tokens that it finds likeliest. logits, teacher [answer tokens, vocabulary]."""
    likely, tokens = teacher.log_softmax(-1).topk(min(k, teacher.shape[-1]))  # [answer tokens, k]
    return row_mean((likely.exp() * (likely - logits.log_softmax(-1).gather(-1, tokens))).sum(-1), rows)


def weight_loss(adapter: Adapter, size) -> Tensor:
    """L1 or L2 on the generated weights: the mean sizes (torch.abs or torch.square) of A and of B, summed over the modules.

    Each adapter weighs the same, whatever its rank: where short documents were filled up with ranks of zeros, these do not count.
    """
    loss = 0.0
    for A, B in adapter.values():
        of_A, of_B = size(A).mean(-1), size(B).mean(-2)  # [n, L, r]
        ranks = (of_A.detach() > 0).sum(-1)  # [n, L]
        loss = loss + ((of_A + of_B).sum(-1) / ranks).mean()
    return loss


def z_score_loss(adapter: Adapter, target: Adapter, scale: dict[str, Tensor]) -> Tensor:
    """L1 between z-scored A and B and those of the oracles. The means cancel, |a - t| / deviation is left."""
    losses = []
    for name, pair in adapter.items():
        losses += [((x - t) / scale[f"{name}_{key}"]).abs().mean() for key, x, t in zip("AB", pair, target[name])]
    return sum(losses) / len(losses)


def mixup(task_emb: Tensor, target: Adapter, delta_w: bool) -> tuple[Tensor, Adapter]:
    """Move each row a random part of the way to another one, and its target as far (arXiv 1710.09412; not in the T2L paper).

    Few oracles can be known by heart; on the lines between them there is no end of targets. And what is straight between
    any two of them adds up: "reversed, in French" becomes what "reversed" does and what "in French" does.
    What lies between is a mixture of A and of B; or of the products BA, of twice the rank, where these are compared.
    """
    task_emb, other = F.normalize(task_emb, dim=-1), torch.randperm(len(task_emb))
    way = torch.rand(len(task_emb), 1, 1, 1, device=task_emb.device)  # [n, 1, 1, 1]
    if delta_w:
        target = {name: (torch.cat([A, A[other]], 2), torch.cat([(1 - way) * B, way * B[other]], 3)) for name, (A, B) in target.items()}
    else:
        target = {name: tuple(torch.lerp(x, x[other], way) for x in pair) for name, pair in target.items()}
    return torch.lerp(task_emb, task_emb[other], way[:, :, 0, 0]), target


def delta_w_loss(adapter: Adapter, target: Adapter, scaling: float = 10_000.0) -> Tensor:
    """L1 between the products BA, which are small, so times 10000 as published."""
    losses = [scaling * (B @ A - target[name][1] @ target[name][0]).abs().mean() for name, (A, B) in adapter.items()]
    return sum(losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------
# What is trained: an objective draws the batch of a step (the same on all processes) and computes its loss
# ---------------------------------------------------------------------------------------------------------


def sample(rng: random.Random, population, k: int) -> list:
    """k different ones, or, where there are fewer, k with repetitions."""
    return rng.sample(population, k) if k <= len(population) else rng.choices(population, k=k)


class Bank(nn.Module):
    """Ordinary LoRAs, one a task, as one batch of adapters. Task indices [n] -> n adapters.

    They start from a common random A, or each from its own (own_init); or there is but one A, which all train (one_A).
    """

    def __init__(self, config: lora.LoRAConfig, n: int, own_init: bool = False, one_A: bool = False):
        super().__init__()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name in config.paths:
            A = lora.fresh(torch.empty(n if own_init else 1, config.n_layers, config.r, config.in_features[name]))
            self.A[name] = nn.Parameter(A if own_init or one_A else A.repeat(n, 1, 1, 1))  # [n or 1, L, r, in]
            self.B[name] = nn.Parameter(torch.zeros(n, config.n_layers, config.out_features[name], config.r))

    def forward(self, index: Tensor | int) -> Adapter:
        return {name: (A.expand(len(self.B[name]), -1, -1, -1)[index], self.B[name][index]) for name, A in self.A.items()}


class Finetune(nn.Module):
    """The task loss through the frozen base model, of adapters that `net` makes for the tasks of a batch."""

    def __init__(self, args, device):
        super().__init__()
        self.args, self.device = args, device
        self.tasks = data.pick(data.load_tasks(args.tasks), args.split, args.n_tasks)
        base, tokenizer = model.load_base(args.base_model, device, getattr(torch, args.dtype))
        model.check_head(base)
        model.check_known(tokenizer, [text for task in self.tasks for question, answers in task.train for text in (question, answers[0])])
        targets = args.target_modules.split(",")
        self.config = lora.config_for(base, targets, model.full_name(args.base_model), r=args.rank, alpha=args.alpha)
        lora.inject(base, targets, args.dropout)
        if args.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if args.compile:
            on_cpu = device.type == "cpu"
            if on_cpu:  # there attention in plain steps, which get fused, and the uncompiled random numbers are the faster ones
                base.set_attn_implementation("eager")
            for layer in base.get_decoder().layers:
                layer.compile(dynamic=True, options={"fallback_random": on_cpu})
        self.frozen = (base, tokenizer)  # in a tuple, so that it is no part of this module's parameters
        self.tokenize = lru_cache(2**16)(lambda *example: model.tokenize_example(tokenizer, *example))
        if args.max_tokens:
            for task in self.tasks:
                before = task.definition or max(task.descriptions, key=len) if args.prompt_with_definition else ""
                task.train = [x for x in task.train if self.length(x[0], x[1][0], before) <= args.max_tokens]
            self.tasks = [task for task in self.tasks if task.train]
            if not self.tasks:
                raise UserError(f"--max_tokens {args.max_tokens}: every example is longer")

    def draw(self, rng: random.Random, step: int) -> list:
        """[(index of a task, one of its descriptions, some of its examples)]"""
        chosen = [(i, self.tasks[i]) for i in sample(rng, range(self.reach(step)), self.args.tasks_per_batch)]
        return [(i, rng.choice(task.descriptions), sample(rng, task.train, self.args.examples_per_task)) for i, task in chosen]

    def reach(self, step: int) -> int:
        """How many of the tasks, from the first, take part by now."""
        return len(self.tasks)

    def forward(self, batch: list) -> Tensor:
        base, _ = self.frozen
        base.eval()  # it may be the text encoder, too, or read documents
        adapter = self.adapters(batch)  # A [tasks, L, r, in], B [tasks, L, out, r]
        base.train()
        loss = sum(weight * weight_loss(adapter, size) for weight, size in ((self.args.l1, torch.abs), (self.args.l2, torch.square)) if weight)
        rows = []  # (index in the batch, question, answer, what stands before the question)
        for k, (i, description, examples) in enumerate(batch):
            for question, answers in examples:
                stated = torch.rand(()) < self.args.prompt_with_definition
                rows.append((k, question, answers[0], self.tasks[i].definition or description if stated else ""))
        adapter = {name: (A.to(base.dtype), B.to(base.dtype)) for name, (A, B) in adapter.items()}  # at once, not layer by layer
        if self.args.row_groups == 1:  # neighbouring rows share the adapter of their task
            return loss + self.part_loss(rows, batch, adapter)
        rows.sort(key=lambda row: self.length(*row[1:]))  # rows of like length together, each with its adapter
        size = math.ceil(len(rows) / self.args.row_groups)
        for i, own in enumerate(lora.split(lora.select(adapter, [row[0] for row in rows]), size)):
            part = rows[i * size : (i + 1) * size]
            loss = loss + self.part_loss(part, batch, own) * (len(part) / len(rows))
        return loss

    def length(self, question: str, answer: str, before: str) -> int:
        """Tokens of an example, with its prompt."""
        return sum(map(len, self.tokenize(question, answer, before)))

    def padded(self, examples: list[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
        """input_ids and labels of (question, answer, what stands before the question). [rows, T]"""
        prompts, answers = zip(*(self.tokenize(*example) for example in examples))
        input_ids = model.pad([p + a for p, a in zip(prompts, answers)], self.frozen[1].pad_token_id)
        labels = model.pad([[-100] * len(p) + a for p, a in zip(prompts, answers)], -100)
        return input_ids.to(self.device), labels.to(self.device)

    def part_loss(self, rows: list, batch: list, adapter: Adapter) -> Tensor:
        """The loss of rows that are computed together, under the adapters of each."""
        base, args = self.frozen[0], self.args
        lora.set_adapter(base, adapter, self.config.scaling)
        return answer_loss(base, *self.padded([row[1:] for row in rows]), args.label_smoothing, args.neftune_alpha)

    def save(self, folder: Path) -> None:
        hypernet.save_hypernet(self.net, folder, torch.bfloat16)


class Lora(Finetune):
    """--mode lora: one adapter a task, or one for all."""

    def __init__(self, args, device):
        super().__init__(args, device)
        if not args.multi_task:  # every adapter takes part in every step
            args.tasks_per_batch = len(self.tasks)
        self.net = Bank(self.config, 1 if args.multi_task else len(self.tasks), args.own_init, args.one_A).to(device)

    def adapters(self, batch: list) -> Adapter:
        """Those of the bank."""
        return self.net(torch.tensor([0 if self.args.multi_task else i for i, _, _ in batch], device=self.device))

    def save(self, folder: Path) -> None:
        """One adapter folder a task, by its name; or the multi-task adapter in the folder itself."""
        folders = [folder] if self.args.multi_task else [folder / task.name for task in self.tasks]
        for i, one in enumerate(folders):
            lora.save_adapter(one, self.net(i), self.config)


def new_hypernet(args, config: lora.LoRAConfig, encoder, tasks: list[data.Task]) -> hypernet.TextToLoRA:
    """A hypernetwork with the sizes of `args`, for adapters as in `config`, to be trained on the descriptions of `tasks`."""
    own = {key: getattr(args, key) for key in ("encoder", "size", "latent_size", "head_in_size", "head_scale", "dropout")}
    own |= dict(task_emb_size=encoder(tasks[0].descriptions[:1]).shape[1], prompt_with_definition=args.prompt_with_definition > 0)
    z_score = start_config(args).get("z_score", args.mode == "recon" and not args.delta_w)  # SFT goes on from a reconstruction as that is
    net = hypernet.TextToLoRA(hypernet.HypernetConfig(**vars(config), **own, z_score=z_score))
    if args.tell_apart and not (Path(args.out_dir) / "state.safetensors").exists():  # a run that goes on has its weights in there
        enough = max(2, 2**13 // len(tasks))  # the time that it takes grows with the cube of their number
        net.tell_apart([encoder(task.descriptions[:enough]).cpu() for task in tasks])
    return net


def remember(encoder, device):
    """Text -> embedding [E]; the last 4096 are kept."""
    return lru_cache(2**12)(lambda text: encoder([text])[0].to(device))


class Sft(Finetune):
    """--mode sft: the hypernetwork makes the adapters from the descriptions."""

    def __init__(self, args, device):
        super().__init__(args, device)
        encoder = model.load_encoder(args.encoder, device, self.frozen)
        self.embed = remember(encoder, device)
        self.net = new_hypernet(args, self.config, encoder, self.tasks).to(device)
        if not self.net.config.z_score:
            self.net.start_as_lora()

    def adapters(self, batch: list) -> Adapter:
        """Written from the descriptions."""
        return self.net(torch.stack([self.embed(description) for _, description, _ in batch]))


class Documents(Finetune):
    """--mode sft --arch d2l: the hypernetwork makes the adapters from documents, the examples are questions about them."""

    def __init__(self, args, device):
        super().__init__(args, device)
        model.check_known(self.frozen[1], [task.descriptions[0] for task in self.tasks])
        size = self.frozen[0].config.get_text_config().hidden_size
        self.tasks.sort(key=lambda task: len(task.descriptions[0]))
        own = {key: getattr(args, key) for key in ("latent_size", "n_latents", "n_blocks", "n_heads", "chunk_len")}
        self.net = hypernet.DocToLoRA(hypernet.DocConfig(**vars(self.config), **own, feature_size=size, per_layer=not args.early_exit)).to(device)

    def reach(self, step: int) -> int:
        """Short documents first, all of them from the middle of the training on: what belongs together is learnt on few facts."""
        return math.ceil(len(self.tasks) * min(1, 1 / 3 + 4 / 3 * step / self.args.max_steps))

    def adapters(self, batch: list) -> Adapter:
        """Written from the documents, as the frozen base model reads them."""
        n_pieces = 2 ** int(torch.randint(self.args.max_pieces.bit_length(), ()))
        return hypernet.read_documents(self.net, *self.frozen, [[document] for _, document, _ in batch], self.args.chunk_batch, n_pieces)

    def part_loss(self, rows: list, batch: list, adapter: Adapter) -> Tensor:
        """With --distill the base model itself, with the document in its prompt, is the teacher."""
        if not self.args.distill:
            return super().part_loss(rows, batch, adapter)
        base = self.frozen[0]
        with torch.no_grad():
            lora.set_adapter(base, None)
            told = [(question, answer, batch[k][1]) for k, question, answer, _ in rows]
            teacher, _, _ = answer_logits(base.eval(), *self.padded(told))
        lora.set_adapter(base.train(), adapter, self.config.scaling)
        logits, of, _ = answer_logits(base, *self.padded([row[1:] for row in rows]), self.args.neftune_alpha)
        return distill_loss(logits, teacher, of, self.args.distill)


class Recon(nn.Module):
    """--mode recon: the hypernetwork learns to write the oracles' adapters; no base model takes part."""

    def __init__(self, args, device):
        super().__init__()
        self.args, self.device = args, device
        folder = Path(args.oracles)
        tasks = data.pick(data.load_tasks(args.tasks), args.split, args.n_tasks)
        self.tasks = [task for task in tasks if (folder / task.name / "adapter_config.json").exists()]
        if not self.tasks:
            raise UserError(f"--oracles {folder}: no adapters of the {args.split} tasks of --tasks {args.tasks} in it")
        self.oracles, config = lora.load_adapters([folder / task.name for task in self.tasks], device)
        if model.preset_name(config.base_model) != model.preset_name(args.base_model):
            raise UserError(f"--oracles {args.oracles} are for {config.base_model}, not for --base_model {args.base_model}")
        if len(self.tasks) < 2 and not args.delta_w:
            raise UserError(f"z-scores take two oracles or more; there is one in --oracles {args.oracles}")
        base = model.load_base(args.base_model, device, getattr(torch, args.dtype)) if args.encoder == "base" else None
        encoder = model.load_encoder(args.encoder, device, base)
        self.embed = remember(encoder, device)
        self.net = new_hypernet(args, config, encoder, self.tasks).to(device)
        if args.delta_w:
            for scale in self.net.scale.values():
                scale.fill_(0.01)  # times itself is the 1/10000 of the loss
        else:
            self.net.normalize(self.oracles)

    def draw(self, rng: random.Random, step: int) -> list:
        """[(index of a task, one of its descriptions)]"""
        chosen = sample(rng, range(len(self.tasks)), self.args.tasks_per_batch)
        return [(i, rng.choice(self.tasks[i].descriptions)) for i in chosen]

    def forward(self, batch: list) -> Tensor:
        task_emb = torch.stack([self.embed(description) for _, description in batch])  # [n, E]
        target = lora.select(self.oracles, [i for i, _ in batch])
        if self.args.mixup:
            task_emb, target = mixup(task_emb, target, self.args.delta_w)
        adapter = self.net(task_emb)
        return delta_w_loss(adapter, target) if self.args.delta_w else z_score_loss(adapter, target, self.net.scale)

    save = Finetune.save


class Pretrain(nn.Module):
    """The tiny base model: Llama, 0.84M parameters, in turn on 8 examples of one training task and on a document of facts with
    8 questions about it."""

    def __init__(self, args, device):
        super().__init__()
        self.args, self.device = args, device
        self.tasks = data.tiny_splits()["train"]  # validation and test tasks stay unseen here, too
        self.weights = [2 if "reversed" in parts else 1 for parts in self.tasks]  # the hardest layout to learn
        self.ids = {word: i for i, word in enumerate(data.VOCABULARY)}
        config = LlamaConfig(
            vocab_size=len(self.ids), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
            bos_token_id=None, eos_token_id=self.ids["<eos>"], pad_token_id=self.ids["<pad>"],
        )  # fmt: skip
        self.net = LlamaForCausalLM(config).to(device)

    def draw(self, rng: random.Random, step: int) -> list:
        """[texts][examples]. Long texts come late: without this curriculum the model learns next to nothing."""
        n_texts, n_examples = self.args.tasks_per_batch, self.args.examples_per_task
        if step % 2:
            n_lines, texts = 2 ** rng.randint(0, min(6, int(12 * step / self.args.max_steps))), []
            for _ in range(n_texts):
                document = data.fact_document(rng, n_lines)
                (first, answers), *others = rng.choices(document.train, k=n_examples)
                texts.append([(f"{document.descriptions[0]} {first}", answers), *others])  # the document comes with the first question
            return texts
        done = step / self.args.max_steps
        shortest, longest = (1, 2) if done < 0.12 else (2, 3) if done < 0.25 else (2, 4) if done < 0.4 else (3, 4)
        return [
            [data.tiny_example(parts, rng, rng.randint(shortest, longest)) for _ in range(n_examples)]
            for parts in rng.choices(self.tasks, self.weights, k=n_texts)
        ]

    def forward(self, batch: list) -> Tensor:
        input_ids, labels = [], []
        for text in batch:
            input_ids.append([])
            labels.append([])
            for question, (answer,) in text:
                prompt = [self.ids[w] for w in [*question.split(), "->"]]
                target = [self.ids[w] for w in [*answer.split(), "<eos>"]]
                input_ids[-1] += prompt + target
                labels[-1] += [-100] * len(prompt) + target
        pad = lambda rows, value: model.pad(rows, value).to(self.device)
        return answer_loss(self.net, pad(input_ids, self.ids["<pad>"]), pad(labels, -100), self.args.label_smoothing)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as an ordinary Hugging Face folder."""
        special = [word for word in data.VOCABULARY if word.startswith("<")]
        lora.write_json(folder / "config.json", self.net.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
        lora.write_safetensors(folder / "model.safetensors", {k: t for k, t in self.net.state_dict().items() if k != "lm_head.weight"})
        lora.write_json(
            folder / "tokenizer.json",
            {
                "version": "1.0",
                "added_tokens": [
                    dict(id=self.ids[w], content=w, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                    for w in special
                ],
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "model": {"type": "WordLevel", "vocab": self.ids, "unk_token": "<unk>"},
            },
        )
        lora.write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            | {f"{w[1:-1]}_token": w for w in special},
        )


OBJECTIVES = {("pretrain", "t2l"): Pretrain, ("lora", "t2l"): Lora, ("recon", "t2l"): Recon, ("sft", "t2l"): Sft, ("sft", "d2l"): Documents}

# ---------------------------------------------------------------------------------------------------------
# The run: its folder, its state, its processes
# ---------------------------------------------------------------------------------------------------------

# Other steps change how fast the learning rate falls from here on, and how soon long texts come; a setting that is not among
# these would change the run itself.
FREE_ON_RESUME = ("resume", "max_steps", "out_dir", "save_every", "device", "wandb", "gradient_checkpointing")


def open_run(args) -> None:
    """Check --out_dir, and with --resume that the settings are those of the run in it."""
    folder = Path(args.out_dir)
    record, written = folder / "train_args.json", any(folder.rglob("*.safetensors"))
    if folder.exists() and not record.exists() and any(folder.iterdir()):
        raise UserError(f"--out_dir {folder} holds something that train.py did not write; choose another")
    if not args.resume and record.exists() and written:
        raise UserError(f"--out_dir {folder} holds a run already; choose another folder or delete it, or add --resume if the run was cut off")
    if args.resume:
        if not record.exists():
            raise UserError(f"--resume: there is no run in {folder}")
        then, now = lora.read_json(record), vars(args)
        changed = [f"--{k} was {then.get(k)}, is {v}" for k, v in now.items() if k not in FREE_ON_RESUME and then.get(k) != v]
        if written and not (folder / "state.safetensors").exists():
            raise UserError(f"--resume: the run in {folder} is finished; a hypernetwork is trained further by another run, with --start_from {folder}")
        if changed:
            raise UserError(f"--resume goes on with the settings of the run in {folder}: {'; '.join(changed)}")


def save_state(path: Path, step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All that the next step depends on, in one file. A step's randomness follows from its number, so none is kept."""
    tensors = {f"net.{k}": t for k, t in net.state_dict().items() if k != "lm_head.weight"}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": t for k, t in state.items()}
    lora.write_safetensors(path, tensors | {"step": torch.tensor(step)})


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state into net and optimizer; returns the number of steps done."""
    tensors = lora.read_safetensors(path)
    net.load_state_dict({k[4:]: t for k, t in tensors.items() if k.startswith("net.")}, strict=False)
    state = optimizer.state_dict()
    for key, t in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state["state"].setdefault(int(i), {})[name] = t
    optimizer.load_state_dict(state)
    return int(tensors["step"])


def start_from(net: nn.Module, folder: str) -> None:
    """Take over the weights of a trained hypernetwork; or an adapter, as what is written whatever the description, so that only
    differences from it are to be learnt. It has to be for the same base model and of the same sizes."""
    if (Path(folder) / "adapter_model.safetensors").exists():
        adapter, config = lora.load_adapter(folder)
        constant = "shift" if isinstance(net, hypernet.TextToLoRA) else "bias"
        weights = {f"{constant}.{name}_{key}": x for name, pair in adapter.items() for key, x in zip("AB", pair)}
    else:
        other = hypernet.load_hypernet(folder)
        config, weights = other.config, other.state_dict()
    have, want = ({k: v for k, v in vars(c).items() if k not in ("encoder", "dropout")} for c in (config, net.config))
    for settings in (have, want):
        settings["base_model"] = model.preset_name(settings["base_model"])
        settings["target_modules"] = ",".join(settings["paths"] if "size" in have else sorted(settings["paths"]))  # T2L numbers them
    if differing := [f"{k} is {v}, not {want.get(k)}" for k, v in have.items() if v != want.get(k)]:
        raise UserError(f"--start_from {folder} is of other settings: {'; '.join(differing)}")
    net.load_state_dict(net.state_dict() | weights)


def start_processes(args) -> tuple[int, int, int, torch.device]:
    """(rank, rank on this machine, world size, device). torchrun sets the environment; without it this is one process of one."""
    rank, local_rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world > 1:  # the others wait while the first one downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return rank, local_rank, world, device


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(args.warmup * args.max_steps))
    return args.lr * min((step + 1) / warmup, (args.max_steps - step) / max(1, args.max_steps - warmup))


def main() -> None:
    args = complete(parse_args())
    rank, local_rank, world, device = start_processes(args)
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    open_run(args)
    settings = dict(vars(args))
    torch.manual_seed(args.seed % 2**64)
    if local_rank > 0:
        try:
            dist.barrier()  # the first process of each machine goes ahead, and downloads what has to be downloaded
        except RuntimeError:  # it has ended, and said why
            raise SystemExit(2) from None
    objective = OBJECTIVES[args.mode, args.arch](args, device)
    if local_rank == 0 and world > 1:
        dist.barrier()
    if args.start_from:
        start_from(objective.net, args.start_from)
    if args.tasks_per_batch % world:
        raise UserError(f"{args.tasks_per_batch} tasks a step cannot be shared out evenly among {world} processes")
    share = args.tasks_per_batch // world
    parallel = DistributedDataParallel(objective) if world > 1 else objective
    parameters = [p for p in objective.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)

    folder = Path(args.out_dir)
    state, metrics = folder / "state.safetensors", folder / "metrics.jsonl"
    step = load_state(state, objective.net, optimizer) if args.resume and state.exists() else 0
    if step >= args.max_steps:
        raise UserError(f"--resume: the run in {folder} has done {step} steps; it cannot end after {args.max_steps}")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        kept = metrics.read_text().splitlines(keepends=True)[:step] if args.resume and metrics.exists() else []
        metrics.write_text("".join(kept))
        lora.write_json(folder / "train_args.json", settings | {"trained_tasks": len(objective.tasks)})
        log = metrics.open("a")
        print(f"{args.mode}: {sum(p.numel() for p in parameters):,} parameters, {args.max_steps} steps, into {folder}/", flush=True)
        if args.wandb:
            import wandb

            wandb.init(project="text-to-lora", name=folder.name, config=vars(args))

    bar = tqdm(total=args.max_steps, initial=step, disable=rank > 0, desc=args.mode)
    while step < args.max_steps:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)

        # Data is drawn alike in all processes, each takes its share; noise (dropout, NEFTune) differs between them.
        batch = objective.draw(random.Random(f"{args.seed} {step}"), step)[rank * share : (rank + 1) * share]
        torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))
        plain = device.type == "cpu" and args.dtype == "bfloat16"  # there the plain attention kernel is the faster one
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):  # trained weights stay float32
                loss = parallel(batch)
            optimizer.zero_grad()
            loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)

        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        if not torch.isfinite(loss + grad_norm):
            saved = f"the last state is in {state}" if state.exists() else "no state was saved yet"
            raise UserError(f"the loss is {loss.item()}, the gradient {grad_norm.item()} in step {step}; {saved}; try a lower --lr")
        optimizer.step()
        step += 1

        if rank == 0:
            row = dict(step=step, loss=loss.item(), lr=learning_rate(step - 1, args), grad_norm=grad_norm.item())
            log.write(json.dumps(row | {"seconds": round(time.perf_counter() - started, 4)}) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            if args.wandb:
                wandb.log(row, step=step)
            if step % args.save_every == 0 and step < args.max_steps:
                save_state(state, step, objective.net, optimizer)
    bar.close()
    if rank == 0:
        objective.save(folder)
        state.unlink(missing_ok=True)
        print(f"done: {folder}/", flush=True)
    if world > 1:
        dist.barrier()  # leave together
        dist.destroy_process_group()


if __name__ == "__main__":
    lora.run(main)
