"""The adapter: what a LoRA is as data, and how a frozen model runs with one.

An adapter is a plain dictionary, the same everywhere in this project:

    {"q_proj": (A, B), "v_proj": (A, B)}      A [..., L, r, in]    B [..., L, out, r]

It has one entry per kind of linear layer, stacked over the L layers of the base model. Leading dimensions are
a batch of adapters. With an adapter a linear layer computes (LoRA, arXiv 2106.09685, eq. 3)

    y = W x + scaling * B (A x)
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Adapter = dict[str, tuple[Tensor, Tensor]]
LAYER = re.compile(r"\.\d+\.")  # the first number in a module's path is its layer

class UserError(ValueError):
    """A mistake that the user can put right. The commands print it as one line and exit with code 2."""

# -------------------- Where an adapter goes, and the layer that applies it --------------------

@dataclass
class LoRAConfig:
    """What belongs to an adapter besides its tensors."""

    base_model: str = ""  # a preset, a Hugging Face id or a folder
    n_layers: int = 0
    paths: dict[str, str] = field(default_factory=dict)  # {"q_proj": "model.layers.{}.self_attn.q_proj"}
    in_features: dict[str, int] = field(default_factory=dict)
    out_features: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: float = 16.0
    rslora: bool = True  # rank-stabilised scaling (arXiv 2312.03732), as published

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

def find_targets(model: nn.Module, target_modules: list[str]) -> dict[str, list[tuple[str, nn.Linear]]]:
    """{module name: [(path, linear layer) of layer 0, 1, ...]}. UserError if the layers are not alike."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # not a vision tower beside it
    inside, linears = set(decoder.modules()), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module in inside and LAYER.search(path):
            linears.setdefault(path.split(".")[-1], []).append((path, module))
    for name in target_modules:
        if name not in linears:
            raise UserError(f"this model has no linear layers named {name}, but {', '.join(sorted(linears))}")
        kinds = {(LAYER.sub(".{}.", path, count=1), module.weight.shape) for path, module in linears[name]}
        numbers = [int(LAYER.search(path)[0].strip(".")) for path, _ in linears[name]]
        if len(kinds) > 1 or numbers != list(range(len(linears[target_modules[0]]))):
            raise UserError(f"{name} is not in every layer, in one place and of one shape: {kinds}")
    return {name: linears[name] for name in target_modules}

def config_for(model: nn.Module, target_modules: list[str], base_model: str, **settings) -> LoRAConfig:
    """The LoRAConfig of adapters for these modules of `model`; `settings` are r, alpha and rslora."""
    config = LoRAConfig(base_model=base_model, **settings)
    for name, layers in find_targets(model, target_modules).items():
        path, module = layers[0]
        config.n_layers, config.paths[name] = len(layers), LAYER.sub(".{}.", path, count=1)
        config.in_features[name], config.out_features[name] = module.in_features, module.out_features
    return config

def fresh_(A: Tensor) -> Tensor:
    """Fill A [..., r, in] as a new LoRA has it: uniform up to 1 / sqrt(in). Its B is zero."""
    return A.uniform_(-(A.shape[-1] ** -0.5), A.shape[-1] ** -0.5)

class LoRALinear(nn.Linear):
    """A frozen linear layer with room for an adapter. Its weight is the base model's own tensor."""

    def __init__(self, base: nn.Linear, name: str, layer: int, dropout: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.name, self.layer, self.dropout = name, layer, nn.Dropout(dropout)
        self.A = self.B = self.scaling = None  # [n, r, in] and [n, out, r] for n adapters, and their scaling

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [rows, T, out]
        if self.A is None:
            return y
        assert len(x) % len(self.A) == 0, f"{len(x)} rows cannot be shared out among {len(self.A)} adapters"
        x = self.dropout(x.to(self.A.dtype))
        x = x.reshape(len(self.A), -1, self.in_features)  # [n, rows/n * T, in]: neighbours share an adapter
        update = self.scaling * (x @ self.A.mT) @ self.B.mT  # [n, rows/n * T, out]
        return y + update.view_as(y).to(y.dtype)

def inject(model: nn.Module, target_modules: list[str], dropout: float = 0.0) -> nn.Module:
    """Replace every linear layer with one of these names by a LoRALinear; returns the model. `dropout` acts
    on the input of A, in training only. Without an adapter the model computes what it did."""
    for name, layers in find_targets(model, target_modules).items():
        for layer, (path, module) in enumerate(layers):
            parent, child = path.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, LoRALinear(module, name, layer, dropout))
    return model

