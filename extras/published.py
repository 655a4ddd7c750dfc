"""Convert a published checkpoint of Text-to-LoRA or Doc-to-LoRA: python -m extras.published FROM OUT_DIR

    python -m extras.published SakanaAI/text-to-lora/trained_t2l/gemma_2b_t2l out/gemma_t2l
    python -m extras.published SakanaAI/doc-to-lora/gemma_demo/checkpoint-80000 out/gemma_d2l
    python generate.py --hypernet out/gemma_t2l --desc "..." --input "..."

FROM is a folder, or a folder on the hub. Not tested against the published weights, which we could not
download; tested on small checkpoints in the same layout, written by the published code. Pickles are read by
torch's restricted unpickler: nothing in them runs.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hypernet
import model
from nets import d2l, rotary
from support import UserError, command, make_parser, read_json

FILES = ["hypermod.pt", "args.yaml", "adapter_config.json", "pytorch_model.bin"]
MOST_LAYERS = 1000  # of a base model
MOST_NUMBERS = 10**10  # a small file can ask for more, since torch stores a repeated number once


def convert(folder: Path, module_order: list[str] | None = None) -> nn.Module:
    """The network of a published checkpoint. Raises UserError if its files are broken or of another layout.

    `module_order` names the target modules in the order of the rows of the module embedding. The published
    code numbers them by iterating over a Python set, so the order depends on the hash seed of the training
    process, and no file records it. The default is the order of adapter_config.json, where PEFT wrote that
    set.
    """
    hint = ""
    try:
        if (folder / "pytorch_model.bin").exists():
            content = read_pickle(folder / "pytorch_model.bin")
            net_class, fields, weights = d2l.DocToLoRA, doc_fields(content), doc_weights(content)
        else:
            import yaml  # comes with transformers; nothing else needs it

            hint = ", or --module_order is wrong"
            peft = read_json(folder / "adapter_config.json")
            args = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
            content = read_pickle(folder / "hypermod.pt")
            fields = text_fields(peft, args, content, module_order or list(peft["target_modules"]))
            weights = our_weights(content, fields, args)
            is_rotary = fields["size"] == "small" and "rank_emb.0.weight" not in weights
            net_class = rotary.Net if is_rotary else hypernet.TextToLoRA
        n_numbers = sum(tensor.numel() for tensor in weights.values())
        if n_numbers > MOST_NUMBERS:
            raise ValueError(f"that network would have {n_numbers:,} parameters")
        with torch.device("meta"):  # only shapes, so that nothing is allocated before they are compared
            net = net_class(net_class.config_class(**fields))
        expected = {key: tensor.shape for key, tensor in net.state_dict().items()}
        found = {key: tensor.shape for key, tensor in weights.items()}
        if found != expected:
            differing = sorted(key for key in found | expected if found.get(key) != expected.get(key))
            raise ValueError(f"weights of other names or shapes: {', '.join(differing[:5])}")
        weights = {key: tensor.float().contiguous() for key, tensor in weights.items()}
        net.load_state_dict(weights, assign=True)
    except Exception as e:  # broken files raise arbitrary exceptions
        raise UserError(f"{folder} is no published checkpoint{hint}: {e!r}") from None
    return net.eval()


def make_targets(n_layers: int, in_features: dict[str, int], out_features: dict[str, int]) -> dict[str, dict]:
    """The targets of a config, one for each module. All layers have them."""
    if n_layers > MOST_LAYERS:
        raise ValueError(f"{n_layers} layers")
    targets = {}
    for name in in_features:
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        path, layers = f"model.layers.{{}}.{block}.{name}", list(range(n_layers))
        targets[name] = dict(path=path, layers=layers, n_in=in_features[name], n_out=out_features[name])
    return targets


class Record:
    """Stands for an object of an unknown class. It has the fields of the object and none of its code."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, fields: dict) -> None:
        self.__dict__.update(fields)


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a file of torch.save. Tensors and plain containers are rebuilt; other objects become Records."""
    with zipfile.ZipFile(path) as archive:
        program = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        for opcode, argument, _ in pickletools.genops(archive.read(program)):
            if opcode.name == "GLOBAL" and argument.endswith(" bytearray"):  # allowed by torch, of any length
                raise ValueError("it holds a bytearray")
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Record, name) for name in classes]):
        return torch.load(path, map_location="cpu", weights_only=True)


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


def text_fields(peft: dict, args: dict, weights: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """The fields of our config, from the two config files and the shapes of the weights."""
    task_encoder = weights["task_encoder.mlp.0.weight"]  # [latent / 2, E]
    head = weights[f"heads.{names[0]}.weight"]  # [width, head_in]
    in_features, out_features = {}, {}
    for name in names:
        A, B = weights[f"AB_offset.A.{name}"], weights[f"AB_offset.B.{name}"]  # [L, r, in], [L, out, r]
        n_layers, r, in_features[name] = A.shape
        out_features[name] = B.shape[1]
    if "out_emb_norm.weight" not in weights:
        size = "large"
    elif len(head) == max(in_features[names[0]], out_features[names[0]]):
        size = "small"
    else:
        size = "medium"
    recon_loss = ""
    if args["training_task"] == "recon" and not args["factorized"]:
        recon_loss = "delta_w"
    elif f"heads.{names[0]}.bias" not in weights:
        recon_loss = "z_score"
    return {
        "base_model": model.resolve(peft["base_model_name_or_path"]),
        "n_layers": n_layers,
        "targets": make_targets(n_layers, in_features, out_features),
        "r": r,
        "alpha": peft["lora_alpha"],
        "rslora": peft.get("use_rslora", False),
        "encoder": args.get("emb_model") or "base",
        "input_size": task_encoder.shape[1],
        "instruction": True,
        "recon_loss": recon_loss,
        "size": size,
        "latent_size": 2 * len(task_encoder),
        "head_in_size": head.shape[1],
        "dropout": 0.05,
        "input_dropout": 0.0,
    }


def our_weights(weights: dict[str, Tensor], fields: dict[str, Any], args: dict) -> dict[str, Tensor]:
    """Published weights under our names."""
    ours = {}
    for published, our in NAMES.items():
        for key, tensor in weights.items():
            if key.startswith(f"{published}."):
                ours[our + key.removeprefix(published)] = tensor
    if fields["size"] != "large":
        embeddings = []
        for name in fields["targets"]:
            embeddings.append(torch.stack([weights[f"out_emb.{name}.A"], weights[f"out_emb.{name}.B"]]))
        ours["AB_emb"] = torch.stack(embeddings)  # [M, 2, d]

    for name in fields["targets"]:
        for matrix in "AB":
            offset = weights[f"AB_offset.{matrix}.{name}"]
            if fields["recon_loss"] == "z_score":
                offset = offset + weights[f"mean_recon_target.{matrix}.{name}"]
                std = weights[f"std_recon_target.{matrix}.{name}"] + 1e-10
                ours[f"std.{name}_{matrix}"] = std.expand(offset.shape)
            ours[f"offset.{name}_{matrix}"] = offset
            if fields["recon_loss"] == "delta_w":
                ours[f"offset.{name}_{matrix}"] = torch.zeros_like(offset)
        if fields["recon_loss"] == "delta_w":
            # the target was B A times delta_w_scaling: A and B, and so the head, are divided by its root each
            for part in ("weight", "bias"):
                ours[f"heads.{name}.{part}"] = ours[f"heads.{name}.{part}"] * args["delta_w_scaling"] ** -0.5
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


def doc_fields(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of our config, from the records in the file."""
    network, reader = content["hypernet_config"], content["ctx_encoder_args"]
    aggregator, r = network.aggregator_config, network.lora_config.r
    if aggregator.num_self_attn_per_block or network.num_pre_head_layers != 1 or network.use_per_rank_bias:
        raise ValueError("this variant of the network was not published")
    in_features, out_features = network.feature_sizes
    n_blocks = sum("encoder.layers" in key and key.endswith("q_proj.weight") for key in content)
    return {
        "base_model": model.resolve(content["base_model_name_or_path"]),
        "n_layers": len(network.layer_indices),
        "targets": make_targets(len(network.layer_indices), in_features, out_features),
        "r": r,
        "alpha": round(network.lora_config.lora_alpha * r**0.5, 6),  # there lora_alpha is the scaling itself
        "input_size": aggregator.feature_size,
        "early_exit": reader.ctx_encoder_type == "early_exit",
        "latent_size": network.latent_size,
        "n_latents": aggregator.n_latent_queries,
        "n_blocks": n_blocks,
        "n_heads": 16,
        "chunk_len": 8192,  # of the published evaluation
    }


