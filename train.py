"""Train adapters, or a hypernetwork that writes them.

    python train.py                                                     # SFT in the tiny world, one process
    torchrun --nproc_per_node=2 train.py                                # the same batches on two processes
    python train.py @config/mistral-7b.args --out_dir out/mistral       # a file of flags

--mode says what is trained, and by which loss:

    lora       ordinary LoRAs by the task loss: one per task (the oracles), or one for all (--multi_task)
    recon      a hypernetwork, to write the same adapters as the oracles (paper, section 3.1)
    sft        a hypernetwork, by the task loss through the frozen base model (paper, section 3.2)

@FILEs hold flags, see config/. If a flag occurs twice, the last one counts.
"""

import argparse
import gc
import json
import math
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import hypernet
import lora
import model
from lora import Adapter
from support import UserError, command, make_parser, say, write_file
from tasks import SOURCES, load_tasks, summary

# -------------------- Settings --------------------
#
# There are four kinds of runs: ordinary LoRAs ("lora"), reconstruction ("recon"), and SFT of a network that
# reads "descriptions" or "documents". A flag is refused if the kind of run, or its network, does not use it.

parser = make_parser(__doc__)
parser.usage, parser.fromfile_prefix_chars = "train.py [@FILE ...] [--FLAG VALUE ...]", "@"
parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
parser.argument_default = argparse.SUPPRESS  # so that `parse_args` sees which flags were given
defaults, used_by = {}, {}  # {flag: its default}, {flag: kinds of runs that use it}


def block(title: str, kinds: str, **flags) -> None:
    """Flags that these kinds of runs use: name=(default, meaning) or name=(default, meaning, *choices)."""
    group = parser.add_argument_group(title)
    for name, (default, meaning, *choices) in flags.items():
        options = {"type": type(default), "choices": choices or None}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument(f"--{name}", help=f"{meaning} (default: {default})", **options)
        defaults[name], used_by[name] = default, kinds.split()


block("all runs", "lora recon descriptions documents",
    mode=("sft", "what is trained, see above", "lora", "recon", "sft"),
    base_model=("tiny", f"{', '.join(model.PRESETS)}, a hub id or a folder"),
    tasks=("tiny", f"{', '.join(SOURCES)}, or a folder of task files"),
    split=("train", "tasks to train on", "train", "val", "test"),
    n_tasks=(0, "use only so many of these tasks (0: all)"),
    max_steps=(600, "training steps"),
    tasks_per_batch=(128, "tasks of a step, over all processes (0: all)"),
    lr=(2e-3, "highest learning rate"),
    warmup=(0.1, "fraction of the steps in which the learning rate rises"),
    schedule=("linear", "decay to 0; late: in the last third", "linear", "late", "cosine"),
    weight_decay=(1e-2, "weight decay of AdamW, only on matrices (and not on latents and scalers)"),
    dropout=(0.1, "on the input of adapters, and in Text-to-LoRA's trunk"),
    seed=(0, "of the run's randomness"),
    device=("auto", "cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one"),
    dtype=("auto", "auto: bfloat16 on a GPU, not for recon", "auto", "float32", "bfloat16"),
    val_every=(250, "steps between two validations, and between two saved states"),
    out_dir=("out/run", "a new folder"),
    resume=(False, "continue the interrupted run in --out_dir"),
)
block("hypernetworks", "recon descriptions documents",
    arch=("t2l", "t2l (Text-to-LoRA), d2l (Doc-to-LoRA), or the name of a file in extras/"),
    init_from=("", "start from the weights of this hypernetwork"),
)
block("runs through the base model: all but recon", "lora descriptions documents",
    target_modules=("q_proj,v_proj", "linear layers, by the ends of their paths"),
    rank=(8, "rank of an adapter; of each chunk of a document"),
    alpha=(16.0, "scaling is alpha / sqrt(rank)"),
    examples_per_task=(1, "examples of each task of a step"),
    micro_batch=(64, "examples at once, on each process"),
    max_tokens=(512, "longer examples are not drawn"),
    neftune_alpha=(0.0, "noise on the input embeddings (NEFTune)"),
    l1=(0.0, "weight of the mean absolute value of A and B"),
    l2=(1e-3, "weight of the mean square of A and B"),
    gradient_checkpointing=(False, "compute activations twice, to save memory"),
)
block("ordinary LoRAs", "lora", multi_task=(False, "one adapter for all tasks"))
block("reconstruction", "recon",
    oracles=("", "the folder that --mode lora wrote"),
    recon_loss=("z_score", "compares A and B over their deviation, or B A", "z_score", "delta_w"),
)
block("runs on descriptions, and ordinary LoRAs", "lora descriptions",
    instruction=(False, "put the definition before the input"),
    label_smoothing=(0.0, "label smoothing"),
    shard=(False, "shard the base model over the processes"),
)
block("documents", "documents",
    short_first=(False, "short documents first, all from half-way on"),
    distill=(0, "learn the base model's top k tokens with the document in its prompt"),
)
block("the network: those that its config has", "network",
    encoder=("preset", "the preset's, hash, base, a hub id or a folder"),
    size=("large", "what one pass through a head of Text-to-LoRA writes", *hypernet.SIZES),
    latent_size=(128, "width of the trunk, or of the Perceiver (published: 512)"),
    head_in_size=(256, "width of the input of the heads"),
    input_dropout=(0.1, "dropout of the text encoder's output (not published)"),
    encoder_rank=(0, "rank of a LoRA on the text encoder (0: none; not published)"),
    early_exit=(False, "read the states after a quarter of the layers, not of each layer"),
    n_blocks=(9, "cross-attention blocks of the Perceiver"),
    n_heads=(16, "attention heads of size 128; a quarter as many for keys and values"),
    chunk_len=(512, "maximum tokens per chunk, without the template's that are added at cuts"),
    chat=(True, "read a chunk as a user turn of the base model's chat template"),
)
MAY_CHANGE = {  # with --resume: length, learning rate, how the step is computed, where, and when it is saved
    *("max_steps", "lr", "schedule", "micro_batch", "dtype", "gradient_checkpointing", "shard", "device"),
    *("val_every", "out_dir", "resume"),
}
NOT_ZERO = {"max_steps", "val_every", "rank", "alpha", "examples_per_task", "micro_batch", "max_tokens"}
NOT_ZERO |= {"head_in_size", "n_blocks", "n_heads", "chunk_len"}