def lora_layers(model: nn.Module, adapter: Adapter) -> list[LoRALinear]:
    """The injected layers of `model`. Raises UserError if `adapter` does not fit them."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    n_layers = max((m.layer + 1 for m in layers), default=0)
    there = {m.name: (n_layers, m.in_features, m.out_features) for m in layers}
    for name, (A, B) in adapter.items():
        shape = (A.shape[-3], A.shape[-1], B.shape[-2])
        if there.get(name) != shape:
            raise UserError(f"the adapter is for another base model: {name} {shape}, there {there.get(name)}")
    return layers

def set_adapter(model: nn.Module, adapter: Adapter | None, scaling: float | None = None) -> None:
    """Run `model` with this adapter, at this scaling, from now on; None clears it. One adapter acts on all
    rows of a batch. Of n adapters and k * n rows, the first k use adapter 0, the next k adapter 1, ..."""
    assert adapter is None or scaling is not None, "an adapter needs its scaling (config.scaling)"
    adapter = adapter or {}
    by_layer = {name: (A.unbind(-3), B.unbind(-3)) for name, (A, B) in adapter.items()}
    for m in lora_layers(model, adapter):
        m.A = m.B = None
        if m.name in by_layer:
            A, B = by_layer[m.name][0][m.layer], by_layer[m.name][1][m.layer]
            m.A, m.B = A.view(-1, *A.shape[-2:]), B.view(-1, *B.shape[-2:])  # [n, r, in], [n, out, r]
            m.scaling = scaling

@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter, scaling: float) -> None:
    """Add one adapter to the weights, for good: W + scaling * B A."""
    for m in lora_layers(model, adapter):
        if m.name in adapter:
            A, B = adapter[m.name][0][m.layer], adapter[m.name][1][m.layer]
            m.weight.data = (m.weight.float() + scaling * B.float() @ A.float()).to(m.weight.dtype)

# -------------------- Several adapters --------------------

def concat_rank(adapters: list[Adapter]) -> Adapter:
    """One adapter that does what all of these do together, at the same scaling: the ranks add up.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]
    """
    joined = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        pairs = [adapter[name] for adapter in adapters if name in adapter]
        joined[name] = (torch.cat([A for A, _ in pairs], -2), torch.cat([B for _, B in pairs], -1))
    return joined

def select(adapter: Adapter, index) -> Adapter:
    """Adapters out of a batch: an integer takes one, a list or index tensor a new batch (rows may repeat)."""
    return {name: (A[index], B[index]) for name, (A, B) in adapter.items()}

class LoRABank(nn.Module):
    """Ordinary LoRAs, trained as a batch, all from one random A. Task index [n] -> n adapters, int -> one."""

    def __init__(self, config: LoRAConfig, n: int):
        super().__init__()
        self.config, self.A, self.B = config, nn.ParameterDict(), nn.ParameterDict()
        for name in config.paths:
            n_in, n_out = config.in_features[name], config.out_features[name]
            A = fresh_(torch.empty(config.n_layers, config.r, n_in))
            self.A[name] = nn.Parameter(A.repeat(n, 1, 1, 1))  # [n, L, r, in]
            self.B[name] = nn.Parameter(torch.zeros(n, config.n_layers, n_out, config.r))

    def forward(self, index: Tensor) -> Adapter:
        return {name: (self.A[name][index], self.B[name][index]) for name in self.A}

# -------------------- Files --------------------

def write(path: Path, content: dict) -> None:
    """Write tensors (.safetensors) or JSON, whole or not at all."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            save_file({k: t.detach().cpu().contiguous() for k, t in content.items()}, tmp, {"format": "pt"})
        else:
            tmp.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

