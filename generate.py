"""Write an adapter from a description, or from a document, and see what it does.

    python generate.py --desc "Keep only the animals and translate them into French."
    python generate.py --desc "..." --desc "..." --input "cat red dog shirt"
    python generate.py --doc notes.txt --input "What is ...?"

The adapter is a folder that PEFT loads. The base model's answers stand beside those with the adapter.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import data
import hypernet
import lora
import model
from lora import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

def model_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say which models answer, and how; eval.py has them, too."""
    switch = argparse.BooleanOptionalAction
    p.add_argument("--base_model", help=f"{', '.join(model.PRESETS)}, an id or folder; by default the net's.")
    p.add_argument("--hypernet", help="A folder, or USER/REPO/FOLDER of the hub; by default the shipped one.")
    p.add_argument("--module_order", help="Of a published checkpoint's target modules (see the README).")
    p.add_argument("--encoder", help="Where the text encoder is, if not under its name in training.")
    p.add_argument("--instruction", action=switch, help="Put the definition (or description) before inputs.")
    p.add_argument("--max_new_tokens", type=int, default=64, help="Longest answer.")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="By default bfloat16 on GPU only.")

def parse_args() -> argparse.Namespace:
    """The flags, checked as far as that goes without a model."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=lora.Help)
    p.add_argument("--desc", action="append", help="What to do, in words; several make several adapters.")
    p.add_argument("--doc", action="append", help="Text file to know; several make one adapter.")
    p.add_argument("--input", action="append", help="A text to answer; may be given several times.")
    p.add_argument("--out", default="out/adapter", help="Folder of the adapter; of several: 0, 1, ... in it.")
    p.add_argument("--merge", help="Folder for the base model with the adapter merged into its weights.")
    model_flags(p)
    args = p.parse_args()
    if bool(args.desc) == bool(args.doc):
        raise UserError('say what to do (--desc "Translate the animals.") or what to know (--doc FILE)')
    if args.merge and len(args.desc or []) > 1:
        raise UserError("--merge takes a single --desc")
    if not all(text.strip() for text in (args.desc or []) + (args.input or [])):
        raise UserError("--desc or --input is empty")
    for folder in filter(None, (args.out, args.merge)):
        ours = any((Path(folder) / sub / "description.txt").exists() for sub in ("", "0"))
        if Path(folder).exists() and not ours and any(Path(folder).iterdir()):
            raise UserError(f"{folder} holds something that generate.py did not write; choose another folder")
    return args

def load_net(name: str | None, args, reads: str = "descriptions") -> torch.nn.Module:
    """The hypernetwork of a folder, or of a folder on the hub; by default the one for the base model."""
    preset = model.preset_name(args.base_model or "tiny")
    shipped = Path(model.TINY).parent / preset / ("d2l" if reads == "documents" else "sft_large")
    if not name and not shipped.exists():
        raise UserError(f"no hypernetwork for {preset} is shipped; train one and pass it with --hypernet")
    order = args.module_order.split(",") if args.module_order else None
    return hypernet.load_hypernet(model.fetch(name or str(shipped), hypernet.FILES), order).to(DEVICE)

def load_for(configs: list[lora.LoRAConfig], args):
    """(base model, tokenizer) that these adapters or hypernetworks belong to, ready to take them."""
    base_model = args.base_model or (configs[0].base_model if configs else "tiny")
    for config in configs:
        if model.preset_name(base_model) != model.preset_name(config.base_model):
            raise UserError(f"what was trained for {config.base_model} does not go with {base_model}")
    base, tokenizer = model.load_base(base_model, DEVICE, args.dtype and getattr(torch, args.dtype))
    return lora.inject(base, sorted({name for config in configs for name in config.paths})), tokenizer

def writer(net: torch.nn.Module, base, tokenizer, args):
    """A function: n descriptions (or documents) -> n adapters."""
    name, encode = args.encoder or net.config.encoder, None
    if net.reads == "descriptions":
        encode = model.load_encoder(name, DEVICE, (base, tokenizer), net.config.full_stop)
    conditions = hypernet.conditions(net, base, tokenizer, encode)
    return torch.no_grad()(lambda texts: net(conditions(texts)))

def show(base, tokenizer, ways: dict[str, tuple], scaling: float, inputs: list[str], args) -> None:
    """Print answers. `ways` is {way to answer: (adapter or None, text before the input)}."""
    answers, times = {}, []
    for way, (adapter, before) in ways.items():
        prompts = [model.render(tokenizer, model.prompt(tokenizer, text, before)) for text in inputs]
        lora.set_adapter(base, adapter, scaling)
        started = time.perf_counter()
        answers[way] = model.answer(base, tokenizer, prompts, args.max_new_tokens)
        times.append(f"{way} {(time.perf_counter() - started) * 1000:.0f} ms")
    for i, text in enumerate(inputs):
        print(f"\n  {'input':12}  {text}")
        for way, given in answers.items():
            print(f"  {way:12}  {given[i].rstrip()}")
    if args.doc:
        print(f"\n  time of all answers: {', '.join(times)}")

def save_merged(folder: Path, base, tokenizer, description: str) -> None:
    """Write the merged model, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        base.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        (Path(tmp) / "description.txt").write_text(description + "\n", encoding="utf-8")
        for file in Path(tmp).iterdir():
            file.replace(folder / file.name)

