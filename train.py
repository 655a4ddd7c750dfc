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
import json
import math
import os
import random
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
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
from support import flags, hub, processes
from support.files import UserError, command, write_file
from support.optimizer import learning_rate, make_optimizer
from support.processes import Process
from support.state import load_state, on_ctrl_c, save_state
from tasks import SOURCES, load_tasks
from tasks import folder as task_folder
from tasks.documents import generate_answers

# -------------------- Settings --------------------

SETTINGS = [  # name, default (for the tiny world), meaning; numbers: least value (otherwise 0), greatest
    # what is trained
    ("mode", "sft", "lora, recon or sft, see above"),
    ("arch", "t2l", "hypernetwork: t2l is Text-to-LoRA, d2l Doc-to-LoRA (start from @config/d2l.args)"),
    ("base_model", "tiny", f"{', '.join(hub.PRESETS)}, a hub id or a folder"),
    ("encoder", "preset", "text encoder: the preset's, hash, base, a hub id or a folder"),
    ("init_from", "", "start from the weights of this hypernetwork, of the same settings"),
    ("multi_task", False, "lora: one adapter for all tasks"),
    ("oracles", "", "recon: the folder that --mode lora wrote; it sets rank, alpha and target_modules"),
    # tasks
    ("tasks", "tiny", f"{', '.join(sorted({*SOURCES} - {'benchmarks'}))}, or a folder of task files"),
    ("split", "train", "tasks to train on: train, val or test"),
    ("n_tasks", 0, "use only so many of these tasks (0: all)"),
    ("instruction", False, "put the task's definition before each input, as published"),
    # adapters
    ("target_modules", "q_proj,v_proj", "linear layers that get an adapter"),
    ("rank", 8, "rank of an adapter; d2l: of each chunk; with slots: of each", 1),
    ("alpha", 16.0, "scaling is alpha / sqrt(rank)"),
    ("dropout", 0.1, "dropout on the input of the adapters", 0, 1),
    # steps
    ("max_steps", 1000, "training steps", 1),
    ("tasks_per_batch", 128, "tasks of a step, over all processes (0: all)"),
    ("examples_per_task", 1, "examples of each of these tasks", 1),
    ("micro_batch", 64, "examples that go through the base model at once, on each process", 1),
    ("max_tokens", 512, "longer examples are left out", 1),
    ("short_first", False, "d2l: short documents first, all of them from half-way on"),
    # optimizer: AdamW (betas 0.9, 0.999; eps 1e-8)
    ("lr", 3e-3, "highest learning rate"),
    ("head_lr", 1 / 16, "factor on lr for the network's heads"),
    ("warmup", 0.1, "fraction of the steps in which the learning rate rises", 0, 1),
    ("schedule", "linear", "decay: linear; late: constant, then linear in the last third; cosine: to 1e-7"),
    ("weight_decay", 1e-2, "weight decay, not on scales, biases, norms and latents"),
    ("max_grad_norm", 1.0, "longer gradients are clipped to this length (0: never)"),
    # loss
    ("label_smoothing", 0.0, "label smoothing", 0, 1),
    ("neftune_alpha", 0.0, "noise on the base model's input embeddings (NEFTune)"),
    ("l1", 0.0, "weight of the mean absolute value of the written A and B"),
    ("l2", 1e-3, "weight of the mean square of the written A and B"),
    ("distill", 0, "match the k likeliest tokens of the base model with the document in its prompt (0: no)"),
    ("recon_loss", "z_score", "recon: what is compared: z_score, plain or delta_w"),
    # the run
    ("seed", 0, "seed of all randomness"),
    ("device", "auto", "cpu, cuda, cuda:1, mps; auto: a GPU if there is one, otherwise the CPU"),
    ("dtype", "auto", "computation in float32 or bfloat16; auto: bfloat16 on a GPU, except for recon"),
    ("gradient_checkpointing", False, "save memory: compute activations again in the backward pass"),
    ("shard", False, "shard the base model's layers over the processes, if it is larger than one GPU"),
    ("val_every", 250, "steps between two validations, and between two saves of the state", 1),
    ("out_dir", "out/run", "a new folder"),
    ("wandb", False, "log to Weights & Biases as well"),
]
SETTINGS = [flags.Setting(*row) for row in SETTINGS]
MAY_CHANGE = [  # with --resume: length, learning rate, how the step is computed, where the run is
    *("max_steps", "lr", "head_lr", "schedule", "micro_batch", "dtype", "gradient_checkpointing", "shard"),
    *("device", "val_every", "out_dir", "wandb"),
]
CHOICES = {
    "mode": ["lora", "recon", "sft"],
    "arch": list(hypernet.ARCHS),
    "size": list(hypernet.SIZES),
    "split": ["train", "val", "test"],
    "schedule": ["linear", "late", "cosine"],
    "recon_loss": ["z_score", "plain", "delta_w"],
    "dtype": ["auto", "float32", "bfloat16"],
}


