"""Train adapters, or a hypernetwork that writes them.

    python train.py --mode sft                                     # in the tiny world, on one process
    torchrun --nproc_per_node=2 train.py --mode sft                # the same batches on two processes
    python train.py --base_model mistral-7b --help                 # the settings of that run

--mode says what is trained, and by which loss:

    lora       ordinary LoRAs by the task loss: one per task (the oracles), or one for all (--multi_task)
    recon      a hypernetwork, to write the same adapters as the oracles (paper, section 3.1)
    sft        a hypernetwork, by the task loss through the frozen base model (paper, section 3.2)
"""

import argparse
import dataclasses
import json
import math
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

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
from lora import Adapter, UserError

# -------------------- Settings: kind of run = (value in the tiny world, published value) --------------------
#
# Published are the scripts of SakanaAI/text-to-lora and doc-to-lora, where SFT takes 5 H100-days; to begin
# with, try a tenth of that: --max_steps 118000. Base models other than tiny take the published values. The
# first of these kinds that has an entry counts: the tasks, the arch with the base model, the arch,
# "multi_task" (with --multi_task, in place of the mode) or the mode, "any".

SETTINGS = {
    # steps; published: any 20,000 epochs of 59, recon 10,000 of 120, lora up to 100 epochs (2500 is a guess)
    "max_steps": dict(any=(1000, 1_180_000), recon=(3000, 1_200_000), lora=(240, 2500), d2l=(2600, 80_000)),
    # highest learning rate, and that of the network's heads as a multiple of it
    "lr": dict(any=(3e-3, 2.5e-5), recon=(4e-3, 1e-3), lora=(3e-3, 8e-5), d2l=(2e-3, 4e-5)),
    "head_lr": dict(any=(1 / 16, 1.0), d2l=(1.0, 1.0)),
    # share of the steps in which the learning rate rises (published d2l: 100 of 80,000); how it falls then
    "warmup": dict(any=(0.1, 0.2), recon=(0.1, 0.1), lora=(0.1, 0.1), d2l=(0.04, 0.00125)),
    "schedule": dict(any=("linear", "linear"), d2l=("linear", "cosine")),
    # AdamW (betas 0.9, 0.999; eps 1e-8); longer gradients are clipped
    "weight_decay": dict(any=(1e-2, 1e-2), recon=(1e-2, 1e-3), lora=(1e-2, 1e-3), multi_task=(1e-2, 1e-3)),
    "max_grad_norm": dict(any=(1.0, 1.0)),
    # the batch of a step; lora: all tasks, each with its own LoRA; d2l: documents, and questions of each
    "tasks_per_batch": dict(any=(128, 8), recon=(64, 4), lora=(None, None), d2l=(32, 8)),
    "examples_per_task": dict(any=(1, 1), lora=(4, 8), d2l=(4, 1)),
    "micro_batch": dict(any=(64, 8)),  # rows that go through the base model at once
    "max_tokens": dict(any=(512, 512)),  # longer examples are left out
    # dropout of LoRAs and in Text-to-LoRA; noise on the input embeddings; smoothing of the labels
    "dropout": dict(any=(0.1, 0.05), recon=(0.0, 0.05), lora=(0.0, 0.05), d2l=(0.0, 0.0)),
    "neftune_alpha": dict(any=(0.0, 5.0), needle=(0.0, 0.0)),
    "label_smoothing": dict(any=(0.0, 0.1), d2l=(0.0, 0.0)),
    # weights in the loss (not of recon) of the mean square and the mean absolute value of A and B
    "l2": dict(any=(1e-3, 1e-3), lora=(0.0, 0.0), multi_task=(0.0, 0.0), d2l=(1e-3, 0.0)),
    "l1": dict(any=(0.0, 0.0), d2l=(0.0, 0.1), needle=(0.0, 1.5)),
    "short_first": dict(any=(False, False), d2l=(True, True)),  # short documents first (published: not said)
    # d2l: match the teacher's likeliest k tokens in place of the answers (0: learn the answers)
    "distill": dict(any=(0, 0), d2l=(0, 16), needle=(0, 0)),
    "recon_loss": dict(any=("z_score", "delta_w")),
    "size": dict(any=("large", "large"), recon=("large", "medium")),
    "rank": dict(any=(8, 8)),  # of the adapters; for d2l of each chunk
    "alpha": dict(any=(16.0, 16.0), d2l=(128.0, 128.0)),  # scaling is alpha / sqrt(rank); d2l: 2 r^2
    "target_modules": dict(any=("q_proj,v_proj", "q_proj,v_proj"), d2l=("down_proj", "down_proj")),
    "instruction": dict(any=(False, True), d2l=(False, False)),  # the task's definition stands in the prompt
    "tasks": dict(any=("tiny", "lots-of-loras"), d2l=("facts", "needle")),
    "val_every": dict(any=(250, 10_000)),  # steps between two validations, which keep the best weights
    # the network's own fields
    "net": {
        "any": ("", ""),
        "t2l": ("latent_size=128 head_in_size=256 input_dropout=0.3", "head_in_size=512 full_stop=true"),
        "t2l gemma-2-2b": ("", "latent_size=512 head_in_size=2048 full_stop=true"),
        "t2l llama-3.1-8b": ("", "latent_size=512 head_in_size=2048 full_stop=true"),
        "d2l": ("latent_size=128 n_blocks=1 n_heads=4 chunk_len=4 chat=false", "latent_size=512 n_blocks=9"),
        "needle": ("", "latent_size=512 n_blocks=8 n_latents=208 early_exit=true"),
    },
}

