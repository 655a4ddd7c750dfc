"""The adapter: LoRA weights as data, and a frozen model that runs with them.

An adapter is a plain dictionary, the same everywhere in this project:

    {"q_proj": (A, B), "v_proj": (A, B)}      A [..., L, r, in]    B [..., L, out, r]

It has one entry per linear layer of a decoder block, stacked over the L blocks of the base model. Leading
dimensions are a batch of adapters. With an adapter a linear layer computes (LoRA, arXiv 2106.09685, eq. 3)

    y = W x + scaling * B (A x)
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.files import UserError, read_file, write_file
from support.hub import source_of

Adapter = dict[str, tuple[Tensor, Tensor]]

# -------------------- Where an adapter goes --------------------


@dataclass
class LoRAConfig:
    """Adapter metadata: the layers it belongs to, and how it is scaled."""

    base_model: str = ""  # a Hugging Face id, a folder, or "tiny"
    base_shape: list[int] = field(default_factory=list)  # its layers, hidden size and vocabulary
    n_layers: int = 0
    paths: dict[str, str] = field(default_factory=dict)  # {"q_proj": "model.layers.{}.self_attn.q_proj"}
    in_features: dict[str, int] = field(default_factory=dict)
    out_features: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: float = 16.0
    rslora: bool = True  # rank-stabilised scaling (arXiv 2312.03732), as published

    @property
    def scaling(self) -> float:
        return self.alpha / self.scaling_divisor(self.r)

    def scaling_divisor(self, r: int) -> float:
        return r**0.5 if self.rslora else r


LAYER_NUMBER = re.compile(r"\.(\d+)\.")  # the first number in a module's path is its layer


def layer_number(path: str) -> int:
    return int(LAYER_NUMBER.search(path)[1])


def without_layer(path: str) -> str:
    """ "model.layers.3.self_attn.q_proj" -> "model.layers.{}.self_attn.q_proj" """
    return LAYER_NUMBER.sub(".{}.", path, count=1)


def find_targets(base: nn.Module, target_modules: list[str]) -> dict[str, list[tuple[str, nn.Linear]]]:
    """{module name: [(path, linear layer) of layer 0, of layer 1, ...]}.

    Raises UserError if a target is missing in some layers or its shape varies.
    """
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base  # skip a vision tower
    decoder_modules = set(decoder.modules())
    linears: dict[str, list[tuple[str, nn.Linear]]] = {}
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and module in decoder_modules and LAYER_NUMBER.search(path):
            linears.setdefault(path.split(".")[-1], []).append((path, module))

    targets = {}
    for name in target_modules:
        if name not in linears:
            raise UserError(f"this model has no linear layers named {name}, but {', '.join(sorted(linears))}")
        targets[name] = linears[name]
        n_layers = len(linears[target_modules[0]])
        layers = [layer_number(path) for path, _ in linears[name]]
        places = {without_layer(path) for path, _ in linears[name]}
        shapes = {tuple(module.weight.shape) for _, module in linears[name]}
        if layers != list(range(n_layers)) or len(places) > 1 or len(shapes) > 1:
            found = f"layers {layers}, places {sorted(places)}, shapes {sorted(shapes)}"
            raise UserError(f"{name} must be in every layer, in one place and with one shape; found {found}")
    return targets


def config_for(base: nn.Module, target_modules: list[str], base_model: str, **settings) -> LoRAConfig:
    """The LoRAConfig of adapters for these modules of `base`; `settings` are r, alpha and rslora."""
    config = LoRAConfig(base_model=base_model, base_shape=base_shape(base.config), **settings)
    for name, layers in find_targets(base, target_modules).items():
        path, module = layers[0]
        config.n_layers = len(layers)
        config.paths[name] = without_layer(path)
        config.in_features[name] = module.in_features
        config.out_features[name] = module.out_features
    return config


def base_shape(config) -> list[int]:
    """[layers, hidden size, vocabulary]: identifies a base model that is stored in a folder."""
    text = config.get_text_config()
    return [text.num_hidden_layers, text.hidden_size, text.vocab_size]


# -------------------- The layer that applies it --------------------


def init_A_(A: Tensor) -> Tensor:
    """LoRA's initialisation of A [..., r, in]: uniform up to 1 / sqrt(in). B begins as zero."""
    bound = A.shape[-1] ** -0.5
    return A.uniform_(-bound, bound)


class LoRALinear(nn.Linear):
    """A frozen linear layer with an optional adapter. Its weight is the base model's tensor, not a copy."""

    def __init__(self, linear: nn.Linear, name: str, layer: int, dropout: float):
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.layer = name, layer
        self.dropout = nn.Dropout(dropout)
        self.A: Tensor | None = None  # [n, r, in] for n adapters
        self.B: Tensor | None = None  # [n, out, r]
        self.scaling: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [batch, T, out]
        if self.A is None:
            return y
        n = len(self.A)
        assert len(x) % n == 0, f"a batch of {len(x)} cannot be split among {n} adapters"
        x = self.dropout(x.to(self.A.dtype))
        x = x.reshape(n, -1, self.in_features)  # [n, batch/n * T, in]: neighbours share an adapter
        update = self.scaling * (x @ self.A.mT) @ self.B.mT  # [n, batch/n * T, out]
        return y + update.view_as(y).to(y.dtype)