def parse_args() -> argparse.Namespace:
    """The settings of the run, checked as far as possible without loading a model."""
    parser = flags.Parser(__doc__, add_help=False)
    parser.add_settings(SETTINGS, CHOICES)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    words = flags.expand(sys.argv[1:])
    earlier_words = []
    known, _ = parser.parse_known_args(words)
    if known.resume:
        earlier_words = [*flags.words_of_run(Path(known.out_dir)), "--out_dir", known.out_dir]
        known, _ = parser.parse_known_args(earlier_words + words)

    # --arch brings the settings of its network, --oracles the values of some
    net_settings = flags.settings_of(hypernet.ARCHS[known.arch].config_class)
    parser.add_settings(net_settings, CHOICES)
    of_oracles = settings_of_oracles(known.oracles) if known.mode == "recon" and known.oracles else {}
    parser.set_defaults(**of_oracles)
    args, unknown = parser.parse_known_args(earlier_words + words)
    if unknown:
        raise UserError(f"{unknown[0]} is not a setting of --arch {args.arch}; @FILEs stand in front")
    if args.resume:
        flags.refuse_changes(parser.parse_args(earlier_words), args, MAY_CHANGE)
    if of_oracles and set(args.target_modules.split(",")) == set(of_oracles["target_modules"].split(",")):
        args.target_modules = of_oracles["target_modules"]  # in another order
    for name, value in of_oracles.items():
        if getattr(args, name) != value:
            raise UserError(f"--{name} {getattr(args, name)}: the oracles in {args.oracles} have {value}")

    # defaults that depend on other settings
    if args.encoder == "preset":
        args.encoder = hub.preset_encoder(args.base_model)
    if args.dtype == "auto":
        on_cpu = processes.choose_device(args.device).type == "cpu"
        args.dtype = "float32" if on_cpu or args.mode == "recon" else "bfloat16"  # recon: as published
    if args.help:
        print(__doc__)
        print("--resume continues the interrupted run in --out_dir.")
        flags.print_settings("The settings of this run:", SETTINGS, args)
        flags.print_settings(f"Those of its network (--arch {args.arch}):", net_settings, args)
        sys.exit(0)
    check_settings(args)
    args.as_text = flags.as_text(SETTINGS + net_settings, args)
    return args


def settings_of_oracles(folder: str) -> dict:
    """The settings that reconstruction takes from the adapters it imitates."""
    adapters = sorted(Path(folder).glob("*/adapter_config.json"))
    if not adapters:
        raise UserError(f"--oracles {folder} holds no adapters; --mode lora writes them")
    _, config = lora.load_adapter(adapters[0].parent)
    return {"rank": config.r, "alpha": config.alpha, "target_modules": ",".join(config.paths)}


