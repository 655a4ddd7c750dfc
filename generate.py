"""Write an adapter from a description, or from a document, and see what it does.

    python generate.py --desc "Keep only the animals and translate them into French."
    python generate.py --desc "..." --desc "..." --input "cat red dog shirt"
    python generate.py --doc notes.txt --input "What is ...?"
    python generate.py --web                                                # a page to try it (needs gradio)

The adapter is a folder that PEFT loads. The base model's answers stand beside those with the adapter.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import hypernet
import lora
import model
from checkpoints import load, locate
from config import flags
from lora import Adapter, UserError

def parse_args() -> argparse.Namespace:
    """The flags, checked as far as that goes without a model."""
    parser = flags.Parser(__doc__)
    parser.add_argument("--desc", action="append", help="what to do, in words; several make several adapters")
    parser.add_argument("--doc", action="append", help="text file to read; several make one adapter")
    parser.add_argument("--input", action="append", help="a text to answer; may be given several times")
    parser.add_argument("--out", default="out/adapter", help="adapter folder; for several: 0, 1, ... in it")
    parser.add_argument("--merge", help="folder for the base model with the adapter merged into its weights")
    parser.add_argument("--web", type=int, nargs="?", const=7860, metavar="PORT", help="page to try it")
    load.add_model_flags(parser)
    args = parser.parse_args()
    if args.web and not (args.desc or args.doc or args.shard):
        return args
    if args.web or bool(args.desc) == bool(args.doc):
        raise UserError('say what to do (--desc "Translate the animals.") or what to know (--doc FILE)')
    if args.merge and args.shard:
        raise UserError("--merge needs the whole base model: not with --shard")
    if args.merge and len(args.desc or []) > 1:
        raise UserError("--merge takes a single --desc")
    if not all(text.strip() for text in (args.desc or []) + (args.input or [])):
        raise UserError("--desc or --input is empty")
    if args.doc and args.instruction:
        raise UserError("--instruction goes with --desc")
    for folder in (args.out, args.merge):
        if folder and not may_overwrite(Path(folder)):
            raise UserError(f"{folder} holds something that generate.py did not write; choose another folder")
    return args

def may_overwrite(folder: Path) -> bool:
    """Whether a folder may be overwritten: it is new, empty, or made by generate.py."""
    if not folder.exists() or not any(folder.iterdir()):
        return True
    return (folder / "description.txt").exists() or (folder / "0" / "description.txt").exists()

def remove_adapters(folder: Path) -> None:
    """Remove the adapters that an earlier call has written into a folder."""
    numbered = [path for path in folder.glob("[0-9]*") if path.is_dir()]
    for old in (*numbered, folder):
        for name in ("adapter_model.safetensors", "adapter_config.json", "description.txt"):
            (old / name).unlink(missing_ok=True)
        if old.exists() and not any(old.iterdir()):
            old.rmdir()

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

def show(answers: dict[str, list[str]], inputs: list[str]) -> None:
    """Print the answers to each input, one below the other."""
    for i, question in enumerate(inputs):
        print(f"\n  {'input':12}  {question}")
        for label in answers:
            print(f"  {label:12}  {answers[label][i].rstrip()}")

def save_merged(folder: Path, base, tokenizer, description: str) -> None:
    """Write the merged model into a temporary folder, then move it into place, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        base.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        (Path(tmp) / "description.txt").write_text(description + "\n", encoding="utf-8")
        for earlier in folder.glob("*.safetensors*"):  # an earlier model may have other shards
            earlier.unlink()
        for file in Path(tmp).iterdir():
            file.replace(folder / file.name)

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
    if load.DEVICE == "cuda":
        torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - started) * 1000
    lora.lora_layers(base, adapters)  # refuses what does not fit, before any file is written
    return adapters, milliseconds

def main() -> None:
    args = parse_args()
    if args.web:
        from assets import web  # it builds on this file

        return web.serve(args)
    documents = read_documents(args.doc or [])
    net = load.load_net(args.hypernet, args, "documents" if args.doc else "descriptions")
    base, tokenizer = load.load_base_for([net.config], args)
    model.check_known(tokenizer, (args.input or []) + documents)
    if args.instruction is None:
        args.instruction = net.config.instruction
    encode = load.load_encoder_for(net, base, tokenizer, args)
    texts = ["\n\n".join(documents)] if args.doc else args.desc
    adapters, milliseconds = write_adapters(net, [documents] if args.doc else texts, base, tokenizer, encode)
    print(f"{len(texts)} adapter{'s' if len(texts) > 1 else ''} written in {milliseconds:.1f} ms")

    remove_adapters(Path(args.out))
    for i, text in enumerate(texts):
        folder = Path(args.out) / str(i) if len(texts) > 1 else Path(args.out)
        adapter = lora.select(adapters, i)
        lora.save_adapter(folder, adapter, net.config)
        (folder / "description.txt").write_text(text + "\n", encoding="utf-8")
        n_tokens = len(model.tokenize(tokenizer, text))
        print(f"\n{', '.join(args.doc)}: {n_tokens:,} tokens" if args.doc else f"\n{text}")
        rank = next(iter(adapter.values()))[0].shape[-2]
        print(f"  adapter: {folder}/ (rank {rank} on {', '.join(adapter)} in {net.config.n_layers} layers)")
        inputs = args.input or []
        if not inputs and not args.doc:
            inputs = locate.example_inputs(net.config.base_model, text)
        if inputs:
            answers, times = compare(base, tokenizer, adapter, net.config.scaling, text, inputs, args)
            show(answers, inputs)
            if args.doc:
                parts = [f"{label} {taken}" for label, taken in times.items()]
                print(f"\n  time of all answers: {', '.join(parts)}")

    if args.merge:
        lora.set_adapter(base, None)
        lora.merge(base, lora.select(adapters, 0), net.config.scaling)
        save_merged(Path(args.merge), base, tokenizer, texts[0])
        print(f"\nmerged model: {args.merge}/")

if __name__ == "__main__":
    lora.command(main)