def is_used(args: argparse.Namespace, name: str) -> bool:
    """Whether a run uses a setting: by its kind, or if the config of its network has a field of this name."""
    if used_by[name] != ["network"]:
        return args.kind in used_by[name]
    config_class = hypernet.find_arch(args.arch).config_class
    return args.mode != "lora" and name in {field.name for field in fields(config_class)}


def parse_args(words: list[str]) -> argparse.Namespace:
    """The settings of a run. A resumed one goes by its train.args, then by `words`."""
    given = vars(parser.parse_args(words))
    recorded = dict(defaults)
    if given.get("resume"):
        file = f"{given.get('out_dir', defaults['out_dir'])}/train.args"
        recorded |= vars(parser.parse_args([f"@{file}"]))
        for name, new in given.items():
            if new != recorded[name] and name not in MAY_CHANGE:
                raise UserError(f"--resume: this run has --{name} {recorded[name]}, not {new}")
    args = argparse.Namespace(**recorded | given)
    net_class = hypernet.find_arch(args.arch)
    args.kind = net_class.reads if args.mode == "sft" else args.mode
    for name, value in (recorded | given).items():
        if name in given and not is_used(args, name):
            raise UserError(f"--{name} is not a setting of --mode {args.mode} ({args.kind})")
        if not isinstance(value, str) and (value < 0 or (value == 0 and name in NOT_ZERO)):
            raise UserError(f"--{name} must not be {value}")
    if args.warmup > 1:
        raise UserError("--warmup is a fraction of the steps")
    if args.mode != "lora" and args.mode not in net_class.modes:
        raise UserError(f"--arch {args.arch} is trained with --mode {' or '.join(net_class.modes)}")
    if args.encoder == "preset":
        args.encoder = model.PRESETS.get(model.preset_of(args.base_model), ("", "base"))[1]
    if args.dtype == "auto":
        dtype = torch.float32 if args.mode == "recon" else model.default_dtype(model.pick_device(args.device))
        args.dtype = str(dtype).removeprefix("torch.")
    if args.gradient_checkpointing and args.dropout and args.device == "mps":
        raise UserError("--gradient_checkpointing on mps needs --dropout 0: another mask would be drawn")
    if args.shard and args.kind == "descriptions" and args.encoder == "base":
        raise UserError("--shard needs a text encoder beside the sharded base model: --encoder ID or DIR")
    return args


