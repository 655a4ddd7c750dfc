"""Write an adapter from a description, or from a document, and see what it does.

    python generate.py --desc "Keep only the animals, in French." --input "cat red dog shirt"
    python generate.py --desc "..." --desc "..." --input "..." --input "..."
    python generate.py --doc notes.txt --input "What is ...?"
    python generate.py --adapter out/mine/swap --input "..."             # one that is there already

The adapter is a folder that PEFT loads. The base model's answers stand beside those with the adapter.
"""

import argparse
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

import hypernet
import lora
import model
from lora import Adapter
from support import UserError, at_least, command, make_parser, read_json, write_file


def parse_args() -> argparse.Namespace:
    """The flags, after all checks that need no model."""
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--desc", action="append", help="what to do, in words; several make several adapters")
    source.add_argument("--doc", action="append", help="text file to read; several make one adapter")
    source.add_argument("--adapter", help="use the adapter in this folder; nothing is written")
    parser.add_argument("--input", action="append", default=[], help="a text to answer; several are allowed")
    parser.add_argument("--out", help="adapter folder (default: out/adapter); for several: 0, 1, ... in it")
    parser.add_argument("--merge", help="new folder for a base model with merged weights")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=64, help="longest answer (default: 64)")
    add_model_flags(parser)
    args = parser.parse_args()
    if args.adapter and (args.hypernet or args.out or args.encoder):
        raise UserError("--hypernet, --out and --encoder go with --desc or --doc")
    if args.doc and (args.encoder or args.instruction):
        raise UserError("--encoder and --instruction go with --desc")
    if args.merge and len(args.desc or []) > 1:
        raise UserError("--merge takes a single --desc")
    if not all(text.strip() for text in [*(args.desc or []), *args.input]):
        raise UserError("a text of --desc or --input is empty")
    args.base_model = args.base_model and model.resolve(args.base_model)
    args.out = Path(args.out or "out/adapter")
    if not args.adapter:
        check_out(args.out)
        if args.merge is not None and args.out.resolve().is_relative_to(Path(args.merge).resolve()):
            raise UserError(f"--merge {args.merge!r} would hold --out; choose another")
    if args.merge is not None and Path(args.merge).exists():
        raise UserError(f"--merge {args.merge!r} is no new folder; choose another")
    return args


def add_net_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which hypernetwork writes adapters, and for which base model."""
    add = parser.add_argument
    add("--base_model", help=f"{', '.join(model.PRESETS)}, a hub id or a folder; default: the net's")
    add("--hypernet", help="a folder, or USER/REPO/FOLDER on the hub; default: the shipped one")
    add("--encoder", help="new folder or id of the text encoder used in training")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which models answer, and how; eval.py has them, too."""
    add_net_flags(parser)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--instruction", action=switch, help="put the description before inputs; default: as in training")
    add("--device", default="auto", help=model.DEVICES)
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU that has it")


# -------------------- Loading what was trained --------------------


def shipped_hypernet(base_model: str, reads: str) -> str | None:
    """The folder of the hypernetwork in checkpoints/ for a base model; None if there is none."""
    shape = [-1]
    if Path(base_model).is_dir():
        shape = lora.base_shape(AutoConfig.from_pretrained(base_model))
    name = "d2l" if reads == "documents" else "sft_large"
    for file in Path(__file__).parent.glob(f"checkpoints/*/{name}/config.json"):
        config = read_json(file)
        if model.is_same_base(base_model, shape, model.resolve(config["base_model"]), config["base_shape"]):
            return str(file.parent)
    return None


def net_folder(args, reads: str) -> str:
    """--hypernet, or the folder of the shipped hypernetwork. UserError if there is none."""
    base_model = args.base_model or model.TINY
    if not (args.hypernet or Path(base_model).is_dir() or model.is_hub_id(base_model)):
        raise UserError(f"--base_model {base_model}: there is no such folder, nor an id USER/REPO on the hub")
    folder = args.hypernet or shipped_hypernet(base_model, reads)
    if not folder:
        message = f"no hypernetwork that reads {reads} is shipped for {base_model}"
        raise UserError(f"{message}; train one and pass it with --hypernet")
    return folder


def load_net(folder: str | Path, reads: str, device, encoder: str | None = None) -> nn.Module:
    """The hypernetwork of a folder, here or on the hub, perhaps with another --encoder. `connect` it next."""
    folder = model.fetch(folder, hypernet.FILES + hypernet.KNOWN)
    net = hypernet.load_hypernet(folder).to(device)
    if net.reads != reads:
        raise UserError(f"the hypernetwork in {folder} reads {net.reads}, not {reads}")
    if encoder and reads == "descriptions":
        net.config.encoder = encoder
    return net