def doc_weights(content: dict[str, Any]) -> dict[str, Tensor]:
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
        if key in ("b1", "b2"):
            tensor = tensor[0]  # [1, L, 1, 1, d] -> [L, 1, 1, d]
        elif key.startswith("scaler."):
            tensor = tensor[0]  # [1, L, r, 1] -> [L, r, 1]
        elif key == "head" and tensor.dim() == 3:
            tensor = tensor[:, None]  # with a single module: [L, d, width] -> [L, 1, d, width]
        if key.endswith("_B"):
            tensor = tensor.mT  # [L, r, out] -> [L, out, r]; scaler: [L, r, 1] -> [L, 1, r]
        ours[key] = tensor
    return ours


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("start", metavar="FROM", help="a folder, or USER/REPO/FOLDER on the hub")
    add("out_dir", metavar="OUT_DIR", type=Path, help="a new folder")
    add("--module_order", help="of Text-to-LoRA: its target modules in the order of the module embedding")
    args = parser.parse_args()
    if args.out_dir.exists() and any(args.out_dir.iterdir()):
        raise UserError(f"{args.out_dir} is in use; choose another folder")
    order = args.module_order.split(",") if args.module_order else None
    net = convert(model.fetch(args.start, FILES), order)
    hypernet.save_hypernet(net, args.out_dir)
    print(f"{args.out_dir}: {net.config.base_model}, {', '.join(net.config.targets)}")


if __name__ == "__main__":
    command(main)