def as_text(args: argparse.Namespace) -> str:
    """The settings that a run uses, as a file of flags."""
    lines = []
    for name in used_by:
        value = getattr(args, name)
        if is_used(args, name) and isinstance(value, bool):
            lines.append(f"--{name}" if value else f"--no-{name}")
        elif is_used(args, name):
            lines.append(f"--{name} {shlex.quote(str(value))}")
    lines.remove("--resume" if args.resume else "--no-resume")
    return "\n".join(lines) + "\n"


# -------------------- The losses --------------------


def example_mean(losses: Tensor, example_index: Tensor) -> Tensor:
    """Losses of tokens, averaged over each example, then over the examples: every example counts equally."""
    n_tokens = torch.bincount(example_index)  # [examples]
    return (losses / n_tokens[example_index]).sum() / len(n_tokens)


def answer_loss(logits: Tensor, example_index: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the answers, from `model.answer_logits`."""
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)  # [tokens]
    return example_mean(losses, example_index)


def distill_loss(logits: Tensor, example_index: Tensor, teacher: Tensor, k: int) -> Tensor:
    """KL divergence from a teacher on its k likeliest tokens, not renormalised. Both [tokens, vocabulary]."""
    log_p, tokens = teacher.log_softmax(-1).topk(min(k, teacher.shape[-1]))  # [tokens, k]
    log_q = logits.log_softmax(-1).gather(-1, tokens)
    return example_mean((log_p.exp() * (log_p - log_q)).sum(-1), example_index)


def weight_size(adapter: Adapter, measure) -> Tensor:
    """Mean of measure(A) plus mean of measure(B), torch.abs or torch.square, summed over the modules.

    Each adapter of the batch counts equally, without the ranks of zeros that pad it (`DocToLoRA.join`).
    """
    total = 0.0
    for A, B in adapter.values():  # [n, L, R, in], [n, L, out, R]
        not_padding = A.any(-1).any(1)  # [n, R]: in any layer
        L, ranks = A.shape[1], not_padding.sum(-1).clamp(min=1)  # [n]
        mean_A = measure(A).sum((1, 2, 3)) / (L * ranks * A.shape[-1])  # [n]
        mean_B = measure(B).sum((1, 2, 3)) / (L * ranks * B.shape[-2])
        total = total + mean_A.mean() + mean_B.mean()
    return total


def recon_loss(compare: str, adapter: Adapter, oracle: Adapter, std: Adapter) -> Tensor:
    """L1 between written adapters and oracles, averaged over the modules.

    "delta_w" compares 10,000 BA, as published; "z_score" compares A and B divided by the std of the
    oracles.
    """
    losses = []
    for name, (A, B) in adapter.items():
        oracle_A, oracle_B = oracle[name]
        if compare == "delta_w":
            losses.append(10_000 * (B @ A - oracle_B @ oracle_A).abs().mean())  # [n, L, out, in]
        else:
            std_A, std_B = std[name]
            loss_A = ((A - oracle_A) / std_A).abs().mean()
            loss_B = ((B - oracle_B) / std_B).abs().mean()
            losses.append((loss_A + loss_B) / 2)
    return sum(losses) / len(losses)


# -------------------- A training step --------------------


@dataclass
class Run:
    """Everything a step needs. Of `count` processes, the one with rank 0 validates, writes and prints."""

    args: argparse.Namespace
    device: torch.device
    rank: int
    count: int
    tasks: list[data.Task]
    val_tasks: list[data.Task]
    base: nn.Module  # the frozen model; for recon without weights, unless it is the text encoder
    tokenizer: Any  # recon: None, since it uses no examples
    net: nn.Module  # what is trained: it writes adapters
    oracles: Adapter | None = None  # recon: the adapters to imitate, one per task
    std: Adapter | None = None  # recon: their standard deviation


def inputs_of(run: Run, drawn: list[data.Drawn]) -> list:
    """What `run.net` writes adapters from: the texts of tasks, or the numbers of ordinary LoRAs."""
    if run.args.mode == "lora":
        return [0 if run.args.multi_task else item.index for item in drawn]
    return [item.description for item in drawn]


def autocast(run: Run):
    """Compute in bfloat16 if --dtype says so; the weights of `net` stay in float32."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.args.dtype == "bfloat16")


def sft_step(run: Run, net: nn.Module, drawn: list[data.Drawn]) -> dict[str, Tensor]:
    """One training step through the frozen base model, of a hypernetwork or of ordinary LoRAs (`LoRABank`).

    The adapters are the interface between the two networks: the step goes forward through the hypernetwork,
    forward and backward through the base model, then backward through the hypernetwork. It leaves gradients
    in `net` and returns the terms of the loss. `net` is run.net, or with several processes its DDP version:
    each takes an equal share of the tasks, and DDP averages the gradients (only dropout and noise differ).
    """
    args, scaling = run.args, run.net.config.scaling
    rows = data.tokenize(run.tokenizer, run.tasks, drawn, args)  # of all examples, the shortest first

    # 1. One forward pass of the hypernetwork writes all adapters of the step.
    with autocast(run):
        written = net(inputs_of(run, drawn))  # A [tasks, L, r, in], B [tasks, L, out, r]

    # 2. Detached, they are leaves: they collect the gradients of everything that is computed with them.
    leaves = {}
    for name, (A, B) in written.items():
        leaves[name] = (A.detach().requires_grad_(), B.detach().requires_grad_())
    losses = {"task": torch.zeros((), device=run.device)}
    for name, weight, measure in (("l1", args.l1, torch.abs), ("l2", args.l2, torch.square)):
        if weight:
            penalty = weight * weight_size(leaves, measure)
            penalty.backward()
            losses[name] = penalty.detach()

    # 3. The examples go through the base model, a few of similar length at a time. Each backward pass frees
    #    the activations, so the memory of a step is that of one micro-batch.
    for i in range(0, len(rows), args.micro_batch):
        examples = rows[i : i + args.micro_batch]
        adapters = lora.select(leaves, [row.place for row in examples])  # A [examples, L, r, in]
        teacher = None
        if args.distill:  # the logits of the base model itself, with the document in its prompt
            with torch.no_grad(), autocast(run):
                prompts = [(row.teacher_prompt, row.answer) for row in examples]
                teacher, _, _ = model.answer_logits(run.base, prompts)  # [tokens, vocabulary]
        # (with --gradient_checkpointing the backward pass runs the layers again, with their adapters)
        with lora.use(run.base, adapters, scaling):
            loss = task_loss(run, examples, teacher) * len(examples) / len(rows)
            loss.backward()
        losses["task"] += loss.detach()

    # 4. One backward pass through the hypernetwork, from the gradients of A and B.
    outputs, gradients = [], []
    for name in written:
        outputs += written[name]
        for leaf in leaves[name]:  # in a base model with experts, the layers of a target may get no tokens
            gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    torch.autograd.backward(outputs, gradients)
    return losses


def task_loss(run: Run, examples: list[data.Row], teacher: Tensor | None) -> Tensor:
    """The loss of examples that go through the base model together, with the adapters in use."""
    pairs = [(row.prompt, row.answer) for row in examples]
    with autocast(run):
        logits, example_index, labels = model.answer_logits(run.base, pairs, run.args.neftune_alpha)
    if teacher is not None:
        return distill_loss(logits, example_index, teacher, run.args.distill)
    return answer_loss(logits, example_index, labels, run.args.label_smoothing)


def recon_step(run: Run, net: nn.Module, drawn: list[data.Drawn]) -> dict[str, Tensor]:
    """One step of reconstruction, without a base model. As sft_step, it leaves gradients in `net`."""
    with autocast(run):
        written = net(inputs_of(run, drawn))
    oracles = lora.select(run.oracles, [item.index for item in drawn])
    loss = recon_loss(run.args.recon_loss, written, oracles, run.std)
    loss.backward()
    return {"recon": loss.detach()}


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Cross-entropy and accuracy on up to 8 examples of each validation task, with its first description.

    An answer is right if every token is the most likely one: greedy decoding would give the same.
    """
    run.net.eval()
    lora.set_dropout(run.base, False)
    drawn = [data.Drawn(i, task.descriptions[0], task.test[:8]) for i, task in enumerate(run.val_tasks)]
    rows, loss, n_right = data.tokenize(run.tokenizer, run.val_tasks, drawn, run.args), 0.0, 0
    rows = [row for row in rows if row.n_tokens <= run.args.max_tokens] or rows[:1]
    with autocast(run):
        written = run.net(inputs_of(run, drawn))
        for i in range(0, len(rows), run.args.micro_batch):
            examples = rows[i : i + run.args.micro_batch]
            adapters = lora.select(written, [row.place for row in examples])
            with lora.use(run.base, adapters, run.net.config.scaling):
                pairs = [(row.prompt, row.answer) for row in examples]
                logits, example_index, labels = model.answer_logits(run.base, pairs)
            loss += answer_loss(logits, example_index, labels).item() * len(examples)
            wrong_examples = example_index[logits.argmax(-1) != labels].unique()
            n_right += len(examples) - len(wrong_examples)
    run.net.train()
    lora.set_dropout(run.base, True)
    return {"val_loss": loss / len(rows), "val_accuracy": n_right / len(rows)}


# -------------------- The loop --------------------


def make_optimizer(net: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW. What is no matrix has no weight decay, nor what the network lists."""
    without = {id(p) for p in net.no_decay()} if hasattr(net, "no_decay") else set()
    groups = {0.0: [], args.weight_decay: []}  # {weight decay: parameters}
    for p in net.parameters():
        if p.requires_grad:
            groups[0.0 if p.dim() < 2 or id(p) in without else args.weight_decay].append(p)
    settings = [dict(params=parameters, weight_decay=decay) for decay, parameters in groups.items()]
    return torch.optim.AdamW(settings, lr=args.lr, betas=(0.9, 0.999), fused=True)


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then linear decay to 0, or over the last third only, or cosine decay to 1e-7."""
    warmup = max(1, round(args.warmup * args.max_steps))
    remaining = (args.max_steps - step) / max(1, args.max_steps - warmup)  # from 1 to 0
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "cosine":
        return 1e-7 + (args.lr - 1e-7) * (1 - math.cos(math.pi * remaining)) / 2
    if args.schedule == "late":
        return args.lr * min(1.0, 3 * (args.max_steps - step) / args.max_steps)
    return args.lr * remaining


def train(run: Run, folder: Path) -> None:
    """Train until --max_steps. The weights with the lowest validation loss are kept; without it the last."""
    args, is_first, saved_at = run.args, run.rank == 0, time.monotonic()
    optimizer, state = make_optimizer(run.net, args), {"step": 0, "best": math.inf, "best_step": 0}
    if args.resume:
        state = load_state(run, folder, optimizer)
    if is_first:
        write_file(folder / "train.args", as_text(args))
    net = DistributedDataParallel(run.net) if run.count > 1 else run.net
    step, first_loss, measured = state["step"], None, {}
    bar = tqdm(total=args.max_steps, initial=step, disable=not is_first, desc=args.mode)
    while step < args.max_steps:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # All processes draw the same tasks, and each takes an equal share, with equally many examples. So
        # the mean over the processes is that of the batch: DDP's of gradients, ours of losses. Only what is
        # random within a step differs. (All run a sharded base model equally often, also in validation.)
        drawn = data.draw(run.tasks, step, args, run.tokenizer)[run.rank :: run.count]
        torch.manual_seed(random.Random(f"{args.seed} {step} {run.rank}").getrandbits(63))
        optimizer.zero_grad()
        losses = recon_step(run, net, drawn) if args.mode == "recon" else sft_step(run, net, drawn)
        grad_norm = nn.utils.clip_grad_norm_(list(run.net.parameters()), 1.0).item()
        values = torch.stack(list(losses.values()))
        if run.count > 1:
            dist.all_reduce(values)
        values = (values / run.count).tolist()
        loss = sum(values)
        first_loss = first_loss or loss
        if not math.isfinite(loss + grad_norm) or loss > 100 * max(1.0, first_loss):
            message = f"the loss is {loss:.3g} in step {step + 1}, the gradient's length {grad_norm:.3g}"
            raise UserError(f"{message}; start again with a lower --lr")
        optimizer.step()
        step += 1

        row = {"step": step, "loss": loss} | {f"loss_{name}": value for name, value in zip(losses, values)}
        row |= {"lr": lr, "grad_norm": grad_norm}
        is_due = step % args.val_every == 0 or step == args.max_steps
        if is_due and run.val_tasks and (is_first or args.shard):
            measured = validate(run)
            row |= measured
        if is_first:
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            # the best weights first, then the state: what a kill between them loses is computed again
            if row.get("val_loss", math.nan) <= state["best"]:  # (nan: no validation)
                state |= {"best": row["val_loss"], "best_step": step}
                save(run, folder)
            if is_due or time.monotonic() - saved_at > 600:
                save_state(run, folder, optimizer, state | {"step": step})
                saved_at = time.monotonic()
            bar.set_postfix({"loss": loss} | measured, refresh=False)
            bar.update()
    bar.close()
    if is_first:
        if not state["best_step"]:
            save(run, folder)
        (folder / "state.pt").unlink(missing_ok=True)
        print(f"{folder}/ holds the weights of step {state['best_step'] or step}")


def save(run: Run, folder: Path) -> None:
    """Write what was trained: a hypernetwork, one adapter folder per task, or the multi-task adapter."""
    if run.args.mode != "lora":
        hypernet.save_hypernet(run.net, folder)
    elif run.args.multi_task:
        lora.save_adapter(folder, run.net(0), run.net.config)
    else:
        for i, task in enumerate(run.tasks):
            lora.save_adapter(folder / task.name, run.net(i), run.net.config)
            text = task.definition or task.descriptions[0]
            write_file(folder / task.name / "definition.txt", text + "\n")


def save_state(run: Run, folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write what --resume needs. Randomness follows from the step."""
    state |= {"count": run.count, "net": run.net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "state.pt.tmp")
    os.replace(folder / "state.pt.tmp", folder / "state.pt")


def load_state(run: Run, folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Put a saved state into the network and the optimizer, and forget the metrics of later steps."""
    if not (folder / "state.pt").exists():
        raise UserError(f"--resume: {folder} holds no interrupted run")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if state["step"] > run.args.max_steps:
        raise UserError(f"--max_steps {run.args.max_steps}: this run has done {state['step']} steps")
    if state["count"] != run.count:
        message = f"--resume: this run has {state['count']} processes, not {run.count}"
        raise UserError(f"{message}: its dropout would be another")
    run.net.load_state_dict(state.pop("net"))
    optimizer.load_state_dict(state.pop("optimizer"))
    if run.rank == 0:
        rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_file(folder / "metrics.jsonl", "".join(rows[: state["step"]]))
    return state


# -------------------- What is trained --------------------


def choose_tasks(args) -> tuple[list[data.Task], list[data.Task]]:
    """(tasks to train on, tasks to validate on). UserError if they do not suit the run."""
    splits = load_tasks(args.tasks)
    say(summary(args.tasks, splits))
    tasks, val_tasks = data.pick(splits, args.split, args.n_tasks), splits.get("val", [])
    if args.kind != "lora":
        reads = hypernet.find_arch(args.arch).reads
        if tasks[0].is_document != (reads == "documents"):
            message = f"--tasks {args.tasks} cannot be used with --arch {args.arch}, which reads {reads}"
            raise UserError(message + (" (see config/d2l.args)" if reads == "documents" else ""))
    elif not args.multi_task:
        val_tasks = []  # each LoRA is trained for its own task alone
        if len({task.name for task in tasks}) < len(tasks):
            raise UserError(f"--tasks {args.tasks}: tasks of equal names cannot have an adapter folder each")
    if args.instruction and tasks[0].is_document:
        raise UserError("--instruction would put the document itself into the prompt")
    return tasks, [task for task in val_tasks if task.test]


def prepare(args, device: torch.device, rank: int, count: int) -> Run:
    """For SFT and ordinary LoRAs: load the tasks and the frozen models, and make what is trained."""
    tasks, val_tasks = choose_tasks(args)
    names, dtype = args.target_modules.split(","), getattr(torch, args.dtype)
    if args.shard:
        base, tokenizer = model.load_sharded(args.base_model, device, dtype, names, args.dropout)
    else:
        base, tokenizer = model.load_base(args.base_model, device, dtype)
        lora.inject(base, names, args.dropout)
    lora.set_dropout(base, True)
    if args.gradient_checkpointing:
        model.recompute_layers(base)
    if device.type == "cpu":
        base.set_attn_implementation("eager")  # its backward pass is faster there
    tasks = data.check(tasks, val_tasks, args, tokenizer)
    if args.short_first:
        tasks.sort(key=lambda task: len(task.descriptions[0]))
    settings = dict(r=args.rank, alpha=args.alpha, instruction=args.instruction)
    config = lora.config_for(base, model.full_name(args.base_model), **settings)
    if args.mode == "lora":
        net = lora.LoRABank(config, 1 if args.multi_task else len(tasks)).to(device)
    else:
        net = make_hypernet(args, config, base, tokenizer, device)
    return Run(args, device, rank, count, tasks, val_tasks, base, tokenizer, net)


def prepare_recon(args, device: torch.device, rank: int, count: int) -> Run:
    """For reconstruction: oracles, and a base model of shapes only, unless it is the text encoder."""
    tasks, _ = choose_tasks(args)
    with_oracle = [task for task in tasks if Path(args.oracles, task.name).is_dir()]
    if not with_oracle or not args.oracles:
        which = f"the {args.split} tasks of {args.tasks}"
        raise UserError(f"--oracles {args.oracles or 'DIR is needed: it'} holds no adapters of {which}")
    say(f"oracles of {len(with_oracle)} of {len(tasks)} tasks")
    oracles, config = lora.load_adapters([Path(args.oracles, task.name) for task in with_oracle], device)
    if args.encoder == "base":
        base, tokenizer = model.load_base(args.base_model, device, getattr(torch, args.dtype))
    else:
        base, tokenizer = model.load_shapes(args.base_model), None
    model.check_base(args.base_model, lora.base_shape(base.config), config.base_model, [])
    lora.inject(base, list(config.targets))
    lora.check_fits(base, oracles)
    settings = dict(r=config.r, alpha=config.alpha, rslora=config.rslora, instruction=config.instruction)
    config = lora.config_for(base, model.full_name(args.base_model), **settings)
    mean, std = lora.statistics(oracles)
    net = make_hypernet(args, config, base, tokenizer, device, mean, std)
    return Run(args, device, rank, count, with_oracle, [], base, None, net, oracles, std)


def make_hypernet(args, lora_config, base, tokenizer, device, *statistics: Adapter) -> nn.Module:
    """The network of --arch for adapters of this config, connected with what it reads with.

    `statistics` are mean and standard deviation of the oracles, for reconstruction.
    """
    net_class, settings = hypernet.find_arch(args.arch), vars(lora_config).copy()
    for field in fields(net_class.config_class):
        if field.name not in settings and field.name in used_by and is_used(args, field.name):
            settings[field.name] = getattr(args, field.name)  # a field beyond those, with the name of a flag
    config = net_class.config_class(**settings)
    config.measure(base)
    net = net_class(config)
    net.recompute = args.gradient_checkpointing
    if statistics:
        net.start_at(*statistics)
    else:
        net.start_as_lora()
    if args.init_from and not args.resume:
        hypernet.copy_weights(args.init_from, net)
    net.to(device)  # moved last: random numbers of a GPU would be others
    net.connect(base, tokenizer)
    return net


# -------------------- The run --------------------


def main() -> None:
    args = parse_args(sys.argv[1:])
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, folder = model.pick_device(args.device), Path(args.out_dir)
    if "RANK" in os.environ:  # torchrun
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device_id)
    elif args.shard:
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=N ...")
    if rank == 0 and not args.resume and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out_dir {folder} is in use; choose another, or --resume an interrupted run")
    torch.manual_seed(args.seed)
    run = (prepare_recon if args.mode == "recon" else prepare)(args, device, rank, count)
    n_drawn = min(args.tasks_per_batch or len(run.tasks), len(run.tasks))
    if n_drawn % count:
        message = f"a step has {n_drawn} tasks, which is no multiple of {count} processes"
        raise UserError(f"{message}: choose --tasks_per_batch or --n_tasks")
    if n_drawn < args.tasks_per_batch:
        say(f"a step has all {n_drawn} tasks, fewer than --tasks_per_batch {args.tasks_per_batch}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    n_parameters = sum(p.numel() for p in run.net.parameters() if p.requires_grad)
    where = f"on {count} x {where}, in {args.dtype}, into {folder}/"
    say(f"{args.mode}: {n_parameters:,} parameters, {where}")
    try:
        train(run, folder)
    except KeyboardInterrupt:
        if (folder / "state.pt").exists():
            say(f"\nto continue from the last state, as it was started: train.py --resume --out_dir {folder}")
        raise
    if "RANK" in os.environ:
        gc.collect()  # DDP's reducer must not be the last to hold the group: freeing it may hang
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