def check_settings(args: argparse.Namespace) -> None:
    """Raise UserError for settings that do not go together."""
    if args.arch == "d2l" and args.mode != "sft":
        raise UserError("--arch d2l is trained with --mode sft")
    if args.arch == "d2l" and args.instruction:
        raise UserError("--instruction cannot be combined with --arch d2l: documents have none")
    if args.init_from and args.mode == "lora":
        raise UserError("--init_from takes a hypernetwork, and goes with --mode sft or recon")
    if args.multi_task and args.mode != "lora":
        raise UserError("--multi_task goes with --mode lora")
    if args.shard and args.mode == "recon":
        raise UserError("--shard cannot be combined with --mode recon, which runs no base model")
    processes.check_shard(args.shard)
    if args.tasks == "benchmarks":
        raise UserError("--tasks benchmarks are for eval.py: there is nothing to train on")
    if args.wandb and not find_spec("wandb"):
        raise UserError("--wandb needs wandb: pip install wandb")
    if args.mode == "recon" and args.recon_loss != "delta_w" and getattr(args, "slots", 1) > 1:
        raise UserError("--slots adds up ranks: with --mode recon it needs --recon_loss delta_w")
    if args.mode == "recon" and not args.oracles:
        raise UserError("--mode recon needs --oracles DIR, a folder that --mode lora wrote")
    folder = Path(args.out_dir)
    files = [file.name for file in folder.iterdir()] if folder.exists() else []
    if not args.resume and files not in ([], ["answers.json"]):  # which is written before training starts
        raise UserError(f"--out_dir {folder} is in use; choose another, or --resume an interrupted run")


# -------------------- The losses --------------------


def example_mean(losses: Tensor, example_index: Tensor) -> Tensor:
    """Losses of tokens, averaged over each example, then over the examples: every example counts equally."""
    n_tokens = torch.bincount(example_index)  # [examples]
    return (losses / n_tokens[example_index]).sum() / len(n_tokens)


