"""Train adapters, or a hypernetwork that writes them.

    python train.py                                                     # SFT in the tiny world, one process
    torchrun --nproc_per_node=2 train.py                                # the same batches on two processes
    python train.py @config/mistral-7b.args --help                      # the settings of a run, printed

--mode says what is trained, and by which loss:

    lora       ordinary LoRAs by the task loss: one per task (the oracles), or one for all (--multi_task)
    recon      a hypernetwork, to write the same adapters as the oracles (paper, section 3.1)
    sft        a hypernetwork, by the task loss through the frozen base model (paper, section 3.2)

@FILEs stand first and hold flags, see config/. If a flag occurs twice, the last one counts.
"""

import argparse
import math
import os
import random
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import hypernet
import lora
import model
from lora import Adapter
from support import flags, hub, processes, state
from support.files import UserError, command, write_file
from support.flags import setting
from support.processes import Process
from tasks import SOURCES, checks

# -------------------- Settings --------------------

DTYPES = ("auto", "float32", "bfloat16")
NETWORKS, THROUGH_BASE = "recon text document", "lora text document"  # kinds of runs


@dataclass
class Settings:
    """The settings of a run: default (for the tiny world), meaning, and values that are allowed.

    There are four kinds of runs: ordinary LoRAs (lora), reconstruction (recon), and SFT of a network that
    reads descriptions (text) or documents (document). `kinds` are the kinds that use a setting, by default
    all; others do not accept the flag.
    """

    # what is trained
    mode: str = setting("sft", "what is trained, see above", choices=("lora", "recon", "sft"))
    arch: str = setting("t2l", "the network, see hypernet.py", choices=hypernet.ARCHS, kinds=NETWORKS)
    base_model: str = setting("tiny", f"{', '.join(hub.PRESETS)}, a hub id or a folder")
    encoder: str = setting("preset", "preset's, hash, base, a hub id or a folder", kinds="recon text")
    init_from: str = setting("", "start from the weights of this hypernetwork", kinds=NETWORKS)
    multi_task: bool = setting(False, "one adapter for all tasks", kinds="lora")
    oracles: str = setting("", "the folder that --mode lora wrote", kinds="recon")
    # tasks
    tasks: str = setting("tiny", f"{', '.join(SOURCES)}, or a folder of task files")
    split: str = setting("train", "tasks to train on", choices=("train", "val", "test"))
    n_tasks: int = setting(0, "use only so many of these tasks (0: all)")
    instruction: bool = setting(False, "definition before the input", kinds="lora text")
    # adapters
    target_modules: str = setting("q_proj,v_proj", "linear layers, by the ends of paths", kinds=THROUGH_BASE)
    rank: int = setting(8, "rank of an adapter; of each chunk", least=1, most=4096, kinds=THROUGH_BASE)
    alpha: float = setting(16.0, "scaling is alpha / sqrt(rank)", least=1e-3, kinds=THROUGH_BASE)
    dropout: float = setting(0.1, "dropout on the input of adapters, and in Text-to-LoRA's trunk", most=1)
    # steps
    max_steps: int = setting(1000, "training steps", least=1)
    tasks_per_batch: int = setting(128, "tasks of a step, over all processes (0: all)")
    examples_per_task: int = setting(1, "examples of each of these tasks", least=1, kinds=THROUGH_BASE)
    micro_batch: int = setting(64, "examples at once, on each process", least=1, kinds=THROUGH_BASE)
    max_tokens: int = setting(512, "longer examples are left out", least=1, kinds=THROUGH_BASE)
    short_first: bool = setting(False, "short documents first, all from half-way on", kinds="document")
    # optimizer: AdamW (betas 0.9, 0.999; eps 1e-8); gradients are clipped to length 1
    lr: float = setting(3e-3, "highest learning rate")
    warmup: float = setting(0.1, "fraction of the steps in which the learning rate rises", most=1)
    schedule: str = setting("linear", "decay; late: in the last third", choices=("linear", "late", "cosine"))
    weight_decay: float = setting(1e-2, "weight decay, not on scales, biases, norms and latents")
    # loss
    label_smoothing: float = setting(0.0, "label smoothing", most=1, kinds="lora text")
    neftune_alpha: float = setting(0.0, "noise on the input embeddings (NEFTune)", kinds=THROUGH_BASE)
    l1: float = setting(0.0, "weight of the mean absolute value of the A and B", kinds=THROUGH_BASE)
    l2: float = setting(1e-3, "weight of the mean square of the A and B", kinds=THROUGH_BASE)
    distill: int = setting(0, "learn the base model's top k tokens with the document", kinds="document")
    recon_loss: str = setting("z_score", "of A and B, or B A", choices=("z_score", "delta_w"), kinds="recon")
    # the run
    seed: int = setting(0, "seed of all randomness")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one")
    dtype: str = setting("auto", "auto: bfloat16 on a GPU, not for recon", choices=DTYPES)
    gradient_checkpointing: bool = setting(False, "compute activations twice, for memory", kinds=THROUGH_BASE)
    shard: bool = setting(False, "shard the base model over the processes", kinds=THROUGH_BASE)
    val_every: int = setting(250, "steps between two validations, or saves of the state", least=1)
    out_dir: str = setting("out/run", "a new folder")