def settings_of(args: argparse.Namespace) -> dict:
    """The values of SETTINGS for a run of this --base_model, --mode, --arch, --multi_task and --tasks; and
    the text encoder and the precision that go with it."""
    base = model.preset_name(args.base_model)
    kinds = [f"{args.arch} {base}", args.arch, "multi_task" if args.multi_task else args.mode, "any"]

    def value(name: str, kinds: list[str]):
        entries = SETTINGS[name]
        return next(entries[kind] for kind in kinds if kind in entries)[0 if base == "tiny" else 1]

    tasks = args.tasks or value("tasks", kinds)
    values = {name: value(name, [tasks, *kinds]) for name in SETTINGS}
    encoder = model.PRESETS[base][1] if base in model.PRESETS else "base"
    on_gpu = torch.cuda.is_available() and args.mode != "recon"  # reconstruction is in float32, as published
    return values | {"encoder": encoder, "dtype": "bfloat16" if on_gpu else "float32"}

def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags; their defaults come from SETTINGS."""
    p.add_argument("--mode", default="sft", choices=["lora", "recon", "sft"], help="See above.")
    p.add_argument("--arch", default="t2l", choices=hypernet.ARCHS, help="Text-to-LoRA or Doc-to-LoRA.")
    p.add_argument("--base_model", default="tiny", help=f"{', '.join(model.PRESETS)}, a hub id or a folder.")
    p.add_argument("--encoder", help="Text encoder: hash, base, a hub id or a folder; or several: A+B.")
    p.add_argument("--size", choices=hypernet.SIZES, help="Size of Text-to-LoRA.")
    p.add_argument("--net", metavar='"FIELD=VALUE ..."', help="The network's own fields; values in JSON.")
    p.add_argument("--target_modules", help="Linear layers that get an adapter.")
    p.add_argument("--rank", type=int, help="Of the adapters; for d2l of each chunk.")
    p.add_argument("--multi_task", action="store_true", help="lora: one adapter for all tasks.")
    p.add_argument("--recon_loss", choices=["z_score", "plain", "delta_w"], help="recon: what to compare.")
    p.add_argument("--tasks", help="tiny, lots-of-loras, for d2l facts or needle, or a folder of task files.")
    p.add_argument("--split", default="train", choices=["train", "val", "test"], help="Tasks to train on.")
    p.add_argument("--n_tasks", type=int, help="Use that many of the tasks; by default all.")
    p.add_argument("--oracles", help="recon: the folder that --mode lora wrote.")
    switch = argparse.BooleanOptionalAction
    p.add_argument("--instruction", action=switch, help="Put the task's definition before inputs.")
    p.add_argument("--like", metavar="DIR", help="Take the settings of the run in that folder.")
    p.add_argument("--max_steps", type=int, help="Training steps.")
    p.add_argument("--lr", type=float, help="Highest learning rate.")
    p.add_argument("--tasks_per_batch", type=int, help="In each step, over all processes (lora: all).")
    p.add_argument("--examples_per_task", type=int, help="In each step.")
    p.add_argument("--micro_batch", type=int, help="Rows in the base model at once, on each process.")
    p.add_argument("--dropout", type=float, help="On the input of the adapters, and in Text-to-LoRA.")
    p.add_argument("--neftune_alpha", type=float, help="Noise on the base model's input embeddings.")
    p.add_argument("--seed", type=int, default=0, help="Of all randomness.")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="Of all but the trained weights.")
    p.add_argument("--gradient_checkpointing", action="store_true", help="Save memory in the base model.")
    p.add_argument("--out_dir", default="out/run", help="A new folder, or with --resume that of the run.")
    p.add_argument("--val_every", type=int, help="Steps between two validations, and two saves of the state.")
    p.add_argument("--resume", action="store_true", help="Continue the run in --out_dir, with its settings.")
    p.add_argument("--wandb", action="store_true", help="Log to Weights & Biases as well.")

def parse_args() -> argparse.Namespace:
    """The settings: SETTINGS, or those of another run (--like, --resume); then the command line's."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=lora.Help)
    add_flags(p)
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    typed = p.parse_known_args(words)[0]  # 1. What was typed tells which run to take settings from.
    folder, recorded = Path(typed.out_dir), {}
    if typed.resume and not (folder / "state.safetensors").exists():
        raise UserError(f"--resume: {folder} holds no interrupted run")
    if other := folder if typed.resume else typed.like:
        of_this_call = {"out_dir": typed.out_dir, "resume": False, "wandb": False}
        recorded = lora.read(Path(other) / "train_args.json") | of_this_call
    p.set_defaults(**recorded)
    given = p.parse_known_args(words)[0]  # 2. With those settings it tells the kind of run.
    values = settings_of(given) | recorded
    net = f"{values['net']} {typed.net or ''}".strip()  # what is said later wins
    more = [f"{name} {value}" for name, value in values.items() if name not in vars(typed)]
    p.epilog = f"in SETTINGS only: {', '.join(more)}"
    p.set_defaults(**values | {"net": net})
    args = p.parse_args()  # 3. Now each flag has its default, and --help shows it.
    args.net = net
    reads = hypernet.ARCHS[args.arch][0].reads
    if reads == "documents" and args.mode != "sft":
        raise UserError(f"--arch {args.arch} is trained with --mode sft")
    if args.tasks in data.SOURCES and (reads == "documents") != (args.tasks in data.DOCUMENTS):
        raise UserError(f"--tasks {args.tasks} does not go with --arch {args.arch}")
    if args.mode == "recon" and not args.oracles:
        raise UserError("--mode recon needs --oracles DIR, a folder that --mode lora wrote")
    there = {file.name for file in folder.iterdir()} if folder.exists() else set()
    if there - {"answers.json"} and not args.resume:  # which is written before training starts
        raise UserError(f"--out_dir {folder} is in use; choose another, or --resume an interrupted run")
    return args

