"""Train adapters, or a hypernetwork that writes them.

    python train.py                                                     # SFT in the tiny world, one process
    torchrun --nproc_per_node=2 train.py                                # the same batches on two processes
    python train.py @config/mistral-7b.args --out_dir out/mistral       # a file of flags

--mode says what is trained, and by which loss:

    lora       ordinary LoRAs by the task loss: one per task (the oracles), or one for all (--multi_task)
    recon      a hypernetwork, to write the same adapters as the oracles (paper, section 3.1)
    sft        a hypernetwork, by the task loss through the frozen base model (paper, section 3.2)

@FILEs hold flags, see config/. If a flag occurs twice, the last one counts. --mode and --arch decide which
flags there are: `train.py --mode recon --help` shows those of a reconstruction.
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
from dataclasses import dataclass
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
from support import UserError, at_least, command, make_parser, say, write_file
from tasks import SOURCES, load_tasks, summary

# -------------------- Settings --------------------

SETTINGS = {  # {group: [(name, default, least value of a number, meaning, *choices)]}
    "all runs": [
        ("mode", "sft", None, "what is trained, see above", "lora", "recon", "sft"),
        ("base_model", "tiny", None, f"{', '.join(model.PRESETS)}, a hub id or a folder"),
        ("tasks", "tiny", None, f"{', '.join(SOURCES)}, or a folder of task files"),
        ("split", "train", None, "tasks to train on", "train", "val", "test"),
        ("n_tasks", 0, 0, "use only so many of these tasks (0: all)"),
        ("max_steps", 600, 1, "training steps"),
        ("tasks_per_batch", 128, 0, "tasks of a step, over all processes (0: all)"),
        ("lr", 2e-3, 0, "highest learning rate"),
        ("warmup", 0.1, 0, "fraction of the steps in which the learning rate rises"),
        ("schedule", "linear", None, "decay of lr; late: in the last third", "linear", "late", "cosine"),
        ("weight_decay", 1e-2, 0, "weight decay of AdamW, only on matrices (and not on latents and scalers)"),
        ("seed", 0, 0, "of the run's randomness"),
        ("device", "auto", None, "cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one"),
        ("dtype", "auto", None, "auto: bfloat16 on a GPU, not for recon", "auto", "float32", "bfloat16"),
        ("val_every", 250, 1, "steps between two validations, and between two saved states"),
        ("out_dir", "out/run", None, "a new folder"),
        ("resume", False, None, "continue the interrupted run in --out_dir"),
    ],
    "base model": [  # the loss goes through it
        ("target_modules", "q_proj,v_proj", None, "linear layers, by the ends of their paths"),
        ("rank", 8, 1, "rank of an adapter; of each chunk of a document"),
        ("alpha", 16.0, 1e-3, "scaling is alpha / sqrt(rank)"),
        ("examples_per_task", 1, 1, "examples of each task of a step"),
        ("micro_batch", 64, 1, "examples at once, on each process"),
        ("max_tokens", 512, 1, "maximum tokens of an example; longer ones are not drawn"),
        ("neftune_alpha", 0.0, 0, "noise on the input embeddings (NEFTune)"),
        ("l1", 0.0, 0, "weight of the mean absolute value of A and B"),
        ("l2", 1e-3, 0, "weight of the mean square of A and B"),
        ("gradient_checkpointing", False, None, "compute activations twice, to save memory"),
    ],
    "documents": [
        ("short_first", False, None, "short documents first; all documents after half of the steps"),
        ("distill", 0, 0, "learn the base model's top k tokens, with the document in its prompt (0: no)"),
    ],
    "no documents": [
        ("instruction", False, None, "put the definition before the input"),
        ("label_smoothing", 0.0, 0, "label smoothing"),
        ("shard", False, None, "shard the base model over the processes"),
    ],
    "lora": [("multi_task", False, None, "one adapter for all tasks")],
    "recon": [
        ("oracles", "", None, "the folder that --mode lora wrote"),
        ("recon_loss", "z_score", None, "compares A and B over their std, or B A", "z_score", "delta_w"),
    ],
    "hypernetwork": [
        ("arch", "t2l", None, "t2l (Text-to-LoRA), d2l (Doc-to-LoRA), or another file of nets/"),
        ("init_from", "", None, "start from the weights of this hypernetwork"),
    ],
    "dropout": [("dropout", 0.1, 0, "on the input of adapters, and in the network if it has dropout")],
}
MAY_CHANGE = {  # with --resume: length, learning rate, how the step is computed, where, and when it is saved
    *("max_steps", "lr", "schedule", "micro_batch", "dtype", "gradient_checkpointing", "shard", "device"),
    *("val_every", "out_dir", "resume"),
}


def groups_of(mode: str, net_class) -> set[str]:
    """The groups of settings that a run of this mode has, with a network of this class."""
    reads = "documents" if net_class.reads == "documents" else "no documents"
    has_dropout = hasattr(net_class.config_class, "dropout")
    return {
        "sft": {"all runs", "base model", reads, "hypernetwork", "dropout"},
        "lora": {"all runs", "base model", "no documents", "lora", "dropout"},
        "recon": {"all runs", "recon", "hypernetwork", "dropout" if has_dropout else ""},
    }[mode]


def new_parser(**settings) -> argparse.ArgumentParser:
    """A parser that reads @FILEs: a flag and its value on a line, "#" begins a comment."""
    parser = make_parser(__doc__, fromfile_prefix_chars="@", **settings)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    return parser


def add_flag(parser: argparse.ArgumentParser, name: str, default, least, meaning: str, *choices) -> None:
    """Add the flag of a setting. Its type is that of the default."""
    options = {"type": str, "choices": choices or None}
    if isinstance(default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    elif least is not None:
        options = {"type": at_least(least, type(default))}
    parser.add_argument(f"--{name}", default=default, help=f"{meaning} (default: {default})", **options)


def parse_args(words: list[str]) -> tuple[argparse.Namespace, str]:
    """(the settings of a run, the same as a file of flags). A resumed run reads its train.args first.

    Settings that the run does not use have their defaults. argparse refuses their flags.
    """
    # a first look: which groups of settings the run has
    looker = new_parser(add_help=False)
    for setting in SETTINGS["all runs"] + SETTINGS["hypernetwork"]:
        add_flag(looker, *setting)
    seen, _ = looker.parse_known_args(words)
    recorded = [f"@{seen.out_dir}/train.args"] if seen.resume else []
    seen, _ = looker.parse_known_args(recorded + words)
    net_class = hypernet.find_arch(seen.arch)
    used, names = groups_of(seen.mode, net_class), []

    parser = new_parser(usage="train.py [@FILE ...] [--FLAG VALUE ...]")
    for group, settings in SETTINGS.items():
        if group == "hypernetwork":
            settings = settings + hypernet.settings_of(net_class.config_class)
        for name, default, *more in settings:
            if group in used:
                add_flag(parser, name, default, *more)
                names += [name] if name != "resume" else []
            else:
                parser.set_defaults(**{name: default})
    args = parser.parse_args(recorded + words)

    if recorded:
        for name, old in vars(parser.parse_args(recorded)).items():
            new = getattr(args, name)
            if new != old and name not in MAY_CHANGE:
                raise UserError(f"--resume: this run has --{name} {old}, not {new}")
    if args.warmup > 1:
        raise UserError("--warmup is a fraction of the steps")
    if args.mode != "lora" and args.mode not in net_class.modes:
        raise UserError(f"--arch {args.arch} is trained with --mode {' or '.join(net_class.modes)}")
    if getattr(args, "encoder", "") == "preset":
        encoders = {base.lower(): encoder for base, encoder in model.PRESETS.values()}
        args.encoder = encoders.get(model.resolve(args.base_model).lower(), "base")
    if args.dtype == "auto":
        dtype = torch.float32 if args.mode == "recon" else model.default_dtype(model.pick_device(args.device))
        args.dtype = str(dtype).removeprefix("torch.")
    if args.gradient_checkpointing and args.dropout and args.device == "mps":
        raise UserError("--gradient_checkpointing on mps needs --dropout 0: another mask would be drawn")
    if args.shard and getattr(args, "encoder", "") == "base" and args.mode == "sft":
        raise UserError("--shard needs a text encoder beside the sharded base model: --encoder ID or DIR")
    return args, as_file(args, names)


def as_file(args: argparse.Namespace, names: list[str]) -> str:
    """These settings as a file of flags."""
    lines = []
    for name in names:
        value = getattr(args, name)
        if isinstance(value, bool):
            lines.append(f"--{name}" if value else f"--no-{name}")
        else:
            lines.append(f"--{name} {shlex.quote(str(value))}")
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
    """Mean of measure(A) plus mean of measure(B), summed over the modules (torch.abs or torch.square).

    Every adapter of the batch counts equally. Zero padding along the rank is excluded (Doc-to-LoRA).
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
    """Everything a step needs. Process 0 writes files and prints."""

    args: argparse.Namespace
    device: torch.device
    process: int  # its number
    n_processes: int
    tasks: list[data.Task]
    pool: list[int]  # indices of tasks, repeated by weight; a step draws from it
    exam: list[data.Drawn]  # to validate: tasks with a description and examples
    base: nn.Module  # the frozen model; for recon without weights, unless it is the text encoder
    tokenizer: Any  # None for recon, which uses no examples
    net: nn.Module  # what is trained: it writes adapters
    oracles: Adapter | None = None  # recon: the adapters to imitate, one per task
    std: Adapter | None = None  # recon: their standard deviation

    def inputs(self, drawn: list[data.Drawn]) -> list:
        """What `net` writes adapters from: the texts of tasks, or the numbers of ordinary LoRAs."""
        if self.net.reads == "numbers":
            return [item.index for item in drawn]
        return [item.description for item in drawn]

    def autocast(self):
        """Compute in bfloat16 if --dtype says so; the weights of `net` stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16")


def micro_batches(drawn: list[data.Drawn], adapters: Adapter, n: int):
    """The examples of tasks, n of similar length at a time: (their ids, an adapter for each)."""
    examples = [(place, ids) for place, item in enumerate(drawn) for ids in item.examples]
    examples.sort(key=lambda example: example[1].n_tokens)
    for i in range(0, len(examples), n):
        batch = examples[i : i + n]
        yield [ids for _, ids in batch], lora.select(adapters, [place for place, _ in batch])


def sft_step(run: Run, net: nn.Module, drawn: list[data.Drawn]) -> dict[str, Tensor]:
    """One training step through the frozen base model, of a hypernetwork or of ordinary LoRAs (`LoRABank`).

    The adapters are the interface between the two networks: the step goes forward through the hypernetwork,
    forward and backward through the base model, then backward through the hypernetwork. It leaves gradients
    in `net` and returns the terms of the loss. `net` is run.net, or with several processes its DDP version.
    """
    args, scaling = run.args, run.net.config.scaling

    # 1. One forward pass of the hypernetwork writes all adapters of the step.
    with run.autocast():
        written = net(run.inputs(drawn))  # A [tasks, L, r, in], B [tasks, L, out, r]

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
    #    the base model's activations, so only those of one micro-batch are in memory.
    n_examples = sum(len(item.examples) for item in drawn)
    for examples, adapters in micro_batches(drawn, leaves, args.micro_batch):  # A [micro_batch, L, r, in]
        teacher = None
        if args.distill:  # the logits of the base model itself, with the document in its prompt
            with torch.no_grad(), run.autocast():
                prompts = [(ids.teacher_prompt, ids.answer) for ids in examples]
                teacher, _, _ = model.answer_logits(run.base, prompts)  # [tokens, vocabulary]
        # (with --gradient_checkpointing the backward pass runs the layers again, with their adapters)
        with lora.use(run.base, adapters, scaling):
            loss = task_loss(run, examples, teacher) * len(examples) / n_examples
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


def task_loss(run: Run, examples: list[data.Ids], teacher: Tensor | None) -> Tensor:
    """The loss of examples that go through the base model together, with the adapters in use."""
    pairs = [(ids.prompt, ids.answer) for ids in examples]
    with run.autocast():
        logits, example_index, labels = model.answer_logits(run.base, pairs, run.args.neftune_alpha)
    if teacher is not None:
        return distill_loss(logits, example_index, teacher, run.args.distill)
    return answer_loss(logits, example_index, labels, run.args.label_smoothing)


def recon_step(run: Run, net: nn.Module, drawn: list[data.Drawn]) -> dict[str, Tensor]:
    """One step of reconstruction. Like sft_step, it leaves gradients in `net`."""
    with run.autocast():
        written = net(run.inputs(drawn))
    oracles = lora.select(run.oracles, [item.index for item in drawn])
    loss = recon_loss(run.args.recon_loss, written, oracles, run.std)
    loss.backward()
    return {"recon": loss.detach()}


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Cross-entropy and accuracy on the validation tasks, a few tasks at a time.

    An answer is right if every token is the most likely one: greedy decoding would give the same.
    """
    n_examples, loss, n_right = sum(len(item.examples) for item in run.exam), 0.0, 0
    run.net.eval()
    lora.set_dropout(run.base, False)
    at_once = max(1, run.args.micro_batch // data.N_VALIDATE)
    for i in range(0, len(run.exam), at_once):
        drawn = run.exam[i : i + at_once]
        with run.autocast():
            written = run.net(run.inputs(drawn))
            for examples, adapters in micro_batches(drawn, written, run.args.micro_batch):
                pairs = [(ids.prompt, ids.answer) for ids in examples]
                with lora.use(run.base, adapters, run.net.config.scaling):
                    logits, example_index, labels = model.answer_logits(run.base, pairs)
                loss += answer_loss(logits, example_index, labels).item() * len(examples)
                wrong_examples = example_index[logits.argmax(-1) != labels].unique()
                n_right += len(examples) - len(wrong_examples)
    run.net.train()
    lora.set_dropout(run.base, True)
    return {"val_loss": loss / n_examples, "val_accuracy": n_right / n_examples}


# -------------------- The loop --------------------


def make_optimizer(net: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW. Only matrices have weight decay, without those that the network excludes."""
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


def train(run: Run, folder: Path, settings: str) -> None:
    """Train until --max_steps. Keep the weights with the lowest validation loss; the last without it."""
    args, is_first, saved_at = run.args, run.process == 0, time.monotonic()
    optimizer = make_optimizer(run.net, args)
    state = {"step": 0, "best": math.inf, "best_step": 0}
    if args.resume:
        state = load_state(run, folder, optimizer)
    if is_first:
        write_file(folder / "train.args", settings)
        if not args.resume:
            write_file(folder / "metrics.jsonl", "")
    net = DistributedDataParallel(run.net) if run.n_processes > 1 else run.net
    step, measured = state["step"], {}
    bar = tqdm(total=args.max_steps, initial=step, disable=not is_first, desc=args.mode)
    while step < args.max_steps:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        pool = run.pool
        if args.short_first:  # tasks are sorted; start with the shortest sixth, use all after half the steps
            fraction = min(1, 1 / 6 + 5 / 3 * step / args.max_steps)
            pool = pool[: math.ceil(len(pool) * fraction)]
        # All processes draw the same tasks. Each takes an equal share, with equally many examples. So the
        # mean over processes is the mean over the batch. DDP averages gradients, we average losses. Only
        # dropout and noise differ. (All processes run a sharded base model equally often, also to validate.)
        drawn = data.draw(run.tasks, pool, step, args, run.tokenizer)[run.process :: run.n_processes]
        torch.manual_seed(random.Random(f"{args.seed} {step} {run.process}").getrandbits(63))
        optimizer.zero_grad()
        losses = recon_step(run, net, drawn) if args.mode == "recon" else sft_step(run, net, drawn)
        grad_norm = nn.utils.clip_grad_norm_(list(run.net.parameters()), 1.0).item()
        values = torch.stack(list(losses.values()))
        if run.n_processes > 1:
            dist.all_reduce(values)
        values = (values / run.n_processes).tolist()
        loss = sum(values)
        if not math.isfinite(loss + grad_norm):
            message = f"the loss is {loss:.3g} in step {step + 1}, the gradient's length {grad_norm:.3g}"
            raise UserError(f"{message}; start again with a lower --lr")
        optimizer.step()
        step += 1

        row = {"step": step, "loss": loss} | {f"loss_{name}": value for name, value in zip(losses, values)}
        row |= {"lr": lr, "grad_norm": grad_norm}
        is_due = step % args.val_every == 0 or step == args.max_steps
        if is_due and run.exam and (is_first or args.shard):
            measured = validate(run)
            row |= measured
        if is_first:
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            # save the best weights before the state: after a kill in between, --resume repeats these steps
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
    if run.net.reads != "numbers":
        hypernet.save_hypernet(run.net, folder)
    elif run.args.multi_task:
        lora.save_adapter(folder, run.net([0]), run.net.config)
    else:
        for i, task in enumerate(run.tasks):
            lora.save_adapter(folder / task.name, run.net([i]), run.net.config)
            text = task.definition or task.descriptions[0]
            write_file(folder / task.name / "definition.txt", text + "\n")


def save_state(run: Run, folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Save the state for --resume. Random numbers follow from the seed, the step and the process."""
    networks = {"net": run.net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | networks | {"n_processes": run.n_processes}, folder / "state.pt.tmp")
    os.replace(folder / "state.pt.tmp", folder / "state.pt")


def load_state(run: Run, folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Put a saved state into the network and the optimizer, and forget the metrics of later steps."""
    if not (folder / "state.pt").exists():
        raise UserError(f"--resume: {folder} holds no interrupted run with a saved state")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if state["step"] > run.args.max_steps:
        raise UserError(f"--max_steps {run.args.max_steps}: this run has done {state['step']} steps")
    if state["n_processes"] != run.n_processes:
        message = f"--resume: this run has {state['n_processes']} processes, not {run.n_processes}"
        raise UserError(f"{message}: its dropout would be another")
    run.net.load_state_dict(state.pop("net"))
    optimizer.load_state_dict(state.pop("optimizer"))
    if run.process == 0:
        rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_file(folder / "metrics.jsonl", "".join(rows[: state["step"]]))
    return state


# -------------------- What is trained --------------------


def tasks_to_learn(args) -> tuple[list[data.Task], list[data.Task]]:
    """(tasks to train on, tasks to validate on). UserError if they do not suit the run."""
    splits = load_tasks(args.tasks)
    say(summary(args.tasks, splits))
    tasks, val_tasks = data.pick(splits, args.split, args.n_tasks), splits.get("val", [])
    if args.mode != "lora":
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
    return tasks, val_tasks


def prepare(args, device: torch.device, process: int, n_processes: int) -> Run:
    """Load the tasks and the frozen models, and make what is trained."""
    tasks, val_tasks = tasks_to_learn(args)
    exam, oracles, std = [], None, None
    if args.mode == "recon":
        tasks, oracles, config, base, tokenizer = load_oracles(args, tasks, device)
        mean, std = lora.statistics(oracles)
        net = make_hypernet(args, config, base, tokenizer, device, mean, std)
        tokenizer = None  # no examples are read
    else:
        base, tokenizer = load_base(args, device)
        tasks = data.with_short_examples(tasks, val_tasks, args, tokenizer)
        exam = data.exam_of(val_tasks, args, tokenizer)
        if args.short_first:
            tasks.sort(key=lambda task: len(task.descriptions[0]))
        settings = dict(r=args.rank, alpha=args.alpha, instruction=args.instruction)
        config = lora.config_for(base, model.resolve(args.base_model), **settings)
        if args.mode == "lora":
            net = lora.LoRABank(config, 1 if args.multi_task else len(tasks)).to(device)
        else:
            net = make_hypernet(args, config, base, tokenizer, device)
    pool = pool_of(tasks, args, n_processes)
    return Run(args, device, process, n_processes, tasks, pool, exam, base, tokenizer, net, oracles, std)


def pool_of(tasks: list[data.Task], args, n_processes: int) -> list[int]:
    """The tasks from which a step draws. Sets --tasks_per_batch to all of them if it is 0 or larger."""
    if args.tasks_per_batch > len(tasks):
        say(f"a step has all {len(tasks)} tasks, fewer than --tasks_per_batch {args.tasks_per_batch}")
    n = args.tasks_per_batch = min(args.tasks_per_batch or len(tasks), len(tasks))
    if n % n_processes:
        message = f"a step has {n} tasks, which is no multiple of {n_processes} processes"
        raise UserError(f"{message}: choose --tasks_per_batch or --n_tasks")
    pool = []
    for i, task in enumerate(tasks):
        pool += [i] * (task.weight if n < len(tasks) else 1)
    return pool


def load_base(args, device):
    """(the frozen base model with LoRA layers, its tokenizer), as --dropout, --shard, ... say."""
    name, dtype = model.resolve(args.base_model), getattr(torch, args.dtype)
    targets = args.target_modules.split(",")
    if args.shard:
        base, tokenizer = model.load_sharded(name, device, dtype, targets, args.dropout)
    else:
        base, tokenizer = model.load_base(name, device, dtype)
        lora.inject(base, targets, args.dropout)
    lora.set_dropout(base, True)
    if args.gradient_checkpointing:
        model.recompute_layers(base)
    if device.type == "cpu":
        base.set_attn_implementation("eager")  # its backward pass is faster there
    window = model.window_of(base)
    if args.max_tokens > window:
        raise UserError(f"--max_tokens {args.max_tokens} is more than the base model's window of {window}")
    return base, tokenizer


def load_oracles(args, tasks: list[data.Task], device):
    """(the tasks with an oracle, all oracles as a batch, the config of adapters, base model, tokenizer).

    No example is read. So the base model has only shapes and the tokenizer is None, unless the base model is
    the text encoder.
    """
    with_oracle = [task for task in tasks if Path(args.oracles, task.name).is_dir()]
    if not with_oracle or not args.oracles:
        which = f"the {args.split} tasks of {args.tasks}"
        raise UserError(f"--oracles {args.oracles or 'DIR is needed: it'} holds no adapters of {which}")
    say(f"oracles of {len(with_oracle)} of {len(tasks)} tasks")
    oracles, config = lora.load_adapters([Path(args.oracles, task.name) for task in with_oracle], device)
    name = model.resolve(args.base_model)
    if getattr(args, "encoder", "") == "base":
        base, tokenizer = model.load_base(name, device, getattr(torch, args.dtype))
    else:
        base, tokenizer = model.load_shapes(name), None
    model.check_base(base, config)
    lora.inject(base, list(config.targets))
    lora.check_fits(base, oracles)
    settings = dict(r=config.r, alpha=config.alpha, rslora=config.rslora, instruction=config.instruction)
    return with_oracle, oracles, lora.config_for(base, name, **settings), base, tokenizer


def make_hypernet(args, lora_config, base, tokenizer, device, mean=None, std=None) -> nn.Module:
    """The network of --arch for adapters of this config, connected to its text encoder or the base model.

    Reconstruction passes mean and standard deviation of the oracles.
    """
    net_class, settings = hypernet.find_arch(args.arch), vars(lora_config).copy()
    for name, *_ in hypernet.settings_of(net_class.config_class):
        settings[name] = getattr(args, name)
    config = net_class.config_class(**settings)
    if hasattr(config, "dropout"):
        config.dropout = args.dropout
    if mean:
        config.recon_loss = args.recon_loss
    config.measure(base)
    net = net_class(config)
    net.recompute = args.gradient_checkpointing
    if mean:
        net.start_at(mean, std)
    else:
        net.start_as_lora()
    if args.init_from and not args.resume:
        hypernet.copy_weights(args.init_from, net, base)
    net.to(device)  # moved last: random numbers of a GPU would be others
    net.connect(base, tokenizer)
    return net


# -------------------- The run --------------------

LEFT_OVER = {"train.args", "metrics.jsonl"}  # files of a run without a saved state; it may start again


def main() -> None:
    args, settings = parse_args(sys.argv[1:])
    device, folder = model.pick_device(args.device), Path(args.out_dir)
    process, n_processes = model.join_processes(device)
    if args.shard and "RANK" not in os.environ:
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=N ...")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if process == 0 and not args.resume and found - LEFT_OVER:
        raise UserError(f"--out_dir {folder} is in use; choose another, or --resume an interrupted run")
    torch.manual_seed(args.seed)
    run = prepare(args, device, process, n_processes)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    n_parameters = sum(p.numel() for p in run.net.parameters() if p.requires_grad)
    where = f"on {n_processes} x {where}, in {args.dtype}, into {folder}/"
    say(f"{args.mode}: {n_parameters:,} parameters, {where}")
    try:
        train(run, folder, settings)
    except KeyboardInterrupt:
        if (folder / "state.pt").exists():
            resume = f"train.py --resume --out_dir {shlex.quote(str(folder))}"
            say(f"\nto continue from the last state, as it was started: {resume}")
        raise
    if dist.is_initialized():
        gc.collect()  # DDP's reducer must not be the last to hold the group: freeing it may hang
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