MAY_CHANGE = [  # with --resume: length, learning rate, how the step is computed, where the run is
    *("max_steps", "lr", "head_lr", "schedule", "micro_batch", "dtype", "gradient_checkpointing", "shard"),
    *("device", "val_every"),
]


def parse_args() -> argparse.Namespace:
    """The settings of the run, checked as far as possible without loading a model."""
    # 1. what decides which flags there are. A resumed run goes by its train.args, then by the command line
    words, recorded = flags.expand(sys.argv[1:]), []
    all_settings = {item.name: item for item in flags.settings_of(Settings)}
    first = flags.Parser(__doc__, add_help=False)
    first.add_settings([all_settings[name] for name in ("mode", "arch", "out_dir")])
    first.add_argument("--resume", action="store_true")
    args, _ = first.parse_known_args(words)
    if args.resume:
        recorded = state.recorded_words(args.out_dir)
        args, _ = first.parse_known_args(recorded + words)
    net_class = hypernet.ARCHS[args.arch]
    kind = args.mode
    if args.mode == "sft":
        kind = "text" if net_class.reads == "descriptions" else "document"
    settings, unused = flags.used_by(kind, all_settings.values())
    if kind != "lora":
        of_network, _ = flags.used_by(kind, flags.settings_of(net_class.config_class))
        settings += [item for item in of_network if item.name not in all_settings]

    # 2. all flags
    parser = flags.Parser(__doc__, add_help=False)
    parser.add_settings(settings)
    parser.set_defaults(**{item.name: item.default for item in unused})  # for code that reads them
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    what = f"--mode {args.mode}" + ("" if kind == "lora" else f" --arch {args.arch}")
    args = parser.parse(recorded + words, what)

    # 3. defaults that depend on other settings
    if args.encoder == "preset":
        args.encoder = hub.preset_encoder(args.base_model)
    if args.dtype == "auto":
        dtype = processes.default_dtype(processes.choose_device(args.device))
        is_float32 = dtype == torch.float32 or kind == "recon"  # recon: as published
        args.dtype = "float32" if is_float32 else "bfloat16"
    if args.help:
        print(__doc__)
        print("--resume continues the interrupted run in --out_dir.")
        flags.print_settings(f"The settings of {what}:", settings, args)
        sys.exit(0)
    if args.resume:
        flags.say_changes(settings, parser.parse(recorded, what), args, MAY_CHANGE)
    check_settings(args, net_class, kind)
    args.as_text = flags.as_text(settings, args)
    return args


def check_settings(args: argparse.Namespace, net_class, kind: str) -> None:
    """Raise UserError for settings that do not go together."""
    if args.mode != "lora" and args.mode not in net_class.modes:
        raise UserError(f"--arch {args.arch} is trained with --mode {' or '.join(net_class.modes)}")
    if kind == "recon" and not args.oracles:
        raise UserError("--mode recon needs --oracles DIR, a folder that --mode lora wrote")
    if args.shard and "RANK" not in os.environ:
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=N ...")
    if args.shard and kind == "text" and args.encoder == "base":
        raise UserError("--shard needs a text encoder beside the sharded base model: --encoder ID or DIR")
    if args.gradient_checkpointing and args.dropout and processes.choose_device(args.device).type == "mps":
        raise UserError("--gradient_checkpointing on mps needs --dropout 0: another mask would be drawn")
    if not args.out_dir.strip():
        raise UserError("--out_dir is empty")


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


