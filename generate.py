"""Write an adapter from a description, or from a document, and see what it does.

    python generate.py --desc "Keep only the animals and translate them into French."
    python generate.py --desc "..." --desc "..." --input "cat red dog shirt"
    python generate.py --doc notes.txt --input "What is ...?"

The adapter is a folder that PEFT loads. The base model's answers stand beside those with the adapter.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

import hypernet
import lora
import model
from lora import Adapter
from support import flags, hub, processes
from support.files import UserError, command, may_overwrite, read_file, remove_adapters, write_file
from support.processes import Process


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
    if bool(args.desc) == bool(args.doc):
        raise UserError('say what to do (--desc "Translate the animals.") or what to know (--doc FILE)')
    if args.merge and args.shard:
        raise UserError("--merge needs the whole base model: not with --shard")
    processes.check_shard(args.shard)
    if args.merge and len(args.desc or []) > 1:
        raise UserError("--merge takes a single --desc")
    if args.merge and Path(args.merge).resolve() == Path(args.out).resolve():
        raise UserError("--out and --merge need two folders")
    if not all(text.strip() for text in (args.desc or []) + (args.input or [])):
        raise UserError("--desc or --input is empty")
    if args.doc and args.instruction:
        raise UserError("--instruction goes with --desc")
    for folder in (args.out, args.merge):
        if folder and not may_overwrite(Path(folder)):
            raise UserError(f"{folder} is not empty, and generate.py did not write it; choose another folder")
    return args


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which models answer, and how; eval.py has them, too."""
    add = parser.add_argument
    add("--base_model", help=f"{', '.join(hub.PRESETS)}, a hub id or a folder; default: the net's")
    add("--hypernet", help="a folder, or USER/REPO/FOLDER on the hub; default: the shipped one")
    add("--module_order", help="order of a published checkpoint's target modules (checkpoints/README.md)")
    add("--encoder", help="path or id of the text encoder, if it has moved since training")
    switch = argparse.BooleanOptionalAction
    add("--instruction", action=switch, help="put the description before inputs; default: as in training")
    add("--max_new_tokens", type=flags.at_least(1), default=64, help="longest answer")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, otherwise float32")
    add("--shard", action="store_true", help="shard the base model over the processes of torchrun")


# -------------------- Loading what was trained --------------------


def start(args) -> Process:
    """The device; with --shard also the processes of torchrun, which all compute the same."""
    if args.shard:
        return processes.start(args.device)
    if "RANK" in os.environ:
        raise UserError("without --shard this command needs a single process: python, not torchrun")
    return Process(processes.choose_device(args.device))


def load_net(name: str | None, reads: str, args, device: torch.device) -> nn.Module:
    """The hypernetwork of a folder, or of a folder on the hub; without a name the shipped one."""
    folder = name or str(shipped_hypernet(args.base_model or "tiny", reads))
    order = args.module_order.split(",") if args.module_order else None
    net = hypernet.load_hypernet(hub.fetch(folder, hypernet.FILES), order).to(device)
    if net.reads != reads:
        raise UserError(f"the hypernetwork in {folder} reads {net.reads}, not {reads}")
    return net


def shipped_hypernet(base_model: str, reads: str) -> Path:
    """The folder of the hypernetwork in checkpoints/ for a base model; UserError if there is none."""
    shape = None
    if Path(base_model).is_dir():
        shape = lora.base_shape(hub.from_pretrained(AutoConfig, base_model))
    name = "d2l" if reads == "documents" else "sft_large"
    for file in hub.CHECKPOINTS.glob(f"*/{name}/config.json"):
        config = read_file(file)
        same_name = config["base_model"].lower() == hub.full_name(base_model).lower()
        if same_name or config["base_shape"] == shape:
            return file.parent
    raise UserError(f"no hypernetwork for {base_model} is shipped; train one and pass it with --hypernet")


def load_base_for(configs: list[lora.LoRAConfig], args, process: Process):
    """Load the base model of these configs, or --base_model, and inject LoRA layers: (base, tokenizer)."""
    base_model = args.base_model or (configs[0].base_model if configs else "tiny")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    names = sorted({name for config in configs for name in config.paths})
    base, tokenizer = model.load_injected(base_model, names, process, dtype, shard=args.shard)
    for config in configs:
        shape = lora.base_shape(base.config)
        hub.check_base(base_model, shape, config.base_model, config.base_shape)
    return base, tokenizer


def load_encoder_for(net: nn.Module, base: nn.Module, tokenizer, args):
    """The text encoder of a hypernetwork that reads descriptions; None for documents."""
    if net.reads == "documents":
        return None
    name = args.encoder or net.config.encoder
    c = net.config
    return model.load_encoder(name, base.device, (base, tokenizer), c.full_stop, c.encoder_rank > 0)


# -------------------- What an adapter does --------------------


def answer_inputs(base, tokenizer, inputs: list[str], instruction: str, args) -> tuple[list[str], str]:
    """(answers, time they took) with the adapter that is set."""
    prompts = [model.render(tokenizer, model.chat(tokenizer, text, instruction)) for text in inputs]
    started = time.perf_counter()
    answers = model.answer(base, tokenizer, prompts, args.max_new_tokens)
    return answers, f"{(time.perf_counter() - started) * 1000:.0f} ms"