# -------------------- The losses --------------------

def answer_logits(base: nn.Module, examples: list[tuple[list[int], list[int]]], neftune_alpha: float = 0.0):
    """Run the base model on n examples (ids of prompt and answer), with the adapters that are set. Returns at
    all answer tokens (logits [tokens, vocabulary], example [tokens], right token [tokens])."""
    ids = model.pad([p + a for p, a in examples], 0).to(base.device)  # [n, T], padded at the end: no mask
    answers = model.pad([[-1] * len(p) + a for p, a in examples], -1).to(base.device)  # -1 is no answer
    x = base.get_input_embeddings()(ids)  # [n, T, d]
    if neftune_alpha:  # NEFTune (arXiv 2310.05914): uniform noise of a size that does not depend on T and d
        x = x + torch.empty_like(x).uniform_(-1, 1) * neftune_alpha / (x.shape[1] * x.shape[2]) ** 0.5
    example, at = (answers[:, 1:] >= 0).nonzero(as_tuple=True)  # the position before each answer token
    columns = torch.arange(at.min(), at.max() + 1, device=at.device)  # no logits for the prompts
    logits = base(inputs_embeds=x, logits_to_keep=columns, use_cache=False).logits  # [n, columns, vocabulary]
    return logits[example, at - at.min()].float(), example, answers[example, at + 1]

def example_mean(losses: Tensor, example: Tensor) -> Tensor:
    """Losses of tokens, averaged over each example's, then over the examples: these weigh the same."""
    length = torch.bincount(example)
    return (losses / length[example]).sum() / len(length)