def load_base_for(configs: list[lora.LoRAConfig], args, device):
    """The base model of these configs, or --base_model, with LoRA layers for their targets; its tokenizer."""
    base_model = model.resolve(args.base_model or (configs[0].base_model if configs else "tiny"))
    base, tokenizer = model.load_base(base_model, device, getattr(torch, args.dtype) if args.dtype else None)
    names = []
    for config in configs:
        model.check_base(base, config)
        names += config.targets
    if names:
        lora.inject(base, list(dict.fromkeys(names)))
    return base, tokenizer


# -------------------- What an adapter does --------------------


@torch.no_grad()
def write_adapters(net: nn.Module, texts: list, base: nn.Module) -> tuple[Adapter, float]:
    """(one adapter per text, the time in ms). For Doc-to-LoRA a text may be a list of texts."""
    started = time.perf_counter()
    on_gpu = base.device.type != "cpu"
    with torch.autocast(base.device.type, base.dtype, enabled=on_gpu and base.dtype == torch.bfloat16):
        adapters = net(texts)  # A [n, L, r, in]
    if on_gpu:
        torch.accelerator.synchronize(base.device)
    milliseconds = (time.perf_counter() - started) * 1000
    lora.check_fits(base, adapters)  # before any file is written
    return adapters, milliseconds


def ask(base, tokenizer, inputs: list[str], adapter: Adapter, scaling: float, instruction: str, args):
    """The answers to some inputs with an adapter; {} is none. Raises UserError if one is too long."""
    prompts = [model.render(tokenizer, text, instruction) for text in inputs]
    longest = max(len(model.tokenize(tokenizer, prompt)) for prompt in prompts)
    n_new, window = args.max_new_tokens, model.window_of(base)
    if longest + n_new > window:
        message = f"a prompt of {longest} tokens and an answer of {n_new}"
        raise UserError(f"{message} do not fit into the base model's window of {window}")
    with lora.use(base, adapter, scaling):
        answers = model.answer(base, tokenizer, prompts, n_new)
    for i, answer in enumerate(answers):
        cut = "" if answer.has_ended else " [cut: --max_new_tokens]"
        answers[i] = answer._replace(text=answer.text.strip() + cut)
    return answers


def compare(base, tokenizer, inputs: list[str], adapter: Adapter, config, text: str, args) -> float:
    """Print the answers of the base model and those with an adapter that was written from `text`.

    For a document, also print the times, and the answers of the base model with the document in its prompt
    if it fits. Returns how sure the least sure answer with the adapter is.
    """
    instruction = model.instruct(text) if args.instruction and text else ""
    rows = {"base model": ({}, instruction)}
    longest = max(len(model.tokenize(tokenizer, question)) for question in inputs)
    n_tokens = len(model.tokenize(tokenizer, text)) + longest + args.max_new_tokens + 64  # template
    if args.doc and n_tokens < model.window_of(base):
        rows["in context"] = ({}, text)
    rows["with adapter"] = (adapter, instruction)
    answers, times = {}, {}
    for label, (its_adapter, its_instruction) in rows.items():
        started = time.perf_counter()
        answers[label] = ask(base, tokenizer, inputs, its_adapter, config.scaling, its_instruction, args)
        times[label] = f"{label} {(time.perf_counter() - started) * 1000:.0f} ms"
    sure = [config.certainty(answer.log_prob) for answer in answers["with adapter"]]
    for i, question in enumerate(inputs):
        print(f"\n  {'input':12}  {question}")
        for label in answers:
            lines = answers[label][i].text.replace("\n", f"\n{'':16}")
            print(f"  {label:12}  {lines}")
        print(f"  {'sure':12}  {sure[i]:.0%}")
    if args.doc:
        print(f"\n  time of all answers: {', '.join(times.values())}")
    return min(sure)


SURE = 0.5  # below it an answer is called a guess


@torch.no_grad()
def note_guess(net, folder: Path, text: str, sure: float) -> None:
    """Name the words of a description that training never had; for a guess, the nearest that it had."""
    there = (folder / "known.json").exists()
    known = read_json(folder / "known.json") if there else {"words": [], "descriptions": []}
    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    new = [word for word in words if word not in known["words"]]
    if there and new:
        print(f"  note: no training description has the words: {', '.join(new)}")
    if sure < SURE:
        nearest = ""
        if there:
            ours = net.embed_task(net.encode([text])).cpu()  # [1, d/2]
            theirs = load_file(folder / "known.safetensors")["task_emb"].float()  # [tasks, d/2]
            i = F.cosine_similarity(ours, theirs).argmax()
            nearest = f'; the nearest that training had is "{known["descriptions"][i]}"'
        print(f"  note: this is probably a guess{nearest}")


# -------------------- Files --------------------