def weight_size(adapter: Adapter, ranks: int | Tensor, measure) -> Tensor:
    """Mean of measure(A) plus mean of measure(B), torch.abs or torch.square, summed over the modules.

    Each adapter of the batch counts equally. `ranks` [n] are those without padding (`DocToLoRA.join`).
    """
    total = 0.0
    for A, B in adapter.values():  # [n, L, R, in], [n, L, out, R]
        L = A.shape[1]
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
    """Everything a step needs."""

    args: argparse.Namespace
    process: Process
    tasks: list[data.Task]
    val_tasks: list[data.Task]
    base: nn.Module  # the frozen model; for recon without weights, unless it is the text encoder
    tokenizer: Any
    net: nn.Module  # what is trained: it writes adapters
    oracles: Adapter | None = None  # recon: the adapters to imitate, one per task
    std: Adapter | None = None  # recon: their standard deviation


def inputs_of(run: Run, drawn: list[data.DrawnTask]) -> list:
    """What `run.net` writes adapters from: the texts of tasks, or the numbers of ordinary LoRAs."""
    if run.args.mode == "lora":
        return [0 if run.args.multi_task else item.index for item in drawn]
    return [item.description for item in drawn]


def autocast(run: Run):
    """Compute in bfloat16 if --dtype says so; the weights of `net` stay in float32."""
    device = next(run.net.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=run.args.dtype == "bfloat16")


def adapters_of(adapters: Adapter, examples: list[data.TokenizedExample]) -> Adapter:
    """The adapter of each example: that of its task. A [examples, L, r, in]"""
    return lora.select(adapters, [example.task for example in examples])


@torch.no_grad()
def teacher_logits(run: Run, examples: list[data.TokenizedExample]) -> Tensor:
    """The logits of the base model itself, with the document in its prompt. [tokens, vocabulary]"""
    with autocast(run):
        return model.answer_logits(run.base, [(e.teacher_prompt, e.answer) for e in examples])[0]


def task_loss(run: Run, examples: list[data.TokenizedExample], teacher: Tensor | None) -> Tensor:
    """The loss of examples that go through the base model together, with the adapters in use."""
    args, pairs = run.args, [(e.prompt, e.answer) for e in examples]
    with autocast(run):
        logits, example_index, labels = model.answer_logits(run.base, pairs, args.neftune_alpha)
    if teacher is not None:
        return distill_loss(logits, example_index, teacher, args.distill)
    return answer_loss(logits, example_index, labels, args.label_smoothing)


def micro_batches(batch: data.Batch, args) -> Iterator[tuple[float, list]]:
    """(share, examples) of each micro-batch: --micro_batch examples of similar length.

    The shares add up to `batch.example_fraction`. With --shard all processes need equally many. Those that
    have no examples left repeat one, with a share of 0.
    """
    n_examples = batch.most_examples if args.shard else len(batch.examples)
    for i in range(0, n_examples, args.micro_batch):
        examples = batch.examples[i : i + args.micro_batch]
        if examples:
            yield batch.example_fraction * len(examples) / len(batch.examples), examples
        else:
            yield 0.0, batch.examples[:1]


