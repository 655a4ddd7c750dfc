"""Read published checkpoints of Text-to-LoRA and Doc-to-LoRA as our networks.

    python generate.py --hypernet SakanaAI/text-to-lora/trained_t2l/gemma_2b_t2l --desc "..."
    python generate.py --hypernet SakanaAI/doc-to-lora/gemma_demo/checkpoint-80000 --doc notes.txt

Not tested against the published weights, which we could not download; tested on small checkpoints in the same
layout, written by the published code. Pickles are read by torch's restricted unpickler: nothing in them runs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora
from hypernet import DocConfig, DocToLoRA, TextConfig, TextToLoRA
from lora import UserError

def load(folder: Path, module_order: list[str] | None = None) -> TextToLoRA | DocToLoRA:
    """Read a published checkpoint of either network. Raises UserError if its files are broken."""
    if (folder / "pytorch_model.bin").exists():
        return load_doc_to_lora(folder)
    return load_text_to_lora(folder, module_order)

# -------------------- Text-to-LoRA (SakanaAI/text-to-lora) --------------------

NAMES = {  # published name: our name
    "task_encoder.mlp": "task_encoder",
    "layer_depth_encoder": "layer_emb",
    "layer_type_encoder": "module_emb",
    "mixer": "mixer",
    "mlp1.mlp": "mlp1",
    "mlp2.mlp": "mlp2",
    "mlp3": "mlp3",
    "out_emb_norm": "AB_norm",
    "pos_emb": "rank_emb",
    "heads": "heads",
}

def load_text_to_lora(folder: str | Path, module_order: list[str] | None = None) -> TextToLoRA:
    """Read a published checkpoint (hypermod.pt, args.yaml, adapter_config.json), of SFT or reconstruction.

    `module_order` names the target modules in the order of the rows of the module embedding. The published
    code numbers them by iterating over a Python set, so the order depends on the hash seed of the training
    process, and no file records it. The default is the order of adapter_config.json, where PEFT wrote that
    set. Raises UserError if the files are broken or of another layout.
    """
    import yaml  # comes with transformers; nothing else needs it

    folder = Path(folder)
    peft = lora.read_file(folder / "adapter_config.json")
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        weights = torch.load(folder / "hypermod.pt", map_location="cpu", weights_only=True)
        config = text_config(peft, args, weights, module_order or list(peft["target_modules"]))
        net = TextToLoRA(config)
        net.load_state_dict(our_weights(weights, config, args))
    except Exception as e:  # broken files raise arbitrary exceptions
        raise UserError(f"{folder} is no published checkpoint, or --module_order is wrong: {e!r}") from None
    return net.eval()

def text_config(peft: dict, args: dict, weights: dict[str, Tensor], names: list[str]) -> TextConfig:
    """Our config of a published checkpoint, from its two config files and the shapes of its weights."""
    config = TextConfig(base_model=peft["base_model_name_or_path"], full_stop=True, instruction=True)
    config.encoder = args.get("emb_model") or "base"
    config.alpha, config.rslora = peft["lora_alpha"], peft.get("use_rslora", False)
    config.trunk_dropout, config.input_dropout = 0.05, 0.0

    task_encoder = weights["task_encoder.mlp.0.weight"]  # [latent / 2, E]
    head = weights[f"heads.{names[0]}.weight"]  # [width, head_in]
    config.latent_size, config.input_size = 2 * len(task_encoder), task_encoder.shape[1]
    config.head_in_size = head.shape[1]
    for name in names:
        A, B = weights[f"AB_offset.A.{name}"], weights[f"AB_offset.B.{name}"]  # [L, r, in], [L, out, r]
        config.n_layers, config.r, config.in_features[name] = A.shape
        config.out_features[name] = B.shape[1]
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        config.paths[name] = f"model.layers.{{}}.{block}.{name}"
    if "out_emb_norm.weight" not in weights:
        config.size = "large"
    else:
        width_of_small = max(config.in_features[names[0]], config.out_features[names[0]])
        config.size = "small" if len(head) == width_of_small else "medium"
    config.z_score = f"heads.{names[0]}.bias" not in weights
    config.rotary = "pos_emb.0.weight" not in weights
    return config

def our_weights(weights: dict[str, Tensor], config: TextConfig, args: dict) -> dict[str, Tensor]:
    """Published weights under our names."""
    ours = {}
    for published, our in NAMES.items():
        for key, tensor in weights.items():
            if key.startswith(f"{published}."):
                ours[our + key.removeprefix(published)] = tensor
    if config.size != "large":
        embeddings = []
        for name in config.paths:
            embeddings.append(torch.stack([weights[f"out_emb.{name}.A"], weights[f"out_emb.{name}.B"]]))
        ours["AB_emb"] = torch.stack(embeddings)  # [M, 2, d]

    of_delta_w = args["training_task"] == "recon" and not args["factorized"]
    for name in config.paths:
        for matrix in "AB":
            offset, deviation = weights[f"AB_offset.{matrix}.{name}"], torch.tensor(1.0)
            if of_delta_w:  # the target was B A times delta_w_scaling: A and B are divided by its root each
                offset = torch.zeros_like(offset)
                deviation = torch.tensor(args["delta_w_scaling"] ** -0.5)
            elif config.z_score:
                offset = offset + weights[f"mean_recon_target.{matrix}.{name}"]
                deviation = weights[f"std_recon_target.{matrix}.{name}"] + 1e-10
            if config.z_score:
                deviation = deviation.expand(offset.shape)
            ours[f"offset.{name}_{matrix}"] = offset
            ours[f"deviation.{name}_{matrix}"] = deviation
    return ours

# -------------------- Doc-to-LoRA (SakanaAI/doc-to-lora) --------------------

DOC_NAMES = [  # (published part of a name, our part), to be replaced in this order
    ("_orig_mod.", ""),
    ("aggregator.", ""),
    ("modality_projection", "project"),
    ("encoder.latents_q", "latents"),
    ("decoder.latents_q", "queries"),
    ("coder.layernorm", "coder_norm"),
    ("decoder.layers.0", "decoder"),
    ("encoder.layers", "encoder"),
    ("self_attn.", ""),
    ("input_latents_layernorm", "norm_latents"),
    ("input_context_layernorm", "norm_context"),
    ("post_attention_layernorm", "norm_post"),
    ("pre_ff_layernorm", "norm_preff"),
    ("post_ff_layernorm", "norm_postff"),
    ("head.weight", "head"),
    ("layers.0.layers.0", "block_in"),
    ("layers.0.layers.4", "block_out"),
    ("layers.0.layers.1.weight", "W1"),
    ("layers.0.layers.1.bias", "b1"),
    ("layers.0.layers.3.weight", "W2"),
    ("layers.0.layers.3.bias", "b2"),
]

class Record:
    """An object of a class that is not here: its fields, and nothing that runs."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, fields: dict) -> None:
        self.__dict__.update(fields)

