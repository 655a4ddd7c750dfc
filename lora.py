"""The adapter: LoRA weights as data, and a frozen model that runs with them.

An adapter is a plain dictionary, the same everywhere in this project:

    {"q_proj": (A, B), "v_proj": (A, B)}      A [..., L, r, in]    B [..., L, out, r]

It has one entry per target, stacked over the L decoder layers that have it. A target is a set of linear
layers with the same name, place and shape; in most models each layer has one. Leading dimensions are a batch
of adapters. With an adapter a linear layer computes (LoRA, arXiv 2106.09685, eq. 3)

    y = W x + scaling * B (A x)
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
    n_layers: int = 0  # of the decoder
    paths: dict[str, str] = field(default_factory=dict)  # {"q_proj": "model.layers.{}.self_attn.q_proj"}
    # {"q_proj": [3, 7]}: the layers that have a target, if not all have it
    layers: dict[str, list[int]] = field(default_factory=dict)
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

    def layers_of(self, name: str) -> list[int]:
        """The numbers of the decoder layers that have this target; L of them."""
        return self.layers.get(name) or list(range(self.n_layers))

    def used_layers(self) -> list[int]:
        """The numbers of the decoder layers that have any target."""
        return sorted({layer for name in self.paths for layer in self.layers_of(name)})

    def positions(self, name: str) -> slice | list[int]:
        """Where the layers of a target are among `used_layers`."""
        used, own = self.used_layers(), self.layers_of(name)
        return slice(None) if own == used else [used.index(layer) for layer in own]


LAYER_NUMBER = re.compile(r"\.(\d+)\.")  # the first number in a module's path is its layer


def layer_number(path: str) -> int:
    return int(LAYER_NUMBER.search(path)[1])


def without_layer(path: str) -> str:
    """ "model.layers.3.self_attn.q_proj" -> "model.layers.{}.self_attn.q_proj" """
    return LAYER_NUMBER.sub(".{}.", path, count=1)


class Place(NamedTuple):
    """Where the linear layers of a target are, and their shape."""

    path: str  # without the number of the layer
    n_in: int
    n_out: int

    def names(self) -> list[str]:
        """Possible names for a target, the shortest first."""
        last, shape = self.path.split(".")[-1], f"{self.n_out}x{self.n_in}"
        in_layer = self.path.split("{}.")[-1].replace(".", "_")
        whole = self.path.replace(".{}", "").replace(".", "_")
        return [last, f"{last}_{shape}", in_layer, whole, f"{whole}_{shape}"]


def name_targets(places: list[Place]) -> dict[Place, str]:
    """For each place the shortest name that no other one has."""
    names = {}
    for place in places:
        for length, name in enumerate(place.names()):
            if [other.names()[length] for other in places].count(name) == 1:
                names[place] = name
                break
    return names


def find_targets(base: nn.Module, target_modules: list[str]) -> dict[str, list[tuple[str, nn.Linear]]]:
    """{target: [(path, linear layer) in the order of the decoder layers]}.

    `target_modules` are names of linear layers or of targets. Raises UserError if no layer has a name, or if
    its layers are of a class of their own, such as quantised ones.
    """
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base  # skip a vision tower
    decoder_modules = set(decoder.modules())
    found: dict[Place, list[tuple[str, nn.Linear]]] = {}
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and module in decoder_modules and LAYER_NUMBER.search(path):
            place = Place(without_layer(path), module.in_features, module.out_features)
            found.setdefault(place, []).append((path, module))
    if not found:
        raise UserError("this model has no nn.Linear layers (GPT-2 has Conv1D), so it cannot have an adapter")

    names, targets = name_targets(list(found)), {}
    for wanted in target_modules:
        chosen = [place for place in found if wanted in (names[place], place.names()[0])]
        if not chosen:
            others = ", ".join(sorted({place.names()[0] for place in found}))
            raise UserError(f"this model has no linear layers named {wanted}, but {others}")
        for place in chosen:
            targets[names[place]] = found[place]
            kind = type(found[place][0][1])
            if kind.forward not in (nn.Linear.forward, LoRALinear.forward):
                raise UserError(
                    f"{wanted} is {kind.__name__}: quantised layers and the like have no adapters"
                )
    return targets


def linear_names(network: nn.Module) -> list[str]:
    """The names of all linear layers in numbered layers: the last parts of their paths."""
    paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    return sorted({path.split(".")[-1] for path in paths if LAYER_NUMBER.search(path)})


def config_for(base: nn.Module, target_modules: list[str], base_model: str, **settings) -> LoRAConfig:
    """The LoRAConfig of adapters for these modules of `base`; `settings` are r, alpha and rslora."""
    config = LoRAConfig(base_model=base_model, base_shape=base_shape(base.config), **settings)
    config.n_layers = config.base_shape[0]
    for name, layers in find_targets(base, target_modules).items():
        path, module = layers[0]
        config.paths[name] = without_layer(path)
        config.in_features[name] = module.in_features
        config.out_features[name] = module.out_features
        if len(layers) < config.n_layers:
            config.layers[name] = [layer_number(path) for path, _ in layers]
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

    def __init__(self, linear: nn.Linear, name: str, index: int, dropout: float):
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.index = name, index  # its target, and its place among the layers that have it
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
    """Replace each linear layer of these targets by a LoRALinear; returns the model.

    `dropout` acts on the input of A, in training only. Without an adapter the output is unchanged.
    """
    for name, layers in find_targets(base, target_modules).items():
        for index, (path, linear) in enumerate(layers):
            parent, child = path.rsplit(".", 1)
            setattr(base.get_submodule(parent), child, LoRALinear(linear, name, index, dropout))
    return base


def injected_layers(base: nn.Module) -> list[LoRALinear]:
    return [module for module in base.modules() if isinstance(module, LoRALinear)]


def check_fits(base: nn.Module, adapter: Adapter) -> None:
    """Raise UserError if `adapter` does not fit the injected layers of `base`."""
    shapes = {}  # {target: (layers, in, out)}
    for module in injected_layers(base):
        n_layers, _, _ = shapes.get(module.name, (0, 0, 0))
        shapes[module.name] = (n_layers + 1, module.in_features, module.out_features)
    for name, (A, B) in adapter.items():
        shape = (A.shape[-3], A.shape[-1], B.shape[-2])
        if shapes.get(name) != shape:
            message = "the adapter is for another model (layers, in, out):"
            raise UserError(f"{message} {name} {shape}, in this one {shapes.get(name)}")


def set_adapter(base: nn.Module, adapter: Adapter | None, scaling: float | None = None) -> None:
    """Use this adapter in `base`, at this scaling, from now on; None removes it.

    It is computed in the dtype of the base model. A single adapter acts on the whole batch. Of n adapters and
    a batch of n * k, the first k use adapter 0, the next k adapter 1, and so on.
    """
    assert adapter is None or scaling is not None, "an adapter needs its scaling (config.scaling)"
    check_fits(base, adapter or {})
    layers = injected_layers(base)
    pairs = {}  # {target: [(A, B) of its first layer, of its second, ...]}
    for name, (A, B) in (adapter or {}).items():
        weight = layers[0].weight
        A, B = A.to(weight.device, weight.dtype), B.to(weight.device, weight.dtype)
        pairs[name] = list(zip(A.unbind(-3), B.unbind(-3)))  # indexing would have a slower backward pass
    for module in layers:
        module.A = module.B = None
        if module.name in pairs:
            A, B = pairs[module.name][module.index]
            module.A = A.view(-1, *A.shape[-2:])  # [n, r, in]
            module.B = B.view(-1, *B.shape[-2:])  # [n, out, r]
            module.scaling = scaling


def set_dropout(base: nn.Module, active: bool) -> None:
    """Switch the dropout on the adapters' inputs on or off. The base model itself stays in eval mode."""
    for module in injected_layers(base):
        module.train(active)