def answer_loss(logits: Tensor, example: Tensor, right: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the answers, from `answer_logits`."""
    return example_mean(F.cross_entropy(logits, right, reduction="none", label_smoothing=smoothing), example)

def distill_loss(logits: Tensor, example: Tensor, teacher: Tensor, k: int) -> Tensor:
    """KL divergence from a teacher, over its k likeliest tokens. logits, teacher [tokens, vocabulary]."""
    likely, tokens = teacher.log_softmax(-1).topk(k)  # [tokens, k]
    ours = logits.log_softmax(-1).gather(-1, tokens)
    return example_mean((likely.exp() * (likely - ours)).sum(-1), example)

def weight_size(adapter: Adapter, size) -> Tensor:
    """Mean of size(A) and of size(B), torch.abs or torch.square, summed over the modules."""
    return sum(size(A).mean() + size(B).mean() for A, B in adapter.values())

def recon_loss(kind: str, adapter: Adapter, target: Adapter, scale: dict[str, Tensor]) -> Tensor:
    """L1 between generated adapters and oracles, averaged over the modules: of 10,000 BA ("delta_w", as
    published), or of A and B over `scale`: 1 ("plain"), or the oracles' deviation ("z_score")."""
    losses = []
    for name, (A, B) in adapter.items():
        target_A, target_B = target[name]
        if kind == "delta_w":
            losses.append(10_000 * (B @ A - target_B @ target_A).abs().mean())
        else:
            of_A = ((A - target_A) / scale[f"{name}_A"]).abs().mean()
            of_B = ((B - target_B) / scale[f"{name}_B"]).abs().mean()
            losses.append((of_A + of_B) / 2)
    return sum(losses) / len(losses)

# -------------------- What is trained --------------------

@dataclasses.dataclass
class Run:
    """What the steps of a run work with."""

    args: argparse.Namespace
    tasks: list[data.Task]
    val_tasks: list[data.Task]
    base: nn.Module | None  # the frozen model (for recon only if it is the text encoder, too)
    tokenizer: Any
    oracles: Adapter | None  # the adapters to imitate (recon only), one per task
    net: nn.Module  # what is trained: it writes adapters
    condition: Callable  # what the net is given for a batch

def prepare(args, device: torch.device) -> Run:
    """Load the tasks and the frozen models, and make what is trained."""
    splits, base, tokenizer, oracles = data.load_tasks(args.tasks), None, None, None
    tasks = data.pick(splits, args.split, args.n_tasks)
    if args.short_first:
        tasks.sort(key=lambda task: len(task.descriptions[0]))
    if args.mode != "recon" or "base" in args.encoder.split("+"):
        base, tokenizer = model.load_base(args.base_model, device, getattr(torch, args.dtype))
    if args.mode == "recon":
        tasks = [task for task in tasks if (Path(args.oracles) / task.name).exists()]
        if not tasks:
            raise UserError(f"{args.oracles} holds no adapters of the {args.split} tasks of {args.tasks}")
        oracles, config = lora.load_adapters([Path(args.oracles) / task.name for task in tasks], device)
        if model.preset_name(config.base_model) != model.preset_name(args.base_model):
            raise UserError(f"--oracles {args.oracles} are for {config.base_model}, not {args.base_model}")
    else:
        names = args.target_modules.split(",")
        config = lora.config_for(base, names, model.full_name(args.base_model), r=args.rank, alpha=args.alpha)
        lora.inject(base, names, args.dropout).train()
        if device.type == "cpu":
            base.set_attn_implementation("eager")  # its backward pass is the faster one there
        write_answers(base, tokenizer, tasks + splits["val"], Path(args.out_dir) / "answers.json")
        model.check_known(tokenizer, [text for task in tasks for text in task.texts()])
        if args.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})

    if args.mode == "lora":
        net = lora.LoRABank(config, 1 if args.multi_task else len(tasks)).to(device)
        indices = lambda batch: [0 if args.multi_task else i for i, _, _ in batch]
        condition = lambda batch: torch.tensor(indices(batch), device=device)
    else:
        net, conditions = new_hypernet(args, config, base, tokenizer, device)
        condition = lambda batch: conditions([description for _, description, _ in batch])
        if args.mode == "sft":
            net.start_as_lora()
        elif args.recon_loss == "z_score":
            net.normalize(oracles)
    val_tasks = [task for task in splits["val"] if task.test][:32]
    val_tasks = val_tasks if args.mode == "sft" or args.multi_task else []
    return Run(args, tasks, val_tasks, base, tokenizer, oracles, net, condition)

