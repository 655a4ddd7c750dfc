"""Write an adapter from a description, or from a document, and see what it does.

    python generate.py --desc "Keep only the animals and translate them into French."
    python generate.py --desc "..." --desc "..." --input "cat red dog shirt"
    python generate.py --desc "..." --base_model DIR --hypernet DIR --input "..." --merge DIR
    python generate.py --doc FILE --input "What is ...?" --interactive
    python generate.py --doc FILE --doc FILE --add_to out/adapter --out out/more --input "What is ...?"

The adapter is a folder that PEFT loads. The base model's answers stand beside those with the adapter.
"""

import argparse
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

import data
import hypernet
import lora
import model
from lora import UserError

SERVES = {("encoder", "prompt_with_definition"): ("--desc",), ("add_to", "chunk_len", "chunk_batch"): ("--doc",)}  # where flags have an effect
MAX_DESCRIPTION = 2000  # characters
MAX_DOCUMENT = 1_000_000  # characters; the adapter's rank grows with the document, by that of the hypernetwork a piece


def model_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say which models answer, and how; eval.py has them, too."""
    p.add_argument("--base_model", help=f"One of {', '.join(model.PRESETS)}, a Hugging Face id or a folder. Default: the hypernetwork's.")
    p.add_argument("--hypernet", help="A folder that train.py wrote, or a published checkpoint: a folder, or USER/REPO/FOLDER on the Hugging Face hub. Default: the one that comes with the base model.")
    p.add_argument("--module_order", help="Target modules of a published checkpoint in the order that it was trained with (see the README). Default: as in its adapter_config.json.")
    p.add_argument("--encoder", help="Where the hypernetwork's text encoder is, if not under the name that it was trained with.")
    p.add_argument("--chunk_len", type=lora.positive, help="Doc-to-LoRA: tokens of a document that are read as one piece. Default: as trained.")
    p.add_argument("--chunk_batch", type=lora.positive, default=8, help="Doc-to-LoRA: pieces of a document that are read at once.")
    p.add_argument("--max_new_tokens", type=lora.positive, default=64, help="Longest answer, in tokens.")
    p.add_argument("--device", type=lora.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="Of the base model. Default: float32 on CPU, bfloat16 on GPU.")


def parse_args() -> argparse.Namespace:
    """The flags, checked as far as that goes without a model."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--desc", action="append", help="What the adapted model has to do, in words. May be given several times.")
    p.add_argument("--doc", action="append", help="Text file that the model has to know (Doc-to-LoRA). Several make one adapter that knows them all.")
    p.add_argument("--add_to", help="Adapter folder whose adapter the documents are added to.")
    p.add_argument("--interactive", action="store_true", help="Keep the adapter and take inputs, one a line, until an empty one.")
    p.add_argument("--input", action="append", help="Something to answer. May be given several times.")
    p.add_argument("--out", default="out/adapter", help="Folder of the adapter (with several --desc, of folders 0, 1, ...).")
    p.add_argument("--merge", help="Also write the base model with the adapter merged into its weights to this folder.")
    p.add_argument("--prompt_with_definition", action=argparse.BooleanOptionalAction, help="Put the description before the input as well. On for hypernetworks trained so.")
    model_flags(p)
    args = p.parse_args()
    if args.doc and args.desc:
        raise UserError("an adapter comes from --desc or from --doc")
    lora.refuse_idle(args, p, "--doc" if args.doc else "--desc", SERVES)
    if args.doc:
        args.texts = [read_text(file) for file in args.doc]
        args.desc = ["\n\n".join(args.texts)]  # what stands in description.txt, and in the prompt for comparison
    if not args.desc:
        raise UserError('say what the model should do, for example: python generate.py --desc "Translate the animals into French."')
    for description in args.desc:
        if not description.strip():
            raise UserError("--desc is empty")
        if len(description) > MAX_DESCRIPTION and not args.doc:
            raise UserError(f"--desc has {len(description):,} characters; {MAX_DESCRIPTION:,} are the most")
    if any(not text.strip() for text in args.input or []):
        raise UserError("--input is empty")
    if any("\udc80" <= letter <= "\udcff" for text in (args.input or []) + args.desc for letter in text):  # so Python reads other bytes
        raise UserError("--desc and --input take text in UTF-8")
    if (args.merge or args.interactive) and len(args.desc) > 1:
        raise UserError("--merge and --interactive take a single --desc: one model holds one adapter")
    if args.merge and Path(args.merge).resolve() == Path(args.out).resolve():
        raise UserError("--out and --merge name one folder; the adapter and the merged model need one each")
    for flag, folder, other, files in (("--out", args.out, "a merged model", "model*.safetensors"), ("--merge", args.merge, "an adapter", "adapter_*")):
        if folder and Path(folder).exists() and not is_ours(Path(folder)):
            raise UserError(f"{flag} {folder} holds something that generate.py did not write; choose another")
        if folder and any(Path(folder).glob(files)):
            raise UserError(f"{flag} {folder} holds {other}, and transformers would load both; choose another")
    return args


