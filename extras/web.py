"""A page to try it: describe a task, or paste a document, and see what the adapter does.

    python -m extras.web --base_model smollm2-135m      # needs gradio 6: pip install gradio

The page is for this machine only, unless GRADIO_SERVER_NAME names an address.
"""

import argparse
import html
import os
import shutil
import tempfile
import threading
from functools import partial
from pathlib import Path

import generate
import hypernet
import lora
import model
from support import UserError, command, make_parser, read_json

MOST_LINES, MOST_LETTERS = 32, 20_000  # of what a visitor may type


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer (default: 64)")
    parser.add_argument("--port", type=int, default=7860, help="port of this machine")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    args.base_model = args.base_model and model.resolve(args.base_model)
    return args


def load_nets(args, device) -> list:
    """The hypernetwork of --hypernet, or those that are shipped: one for descriptions, one for documents."""
    if args.hypernet:
        reads = hypernet.load_hypernet(model.fetch(args.hypernet, hypernet.FILES)).reads
        return [generate.load_net(args.hypernet, reads, device, args.encoder)]
    folder = generate.net_folder(args, "descriptions")
    nets = [generate.load_net(folder, "descriptions", device, args.encoder)]
    folder = generate.shipped_hypernet(args.base_model or model.TINY, "documents")
    if folder:
        nets.append(generate.load_net(folder, "documents", device))
    return nets


def main() -> None:
    args = parse_args()
    folder = tempfile.TemporaryDirectory()  # of the latest adapters and of gradio's copies, gone at the end
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    import gradio

    device = model.pick_device(args.device)
    nets = load_nets(args, device)
    base, tokenizer = generate.load_base_for([net.config for net in nets], args, device)
    lock = threading.Lock()  # the base model holds one visitor's adapter at a time

    def respond(net, text: str, inputs: str):
        """(table, time, zip file) for what a visitor has typed."""
        questions = [line for line in inputs.splitlines() if line.strip()]
        if not text.strip() or not questions:
            raise gradio.Error("Both boxes need a text.", print_exception=False)
        if len(questions) > MOST_LINES or len(text) + len(inputs) > MOST_LETTERS:
            message = f"At most {MOST_LINES} lines and {MOST_LETTERS:,} letters."
            raise gradio.Error(message, print_exception=False)
        wanted = net.config.instruction if args.instruction is None else args.instruction
        instruction = model.instruct(text) if wanted and net.reads == "descriptions" else ""
        with lock:
            try:
                model.check_known(tokenizer, questions + ([text] if net.reads == "documents" else []))
                adapters, milliseconds = generate.write_adapters(net, [text], base)
                asked = (net.config.scaling, instruction, args)
                without = generate.ask(base, tokenizer, questions, {}, *asked)
                answers = generate.ask(base, tokenizer, questions, adapters, *asked)
                archive = Path(folder.name, net.reads, "adapter.zip")
                lora.save_adapter(archive.with_suffix(""), adapters, net.config)
                shutil.make_archive(str(archive.with_suffix("")), "zip", archive.with_suffix(""))
            except UserError as e:
                raise gradio.Error(html.escape(str(e)), print_exception=False) from None
        table = []
        for question, old, new in zip(questions, without, answers):
            table.append([question, old.text, new.text, f"{net.config.certainty(new.log_prob):.0%}"])
        return table, f"Written in {milliseconds:.1f} ms.", str(archive)

    tabs = {}
    for net in nets:
        title, second = ("Document", "Questions") if net.reads == "documents" else ("Description", "Inputs")
        boxes = [gradio.Textbox(label=title), gradio.Textbox(label=f"{second}, one per line", lines=3)]
        headers = ["input", "base model", "with adapter", "sure"]
        widths = ["30%", "30%", "30%", "10%"]
        table = gradio.Dataframe(headers=headers, label="Answers", wrap=True, column_widths=widths)
        results = [table, gradio.Markdown(), gradio.File(label="The adapter, as PEFT loads it")]
        net.connect(base, tokenizer)
        function = partial(respond, net)
        presets = {model.resolve(preset): preset for preset in model.PRESETS}
        file = Path(model.TINY).parent / presets.get(net.config.base_model, "") / "examples.json"
        examples = read_json(file).get(net.reads) if file.exists() else None
        settings = dict(examples=examples, flagging_mode="never", api_name=title.lower())
        tabs[title] = gradio.Interface(function, boxes, results, submit_btn="Write an adapter", **settings)
    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")  # loads no fonts from elsewhere
    page = gradio.TabbedInterface(list(tabs.values()), list(tabs), "Text-to-LoRA")
    page.launch(server_port=args.port, theme=theme)


if __name__ == "__main__":
    command(main)