def inject(base: nn.Module, target_modules: list[str], dropout: float = 0.0) -> nn.Module:
    """Replace each linear layer that has one of these names by a LoRALinear; returns the model.

    `dropout` acts on the input of A, in training only. Without an adapter the output is unchanged.
    """
    for name, layers in find_targets(base, target_modules).items():
        for layer, (path, linear) in enumerate(layers):
            parent, child = path.rsplit(".", 1)
            setattr(base.get_submodule(parent), child, LoRALinear(linear, name, layer, dropout))
    return base


def lora_layers(base: nn.Module, adapter: Adapter) -> list[LoRALinear]:
    """The injected layers of `base`. Raises UserError if `adapter` does not fit them."""
    layers = [module for module in base.modules() if isinstance(module, LoRALinear)]
    n_layers = max((module.layer + 1 for module in layers), default=0)
    shapes = {module.name: (n_layers, module.in_features, module.out_features) for module in layers}
    for name, (A, B) in adapter.items():
        shape = (A.shape[-3], A.shape[-1], B.shape[-2])
        if shapes.get(name) != shape:
            message = "the adapter is for another base model (layers, in, out):"
            raise UserError(f"{message} {name} {shape}, in this one {shapes.get(name)}")
    return layers


def set_adapter(base: nn.Module, adapter: Adapter | None, scaling: float | None = None) -> None:
    """Use this adapter in `base`, at this scaling, from now on; None removes it.

    It is computed in the dtype of the base model. A single adapter acts on the whole batch. Of n adapters and
    a batch of n * k, the first k use adapter 0, the next k adapter 1, and so on.
    """
    assert adapter is None or scaling is not None, "an adapter needs its scaling (config.scaling)"
    layers = lora_layers(base, adapter or {})
    by_layer = {}  # {module name: [(A, B) of layer 0, of layer 1, ...]}
    for name, (A, B) in (adapter or {}).items():
        A, B = A.to(layers[0].weight.dtype), B.to(layers[0].weight.dtype)
        by_layer[name] = list(zip(A.unbind(-3), B.unbind(-3)))  # indexing would have a slower backward pass
    for module in layers:
        module.A = module.B = None
        if module.name in by_layer:
            A, B = by_layer[module.name][module.layer]
            module.A = A.view(-1, *A.shape[-2:])  # [n, r, in]
            module.B = B.view(-1, *B.shape[-2:])  # [n, out, r]
            module.scaling = scaling


def set_dropout(base: nn.Module, active: bool) -> None:
    """Switch the dropout on the adapters' inputs on or off. The base model itself stays in eval mode."""
    for module in base.modules():
        if isinstance(module, LoRALinear):
            module.train(active)


@torch.no_grad()
def merge(base: nn.Module, adapter: Adapter, scaling: float) -> None:
    """Add one adapter to the weights, for good: W + scaling * B A."""
    for module in lora_layers(base, adapter):
        if module.name in adapter:
            A, B = adapter[module.name]
            update = scaling * B[module.layer].float() @ A[module.layer].float()  # [out, in]
            module.weight.data = (module.weight.float() + update).to(module.weight.dtype)


# -------------------- Several adapters --------------------