def sft_step(run: Run, net: nn.Module, drawn: list[data.DrawnTask]) -> dict[str, Tensor]:
    """One training step through the frozen base model, of a hypernetwork or of ordinary LoRAs (`LoRABank`).

    The adapters are the interface between the two networks: the step goes forward through the hypernetwork,
    forward and backward through the base model, then backward through the hypernetwork. It leaves gradients
    in `net` and returns the terms of the loss. `net` is run.net, or with several processes its parallel
    version; then each process returns its part of every term, and the parts add up (`data.Batch`).
    """
    args, process, scaling = run.args, run.process, run.net.config.scaling
    batch = data.make_batch(run.tokenizer, run.tasks, drawn, args, process.rank, process.count)

    # 1. One forward pass of the hypernetwork writes all adapters of the step.
    with autocast(run):
        written = net(inputs_of(run, batch.tasks))  # A [tasks, L, r, in], B [tasks, L, out, r]

    # 2. Detached, they are leaves: they collect the gradients of everything that is computed with them.
    leaves = {}
    for name, (A, B) in written.items():
        leaves[name] = (A.detach().requires_grad_(), B.detach().requires_grad_())
    losses = {}
    for name, weight, measure in (("l1", args.l1, torch.abs), ("l2", args.l2, torch.square)):
        if weight:
            size = weight_size(leaves, run.net.ranks, measure)  # (ranks: of the adapters written last)
            penalty = weight * batch.task_fraction * size
            penalty.backward()
            losses[name] = penalty.detach()

    # 3. The examples go through the base model, a few of similar length at a time. Each backward pass frees
    #    the activations, so the memory of a step is that of one micro-batch.
    losses["task"] = torch.zeros((), device=run.base.device)
    for share, examples in micro_batches(batch, args):
        teacher = teacher_logits(run, examples) if args.distill else None  # of the same answer tokens
        # (with --gradient_checkpointing the backward pass runs the layers again, with their adapters)
        with lora.use(run.base, adapters_of(leaves, examples), scaling):
            loss = task_loss(run, examples, teacher) * share
            loss.backward()
        losses["task"] += loss.detach()

    # 4. One backward pass through the hypernetwork, from the gradients of A and B. With several processes it
    #    adds up the gradients of their parts.
    outputs, gradients = [], []
    for name in written:
        outputs += written[name]
        for leaf in leaves[name]:  # in a base model with experts, the layers of a target may get no tokens
            gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    torch.autograd.backward(outputs, gradients)
    return losses


def recon_step(run: Run, net: nn.Module, drawn: list[data.DrawnTask]) -> dict[str, Tensor]:
    """One step of reconstruction, without a base model. As sft_step, it leaves gradients in `net`."""
    mine = drawn[run.process.rank :: run.process.count]
    weight = len(mine) / len(drawn)
    mine = mine or drawn[:1]  # if there are more processes than tasks
    with autocast(run):
        written = net(inputs_of(run, mine))
    oracles = lora.select(run.oracles, [item.index for item in mine])
    loss = recon_loss(run.args.recon_loss, written, oracles, run.std) * weight
    loss.backward()
    return {"recon": loss.detach()}


NO_DECAY = ("scaler", "bias", "latents", "queries", "b1", "b2")  # parts of parameters' names