def write_answers(base: nn.Module, tokenizer, documents: list[data.Task], file: Path) -> None:
    """Questions that have no answer get the base model's, written with the document in its prompt, as
    published. They are kept in `file`, for other processes and for a run that starts again."""
    asked = [(task, example) for task in documents for example in task.train if not example[1]]
    key = lambda task, example: f"{task.name}: {example[0]}"
    known = lora.read(file) if file.exists() else {}
    todo = [pair for pair in asked if key(*pair) not in known]
    todo.sort(key=lambda pair: len(pair[0].descriptions[0]))
    for i in tqdm(range(0, len(todo), 32), desc="answers", disable=not todo):
        part = todo[i : i + 32]
        chats = [model.prompt(tokenizer, example[0], task.descriptions[0]) for task, example in part]
        answers = model.answer(base, tokenizer, [model.render(tokenizer, chat) for chat in chats], 64)
        known |= {key(*pair): text for pair, text in zip(part, answers)}
        if i % 3200 == 0 or i + 32 >= len(todo):
            file.parent.mkdir(parents=True, exist_ok=True)
            lora.write(file, known)
    for task, example in asked:
        example[1].append(known[key(task, example)])

def new_hypernet(args, config: lora.LoRAConfig, base, tokenizer, device):
    """(the network of --arch for adapters as in `config`, the function texts -> its condition)"""
    kind, settings = hypernet.ARCHS[args.arch]
    known, z_score = settings.__dataclass_fields__, args.mode == "recon" and args.recon_loss == "z_score"
    values = vars(args) | vars(config) | {"z_score": z_score}
    values = {name: value for name, value in values.items() if name in known}
    try:
        values |= {text.split("=")[0]: json.loads(text.split("=")[1]) for text in args.net.split()}
        c = settings(**values)
    except (IndexError, TypeError, ValueError) as e:
        raise UserError(f"--net {args.net}: {e}; --arch {args.arch} has {', '.join(known)}") from None
    if kind.reads == "documents":
        encode, c.input_size = None, base.config.get_text_config().hidden_size
    else:
        encode = model.load_encoder(args.encoder, device, (base, tokenizer), c.full_stop)
        c.input_size = encode(["cat"]).shape[1]
    net = kind(c).to(device)
    return net, hypernet.conditions(net, base, tokenizer, encode)

# -------------------- A training step --------------------

def autocast(run: Run):
    """bfloat16 computation with float32 weights, if --dtype says so."""
    device = next(run.net.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=run.args.dtype == "bfloat16")

def set_row_adapters(run: Run, adapters: Adapter, rows: list[data.Row]) -> None:
    """Give each row of the base model's next batch its own adapter."""
    own = lora.select(adapters, [row.k for row in rows])  # A [rows, L, r, in]
    own = {name: (A.to(run.base.dtype), B.to(run.base.dtype)) for name, (A, B) in own.items()}
    lora.set_adapter(run.base, own, run.net.config.scaling)

def task_loss(run: Run, adapters: Adapter, rows: list[data.Row]) -> Tensor:
    """The loss of rows that go through the base model together, each with its own adapter."""
    args, base = run.args, run.base
    if args.distill:  # the teacher is the base model itself, with the document in its prompt
        lora.set_adapter(base, None)
        with torch.no_grad():
            teacher, _, _ = answer_logits(base, [(row.teacher_prompt, row.answer) for row in rows])
    set_row_adapters(run, adapters, rows)
    examples = [(row.prompt, row.answer) for row in rows]
    logits, example, right = answer_logits(base, examples, args.neftune_alpha)
    if args.distill:
        return distill_loss(logits, example, teacher, args.distill)
    return answer_loss(logits, example, right, args.label_smoothing)

