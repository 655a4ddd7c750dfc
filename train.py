"""Train adapters, or a hypernetwork that writes them.

    python train.py                                                     # SFT in the tiny world, one process
    torchrun --nproc_per_node=2 train.py                                # the same batches on two processes
    python train.py @config/mistral-7b.args --out_dir out/mistral       # a file of flags

--mode says what is trained, and by which loss:

    lora       ordinary LoRAs by the task loss: one per task (the oracles), or one for all (--multi_task)
    recon      a hypernetwork, to write the same adapters as the oracles (paper, section 3.1)
    sft        a hypernetwork, by the task loss through the frozen base model (paper, section 3.2)

@FILEs hold flags, see config/. If a flag occurs twice, the last one counts. A flag that the run does not use
is refused.
"""

import argparse
import fcntl
import gc
import json
import math
import os
import random
import shlex
import sys
import time
from contextlib import contextmanager, nullcontext
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
from nets.bank import LoRABank
from support import UserError, as_file, command, say, settings_parser, write_file
from tasks import SOURCES, load_tasks, summary

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


def weight_size(adapter: Adapter, norm) -> Tensor:
    """Mean of norm(A) plus mean of norm(B), summed over the modules (norm: torch.abs or torch.square).

    Every adapter of the batch counts equally. Zero padding along the rank is excluded (Doc-to-LoRA).
    """
    total = 0.0
    for A, B in adapter.values():  # [n, L, R, in], [n, L, out, R]
        not_padding = A.any(-1).any(1)  # [n, R]: in any layer
        L, ranks = A.shape[1], not_padding.sum(-1).clamp(min=1)  # [n]
        mean_A = norm(A).sum((1, 2, 3)) / (L * ranks * A.shape[-1])  # [n]
        mean_B = norm(B).sum((1, 2, 3)) / (L * ranks * B.shape[-2])
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
    process: int  # the number of this process, of n_processes
    n_processes: int
    tasks: list[data.Task]
    pool: list[int]  # indices of tasks, repeated by weight; a step draws from it
    validation: list[data.Drawn]  # tasks with a description and examples; [] for recon and single LoRAs
    base: nn.Module  # the frozen model; for recon without weights, unless it is the text encoder
    tokenizer: Any
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
    for name, weight, norm in (("l1", args.l1, torch.abs), ("l2", args.l2, torch.square)):
        if weight:
            penalty = weight * weight_size(leaves, norm)
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
    n_examples, loss, n_right = sum(len(item.examples) for item in run.validation), 0.0, 0
    run.net.eval()
    lora.set_dropout(run.base, False)
    at_once = max(1, run.args.micro_batch // data.N_VALIDATE)
    for i in range(0, len(run.validation), at_once):
        drawn = run.validation[i : i + at_once]
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
    step, validated = state["step"], {}
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
        if is_due and run.validation and (is_first or args.shard):
            validated = validate(run)
            row |= validated
        if is_first:
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            # save the best weights before the state: after a kill in between, --resume repeats these steps
            if "val_loss" in row and row["val_loss"] <= state["best"]:
                state |= {"best": row["val_loss"], "best_step": step}
                save(run, folder)
            if is_due or time.monotonic() - saved_at > 600:
                save_state(run, folder, optimizer, state | {"step": step})
                saved_at = time.monotonic()
            bar.set_postfix({"loss": loss} | validated, refresh=False)
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
        lora.save_adapter(folder, run.net([0]), run.net.config)
    else:
        for i, task in enumerate(run.tasks):
            lora.save_adapter(folder / task.name, run.net([i]), run.net.config)
            text = task.definition or task.descriptions[0]
            write_file(folder / task.name / "definition.txt", text + "\n")


def save_state(run: Run, folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Save the state for --resume. Random numbers follow from the seed, the step and the process."""
    state = state | {"net": run.net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"n_processes": run.n_processes}, folder / "state.pt.tmp")
    os.replace(folder / "state.pt.tmp", folder / "state.pt")


def load_state(run: Run, folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Put a saved state into the network and the optimizer, and forget the metrics of later steps."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if state["step"] > run.args.max_steps:
        raise UserError(f"--max_steps {run.args.max_steps}: this run has done {state['step']} steps")
    if state["n_processes"] != run.n_processes:  # their dropout differs
        raise UserError(f"--resume: this run has {state['n_processes']} processes, not {run.n_processes}")
    run.net.load_state_dict(state.pop("net"))
    optimizer.load_state_dict(state.pop("optimizer"))
    if run.process == 0:
        rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_file(folder / "metrics.jsonl", "".join(rows[: state["step"]]))
    return state


# -------------------- Preparation --------------------


def prepare(args, device: torch.device, process: int, n_processes: int) -> Run:
    """Load the tasks and the frozen models, and make what is trained."""
    # the tasks
    splits, reads = load_tasks(args.tasks), hypernet.find_arch(args.arch).reads
    say(summary(args.tasks, splits))
    tasks, val_tasks = data.pick(splits, args.split, args.n_tasks), splits.get("val", [])
    if args.mode != "lora" and tasks[0].is_document != (reads == "documents"):
        raise UserError(f"--tasks {args.tasks} cannot be used with --arch {args.arch}, which reads {reads}")
    if args.instruction and tasks[0].is_document:
        raise UserError("--instruction would put the document itself into the prompt")
    if args.mode == "recon":  # only tasks that have an oracle
        n_tasks = len(tasks)
        tasks = [task for task in tasks if args.oracles and Path(args.oracles, task.name).is_dir()]
        if not tasks:
            raise UserError(f"--oracles {args.oracles!r} holds no adapters of the {args.split} tasks")
        say(f"oracles of {len(tasks)} of {n_tasks} tasks")
    elif args.mode == "lora" and not args.multi_task:
        val_tasks = []  # each LoRA is trained for its own task alone
        if len({task.name for task in tasks}) < len(tasks):
            raise UserError(f"--tasks {args.tasks}: tasks of equal names cannot have an adapter folder each")

    # the frozen base model with LoRA layers, and what is trained
    validation, oracles, mean, std = [], None, None, None
    settings = dict(r=args.rank, alpha=args.alpha, instruction=args.instruction)
    if args.mode == "recon":
        oracles, of_oracles = lora.load_adapters([Path(args.oracles, task.name) for task in tasks], device)
        mean, std = lora.statistics(oracles)
        base, tokenizer = load_frozen(args, device, list(oracles))
        model.check_base(base, of_oracles)
        lora.check_fits(base, oracles)
        for name in ("r", "alpha", "rslora", "instruction"):
            settings[name] = getattr(of_oracles, name)
    else:
        base, tokenizer = load_frozen(args, device, args.target_modules.split(","))
        tasks = data.with_short_examples(tasks, val_tasks, args, tokenizer)
        validation = data.validation_of(val_tasks, args, tokenizer)
        if args.short_first:
            tasks.sort(key=lambda task: len(task.descriptions[0]))
    config = lora.config_for(base, model.resolve(args.base_model), **settings)
    if args.mode == "lora":
        net = LoRABank(config, 1 if args.multi_task else len(tasks)).to(device)
    else:
        net = hypernet.new_hypernet(args, config, base, mean, std)
        net.to(device)  # after its weights are drawn: a GPU would draw other ones
        net.connect(base, tokenizer)

    # the tasks from which a step draws
    if args.tasks_per_batch > len(tasks):
        say(f"a step has all {len(tasks)} tasks, fewer than --tasks_per_batch {args.tasks_per_batch}")
    n = args.tasks_per_batch = min(args.tasks_per_batch or len(tasks), len(tasks))
    if n % n_processes:
        raise UserError(f"a step has {n} tasks (--tasks_per_batch), no multiple of {n_processes} processes")
    pool = []
    for i, task in enumerate(tasks):
        pool += [i] * (task.weight if n < len(tasks) else 1)
    where = (args, device, process, n_processes)
    return Run(*where, tasks, pool, validation, base, tokenizer, net, oracles, std)


def load_frozen(args, device: torch.device, targets: list[str]):
    """(the frozen base model with LoRA layers, its tokenizer)."""
    name, dtype = model.resolve(args.base_model), getattr(torch, args.dtype)
    if args.mode == "recon" and args.encoder != "base":  # nothing goes through it: shapes are enough
        return lora.inject(model.load_shapes(name), targets), model.load_tokenizer(name)
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
    if args.max_tokens > window and args.mode != "recon":
        raise UserError(f"--max_tokens {args.max_tokens} is more than the base model's window of {window}")
    return base, tokenizer


# -------------------- Settings --------------------

SETTINGS = [  # (name, default, meaning, *choices); a network has further ones, as fields of its config
    ("mode", "sft", "what is trained, see above", "lora", "recon", "sft"),
    ("base_model", "tiny", f"{', '.join(model.PRESETS)}, a hub id or a folder"),
    ("tasks", "tiny", f"{', '.join(SOURCES)}, or a folder of task files"),
    ("split", "train", "tasks to train on", "train", "val", "test"),
    ("n_tasks", 0, "use only so many of these tasks (0: all)"),
    ("max_steps", 600, "training steps"),
    ("tasks_per_batch", 128, "tasks of a step, over all processes (0: all)"),
    ("lr", 2e-3, "highest learning rate"),
    ("warmup", 0.1, "fraction of the steps in which the learning rate rises"),
    ("schedule", "linear", "decay of lr; late: in the last third", "linear", "late", "cosine"),
    ("weight_decay", 1e-2, "weight decay of AdamW, only on matrices (and not on latents and scalers)"),
    ("seed", 0, "of the run's randomness"),
    ("device", "auto", model.DEVICES),
    ("dtype", "auto", "auto: bfloat16 on a GPU, not for recon", "auto", "float32", "bfloat16"),
    ("val_every", 250, "steps between two validations, and between two saved states"),
    ("out_dir", "out/run", "a new folder"),
    ("resume", False, "continue the interrupted run in --out_dir"),
    ("target_modules", "q_proj,v_proj", "linear layers, by the ends of their paths"),
    ("rank", 8, "rank of an adapter; of each chunk of a document"),
    ("alpha", 16.0, "scaling is alpha / sqrt(rank)"),
    ("examples_per_task", 1, "examples of each task of a step"),
    ("micro_batch", 64, "examples at once, on each process"),
    ("max_tokens", 512, "maximum tokens of an example; longer ones are not drawn"),
    ("dropout", 0.1, "on the input of adapters, and in the network if it has dropout"),
    ("neftune_alpha", 0.0, "noise on the input embeddings (NEFTune)"),
    ("l1", 0.0, "weight of the mean absolute value of A and B"),
    ("l2", 1e-3, "weight of the mean square of A and B"),
    ("gradient_checkpointing", False, "compute activations twice, to save memory"),
    ("instruction", False, "put the definition before the input"),
    ("label_smoothing", 0.0, "label smoothing"),
    ("shard", False, "shard the base model over the processes"),
    ("multi_task", False, "lora: one adapter for all tasks"),
    ("oracles", "", "recon: the folder that --mode lora wrote"),
    ("recon_loss", "z_score", "recon: compares A and B over their std, or B A", "z_score", "delta_w"),
    ("arch", "t2l", "t2l (Text-to-LoRA), d2l (Doc-to-LoRA), or another file of nets/"),
    ("init_from", "", "start from the weights of this hypernetwork"),
    ("encoder", "preset", "text encoder: the preset's, hash, base, a hub id or a folder"),
    ("short_first", False, "d2l: short documents first; all documents after half of the steps"),
    ("distill", 0, "d2l: learn the base model's top k tokens, with the document in its prompt (0: no)"),
]
UNUSED = {  # by a mode, or by networks that read documents or descriptions: these flags are refused
    "lora": "arch init_from encoder oracles recon_loss short_first distill",
    "sft": "oracles recon_loss multi_task",
    "recon": "target_modules rank alpha examples_per_task micro_batch max_tokens neftune_alpha l1 l2 shard "
    "gradient_checkpointing instruction label_smoothing multi_task short_first distill",
    "documents": "encoder instruction label_smoothing shard",
    "descriptions": "short_first distill",
}
MAY_CHANGE = {  # with --resume: length, learning rate, how the step is computed, where, and when it is saved
    *("max_steps", "lr", "schedule", "micro_batch", "dtype", "gradient_checkpointing", "shard", "device"),
    *("val_every", "out_dir", "resume"),
}


def parse_args(words: list[str]) -> tuple[argparse.Namespace, str]:
    """(the settings of a run, the same as a file of flags). A resumed run reads its train.args first."""
    usage = dict(usage="train.py [@FILE ...] [--FLAG VALUE ...]")
    looker = settings_parser(__doc__, SETTINGS, add_help=False)  # first: resumed? which network?
    seen, _ = looker.parse_known_args(words)
    recorded = [f"@{seen.out_dir or 'out/run'}/train.args"] if seen.resume else []
    seen, _ = looker.parse_known_args(recorded + words)
    net_class = hypernet.find_arch(seen.arch or "t2l")
    of_net = hypernet.settings_of(net_class.config_class)
    parser = settings_parser(__doc__, SETTINGS + of_net, **usage)
    given = vars(parser.parse_args(recorded + words))  # {name: value, or None if it is not given}
    args = argparse.Namespace()
    for name, default, *_ in SETTINGS + of_net:
        setattr(args, name, default if given[name] is None else given[name])

    unused = set(UNUSED[args.mode].split())
    unused |= {name for name, *_ in of_net} if args.mode == "lora" else set(UNUSED[net_class.reads].split())
    if args.mode == "recon" and not hasattr(net_class.config_class, "dropout"):
        unused.add("dropout")
    for name in sorted(unused):
        if given[name] is not None:
            raise UserError(f"--{name} has no use in a run of --mode {args.mode} --arch {args.arch}")
    before = vars(parser.parse_args(recorded)) if recorded else given
    for name in given:
        if given[name] != before[name] and name not in MAY_CHANGE:
            raise UserError(f"--resume: this run has --{name} {before[name]}, not {given[name]}")
    if args.warmup > 1:
        raise UserError("--warmup is a fraction of the steps")
    if args.mode != "lora" and args.mode not in net_class.modes:
        raise UserError(f"--arch {args.arch} is trained with --mode {' or '.join(net_class.modes)}")
    if args.encoder == "preset":
        args.encoder = model.preset_encoder(args.base_model)
    if args.shard and args.encoder == "base" and args.mode == "sft":
        raise UserError("--shard needs a text encoder beside the sharded base model: --encoder ID or DIR")
    if args.dtype == "auto":
        dtype = torch.float32 if args.mode == "recon" else model.default_dtype(model.pick_device(args.device))
        args.dtype = str(dtype).removeprefix("torch.")
    used = {name: value for name, value in vars(args).items() if name not in unused | {"resume"}}
    return args, as_file(used)


# -------------------- The run --------------------

LEFT_OVER = {"train.args", "metrics.jsonl"}  # files of a run without a saved state; it may start again


@contextmanager
def claimed(folder: Path, resume: bool):
    """The folder is this run's inside the block. Raises UserError if it is in use, by a run or by files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            raise UserError(f"--out_dir {folder} is in use by a run that goes on") from None
        found = {path.name for path in folder.iterdir()}
        if not resume and found - LEFT_OVER:
            raise UserError(f"--out_dir {folder} is in use; choose another, or --resume an interrupted run")
        yield
    finally:
        os.close(handle)


def main() -> None:
    args, settings = parse_args(sys.argv[1:])
    device, folder = model.pick_device(args.device), Path(args.out_dir)
    process, n_processes = model.join_processes(device)
    if args.shard and "RANK" not in os.environ:
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=N ...")
    with claimed(folder, args.resume) if process == 0 else nullcontext():
        torch.manual_seed(args.seed)
        run = prepare(args, device, process, n_processes)
        n_parameters = sum(p.numel() for p in run.net.parameters() if p.requires_grad)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
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