def is_ours(folder: Path) -> bool:
    """An empty folder, or one that generate.py wrote before: an adapter, a merged model, or numbered adapters."""
    return folder.is_dir() and (not any(folder.iterdir()) or any((folder / d / "description.txt").exists() for d in ("", "0")))


def load_hypernet(name: str, args) -> hypernet.TextToLoRA | hypernet.DocToLoRA:
    """The hypernetwork of a folder, or of a folder on the Hugging Face hub."""
    folder = model.local_folder(name, hypernet.FILES)
    net = hypernet.load_hypernet(folder, args.module_order and args.module_order.split(",")).to(args.device)
    if isinstance(net, hypernet.DocToLoRA):
        net.config.chunk_len = args.chunk_len or net.config.chunk_len
    return net


def load_for(configs: list[lora.LoRAConfig], args):
    """The base model that these adapters or hypernetworks belong to, ready to take them, and its tokenizer."""
    base_model = args.base_model or (configs[0].base_model if configs else "tiny")
    for config in configs:
        if model.preset_name(base_model) != model.preset_name(config.base_model):
            raise UserError(f"what was trained for {config.base_model} does not go with {base_model}")
    base, tokenizer = model.load_base(base_model, args.device, args.dtype and getattr(torch, args.dtype))
    targets = {name for config in configs for name in config.paths}
    return lora.inject(base, sorted(targets)), tokenizer


load_encoder = cache(model.load_encoder)


def encoder_of(net: hypernet.TextToLoRA, base, tokenizer, args):
    """The text encoder that a hypernetwork was trained with."""
    return load_encoder(args.encoder or net.config.encoder, args.device, (base, tokenizer), net.config.full_stop)


def writer(net, base, tokenizer, args):
    """The hypernetwork as a function: n descriptions (or documents, for Doc-to-LoRA) -> a batch of n adapters."""
    if isinstance(net, hypernet.DocToLoRA):
        return lambda texts: hypernet.read_documents(net, base, tokenizer, [[text] for text in texts], args.chunk_batch)
    encoder = encoder_of(net, base, tokenizer, args)
    return lambda texts: net(encoder(texts).to(args.device))


def document_adapter(net: hypernet.DocToLoRA, base, tokenizer, args) -> lora.Adapter:
    """One adapter (as a batch of one) that knows all --doc, and what the adapter of --add_to does."""
    if not args.add_to:
        return hypernet.read_documents(net, base, tokenizer, [args.texts], args.chunk_batch)
    old, config = lora.load_adapter(args.add_to, args.device)
    if model.preset_name(config.base_model) != model.preset_name(net.config.base_model):
        raise UserError(f"--add_to {args.add_to}: what was trained for {config.base_model} does not go with {net.config.base_model}")
    lora.inject(base, [name for name in old if name not in net.names])
    lora.lora_layers(base, old)
    net.config.paths |= config.paths
    new, r = hypernet.read_documents(net, base, tokenizer, [args.texts], args.chunk_batch), net.config.r
    if all(name in old and torch.equal(old[name][0][:, -r:], net.bias[f"{name}_A"]) for name in net.names):
        old |= {name: (old[name][0][:, :-r], old[name][1][..., :-r]) for name in net.names}  # its bias, once more at the end of `new`
    old = {name: (A, B * (config.scaling / net.config.scaling)) for name, (A, B) in old.items()}
    return lora.stack([lora.concat_rank([old, lora.select(new, 0)])])