def make_optimizer(net: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW. Some parameters have a learning rate of their own (`net.lr_factors`).

    Scales, biases, norms and latents have no weight decay.
    """
    groups = {}  # {(factor on lr, weight decay): parameters}; a fused kernel takes a whole group at once
    for name, p in net.named_parameters():
        lr_factor = net.lr_factors.get(name.split(".")[0], 1.0)
        decays = p.dim() > 1 and not any(word in name for word in NO_DECAY)
        groups.setdefault((lr_factor, args.weight_decay if decays else 0.0), []).append(p)
    settings = [dict(params=p, lr_factor=lr, weight_decay=decay) for (lr, decay), p in groups.items()]
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


def update(run: Run, net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """One step of the optimizer; returns its row of metrics.jsonl."""
    args, process = run.args, run.process
    lr = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]

    # All processes draw the same tasks and compute different parts; what is random in them differs.
    drawn = data.draw(run.tasks, step, args)
    torch.manual_seed(random.Random(f"{args.seed} {step} {process.rank}").getrandbits(63))
    optimizer.zero_grad()
    losses = recon_step(run, net, drawn) if args.mode == "recon" else sft_step(run, net, drawn)
    values = processes.total(process, torch.stack(list(losses.values()))).tolist()
    grad_norm = nn.utils.clip_grad_norm_(list(run.net.parameters()), 1.0).item()
    if not math.isfinite(sum(values) + grad_norm):
        message = f"the loss is {sum(values)} in step {step + 1}, the gradient's length {grad_norm}"
        raise UserError(f"{message}; start again with a lower --lr")
    optimizer.step()
    terms = {f"loss_{name}": value for name, value in zip(losses, values)}
    return {"step": step + 1, "loss": sum(values), **terms, "lr": lr, "grad_norm": grad_norm}


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Cross-entropy and accuracy on up to 8 examples of each validation task, with its first description.

    An answer is right if every token is the most likely one: greedy decoding would give the same.
    """
    run.net.eval()
    lora.set_dropout(run.base, False)
    drawn = [data.DrawnTask(i, task.descriptions[0], task.test[:8]) for i, task in enumerate(run.val_tasks)]
    batch = data.make_batch(run.tokenizer, run.val_tasks, drawn, run.args)
    loss, n_right, n = 0.0, 0, len(batch.examples)
    with autocast(run):
        written = run.net(inputs_of(run, batch.tasks))
        for _, examples in micro_batches(batch, run.args):
            with lora.use(run.base, adapters_of(written, examples), run.net.config.scaling):
                pairs = [(e.prompt, e.answer) for e in examples]
                logits, example_index, labels = model.answer_logits(run.base, pairs)
            loss += answer_loss(logits, example_index, labels).item() * len(examples)
            wrong_examples = example_index[logits.argmax(-1) != labels].unique()
            n_right += len(examples) - len(wrong_examples)
    run.net.train()
    lora.set_dropout(run.base, True)
    return {"val_loss": loss / n, "val_accuracy": n_right / n}


# -------------------- What is trained --------------------


def prepare(args, process: Process) -> Run:
    """For SFT and ordinary LoRAs: load the tasks and the frozen models, and make what is trained."""
    with processes.first_goes_ahead(process):
        tasks, val_tasks = checks.choose_tasks(args, hypernet.ARCHS[args.arch].reads, process.rank == 0)
        hub.fetch(hub.source_of(args.base_model))
    if args.short_first:
        tasks.sort(key=lambda task: len(task.descriptions[0]))
    if args.mode == "lora" and not args.multi_task:
        val_tasks = []  # each LoRA is trained for its own task alone
    names, dtype = args.target_modules.split(","), getattr(torch, args.dtype)
    if args.shard:
        base, tokenizer = model.load_sharded(args.base_model, process, dtype, names, args.dropout)
    else:
        base, tokenizer = model.load_base(args.base_model, process.device, dtype)
        lora.inject(base, names, args.dropout)
    checks.check(tokenizer, tasks, val_tasks, args, process.rank == 0)
    lora.set_dropout(base, True)
    if args.gradient_checkpointing:
        model.recompute_layers(base)
    if process.device.type == "cpu":
        base.set_attn_implementation("eager")  # its backward pass is faster there

    scale = dict(r=args.rank, alpha=args.alpha, instruction=args.instruction)
    config = lora.config_for(base, base.lora_targets, hub.full_name(args.base_model), **scale)
    if args.mode == "lora":
        net = lora.LoRABank(config, 1 if args.multi_task else len(tasks)).to(process.device)
    else:
        net = make_hypernet(args, config, base, tokenizer, process)
    return Run(args, process, tasks, val_tasks, base, tokenizer, net)


def prepare_recon(args, process: Process) -> Run:
    """For reconstruction: oracles, and a base model of shapes only, unless it is the text encoder."""
    with processes.first_goes_ahead(process):
        tasks, _ = checks.choose_tasks(args, hypernet.ARCHS[args.arch].reads, process.rank == 0)
        hub.fetch(hub.source_of(args.base_model))
    with_oracle = [task for task in tasks if (Path(args.oracles) / task.name).is_dir()]
    if not with_oracle:
        raise UserError(f"{args.oracles} holds no adapters of the {args.split} tasks of {args.tasks}")
    if process.rank == 0:
        print(f"oracles of {len(with_oracle)} of {len(tasks)} tasks")
    folders = [Path(args.oracles) / task.name for task in with_oracle]
    oracles, config = lora.load_adapters(folders, process.device)

    base, tokenizer = hub.load_skeleton(args.base_model), None
    if args.encoder == "base":
        base, tokenizer = model.load_base(args.base_model, process.device, getattr(torch, args.dtype))
    config.base_shape = hub.base_shape(base.config)
    hub.check_base(args.base_model, config.base_shape, config.base_model, [])
    config.base_model, config.n_layers = hub.full_name(args.base_model), config.base_shape[0]
    lora.inject(base, list(config.targets))
    lora.check_fits(base, oracles)
    net = make_hypernet(args, config, base, tokenizer, process)
    mean, std = lora.statistics(oracles)
    if not args.init_from:
        net.start_at(mean, std)
    return Run(args, process, with_oracle, [], base, tokenizer, net, oracles, std)


def make_hypernet(args, lora_config: lora.LoRAConfig, base, tokenizer, process: Process) -> nn.Module:
    """The network of --arch for adapters of this config, connected with what it reads with."""
    net_class = hypernet.ARCHS[args.arch]
    names = {field.name for field in fields(net_class.config_class)} & set(vars(args))
    settings = {name: getattr(args, name) for name in names} | vars(lora_config)
    config = net_class.config_class(**settings, z_score=args.mode == "recon" and args.recon_loss == "z_score")
    with processes.first_goes_ahead(process):  # which may download a text encoder
        config.measure(base)
        net = net_class(config)
        net.recompute = args.gradient_checkpointing
        if args.init_from and not args.resume:
            hypernet.copy_weights(args.init_from, net)
        elif args.mode == "sft":
            net.start_as_lora()
        net.to(process.device)  # moved last: random numbers of a GPU would be others
        net.connect(base, tokenizer)
    return net


# -------------------- The run --------------------


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


def resume(run: Run, folder: Path, checkpoint: state.Checkpoint, optimizer) -> int:
    """Read the state of an interrupted run. Returns how many steps are done."""
    n_done = checkpoint.resume(run.net, optimizer)
    if n_done > run.args.max_steps:
        raise UserError(f"--max_steps {run.args.max_steps}: the run in {folder} has done {n_done} steps")
    if run.process.rank == 0:
        checkpoint.rewind(n_done)
        if checkpoint.best_step() == n_done:  # it may have been killed before it saved them
            save(run, folder)
        write_file(folder / "train.args", run.args.as_text)
    return n_done


def train(run: Run, folder: Path) -> bool:
    """Train until --max_steps or Ctrl-C; returns whether the run is finished."""
    args, process = run.args, run.process
    is_first = process.rank == 0
    net = processes.parallel(run.net, process)
    optimizer = make_optimizer(run.net, args)
    checkpoint = state.Checkpoint(folder, checks.identify(run.tasks + run.val_tasks), process.count)
    n_done = resume(run, folder, checkpoint, optimizer) if args.resume else 0
    first_step, interrupts = n_done + 1, state.on_ctrl_c()
    if is_first:
        n_parameters = sum(p.numel() for p in run.net.parameters())
        where = f"{process.count} x {processes.name_of(process.device)}, in {args.dtype}"
        print(f"{args.mode}: {n_parameters:,} parameters, on {where}, into {folder}/", flush=True)
    interrupted, measured = False, {}  # by the last validation
    bar = tqdm(total=args.max_steps, initial=n_done, disable=not is_first, desc=args.mode)
    while n_done < args.max_steps and not interrupted:
        row = update(run, net, optimizer, n_done)
        n_done += 1
        is_due = n_done % args.val_every == 0 or n_done == args.max_steps
        if is_due and run.val_tasks and (is_first or args.shard):
            measured = validate(run)
            row |= measured
        # all processes stop after the same step
        n_interrupts = torch.tensor(float(len(interrupts)), device=process.device)
        interrupted = bool(processes.total(process, n_interrupts))
        if is_first:
            is_best = checkpoint.add(row)
            if is_due or interrupted or n_done == first_step:  # the first shows early that the disk has room
                checkpoint.save_state(n_done, run.net, optimizer)
            if is_best:  # after the state, so that `resume` can do it again
                save(run, folder)
            bar.set_postfix({"loss": row["loss"]} | measured, refresh=False)
            bar.update()
    bar.close()
    if n_done < args.max_steps:
        if is_first:
            again = f"train.py --resume --out_dir {shlex.quote(str(folder))}"
            continued = f"to continue: {processes.launcher()} {again}"
            print(f"interrupted after {n_done} steps; {continued}", file=sys.stderr)
        return False
    if is_first:
        if not checkpoint.best:
            save(run, folder)
        checkpoint.close()
        print(f"{folder}/ holds the weights of step {checkpoint.best_step() or n_done}")
    return True


def main() -> None:
    args = parse_args()
    process = processes.start(args.device)
    torch.manual_seed(args.seed)
    folder = Path(args.out_dir)
    with state.reserved(folder, args.as_text, args.resume) if process.rank == 0 else nullcontext():
        run = prepare_recon(args, process) if args.mode == "recon" else prepare(args, process)
        is_finished = train(run, folder)
    processes.leave()
    if not is_finished:
        sys.exit(130)


if __name__ == "__main__":
    command(main)