OUR_FILES = {*lora.ADAPTER_FILES, "description.txt"}  # of each adapter folder


def check_out(folder: Path) -> None:
    """Raise UserError if --out holds anything but what this command writes: it will be replaced."""
    for path in folder.rglob("*"):
        *parents, name = path.relative_to(folder).parts
        in_place = not parents or (len(parents) == 1 and parents[0].isdigit())
        is_ours = in_place and name in OUR_FILES and (path.parent / "description.txt").exists()
        if path.is_file() and not is_ours:
            raise UserError(f"--out {folder} holds more than this command writes ({path.name})")


@contextmanager
def whole_folder(folder: Path):
    """A new folder to write into. It replaces `folder` at the end of the block; after an error it goes."""
    unfinished = folder.resolve().with_name(f"{folder.resolve().name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_adapters(out: Path, texts: list[str], adapters: Adapter, config) -> list[Path]:
    """Write all adapters in place of what --out holds. Returns their folders."""
    names = [str(i) for i in range(len(texts))] if len(texts) > 1 else ["."]
    with whole_folder(out) as folder:
        for i, (name, text) in enumerate(zip(names, texts)):
            lora.save_adapter(folder / name, lora.select(adapters, [i]), config)
            write_file(folder / name / "description.txt", text + "\n")
    return [out / name for name in names]


def save_merged(merged: Path, base, tokenizer, config, text: str) -> None:
    """Write the merged model; generation_config.json is the base model's own."""
    with whole_folder(merged) as folder:
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        own = model.fetch(base.name_or_path, ["generation_config.json"]) / "generation_config.json"
        if own.exists():
            shutil.copy(own, folder)
        write_file(folder / "prompt.json", {"instruction": config.instruction})
        write_file(folder / "description.txt", text + "\n")
        for file in folder.rglob("*"):  # save_pretrained makes files for their owner only
            if file.is_file():
                file.chmod((folder / "description.txt").stat().st_mode)


def main() -> None:
    args = parse_args()
    device = model.pick_device(args.device)
    documents = [Path(path).read_text(encoding="utf-8-sig") for path in args.doc or []]
    if not all(document.strip() for document in documents):
        raise UserError("a file of --doc is empty")
    if args.adapter:
        adapters, config = lora.load_adapter(args.adapter)
        base, tokenizer = load_base_for([config], args, device)
        folders, texts = [args.adapter], [""]
        for name in ("description.txt", "definition.txt"):  # ours, and that of an oracle
            if Path(args.adapter, name).exists():
                texts = [Path(args.adapter, name).read_text(encoding="utf-8").strip()]
        model.check_known(tokenizer, args.input)
    else:
        reads = "documents" if args.doc else "descriptions"
        net_dir = model.fetch(net_folder(args, reads), hypernet.FILES + hypernet.KNOWN)
        net = load_net(net_dir, reads, device, args.encoder)
        config = net.config
        base, tokenizer = load_base_for([config], args, device)
        model.check_known(tokenizer, args.input + documents)
        net.connect(base, tokenizer)
        texts = ["\n\n".join(documents)] if args.doc else args.desc
        adapters, milliseconds = write_adapters(net, [documents] if args.doc else texts, base)
        folders = save_adapters(args.out, texts, adapters, config)
        print(f"{len(texts)} adapter{'s' if len(texts) > 1 else ''} written in {milliseconds:.1f} ms")

    if args.instruction is None:
        args.instruction = config.instruction
    if args.instruction and not texts[0]:
        message = "note: this adapter was trained with an instruction in the prompt; begin --input with it"
        print(message, file=sys.stderr)
    if args.instruction and not config.instruction:
        print("note: --instruction, but prompts in training had none: expect worse answers", file=sys.stderr)
    for i, (text, folder) in enumerate(zip(texts, folders)):
        n_tokens = len(model.tokenize(tokenizer, text))
        shown = f"{', '.join(args.doc)}: {n_tokens:,} tokens" if args.doc else shorten(text, 500)
        print(f"\n{shown}".rstrip())
        rank = next(iter(adapters.values()))[0].shape[-2]
        where = f"{', '.join(adapters)} in {len(config.adapted_layers())} layers"
        print(f"  adapter: {folder}/ (rank {rank} on {where})")
        if args.input:
            sure = compare(base, tokenizer, args.input, lora.select(adapters, [i]), config, text, args)
            if not args.adapter:
                note_guess(net, net_dir, text, sure)
    if not args.input:
        print('\n  to see what it does, add --input "..."')
    if args.merge:
        lora.merge(base, lora.select(adapters, [0]), config.scaling)
        save_merged(Path(args.merge), base, tokenizer, config, texts[0])
        print(f"\nmerged model: {args.merge}/")


if __name__ == "__main__":
    command(main)