def concat_rank(adapters: list[Adapter]) -> Adapter:
    """One adapter that does what all of these do together, at the same scaling: the ranks add up.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter in adapters:
        for name, pair in adapter.items():
            pairs.setdefault(name, []).append(pair)
    joined = {}
    for name in pairs:
        A = torch.cat([A for A, _ in pairs[name]], -2)  # [..., L, r1 + r2 + ..., in]
        B = torch.cat([B for _, B in pairs[name]], -1)
        joined[name] = (A, B)
    return joined


def select(adapter: Adapter, index) -> Adapter:
    """Adapters of a batch: an integer takes one, a list or index tensor a new batch, with repetition."""
    return {name: (A[index], B[index]) for name, (A, B) in adapter.items()}


class LoRABank(nn.Module):
    """Ordinary LoRAs, trained as a batch, all from the same random A.

    Called with task indices [n] it gives n adapters, with an integer one.
    """

    def __init__(self, config: LoRAConfig, n: int):
        super().__init__()
        self.config = config
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name in config.paths:
            n_in, n_out = config.in_features[name], config.out_features[name]
            A = init_A_(torch.empty(config.n_layers, config.r, n_in))
            self.A[name] = nn.Parameter(A.repeat(n, 1, 1, 1))  # [n, L, r, in]
            self.B[name] = nn.Parameter(torch.zeros(n, config.n_layers, n_out, config.r))

    def forward(self, index) -> Adapter:
        return {name: (self.A[name][index], self.B[name][index]) for name in self.A}


# -------------------- Adapter folders, in PEFT's format --------------------


def save_adapter(folder: str | Path, adapter: Adapter, config: LoRAConfig) -> None:
    """Write one adapter as PEFT does. If its rank is not config.r, lora_alpha is set to keep the scaling."""
    tensors, ranks, alphas = {}, {}, {}
    for name, (A, B) in adapter.items():
        ranks[name] = A.shape[-2]
        alphas[name] = config.scaling * config.scaling_divisor(ranks[name])
        for layer in range(config.n_layers):
            key = "base_model.model." + config.paths[name].format(layer)
            tensors[f"{key}.lora_A.weight"] = A[layer]
            tensors[f"{key}.lora_B.weight"] = B[layer]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source_of(config.base_model),
        "inference_mode": True,
        "target_modules": list(adapter),
        "lora_dropout": 0.0,
        "bias": "none",
        "r": max(ranks.values()),
        "lora_alpha": round(max(alphas.values()), 6),
        "use_rslora": config.rslora,
    }
    if len(set(ranks.values())) > 1:
        peft |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "adapter_model.safetensors", tensors)
    write_file(folder / "adapter_config.json", peft)


ADAPTER_KEY = re.compile(r"base_model\.model\.(?P<path>.+\.\d+\..+)\.lora_(?P<matrix>[AB])\.weight")


def load_adapter(folder: str | Path) -> tuple[Adapter, LoRAConfig]:
    """Read an adapter folder in PEFT's format: A [L, r, in], B [L, out, r] per module, and its config.

    If PEFT scales some modules differently (alpha_pattern, rank_pattern), we keep one scaling and fold
    the difference into B. Layers of smaller rank are zero-padded to the largest rank of their module.
    Raises UserError if the folder holds anything but the A and B of linear layers.
    """
    folder = Path(folder)
    peft = read_file(folder / "adapter_config.json")
    extras = peft.get("use_dora") or peft.get("modules_to_save") or peft.get("bias", "none") != "none"
    if peft.get("peft_type") != "LORA" or extras:
        raise UserError(f"{folder} is not a plain LoRA adapter")
    config = LoRAConfig(base_model=peft.get("base_model_name_or_path") or "")
    config.r, config.alpha, config.rslora = peft["r"], peft["lora_alpha"], peft.get("use_rslora", False)

    layers: dict[str, dict[str, dict[int, Tensor]]] = {}  # {module name: {"A" or "B": {layer: tensor}}}
    for key, tensor in read_file(folder / "adapter_model.safetensors").items():
        match = ADAPTER_KEY.fullmatch(key)
        if not match:
            raise UserError(f"{folder} holds {key}, which is not the A or B of a layer")
        path, matrix = match["path"], match["matrix"]
        name = path.split(".")[-1]
        if matrix == "B":
            scaling = peft_alpha(peft, path) / config.scaling_divisor(tensor.shape[-1])
            tensor = tensor * (scaling / config.scaling)
        config.paths[name] = without_layer(path)
        matrices = layers.setdefault(name, {"A": {}, "B": {}})
        matrices[matrix][layer_number(path)] = tensor

    adapter = {}
    for name, matrices in layers.items():
        numbers = list(range(len(matrices["A"])))
        if sorted(matrices["A"]) != numbers or sorted(matrices["B"]) != numbers:
            raise UserError(f"{folder} has {name} in some layers only")
        r = max(len(A) for A in matrices["A"].values())
        padded_A, padded_B = [], []
        for layer in numbers:
            A, B = matrices["A"][layer], matrices["B"][layer]
            padded_A.append(F.pad(A, (0, 0, 0, r - A.shape[0])))
            padded_B.append(F.pad(B, (0, r - B.shape[1])))
        A, B = torch.stack(padded_A), torch.stack(padded_B)  # [L, r, in], [L, out, r]
        adapter[name] = (A, B)
        config.n_layers = len(A)
        config.in_features[name], config.out_features[name] = A.shape[-1], B.shape[-2]
    return adapter, config


def peft_alpha(peft: dict, path: str) -> float:
    """lora_alpha of one layer: PEFT's alpha_pattern holds regular expressions for the end of its path."""
    for pattern, alpha in (peft.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return alpha
    return peft["lora_alpha"]


def load_adapters(folders: list[Path], device="cpu") -> tuple[Adapter, LoRAConfig]:
    """Several adapter folders of one training run, as a batch: A [n, L, r, in], B [n, L, out, r]."""
    adapters = []
    for folder in folders:
        adapter, config = load_adapter(folder)
        adapters.append(adapter)
    batch = {}
    for name in adapters[0]:
        A = torch.stack([adapter[name][0] for adapter in adapters])
        B = torch.stack([adapter[name][1] for adapter in adapters])
        batch[name] = (A.to(device), B.to(device))
    return batch, config