@torch.no_grad()
def merge(base: nn.Module, adapter: Adapter, scaling: float) -> None:
    """Add one adapter to the weights, for good: W + scaling * B A."""
    check_fits(base, adapter)
    for module in injected_layers(base):
        if module.name in adapter:
            A, B = adapter[module.name]
            update = scaling * B[module.index].float() @ A[module.index].float()  # [out, in]
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
            L, n_in, n_out = len(config.layers_of(name)), config.in_features[name], config.out_features[name]
            A = init_A_(torch.empty(L, config.r, n_in))
            self.A[name] = nn.Parameter(A.repeat(n, 1, 1, 1))  # [n, L, r, in]
            self.B[name] = nn.Parameter(torch.zeros(n, L, n_out, config.r))

    def forward(self, index) -> Adapter:
        return {name: (self.A[name][index], self.B[name][index]) for name in self.A}


# -------------------- Adapter folders, in PEFT's format --------------------


def save_adapter(folder: str | Path, adapter: Adapter, config: LoRAConfig) -> None:
    """Write one adapter as PEFT does. If its rank is not config.r, lora_alpha is set to keep the scaling."""
    tensors, ranks, alphas = {}, {}, {}
    for name, (A, B) in adapter.items():
        r, layers = A.shape[-2], config.layers_of(name)
        pattern = config.paths[name].split(".")[-1]
        if pattern != name:  # another target has it, too
            pattern = config.paths[name].replace(".", r"\.").format(f"({'|'.join(map(str, layers))})")
        ranks[pattern] = r
        alphas[pattern] = config.scaling * config.scaling_divisor(r)
        for index, layer in enumerate(layers):
            key = "base_model.model." + config.paths[name].format(layer)
            tensors[f"{key}.lora_A.weight"] = A[index]
            tensors[f"{key}.lora_B.weight"] = B[index]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source_of(config.base_model),
        "inference_mode": True,
        "target_modules": list(dict.fromkeys(config.paths[name].split(".")[-1] for name in adapter)),
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
    if peft.get("peft_type") != "LORA" or extras or not {"r", "lora_alpha"} <= set(peft):
        raise UserError(f"{folder} is not a plain LoRA adapter")
    config = LoRAConfig(base_model=peft.get("base_model_name_or_path") or "")
    config.r, config.alpha, config.rslora = peft["r"], peft["lora_alpha"], peft.get("use_rslora", False)

    matrices: dict[str, dict[str, Tensor]] = {}  # {path: {"A": [r, in], "B": [out, r]}}
    for key, tensor in read_file(folder / "adapter_model.safetensors").items():
        match = ADAPTER_KEY.fullmatch(key)
        if not match:
            raise UserError(f"{folder} holds {key}, which is not the A or B of a layer")
        if match["matrix"] == "B":
            scaling = peft_alpha(peft, match["path"]) / config.scaling_divisor(tensor.shape[-1])
            tensor = tensor * (scaling / config.scaling)
        matrices.setdefault(match["path"], {})[match["matrix"]] = tensor

    found: dict[Place, dict[int, tuple[Tensor, Tensor]]] = {}  # {place: {layer: (A, B)}}
    for path, pair in matrices.items():
        if len(pair) < 2:
            raise UserError(f"{folder} holds only {' and '.join(pair)} of {path}")
        place = Place(without_layer(path), pair["A"].shape[-1], pair["B"].shape[-2])
        found.setdefault(place, {})[layer_number(path)] = (pair["A"], pair["B"])
    if not found:
        raise UserError(f"{folder} holds an adapter without tensors")
    config.n_layers = 1 + max(layer for layers in found.values() for layer in layers)

    adapter, names = {}, name_targets(list(found))
    for place, by_layer in found.items():
        name, numbers = names[place], sorted(by_layer)
        r = max(len(A) for A, _ in by_layer.values())
        padded_A, padded_B = [], []
        for layer in numbers:
            A, B = by_layer[layer]
            padded_A.append(F.pad(A, (0, 0, 0, r - A.shape[0])))
            padded_B.append(F.pad(B, (0, r - B.shape[1])))
        adapter[name] = (torch.stack(padded_A), torch.stack(padded_B))  # [L, r, in], [L, out, r]
        config.paths[name], config.in_features[name], config.out_features[name] = place
        if len(numbers) < config.n_layers:
            config.layers[name] = numbers
    return adapter, config


def peft_alpha(peft: dict, path: str) -> float:
    """lora_alpha of one layer: PEFT's alpha_pattern holds regular expressions for the end of its path."""
    for pattern, alpha in (peft.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return alpha
    return peft["lora_alpha"]


def load_adapters(folders: list[Path], device="cpu") -> tuple[Adapter, LoRAConfig]:
    """Several adapter folders of one training run, as a batch: A [n, L, r, in], B [n, L, out, r].

    Raises UserError if they differ in modules, ranks or scaling.
    """
    adapters, kinds = [], []
    for folder in folders:
        adapter, config = load_adapter(folder)
        shapes = {name: (A.shape, B.shape) for name, (A, B) in adapter.items()}
        adapters.append(adapter)
        kinds.append((shapes, config.scaling))
        if kinds[-1] != kinds[0]:
            raise UserError(f"the adapters in {folder} and {folders[0]} differ in modules, rank or scaling")
    batch = {}
    for name in adapters[0]:
        A = torch.stack([adapter[name][0] for adapter in adapters])
        B = torch.stack([adapter[name][1] for adapter in adapters])
        batch[name] = (A.to(device), B.to(device))
    return batch, config
