"""An adapter for llama.cpp: python -m extras.gguf out/adapter adapter.gguf   (needs gguf)

    llama-server -m SmolLM2-135M-Instruct.Q4_1.gguf --lora adapter.gguf,other.gguf --lora-init-without-apply
    curl localhost:8080/v1/chat/completions -d '{"lora": [{"id": 0, "scale": 1.0}], "messages": [...]}'

The base model's own GGUF file is needed beside it, of any quantisation.
"""

import argparse
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig

import lora
import model
from support import UserError, check_output, command, make_parser

ARCHITECTURES = {  # model_type in transformers: (architecture in llama.cpp, whether it permutes q and k)
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("adapter", type=Path, help="adapter folder in PEFT's format")
    parser.add_argument("out", help="the GGUF file to write")
    parser.add_argument(
        "--base_model", help="where the base model is, if not under the adapter's name for it"
    )
    return parser.parse_args()


def permute(B: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of q or k for llama.cpp's rotary embedding: interleave a head's halves. [out, r]"""
    return B.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def main() -> None:
    args = parse_args()
    import gguf

    out = check_output(args.out, ".gguf")
    adapter, config = lora.load_adapter(args.adapter)
    base = AutoConfig.from_pretrained(model.resolve(args.base_model or config.base_model))
    if base.model_type not in ARCHITECTURES:
        raise UserError(f"no GGUF adapters for {base.model_type}, but for {', '.join(ARCHITECTURES)}")
    architecture, permutes = ARCHITECTURES[base.model_type]
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(numbers[architecture], base.num_hidden_layers)
    n_heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}

    unfinished = out.with_name(f"{out.name}.tmp")
    writer = gguf.GGUFWriter(unfinished, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config.scaling * config.r)  # llama.cpp scales by alpha / rank
    for name, (A, B) in adapter.items():
        for index, path in enumerate(config.targets[name].paths()):
            key, last = name_map.get_name(path), path.split(".")[-1]
            if key is None:
                raise UserError(f"llama.cpp has no name for {path} of {base.model_type}")
            layer_B = B[0, index]
            if permutes and last in n_heads:
                layer_B = permute(layer_B, n_heads[last])
            writer.add_tensor(f"{key}.weight.lora_a", A[0, index].float().contiguous().numpy())  # [r, in]
            writer.add_tensor(f"{key}.weight.lora_b", layer_B.float().contiguous().numpy())  # [out, r]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(out)
    print(f"{out}: rank {config.r} on {', '.join(adapter)}, for {architecture}")


if __name__ == "__main__":
    command(main)