def read_pickle(path: Path) -> dict[str, Any]:
    """Read a .bin file. Tensors and plain containers are rebuilt; other objects become Records."""
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Record, name) for name in classes]):
        return torch.load(path, map_location="cpu", weights_only=True)

def load_doc_to_lora(folder: str | Path) -> DocToLoRA:
    """Read a published checkpoint (pytorch_model.bin). Everything that is needed is in the file."""
    try:
        content = read_pickle(Path(folder) / "pytorch_model.bin")
        net = DocToLoRA(doc_config(content))
        shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
        net.load_state_dict(doc_weights(content, shapes))
    except Exception as e:  # broken files raise arbitrary exceptions
        raise UserError(f"{folder} is no published Doc-to-LoRA checkpoint: {e!r}") from None
    return net.eval()

def doc_config(content: dict[str, Any]) -> DocConfig:
    """Our config of a published checkpoint, from the records in its file."""
    hypernet, lora_config = content["hypernet_config"], content["hypernet_config"].lora_config
    aggregator, reader = hypernet.aggregator_config, content["ctx_encoder_args"]
    if aggregator.num_self_attn_per_block or hypernet.num_pre_head_layers != 1 or hypernet.use_per_rank_bias:
        raise ValueError("this variant of the network was not published")
    config = DocConfig(base_model=content["base_model_name_or_path"])
    config.in_features, config.out_features = hypernet.feature_sizes
    config.n_layers = len(hypernet.layer_indices)
    for name in config.in_features:
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        config.paths[name] = f"model.layers.{{}}.{block}.{name}"
    config.r = lora_config.r
    config.alpha = lora_config.lora_alpha * config.r**0.5  # there the scaling is lora_alpha itself
    config.input_size, config.latent_size = aggregator.feature_size, hypernet.latent_size
    config.n_latents, config.n_blocks = aggregator.n_latent_queries, aggregator.num_blocks
    config.n_heads = 16
    config.early_exit = reader.ctx_encoder_type == "early_exit"
    config.chunk_len = 8192  # of the published evaluation
    return config

def doc_weights(content: dict[str, Any], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Published weights under our names and in our shapes."""
    ours = {}
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor):
            continue
        for published, our in DOC_NAMES:
            key = key.replace(published, our)
        for matrix in "AB":  # "bias_A.down_proj" -> "bias.down_proj_A"
            for part in ("bias", "scaler"):
                if key.startswith(f"{part}_{matrix}."):
                    key = f"{part}.{key.split('.')[1]}_{matrix}"
        if key.startswith("bias.") and key.endswith("_B"):
            tensor = tensor.mT  # [L, r, out] -> [L, out, r]
        ours[key] = tensor.reshape(shapes[key])
    return ours