def compare(base, tokenizer, adapter: Adapter, scaling: float, text: str, inputs: list[str], args):
    """({label: answers}, {label: time}) of the base model and of an adapter, written from `text`.

    For documents also those of the base model with the document in its prompt, if it fits.
    """
    instruction = text + model.SUFFIX if args.instruction else ""
    answers, times = {}, {}
    lora.set_adapter(base, None)
    answers["base model"], times["base model"] = answer_inputs(base, tokenizer, inputs, instruction, args)
    if args.doc:
        window = base.config.get_text_config().max_position_embeddings
        n_tokens = len(model.tokenize(tokenizer, text))
        if n_tokens + args.max_new_tokens < window:
            answers["in context"], times["in context"] = answer_inputs(base, tokenizer, inputs, text, args)
    lora.set_adapter(base, adapter, scaling)
    answers["with adapter"], times["with adapter"] = answer_inputs(base, tokenizer, inputs, instruction, args)
    return answers, times


def show(answers: dict[str, list[str]], inputs: list[str], times: dict[str, str]) -> None:
    """Print the answers to each input, one below the other, and how long all of them took."""
    for i, question in enumerate(inputs):
        print(f"\n  {'input':12}  {question}")
        for label in answers:
            lines = answers[label][i].rstrip().replace("\n", f"\n{'':16}")
            print(f"  {label:12}  {lines}")
    if times:
        taken = ", ".join(f"{label} {time}" for label, time in times.items())
        print(f"\n  time of all answers: {taken}")


def save_merged(folder: Path, base, tokenizer, description: str) -> None:
    """Write the merged model into a temporary folder, then move it into place, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        base.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        (Path(tmp) / "description.txt").write_text(description + "\n", encoding="utf-8")
        new = [file.name for file in Path(tmp).iterdir()]
        for name in new:
            (Path(tmp) / name).replace(folder / name)
        for earlier in folder.glob("*.safetensors*"):  # an earlier model may have other shards
            if earlier.name not in new:
                earlier.unlink()


def read_documents(files: list[str]) -> list[str]:
    """The texts of --doc files."""
    try:
        documents = [Path(file).read_text(encoding="utf-8-sig") for file in files]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--doc cannot be read as text: {e}") from None
    if not all(text.strip() for text in documents):
        raise UserError("--doc is empty")
    return documents


@torch.no_grad()
def write_adapters(net, texts: list, base, tokenizer, encode) -> tuple[Adapter, float]:
    """(one adapter per text, or for Doc-to-LoRA per list of texts; the milliseconds it took)."""
    started = time.perf_counter()
    adapters = net(hypernet.make_condition(net, texts, base, tokenizer, encode))  # A [n, L, r, in]
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - started) * 1000
    lora.check_fits(base, adapters)  # before any file is written
    return adapters, milliseconds


def main() -> None:
    args = parse_args()
    process = start(args)
    documents, reads = read_documents(args.doc or []), "documents" if args.doc else "descriptions"
    with processes.first_goes_ahead(process):
        net = load_net(args.hypernet, reads, args, process.device)
        hub.fetch_models(args.base_model or net.config.base_model, "base")
    base, tokenizer = load_base_for([net.config], args, process)
    model.check_known(tokenizer, (args.input or []) + documents)
    if args.instruction is None:
        args.instruction = net.config.instruction
    with processes.first_goes_ahead(process):
        encode = load_encoder_for(net, base, tokenizer, args)
    texts = ["\n\n".join(documents)] if args.doc else args.desc
    adapters, milliseconds = write_adapters(net, [documents] if args.doc else texts, base, tokenizer, encode)

    is_first = process.rank == 0  # the others compute the same, and are silent
    if is_first:
        print(f"{len(texts)} adapter{'s' if len(texts) > 1 else ''} written in {milliseconds:.1f} ms")
        remove_adapters(Path(args.out))
    for i, text in enumerate(texts):
        folder = Path(args.out) / str(i) if len(texts) > 1 else Path(args.out)
        adapter = lora.select(adapters, i)
        if is_first:
            lora.save_adapter(folder, adapter, net.config)
            write_file(folder / "description.txt", text + "\n")
            n_tokens = len(model.tokenize(tokenizer, text))
            print(f"\n{', '.join(args.doc)}: {n_tokens:,} tokens" if args.doc else f"\n{text}")
            rank = next(iter(adapter.values()))[0].shape[-2]
            where = f"{', '.join(adapter)} in {len(net.config.used_layers())} layers"
            print(f"  adapter: {folder}/ (rank {rank} on {where})")
        inputs = args.input or []
        if not inputs and not args.doc:
            inputs = hub.example_inputs(net.config.base_model, text)
        if inputs:
            answers, times = compare(base, tokenizer, adapter, net.config.scaling, text, inputs, args)
            if is_first:
                show(answers, inputs, times if args.doc else {})

    if args.merge:
        lora.set_adapter(base, None)
        lora.merge(base, lora.select(adapters, 0), net.config.scaling)
        save_merged(Path(args.merge), base, tokenizer, texts[0])
        print(f"\nmerged model: {args.merge}/")
    processes.leave()


if __name__ == "__main__":
    command(main)