def main() -> None:
    args = parse_args()
    try:
        documents = [Path(file).read_text(encoding="utf-8-sig") for file in args.doc or []]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--doc cannot be read as text: {e}") from None
    if not all(text.strip() for text in documents):
        raise UserError("--doc is empty")
    reads = "documents" if args.doc else "descriptions"
    net = load_net(args.hypernet, args, reads)
    if net.reads != reads:
        raise UserError(f"this hypernetwork reads {net.reads}: use {'--desc' if args.doc else '--doc'}")
    base, tokenizer = load_for([net.config], args)
    write, scaling = writer(net, base, tokenizer, args), net.config.scaling
    stated = net.config.instruction if args.instruction is None else args.instruction
    window = base.config.get_text_config().max_position_embeddings
    texts = args.desc or ["\n\n".join(documents)]
    model.check_known(tokenizer, (args.input or []) + documents)

    started = time.perf_counter()
    adapters = write([documents] if documents else texts)  # A [n, L, r, in], B [n, L, out, r]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    taken = (time.perf_counter() - started) * 1000
    print(f"{len(texts)} adapter{'s' if len(texts) > 1 else ''} written in {taken:.1f} ms")
    lora.lora_layers(base, adapters)  # refuses what does not fit, before anything is written

    for i, text in enumerate(texts):
        folder = Path(args.out) / str(i) if len(texts) > 1 else Path(args.out)
        adapter = lora.select(adapters, i)
        lora.save_adapter(folder, adapter, net.config)
        (folder / "description.txt").write_text(text + "\n", encoding="utf-8")
        n_tokens = len(model.tokenize(tokenizer, text))
        print(f"\n{', '.join(args.doc)}: {n_tokens:,} tokens" if args.doc else f"\n{text}")
        rank = next(iter(adapter.values()))[0].shape[-2]
        print(f"  adapter: {folder}/ (rank {rank} on {', '.join(adapter)} in {net.config.n_layers} layers)")
        before = text + model.SUFFIX if stated else ""
        ways = {"base model": (None, before), "in context": (None, text), "with adapter": (adapter, before)}
        if not args.doc or n_tokens + args.max_new_tokens >= window:
            del ways["in context"]
        shown = data.shown_inputs(net.config.base_model, text) if args.desc else []
        if inputs := args.input or shown:
            show(base, tokenizer, ways, scaling, inputs, args)
    if args.merge:
        lora.set_adapter(base, None)
        lora.merge(base, lora.select(adapters, 0), scaling)
        save_merged(Path(args.merge), base, tokenizer, texts[0])
        print(f"\nmerged model: {args.merge}/")

if __name__ == "__main__":
    lora.command(main)
