"""Write an adapter from a description, or from a document, and see what it does.

    python generate.py --desc "Keep only the animals, in French." --input "cat red dog shirt"
    python generate.py --desc "..." --desc "..." --input "..." --input "..."
    python generate.py --doc notes.txt --input "What is ...?"

The adapter is a folder that PEFT loads. The base model's answers stand beside those with the adapter.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

import hypernet
import lora
import model
from lora import Adapter
from support import files, flags, hub, processes
from support.files import UserError, command, read_file, read_object, write_file


def parse_args() -> argparse.Namespace:
    """The flags, checked as far as that goes without a model."""
    parser = flags.Parser(__doc__)
    parser.add_argument("--desc", action="append", help="what to do, in words; several make several adapters")
    parser.add_argument("--doc", action="append", help="text file to read; several make one adapter")
    parser.add_argument("--input", action="append", help="a text to answer; may be given several times")
    parser.add_argument("--out", default="out/adapter", help="adapter folder; for several: 0, 1, ... in it")
    parser.add_argument("--merge", help="folder for the base model with the adapter merged into its weights")
    add_model_flags(parser)
    args = parser.parse_args()
    if not args.desc and not args.doc:
        raise UserError('say what to do (--desc "Translate the animals.") or what to know (--doc FILE)')
    if args.desc and args.doc:
        raise UserError("--desc and --doc: not both, since different networks read them")
    if args.merge and len(args.desc or []) > 1:
        raise UserError("--merge takes a single --desc")
    if args.merge and Path(args.merge).resolve() == Path(args.out).resolve():
        raise UserError("--out and --merge need two folders")
    if args.doc and args.instruction:
        raise UserError("--instruction goes with --desc")
    for flag, texts in (("--desc", args.desc), ("--input", args.input)):
        for i, text in enumerate(texts or [], 1):
            if not text.strip():
                raise UserError(f"{flag} is empty" if len(texts) == 1 else f"{flag} number {i} is empty")
    for folder in (args.out, args.merge):
        if folder == "":
            raise UserError("the name of a folder is empty (--out or --merge)")
        if folder:
            files.check_folder(Path(folder))
    return args


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which models answer, and how; eval.py has them, too."""
    add = parser.add_argument
    add("--base_model", help=f"{', '.join(hub.PRESETS)}, a hub id or a folder; default: the net's")
    add("--hypernet", help="a folder, or USER/REPO/FOLDER on the hub; default: the shipped one")
    add("--encoder", help="path or id of the text encoder, if it has moved since training")
    switch = argparse.BooleanOptionalAction
    add("--instruction", action=switch, help="put the description before inputs; default: as in training")
    add("--max_new_tokens", type=flags.at_least(1), help="longest answer; default: 64, in eval.py as needed")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, otherwise float32")


# -------------------- Loading what was trained --------------------


def load_net(name: str | None, reads: str, args, device: torch.device) -> tuple[nn.Module, Path]:
    """The hypernetwork of a folder, here or on the hub, and this folder; by default the shipped one."""
    folder = name or str(shipped_hypernet(args.base_model or "tiny", reads))
    folder = hub.fetch(folder, hypernet.FILES, flag="--hypernet")
    net = hypernet.load_hypernet(folder).to(device)
    if net.reads != reads:
        raise UserError(f"the hypernetwork in {folder} reads {net.reads}, not {reads}")
    return net, folder


def shipped_hypernet(base_model: str, reads: str) -> Path:
    """The folder of the hypernetwork in checkpoints/ for a base model; UserError if there is none."""
    shape = None
    if Path(base_model).is_dir():
        shape = lora.base_shape(hub.from_pretrained(AutoConfig, base_model))
    name = "d2l" if reads == "documents" else "sft_large"
    for file in hub.CHECKPOINTS.glob(f"*/{name}/config.json"):
        config = read_object(file)
        same_name = config["base_model"].lower() == hub.full_name(base_model).lower()
        if same_name or config["base_shape"] == shape:
            return file.parent
    raise UserError(f"no hypernetwork for {base_model} is shipped; train one and pass it with --hypernet")


