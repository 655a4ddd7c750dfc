"""The page of `python generate.py --web`: describe a task, or paste a document, and try the adapter."""
import shutil
import tempfile
import threading
from contextlib import suppress
from functools import partial

import generate
import lora
import model
from checkpoints import load, locate
from lora import UserError

def serve(args) -> None:
    """Serve the page on port --web of this machine (GRADIO_SERVER_NAME: of another address)."""
    try:
        import gradio
    except ImportError:
        raise UserError("--web needs gradio: pip install gradio") from None
    nets = []
    for reads in ("descriptions", "documents"):
        with suppress(UserError):  # there may be only one of them for this base model
            nets.append(load.load_net(args.hypernet, args, reads))
    if not nets:
        raise UserError("there is no hypernetwork to try; train one and pass it with --hypernet")
    base, tokenizer = load.load_base_for([net.config for net in nets], args)
    lock = threading.Lock()  # the base model holds one visitor's adapter at a time

    def answer(net, encode, text: str, inputs: str):
        """(table, time, zip file) for what a visitor has typed."""
        questions = [line for line in inputs.splitlines() if line.strip()]
        if not text.strip() or not questions:
            raise gradio.Error("Both boxes need a text.", print_exception=False)
        with lock:
            try:
                model.check_known(tokenizer, questions + ([text] if net.reads == "documents" else []))
                args.doc, args.instruction = net.reads == "documents", net.config.instruction
                adapters, milliseconds = generate.write_adapters(net, [text], base, tokenizer, encode)
                adapter, scaling = lora.select(adapters, 0), net.config.scaling
                answers, _ = generate.compare(base, tokenizer, adapter, scaling, text, questions, args)
            except UserError as e:
                raise gradio.Error(str(e), print_exception=False) from None
        folder = f"{tempfile.mkdtemp()}/adapter"
        lora.save_adapter(folder, adapter, net.config)
        table = [list(cells) for cells in zip(questions, answers["base model"], answers["with adapter"])]
        return table, f"Written in {milliseconds:.1f} ms.", shutil.make_archive(folder, "zip", folder)

    tabs = {}
    for net in nets:
        title, second = ("Document", "Questions") if net.reads == "documents" else ("Description", "Inputs")
        boxes = [gradio.Textbox(label=title), gradio.Textbox(label=f"{second}, one per line", lines=3)]
        table = gradio.Dataframe(headers=["input", "base model", "with adapter"], label="Answers", wrap=True)
        results = [table, gradio.Markdown(), gradio.File(label="The adapter, as PEFT loads it")]
        function = partial(answer, net, load.load_encoder_for(net, base, tokenizer, args))
        settings = dict(examples=locate.examples(net.config.base_model)[net.reads], flagging_mode="never")
        tabs[title] = gradio.Interface(function, boxes, results, submit_btn="Write an adapter", **settings)
    gradio.TabbedInterface(list(tabs.values()), list(tabs), "Text-to-LoRA").launch(server_port=args.web)