def sft_step(run: Run, net: nn.Module, batch: data.Batch) -> Tensor:
    """One training step through the frozen base model, of a hypernetwork or of ordinary LoRAs (`LoRABank`).

    The adapters are the interface between the two networks: the step goes forward through the hypernetwork,
    forward and backward through the base model, then backward through the hypernetwork. It leaves gradients
    in `net` and returns the loss. `net` is run.net, wrapped by DDP if there are several processes.
    """
    args, rows = run.args, data.make_rows(run.tokenizer, run.tasks, batch, run.args)

    # 1. One forward pass of the hypernetwork writes all adapters of the step.
    with autocast(run):
        written = net(run.condition(batch))  # A [tasks, L, r, in], B [tasks, L, out, r]

    # 2. Detached, they are leaves: they collect the gradients of all that is computed with them.
    leaf = lambda x: x.detach().requires_grad_()
    leaves = {name: (leaf(A), leaf(B)) for name, (A, B) in written.items()}
    loss = args.l1 * weight_size(leaves, torch.abs) + args.l2 * weight_size(leaves, torch.square)
    loss.backward()  # gives each leaf a gradient, of zeros at least
    loss = loss.detach()

    # 3. The rows go through the base model a few of like length at a time. Each backward pass frees the
    #    activations, so the memory of a step is that of one micro-batch.
    for i in range(0, len(rows), args.micro_batch):
        part = rows[i : i + args.micro_batch]
        with autocast(run):
            part_loss = task_loss(run, leaves, part) * (len(part) / len(rows))
        part_loss.backward()
        loss += part_loss.detach()

    # 4. One backward pass through the hypernetwork, from the gradients of A and B. Here DDP averages.
    outputs = [x for pair in written.values() for x in pair]
    grads = [x.grad for pair in leaves.values() for x in pair]
    torch.autograd.backward(outputs, grads)
    return loss

def recon_step(run: Run, net: nn.Module, batch: data.Batch) -> Tensor:
    """One step of reconstruction, without a base model. Leaves the gradients in `net`, returns the loss."""
    with autocast(run):
        written = net(run.condition(batch))
    target = lora.select(run.oracles, [i for i, _, _ in batch])
    loss = recon_loss(run.args.recon_loss, written, target, run.net.scale)
    loss.backward()
    return loss.detach()

@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Loss and accuracy on up to 8 examples of each validation task, with its first description. An answer is
    right if each token of it is the likeliest one: greedy decoding would write the same."""
    run.net.eval()
    run.base.eval()
    batch = [(i, task.descriptions[0], task.test[:8]) for i, task in enumerate(run.val_tasks)]
    rows, loss, right = data.make_rows(run.tokenizer, run.val_tasks, batch, run.args), 0.0, 0
    with autocast(run):
        written = run.net(run.condition(batch))
        for i in range(0, len(rows), run.args.micro_batch):
            part = rows[i : i + run.args.micro_batch]
            set_row_adapters(run, written, part)
            logits, example, target = answer_logits(run.base, [(row.prompt, row.answer) for row in part])
            loss += answer_loss(logits, example, target).item() * len(part)
            wrong = example[logits.argmax(-1) != target].unique()
            right += len(part) - len(wrong)
    run.net.train()
    run.base.train()
    return {"val_loss": loss / len(rows), "val_accuracy": right / len(rows)}

# -------------------- The run --------------------

def save(run: Run, folder: Path) -> None:
    """Write what was trained: a hypernetwork, one adapter folder per task, or the multi-task adapter."""
    if run.args.mode != "lora":
        return hypernet.save_hypernet(run.net, folder)
    names = [""] if run.args.multi_task else [task.name for task in run.tasks]
    for i, name in enumerate(names):
        lora.save_adapter(folder / name, run.net(i), run.net.config)

def save_state(path: Path, step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All that the next step depends on, in one file. A step's randomness follows from its number."""
    tensors = {"step": torch.tensor(step)} | {f"net {k}": t for k, t in net.state_dict().items()}
    for name, p in net.named_parameters():
        tensors |= {f"{k} {name}": t for k, t in optimizer.state.get(p, {}).items()}
    lora.write(path, tensors)

def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state into net and optimizer; returns the number of steps done."""
    tensors = lora.read(path)
    net.load_state_dict({k: tensors[f"net {k}"] for k in net.state_dict()})
    for name, p in net.named_parameters():
        if p.requires_grad:
            for k in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[p][k] = tensors[f"{k} {name}"].to(p.device)
    return int(tensors["step"])

def start_processes() -> tuple[int, int, int, torch.device]:
    """(rank, rank on this machine, world size, device). torchrun sets the environment; else it is one."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return rank, local_rank, world, device