def load_base_for(configs: list[lora.LoRAConfig], args, device: torch.device):
    """The base model of these configs, or --base_model, with LoRA layers for their targets; its tokenizer."""
    base_model = args.base_model or (configs[0].base_model if configs else "tiny")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    base, tokenizer = model.load_base(base_model, device, dtype)
    names = []
    for config in configs:
        hub.check_base(base_model, lora.base_shape(base.config), config.base_model, config.base_shape)
        names += config.targets
    lora.inject(base, list(dict.fromkeys(names)))
    return base, tokenizer


def load_reader_for(net: nn.Module, base: nn.Module, tokenizer, args):
    """What reads texts for a hypernetwork; --encoder names the text encoder if it has moved."""
    settings = net.config
    if args.encoder and net.reads == "descriptions":
        settings = replace(settings, encoder=args.encoder)
    return net.load_reader(settings, base, tokenizer, base.device)


# -------------------- What an adapter does --------------------


@torch.no_grad()
def write_adapters(net, texts: list, base, reader) -> tuple[Adapter, float]:
    """(one adapter per text, or for Doc-to-LoRA per list of texts; the milliseconds it took)."""
    started = time.perf_counter()
    on_gpu = base.device.type != "cpu"
    with torch.autocast(base.device.type, base.dtype, enabled=on_gpu and base.dtype == torch.bfloat16):
        adapters = net(net.condition(texts, reader))  # A [n, L, r, in]
    if on_gpu:
        torch.accelerator.synchronize(base.device)
    milliseconds = (time.perf_counter() - started) * 1000
    lora.check_fits(lora.injected_layers(base), adapters)  # before any file is written
    return adapters, milliseconds


def ask(base, tokenizer, inputs: list[str], adapter: Adapter | None, scaling: float, instruction: str, args):
    """The answers to some inputs, with an adapter or without."""
    lora.set_adapter(base, adapter, scaling)
    prompts = [model.render(tokenizer, model.chat(tokenizer, text, instruction)) for text in inputs]
    return [text.strip() for text in model.answer(base, tokenizer, prompts, args.max_new_tokens or 64)]


def compare(base, tokenizer, inputs: list[str], adapter: Adapter, net, text: str, args) -> None:
    """Print the answers of the base model and those with an adapter that was written from `text`.

    For a document also those of the base model with the document in its prompt, if it fits, and the times.
    """
    is_document, scaling = net.reads == "documents", net.config.scaling
    instruction = text + model.SUFFIX if args.instruction and not is_document else ""
    rows = {"base model": (None, instruction)}
    n_tokens = len(model.tokenize(tokenizer, text)) + (args.max_new_tokens or 64)
    if is_document and n_tokens < model.window_of(base):
        rows["in context"] = (None, text)
    rows["with adapter"] = (adapter, instruction)
    answers, times = {}, {}
    for label, (its_adapter, its_instruction) in rows.items():
        started = time.perf_counter()
        answers[label] = ask(base, tokenizer, inputs, its_adapter, scaling, its_instruction, args)
        times[label] = f"{label} {(time.perf_counter() - started) * 1000:.0f} ms"
    show(inputs, answers)
    if is_document:
        print(f"\n  time of all answers: {', '.join(times.values())}")


def show(inputs: list[str], answers: dict[str, list[str]]) -> None:
    """Print the answers to each input, one below the other."""
    for i, question in enumerate(inputs):
        print(f"\n  {'input':12}  {question}")
        for label in answers:
            lines = answers[label][i].replace("\n", f"\n{'':16}")
            print(f"  {label:12}  {lines}")


@torch.no_grad()
def nearest_descriptions(net, reader, folder: Path, texts: list[str]) -> list[str]:
    """For each text the nearest training description: what is unlike all gets a confident answer, too."""
    if not (folder / "descriptions.json").exists():
        return [""] * len(texts)
    known, lines = read_file(folder / "descriptions.json"), []
    condition = net.condition([*texts, *known], reader).float()
    vectors = F.normalize(condition.flatten(1), dim=-1)  # [texts + known, E]
    nearness, indices = (vectors[: len(texts)] @ vectors[len(texts) :].T).max(-1)  # [texts]
    for value, index in zip(nearness.tolist(), indices.tolist()):
        lines.append(f"nearest of {len(known)} training descriptions ({value:.2f} of 1): {known[index]}")
    return lines