def read_text(file: str) -> str:
    """The text of a document."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--doc {file} cannot be read as text: {e}") from None
    if not text.strip():
        raise UserError(f"--doc {file} is empty")
    if len(text) > MAX_DOCUMENT:
        raise UserError(f"--doc {file} has {len(text):,} characters; {MAX_DOCUMENT:,} are the most")
    return text


def show(base, tokenizer, ways: dict[str, tuple], inputs: list[str], args) -> None:
    """Print the answers to some inputs. `ways` is {way to answer: (adapter or None, scaling, text before the input)}."""
    answers, took = {}, []
    for way, (adapter, scaling, before) in ways.items():
        prompts = [model.render(tokenizer, model.prompt(tokenizer, text, before)) for text in inputs]
        lora.set_adapter(base, adapter, scaling)
        started = time.perf_counter()
        answers[way] = model.answer(base, tokenizer, prompts, args.max_new_tokens)
        took.append(f"{way} {(time.perf_counter() - started) * 1000:.0f} ms")
    for i, text in enumerate(inputs):
        print(f"\n  {'input':12}  {text}", *(f"  {way:12}  {given[i].rstrip()}" for way, given in answers.items()), sep="\n")
    if args.doc:
        print(f"\n  time of all answers: {', '.join(took)}")


def main() -> None:
    args = parse_args()
    net = load_hypernet(args.hypernet or hypernet.shipped(args.base_model or "tiny", "d2l" if args.doc else "sft_large"), args)
    if isinstance(net, hypernet.DocToLoRA) != bool(args.doc):
        raise UserError(f"this hypernetwork reads {'descriptions: use --desc' if args.doc else 'documents: use --doc'}")
    config = net.config
    base, tokenizer = load_for([config], args)
    inputs = args.input or (data.tiny_inputs(args.desc[0]) if model.preset_name(config.base_model) == "tiny" and not args.doc else [])
    trained_so = getattr(config, "prompt_with_definition", False)
    state = trained_so if args.prompt_with_definition is None else args.prompt_with_definition
    model.check_known(tokenizer, inputs + (args.desc if args.doc or state else []))
    write = (lambda _: document_adapter(net, base, tokenizer, args)) if args.doc else writer(net, base, tokenizer, args)

    with torch.no_grad():
        started = time.perf_counter()
        adapters = write(args.desc)  # A [n, L, r, in], B [n, L, out, r]
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        seconds = time.perf_counter() - started
    lora.lora_layers(base, adapters)  # refuses what does not fit, before anything is written
    print(f"{len(args.desc)} adapter{'s' * (len(args.desc) > 1)} written in {seconds * 1000:.1f} ms")

    before = Path(args.add_to or "") / "description.txt"
    known = before.read_text(encoding="utf-8", errors="replace") + "\n" if args.add_to and before.exists() else ""
    for i, description in enumerate(args.desc):
        folder = Path(args.out) / str(i) if len(args.desc) > 1 else Path(args.out)
        adapter = lora.select(adapters, i)
        rank = max(A.shape[-2] for A, _ in adapter.values())
        n_tokens = len(model.tokenize(tokenizer, description))
        lora.save_adapter(folder, adapter, config)
        (folder / "description.txt").write_text(known + description + "\n", encoding="utf-8")
        print(f"\n{', '.join(args.doc)}: {n_tokens:,} tokens" if args.doc else f"\n{description}")
        print(f"  adapter: {folder}/ (rank {rank} on {', '.join(adapter)} in {config.n_layers} layers)")

        stated = description if state else ""
        if stated:
            print("  prompt:  the description, then the input")
        ways = {"base model": (None, config.scaling, stated)}
        if args.doc and n_tokens + args.max_new_tokens < base.config.get_text_config().max_position_embeddings:
            ways["in context"] = (None, config.scaling, description)
        ways["with adapter"] = (adapter, config.scaling, stated)
        if inputs:
            show(base, tokenizer, ways, inputs, args)
    if args.interactive:
        print("\nInputs, one a line; an empty one ends.", flush=True)
        sys.stdin.reconfigure(errors="replace")
        for text in iter(lambda: sys.stdin.readline().strip(), ""):
            try:
                model.check_known(tokenizer, [text])
                show(base, tokenizer, ways, [text], args)
            except UserError as e:
                print(f"\n  {e}")

    if args.merge:
        lora.merge(base, lora.select(adapters, 0), config.scaling)
        folder = Path(args.merge)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            base.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
            (Path(tmp) / "description.txt").write_text(args.desc[0] + "\n", encoding="utf-8")
            for file in Path(tmp).iterdir():
                file.replace(folder / file.name)
        print(f"\nmerged model: {folder}/")


if __name__ == "__main__":
    lora.run(main)