NO_DECAY = ("scale", "bias", "latents", "queries", "b1", "b2")

def make_optimizer(net: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW. Heads have their own learning rate; scales, biases, norms and latents no weight decay."""
    groups = []
    for name, p in net.named_parameters():
        lr_scale = args.head_lr if name.startswith("head") else 1.0
        decays = p.dim() > 1 and not any(word in name for word in NO_DECAY)
        if p.requires_grad:
            groups.append(dict(params=[p], lr_scale=lr_scale, weight_decay=args.weight_decay * decays))
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)

def learning_rate(step: int, args) -> float:
    """Linear warm-up, then linear decay to 0, or a cosine to 1e-7."""
    warmup = max(1, round(args.warmup * args.max_steps))
    left = (args.max_steps - step) / max(1, args.max_steps - warmup)  # from 1 to 0
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "cosine":
        return 1e-7 + (args.lr - 1e-7) * (1 - math.cos(math.pi * left)) / 2
    return args.lr * left

def main() -> None:
    args = parse_args()
    rank, local_rank, world, device = start_processes()
    torch.manual_seed(args.seed)
    if local_rank > 0:
        dist.barrier()  # the first process of each machine downloads what has to be downloaded
    run = prepare(args, device)
    if local_rank == 0 and world > 1:
        dist.barrier()
    share, rest = divmod(args.tasks_per_batch or len(run.tasks), world)  # tasks per step and process
    if rest:
        raise UserError(f"the tasks of a step cannot be shared out evenly among {world} processes")
    net = DistributedDataParallel(run.net) if world > 1 else run.net
    take_step = recon_step if args.mode == "recon" else sft_step
    parameters = [p for p in run.net.parameters() if p.requires_grad]
    optimizer = make_optimizer(run.net, args)

    folder = Path(args.out_dir)
    state, metrics = folder / "state.safetensors", folder / "metrics.jsonl"
    step = load_state(state, run.net, optimizer) if args.resume else 0
    if step >= args.max_steps:
        raise UserError(f"--max_steps {args.max_steps}: the run in {folder} has done {step} steps")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lines = metrics.read_text().splitlines()[:step] if args.resume else []
        metrics.write_text("".join(line + "\n" for line in lines))
        best = min([json.loads(line).get("val_loss", math.inf) for line in lines], default=math.inf)
        lora.write(folder / "train_args.json", vars(args))
        log = metrics.open("a")
        print(f"{args.mode}: {sum(p.numel() for p in parameters):,} parameters, into {folder}/", flush=True)
        if args.wandb:
            import wandb
            wandb.init(project="text-to-lora", name=folder.name, config=vars(args))

    bar, measured = tqdm(total=args.max_steps, initial=step, disable=rank > 0, desc=args.mode), {}
    while step < args.max_steps:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # All processes draw the same batch and take their shares of it; noise (dropout, NEFTune) differs.
        batch = data.draw(run.tasks, step, args)[rank * share : (rank + 1) * share]
        torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))
        optimizer.zero_grad()
        loss = take_step(run, net, batch)
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        if not torch.isfinite(loss + grad_norm):
            raise UserError(f"the loss is {loss.item()} in step {step}; try a lower --lr")
        optimizer.step()
        step += 1
        if rank > 0:
            continue

        row = dict(step=step, loss=loss.item(), lr=lr, grad_norm=grad_norm.item())
        if run.val_tasks and (step % args.val_every == 0 or step == args.max_steps):
            measured = validate(run)
            row |= measured
            if measured["val_loss"] <= best:  # keep the best weights
                best = measured["val_loss"]
                save(run, folder)
        log.write(json.dumps(row) + "\n")
        log.flush()
        bar.set_postfix({"loss": row["loss"]} | measured, refresh=False)
        bar.update()
        if args.wandb:
            wandb.log(row, step=step)
        if step % args.val_every == 0 and step < args.max_steps:
            save_state(state, step, run.net, optimizer)
    bar.close()
    if rank == 0:
        if not run.val_tasks:
            save(run, folder)
        state.unlink(missing_ok=True)
    if dist.is_initialized():
        time.sleep(1)  # the last all_reduce's thread needs Python's lock once more: without, this may hang
        dist.destroy_process_group()

if __name__ == "__main__":
    lora.command(main)