def say_length(inputs: list[str], base_model: str) -> None:
    """The tiny world's inputs have four words."""
    n_words = hub.examples(base_model).get("words_per_input")
    if n_words and any(len(text.split()) != n_words for text in inputs):
        message = f"note: in training all inputs had {n_words} words; others get answers that are wrong"
        print(message, file=sys.stderr)


def save_merged(folder: Path, base, tokenizer, description: str) -> None:
    """Write the merged model into a temporary folder, then move it into place, file by file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        base.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        write_file(Path(tmp) / "description.txt", description + "\n")
        new = [file.relative_to(tmp) for file in Path(tmp).rglob("*") if file.is_file()]
        files.claim(folder, [str(file) for file in new])
        mode = (folder / files.MARK).stat().st_mode  # save_pretrained makes files for their owner only
        for file in new:
            (Path(tmp) / file).chmod(mode)
            (folder / file).parent.mkdir(exist_ok=True)
            (Path(tmp) / file).replace(folder / file)


def read_documents(paths: list[str]) -> list[str]:
    """The texts of --doc files."""
    try:
        documents = [Path(path).read_text(encoding="utf-8-sig") for path in paths]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--doc cannot be read as text: {e}") from None
    for path, text in zip(paths, documents):
        if not text.strip():
            raise UserError(f"--doc {path} is empty")
    return documents


def main() -> None:
    args = parse_args()
    device = processes.start_single(args.device)
    documents = read_documents(args.doc or [])
    net, net_folder = load_net(args.hypernet, "documents" if args.doc else "descriptions", args, device)
    base, tokenizer = load_base_for([net.config], args, device)
    inputs = args.input or []
    model.check_known(tokenizer, inputs + documents)
    if args.instruction is None:
        args.instruction = net.config.instruction
    reader = load_reader_for(net, base, tokenizer, args)
    texts = ["\n\n".join(documents)] if args.doc else args.desc
    adapters, milliseconds = write_adapters(net, [documents] if args.doc else texts, base, reader)

    print(f"{len(texts)} adapter{'s' if len(texts) > 1 else ''} written in {milliseconds:.1f} ms")
    folders = [str(i) for i in range(len(texts))] if len(texts) > 1 else ["."]
    names = [*lora.ADAPTER_FILES, "description.txt"]
    files.claim(Path(args.out), [str(Path(folder, name)) for folder in folders for name in names])
    nearest = nearest_descriptions(net, reader, net_folder, texts) if args.desc else [""]
    for i, (text, folder) in enumerate(zip(texts, folders)):
        folder, adapter = Path(args.out, folder), lora.select(adapters, i)
        lora.save_adapter(folder, adapter, net.config)
        write_file(folder / "description.txt", text + "\n")
        n_tokens = len(model.tokenize(tokenizer, text))
        print(f"\n{', '.join(args.doc)}: {n_tokens:,} tokens" if args.doc else f"\n{text}")
        rank = next(iter(adapter.values()))[0].shape[-2]
        where = f"{', '.join(adapter)} in {len(net.config.adapted_layers())} layers"
        print(f"  adapter: {folder}/ (rank {rank} on {where})")
        if nearest[i]:
            print(f"  {nearest[i]}")
        if inputs:
            compare(base, tokenizer, inputs, adapter, net, text, args)
    if not inputs:
        print('\n  to see what it does, add --input "..."')
    elif args.desc:
        say_length(inputs, net.config.base_model)

    if args.merge:
        lora.set_adapter(base, None)
        lora.merge(base, lora.select(adapters, 0), net.config.scaling)
        save_merged(Path(args.merge), base, tokenizer, texts[0])
        print(f"\nmerged model: {args.merge}/")


if __name__ == "__main__":
    command(main)