def answer_loss(logits: Tensor, example_index: Tensor, right_token: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the answers, from `model.answer_logits`."""
    losses = F.cross_entropy(logits, right_token, reduction="none", label_smoothing=smoothing)  # [tokens]
    return example_mean(losses, example_index)


def distill_loss(logits: Tensor, example_index: Tensor, teacher: Tensor, k: int) -> Tensor:
    """KL divergence from a teacher, over its k likeliest tokens. logits, teacher [tokens, vocabulary]."""
    log_p, tokens = teacher.log_softmax(-1).topk(k)  # [tokens, k]
    log_q = logits.log_softmax(-1).gather(-1, tokens)
    return example_mean((log_p.exp() * (log_p - log_q)).sum(-1), example_index)


def mean_weight(adapter: Adapter, measure) -> Tensor:
    """Mean of measure(A) and of measure(B), torch.abs or torch.square, summed over the modules.

    Each adapter of the batch counts equally. Ranks that are zero in A are padding and do not count.
    """
    total = 0.0
    for A, B in adapter.values():  # [n, L, R, in], [n, L, out, R]
        n_ranks = (A != 0).any(-1).sum((1, 2))  # [n], over all layers
        mean_A = measure(A).sum((1, 2, 3)) / (n_ranks * A.shape[-1])  # [n]
        mean_B = measure(B).sum((1, 2, 3)) / (n_ranks * B.shape[-2])
        total = total + mean_A.mean() + mean_B.mean()
    return total


def recon_loss(compare: str, adapter: Adapter, oracle: Adapter, deviation: dict[str, Tensor]) -> Tensor:
    """L1 between written adapters and oracles, averaged over the modules.

    "delta_w" compares 10,000 BA, as published; "plain" and "z_score" compare A and B divided by `deviation`,
    which is 1 or the oracles' deviation.
    """
    losses = []
    for name, (A, B) in adapter.items():
        oracle_A, oracle_B = oracle[name]
        if compare == "delta_w":
            losses.append(10_000 * (B @ A - oracle_B @ oracle_A).abs().mean())  # [n, L, out, in]
        else:
            loss_A = ((A - oracle_A) / deviation[f"{name}_A"]).abs().mean()
            loss_B = ((B - oracle_B) / deviation[f"{name}_B"]).abs().mean()
            losses.append((loss_A + loss_B) / 2)
    return sum(losses) / len(losses)


# -------------------- What is trained --------------------


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
    encode: Any = None  # the text encoder
    oracles: Adapter | None = None  # recon: the adapters to imitate, one per task


def prepare(args, process: Process) -> Run:
    """For SFT and ordinary LoRAs: load the tasks and the frozen models, and make what is trained."""
    with processes.first_goes_ahead(process):
        tasks, val_tasks = choose_tasks(args)
        hub.fetch_models(args.base_model, args.encoder)
    names, dtype = args.target_modules.split(","), getattr(torch, args.dtype)
    base, tokenizer = model.load_injected(args.base_model, names, process, dtype, args.dropout, args.shard)
    answers_file = Path(args.out_dir) / "answers.json"
    generate_answers(base, tokenizer, tasks + val_tasks, answers_file, process)
    tasks = data.drop_long_tasks(tokenizer, tasks, args, process.rank == 0)
    data.check_words(tokenizer, tasks + val_tasks)
    lora.set_dropout(base, True)
    if args.gradient_checkpointing:
        model.recompute_layers(base)
    if process.device.type == "cpu":
        base.set_attn_implementation("eager")  # its backward pass is faster there

    config = lora.config_for(base, names, hub.full_name(args.base_model), r=args.rank, alpha=args.alpha)
    if args.mode == "lora":
        net = lora.LoRABank(config, 1 if args.multi_task else len(tasks)).to(process.device)
        return Run(args, process, tasks, val_tasks, base, tokenizer, net)
    net, encode = make_hypernet(args, config, base, tokenizer, process.device)
    return Run(args, process, tasks, val_tasks, base, tokenizer, net, encode)


def prepare_recon(args, process: Process) -> Run:
    """For reconstruction: oracles, and a base model of shapes only, unless it is the text encoder."""
    with processes.first_goes_ahead(process):
        tasks, _ = choose_tasks(args)
        hub.fetch_models(args.base_model, args.encoder)
    n_tasks = len(tasks)
    tasks = [task for task in tasks if (Path(args.oracles) / task.name).exists()]
    if not tasks:
        raise UserError(f"{args.oracles} holds no adapters of the {args.split} tasks of {args.tasks}")
    if process.rank == 0:
        print(f"oracles of {len(tasks)} of {n_tasks} tasks")
    folders = [Path(args.oracles) / task.name for task in tasks]
    oracles, oracle_config = lora.load_adapters(folders, process.device)

    base, tokenizer = hub.load_skeleton(args.base_model), None
    if args.encoder == "base":
        base, tokenizer = model.load_base(args.base_model, process.device, getattr(torch, args.dtype))
    hub.check_base(args.base_model, lora.base_shape(base.config), oracle_config.base_model, [])
    names = list(oracle_config.paths)
    config = lora.config_for(base, names, hub.full_name(args.base_model))
    config.r, config.alpha, config.rslora = oracle_config.r, oracle_config.alpha, oracle_config.rslora
    lora.inject(base, names)
    lora.check_fits(base, oracles)
    net, encode = make_hypernet(args, config, base, tokenizer, process.device, oracles)
    return Run(args, process, tasks, [], base, tokenizer, net, encode, oracles)


def choose_tasks(args) -> tuple[list[data.Task], list[data.Task]]:
    """(tasks to train on, tasks to validate on)."""
    splits = load_tasks(args.tasks)
    if int(os.environ.get("RANK", 0)) == 0:
        print(task_folder.summary(args.tasks, splits))
    tasks = data.pick(splits, args.split, args.n_tasks)
    reads_documents = hypernet.ARCHS[args.arch].reads == "documents"
    if args.mode != "lora" and tasks[0].is_document != reads_documents:
        reads = "documents (see config/d2l.args)" if reads_documents else "descriptions"
        raise UserError(f"--tasks {args.tasks} cannot be used with --arch {args.arch}, which reads {reads}")
    if args.mode == "lora":
        tasks = data.distinct(tasks)
    if args.short_first:
        tasks.sort(key=lambda task: len(task.descriptions[0]))
    val_tasks = []
    if args.mode == "sft" or args.multi_task:
        val_tasks = [task for task in splits.get("val", []) if task.test]
    return tasks, val_tasks


def make_hypernet(args, lora_config, base, tokenizer, device, oracles: Adapter | None = None):
    """(network of --arch, for adapters of this config; its text encoder, if it reads descriptions)."""
    net_class, encode = hypernet.ARCHS[args.arch], None
    config = net_class.config_class(**vars(lora_config), instruction=args.instruction)
    for setting in flags.settings_of(net_class.config_class):
        setattr(config, setting.name, getattr(args, setting.name))
    if net_class.reads == "documents":
        config.input_size = base.config.get_text_config().hidden_size
    else:
        rank = config.encoder_rank
        encode = model.load_encoder(args.encoder, device, (base, tokenizer), config.full_stop, rank > 0)
        config.encoder = args.encoder
        if rank:
            config.encoder_lora = asdict(hypernet.encoder_lora_config(encode.network, args.encoder, rank))
        config.input_size = encode(["cat"]).shape[-1]  # the width of its output for any text
        config.z_score = args.mode == "recon" and args.recon_loss == "z_score"
    net = hypernet.make_net(net_class, config).to(device)
    net.recompute = args.gradient_checkpointing
    if args.init_from and not args.resume:
        hypernet.copy_weights(args.init_from, net)
    elif args.mode == "sft":
        net.start_as_lora()
    elif config.z_score:
        net.normalize(oracles)
    return net, encode


# -------------------- A training step --------------------


def batch_condition(run: Run, batch: list[data.DrawnTask]):
    """The input of `run.net` for a batch: indices of LoRAs, text embeddings, or states of documents."""
    if run.args.mode == "lora":
        indices = [0 if run.args.multi_task else item.index for item in batch]
        return torch.tensor(indices, device=run.base.device)
    texts = [item.description for item in batch]
    return hypernet.make_condition(run.net, texts, run.base, run.tokenizer, run.encode)


def autocast(run: Run):
    """Compute in bfloat16 if --dtype says so; the weights of `net` stay in float32."""
    device = next(run.net.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=run.args.dtype == "bfloat16")


def set_adapters(run: Run, adapters: Adapter, examples: list[data.TokenizedExample]) -> None:
    """Give each example of the base model's next batch the adapter of its task."""
    selected = lora.select(adapters, [example.task for example in examples])  # A [examples, L, r, in]
    lora.set_adapter(run.base, selected, run.net.config.scaling)


@torch.no_grad()
def teacher_logits(run: Run, examples: list[data.TokenizedExample]) -> Tensor:
    """The logits of the base model itself, with the document in its prompt. [tokens, vocabulary]"""
    lora.set_adapter(run.base, None)
    return model.answer_logits(run.base, [(e.teacher_prompt, e.answer) for e in examples])[0]


def task_loss(run: Run, adapters: Adapter, examples: list[data.TokenizedExample]) -> Tensor:
    """The loss of examples that go through the base model together, each with the adapter of its task."""
    args = run.args
    teacher = teacher_logits(run, examples) if args.distill else None
    set_adapters(run, adapters, examples)
    pairs = [(e.prompt, e.answer) for e in examples]
    logits, example_index, right_token = model.answer_logits(run.base, pairs, args.neftune_alpha)
    if args.distill:
        return distill_loss(logits, example_index, teacher, args.distill)
    return answer_loss(logits, example_index, right_token, args.label_smoothing)


def sft_step(run: Run, net: nn.Module, drawn: list[data.DrawnTask]) -> Tensor:
    """One training step through the frozen base model, of a hypernetwork or of ordinary LoRAs (`LoRABank`).

    The adapters are the interface between the two networks: the step goes forward through the hypernetwork,
    forward and backward through the base model, then backward through the hypernetwork. It leaves gradients
    in `net` and returns the loss. `net` is run.net, wrapped by DDP if there are several processes; then each
    returns its part of the loss, and the parts add up.
    """
    args, process = run.args, run.process
    batch = data.make_batch(run.tokenizer, run.tasks, drawn, args, process.rank, process.count)

    # 1. One forward pass of the hypernetwork writes all adapters of the step.
    condition = batch_condition(run, batch.tasks)
    with autocast(run):
        written = net(condition)  # A [tasks, L, r, in], B [tasks, L, out, r]

    # 2. Detached, they are leaves: they collect the gradients of everything that is computed with them.
    leaves = {}
    for name, (A, B) in written.items():
        leaves[name] = (A.detach().requires_grad_(), B.detach().requires_grad_())
    loss = torch.zeros((), device=run.base.device)
    for weight, measure in ((args.l1, torch.abs), (args.l2, torch.square)):
        if weight:
            penalty = weight * batch.task_fraction * mean_weight(leaves, measure)
            penalty.backward()
            loss += penalty.detach()

    # 3. The examples go through the base model a few of like length at a time. Each backward pass frees the
    #    activations, so the memory of a step is that of one micro-batch.
    examples = batch.examples
    n_micro_batches = processes.lockstep(run.base, math.ceil(len(examples) / args.micro_batch))
    for i in range(n_micro_batches):
        micro_batch = examples[i * args.micro_batch : (i + 1) * args.micro_batch]
        weight = batch.example_fraction * len(micro_batch) / len(examples)
        # with --shard the micro-batch is empty if only other processes have examples left: one of weight 0
        micro_batch = micro_batch or examples[:1]
        with autocast(run):
            micro_loss = task_loss(run, leaves, micro_batch) * weight
        micro_loss.backward()
        loss += micro_loss.detach()

    # 4. One backward pass through the hypernetwork, from the gradients of A and B. With several processes
    #    DDP averages the gradients of their parts here; `main` turns averages into sums.
    outputs, gradients = [], []
    for name in written:
        outputs += written[name]
        for leaf in leaves[name]:  # an expert that no token has reached has no gradient
            gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    torch.autograd.backward(outputs, gradients)
    return loss


def recon_step(run: Run, net: nn.Module, drawn: list[data.DrawnTask]) -> Tensor:
    """One step of reconstruction, without a base model. As sft_step, it leaves gradients in `net`."""
    mine = drawn[run.process.rank :: run.process.count]
    weight = len(mine) / len(drawn)
    mine = mine or drawn[:1]  # if there are more processes than tasks
    condition = batch_condition(run, mine)
    with autocast(run):
        written = net(condition)
    oracles = lora.select(run.oracles, [item.index for item in mine])
    loss = recon_loss(run.args.recon_loss, written, oracles, run.net.deviation) * weight
    loss.backward()
    return loss.detach()


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Cross-entropy and accuracy on up to 8 examples of each validation task, with its first description.

    An answer is right if every token is the most likely one: greedy decoding would give the same.
    """
    run.net.eval()
    lora.set_dropout(run.base, False)
    drawn = [data.DrawnTask(i, task.descriptions[0], task.test[:8]) for i, task in enumerate(run.val_tasks)]
    batch = data.make_batch(run.tokenizer, run.val_tasks, drawn, run.args)
    examples, loss, n_right = batch.examples, 0.0, 0
    condition = batch_condition(run, batch.tasks)
    with autocast(run):
        written = run.net(condition)
        for i in range(0, len(examples), run.args.micro_batch):
            micro_batch = examples[i : i + run.args.micro_batch]
            set_adapters(run, written, micro_batch)
            pairs = [(e.prompt, e.answer) for e in micro_batch]
            logits, example_index, right_token = model.answer_logits(run.base, pairs)
            loss += answer_loss(logits, example_index, right_token).item() * len(micro_batch)
            wrong_examples = example_index[logits.argmax(-1) != right_token].unique()
            n_right += len(micro_batch) - len(wrong_examples)
    run.net.train()
    lora.set_dropout(run.base, True)
    return {"val_loss": loss / len(examples), "val_accuracy": n_right / len(examples)}


def save(run: Run, folder: Path) -> None:
    """Write what was trained: a hypernetwork, one adapter folder per task, or the multi-task adapter."""
    if run.args.mode != "lora":
        hypernet.save_hypernet(run.net, folder)
    elif run.args.multi_task:
        lora.save_adapter(folder, run.net(0), run.net.config)
    else:
        for i, task in enumerate(run.tasks):
            lora.save_adapter(folder / task.name, run.net(i), run.net.config)


# -------------------- The run --------------------


def main() -> None:
    args = parse_args()
    process = processes.start(args.device)
    is_first = process.rank == 0
    torch.manual_seed(args.seed)
    run = prepare_recon(args, process) if args.mode == "recon" else prepare(args, process)
    net = DistributedDataParallel(run.net) if process.count > 1 else run.net
    take_step = recon_step if args.mode == "recon" else sft_step
    parameters = [p for p in run.net.parameters() if p.requires_grad]
    optimizer = make_optimizer(run.net, args)

    folder = Path(args.out_dir)
    state_file, metrics_file = folder / "state.safetensors", folder / "metrics.jsonl"
    step = load_state(state_file, run.net, optimizer) if args.resume else 0
    if step > args.max_steps:
        raise UserError(f"--max_steps {args.max_steps}: the run in {folder} has done {step} steps")
    earlier = metrics_file.read_text().splitlines(keepends=True)[:step] if args.resume else []  # one per step
    best = math.inf  # lowest validation loss
    for line in earlier:
        best = min(best, json.loads(line).get("val_loss", math.inf))
    if is_first:
        print(f"{args.mode}: {sum(p.numel() for p in parameters):,} parameters, into {folder}/", flush=True)
        if args.wandb:
            import wandb  # optional, see check_settings

            wandb.init(project="text-to-lora", name=folder.name, config=vars(args))

    interrupts, log = on_ctrl_c(), None
    bar = tqdm(total=args.max_steps, initial=step, disable=not is_first, desc=args.mode)
    n_examples = (args.tasks_per_batch or len(run.tasks)) * args.examples_per_task  # of a step
    measured = {}  # by the last validation
    while step < args.max_steps:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]

        # All processes draw the same tasks and compute different parts; noise (dropout, NEFTune) differs.
        drawn = data.draw(run.tasks, step, args)
        torch.manual_seed(random.Random(f"{args.seed} {step} {process.rank}").getrandbits(63))
        optimizer.zero_grad()
        loss = take_step(run, net, drawn)
        interrupted = torch.tensor(float(len(interrupts)), device=process.device)
        if process.count > 1:
            dist.all_reduce(loss)
            dist.all_reduce(interrupted)  # all processes stop after the same step
            for p in parameters:
                p.grad *= process.count  # DDP has averaged the gradients of the parts, which add up
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        if not torch.isfinite(loss + grad_norm):
            raise UserError(f"the loss is {loss.item()} in step {step}; try a lower --lr")
        optimizer.step()
        step += 1

        is_validated = bool(run.val_tasks) and (step % args.val_every == 0 or step == args.max_steps)
        if is_validated and (is_first or args.shard):
            measured = validate(run)
        if is_first:
            is_new = log is None
            if is_new:  # a run that fails in its first step leaves nothing behind
                folder.mkdir(parents=True, exist_ok=True)
                write_file(folder / "train.args", args.as_text)
                write_file(metrics_file, "".join(earlier))
                log = metrics_file.open("a")
            record = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
            if is_validated:
                record |= measured
                if measured["val_loss"] <= best:  # keep the best weights
                    best = measured["val_loss"]
                    save(run, folder)
            log.write(json.dumps(record) + "\n")
            log.flush()
            speed = {"examples/s": f"{(bar.format_dict['rate'] or 0) * n_examples:.1f}"}
            bar.set_postfix({"loss": record["loss"]} | measured | speed, refresh=False)
            bar.update()
            if args.wandb:
                wandb.log(record, step=step)
            if is_new or step % args.val_every == 0 or interrupted:
                save_state(state_file, step, run.net, optimizer)
        if interrupted and step < args.max_steps:
            break
    bar.close()

    finished = step == args.max_steps
    if is_first and finished:
        if best == math.inf:  # without a validation
            save(run, folder)
        state_file.unlink()
    del net  # DDP holds the group of processes
    processes.leave()
    if not finished:
        again = f"{processes.launcher()} train.py --resume --out_dir {shlex.quote(str(folder))}"
        if is_first:
            print(f"interrupted after {step} steps; to continue: {again}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command(main)