def read(path: str | Path) -> dict:
    """Read tensors (.safetensors) or JSON. Raises UserError if the file is missing or broken."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None

def save_adapter(folder: str | Path, adapter: Adapter, config: LoRAConfig) -> None:
    """Write one adapter as PEFT does. Ranks follow from the tensors, lora_alpha from config.scaling."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (A, B) in adapter.items():
        for layer in range(config.n_layers):
            key = "base_model.model." + config.paths[name].format(layer)
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A[layer], B[layer]
    ranks = {name: A.shape[-2] for name, (A, _) in adapter.items()}
    alphas = {name: config.scaling * (r**0.5 if config.rslora else r) for name, r in ranks.items()}
    peft = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=config.base_model)
    peft |= dict(inference_mode=True, target_modules=list(adapter), lora_dropout=0.0, bias="none")
    peft |= dict(r=max(ranks.values()), lora_alpha=round(max(alphas.values()), 6), use_rslora=config.rslora)
    peft |= dict(rank_pattern=ranks, alpha_pattern=alphas) if len(set(ranks.values())) > 1 else {}
    write(folder / "adapter_model.safetensors", tensors)
    write(folder / "adapter_config.json", peft)

def load_adapter(folder: str | Path) -> tuple[Adapter, LoRAConfig]:
    """Read an adapter folder in PEFT's format. Raises UserError if it is none, or holds more than A and B."""
    folder = Path(folder)
    peft = read(folder / "adapter_config.json")
    more = peft.get("use_dora") or peft.get("modules_to_save") or peft.get("bias", "none") != "none"
    if peft.get("peft_type") != "LORA" or more:
        raise UserError(f"{folder} is not a plain LoRA adapter")
    config = LoRAConfig(base_model=peft.get("base_model_name_or_path") or "")
    config.r, config.alpha, config.rslora = peft["r"], peft["lora_alpha"], peft.get("use_rslora", False)
    layers = {}  # {module name: ({layer: A}, {layer: B})}
    for key, tensor in read(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+?\.(\d+)\..+)\.lora_([AB])\.weight", key)
        if not match:
            raise UserError(f"{folder} holds {key}, which is not the A or B of a layer")
        path, layer, matrix = match[1], int(match[2]), match[3]
        name = path.split(".")[-1]
        if matrix == "B":  # PEFT may scale modules differently; here one scaling holds, so B takes the rest
            patterns = peft.get("alpha_pattern", {})
            special = [patterns[k] for k in patterns if re.fullmatch(rf"(.*\.)?({k})", path)]
            alpha, r = [*special, config.alpha][0], tensor.shape[-1]
            tensor = tensor * (alpha / (r**0.5 if config.rslora else r) / config.scaling)
        config.paths[name] = LAYER.sub(".{}.", path, count=1)
        layers.setdefault(name, ({}, {}))["AB".index(matrix)][layer] = tensor
    adapter = {}
    for name, pair in layers.items():
        if any(sorted(of) != list(range(len(layers[name][0]))) for of in pair):
            raise UserError(f"{folder} has {name} in some layers only")
        A, B = (torch.stack([of[i] for i in range(len(of))]) for of in pair)  # [L, r, in], [L, out, r]
        adapter[name], config.n_layers = (A, B), len(A)
        config.in_features[name], config.out_features[name] = A.shape[-1], B.shape[-2]
    return adapter, config

def load_adapters(folders: list[str | Path], device="cpu") -> tuple[Adapter, LoRAConfig]:
    """Several adapter folders of one training run, as a batch. A [n, L, r, in], B [n, L, out, r]."""
    loaded = [load_adapter(folder) for folder in folders]
    stacked = lambda name, k: torch.stack([adapter[name][k] for adapter, _ in loaded]).to(device)
    return {name: (stacked(name, 0), stacked(name, 1)) for name in loaded[0][0]}, loaded[0][1]

# -------------------- What the commands share --------------------

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the default behind each flag that has one."""

    def _get_help_string(self, action):
        said = action.default is not None and action.default is not False
        return super()._get_help_string(action) if said else action.help

def command(main) -> None:
    """Run a command's main(). A UserError, or a file error, is one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError, SafetensorError) as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
