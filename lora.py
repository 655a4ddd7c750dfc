"""The adapter: LoRA weights as data, and a frozen model that runs with them.

Adapters are a plain dictionary, the same everywhere in this project:

    {"q_proj": (A, B), "v_proj": (A, B)}      A [n, L, r, in]    B [n, L, out, r]

They are always a batch of n adapters; one adapter is a batch with n = 1. There is one entry per target.
A target is the set of linear layers with the same name, place and shape, in L decoder layers (in most models
in all of them). With an adapter a linear layer computes (LoRA, arXiv 2106.09685, eq. 3)

    y = W x + scaling * B (A x)
"""

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support import UserError, read_json, write_file

Adapter = dict[str, tuple[Tensor, Tensor]]

# -------------------- The layer that applies an adapter --------------------


def init_A_(A: Tensor) -> Tensor:
    """LoRA's initialisation of A [..., r, in]: uniform up to 1 / sqrt(in). B begins as zero."""
    bound = A.shape[-1] ** -0.5
    return A.uniform_(-bound, bound)


class LoRALinear(nn.Linear):
    """A frozen linear layer with an optional adapter. Its weight is the base model's tensor, not a copy."""

    def __init__(self, linear: nn.Linear, name: str, dropout: float):
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.name = name  # its target
        self.dropout = nn.Dropout(dropout)
        self.A: Tensor | None = None  # [n, r, in] while n adapters are in use
        self.B: Tensor | None = None  # [n, out, r]
        self.scaling: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [batch, T, out]
        if self.A is None:
            return y
        n = len(self.A)
        if n > 1 and x.dim() == 2:
            raise UserError(f"{self.name} gets tokens without their example (an expert?): adapt other layers")
        if len(x) % n:
            raise ValueError(f"a batch of {len(x)} cannot be split among {n} adapters")
        x = self.dropout(x.to(self.A.dtype))
        x = x.reshape(n, -1, self.in_features)  # [n, batch/n * T, in]: neighbours share an adapter
        update = self.scaling * (x @ self.A.mT) @ self.B.mT  # [n, batch/n * T, out]
        return y + update.view_as(y).to(y.dtype)


@contextmanager
def use(base: nn.Module, adapter: Adapter, scaling: float):
    """Run `base` with n adapters inside a `with` block. {} means no adapter. Blocks cannot be nested.

    In a batch of n * k examples, the first k use adapter 0, the next k use adapter 1, and so on. The block
    must contain the forward pass; with `model.recompute_layers` also the backward pass, which repeats it.
    """
    check_fits(base, adapter)
    try:
        for name, (A, B) in adapter.items():
            layers = base.lora_layers[name]
            weight = layers[0].weight
            A, B = A.to(weight.device, weight.dtype), B.to(weight.device, weight.dtype)
            # unbind: indexing would have a slower backward pass
            for layer, layer_A, layer_B in zip(layers, A.unbind(1), B.unbind(1)):
                layer.A, layer.B, layer.scaling = layer_A, layer_B, scaling  # [n, r, in], [n, out, r]
        yield
    finally:
        for layer in injected_layers(base):
            layer.A = layer.B = None


def check_fits(base: nn.Module, adapter: Adapter) -> None:
    """Raise UserError if adapters do not fit the injected layers of a model."""
    for name, (A, B) in adapter.items():
        shape = (*A.shape[1:-2], A.shape[-1], B.shape[-2])
        layers = base.lora_layers.get(name)
        found = layers and (len(layers), layers[0].in_features, layers[0].out_features)
        if found != shape:
            message = "the adapter is for another model (layers, in, out):"
            raise UserError(f"{message} {name} {shape}, in this one {found}")


@torch.no_grad()
def merge(base: nn.Module, adapter: Adapter, scaling: float) -> None:
    """Add one adapter (n = 1) to the weights, for good: W + scaling * B A."""
    check_fits(base, adapter)
    for name, (A, B) in adapter.items():
        for layer, layer_A, layer_B in zip(base.lora_layers[name], A[0], B[0]):
            update = scaling * layer_B.float() @ layer_A.float()  # [out, in]
            weight = layer.weight
            layer.weight.data = (weight.float() + update.to(weight.device)).to(weight.dtype)


# -------------------- Which layers have one --------------------


@dataclass
class Target:
    """A set of linear layers: where they are, and their shape."""

    path: str  # "model.layers.{}.self_attn.q_proj"
    layers: list[int]  # the numbers of the decoder layers that have one; L of them
    n_in: int
    n_out: int

    def paths(self) -> list[str]:
        """The paths of its linear layers."""
        return [self.path.format(layer) for layer in self.layers]


def inject(base: nn.Module, target_modules: list[str], dropout: float = 0.0) -> nn.Module:
    """Replace each linear layer of these names by a LoRALinear; returns the model.

    `dropout` acts on the input of A while `set_dropout` is on. Without an adapter the output is unchanged.
    `base.lora_targets` are the targets, `base.lora_layers` the new layers of each.
    """
    base.lora_targets, base.lora_layers = find_targets(base, target_modules), {}
    for name, target in base.lora_targets.items():
        base.lora_layers[name] = []
        for path in target.paths():
            linear = base.get_submodule(path)
            if isinstance(linear, LoRALinear):
                raise UserError(f"{path} would belong to two targets: {linear.name} and {name}")
            layer = LoRALinear(linear, name, dropout)
            base.set_submodule(path, layer)
            base.lora_layers[name].append(layer)
    return base


def injected_layers(base: nn.Module) -> list[LoRALinear]:
    """All LoRALinear layers of a model; [] before `inject`."""
    return [layer for layers in getattr(base, "lora_layers", {}).values() for layer in layers]


def set_dropout(base: nn.Module, active: bool) -> None:
    """Switch the dropout on the adapters' inputs on or off. The base model itself stays in eval mode."""
    for layer in injected_layers(base):
        layer.train(active)


LAYER_NUMBER = re.compile(r"\.(\d+)\.")  # the first number in a module's path is its layer


def split_path(path: str) -> tuple[str, int]:
    """A path without its number, and the number: ("model.layers.{}.self_attn.q_proj", 3)."""
    return LAYER_NUMBER.sub(".{}.", path, count=1), int(LAYER_NUMBER.search(path)[1])


def find_targets(base: nn.Module, names: list[str]) -> dict[str, Target]:
    """Find the targets with these names in a model. [] selects every linear layer in a numbered layer.

    A name is the end of a path, as in PEFT. It may have {} in place of the layer's number, as in
    `single_blocks.{}.to_q`. Raises UserError if it fits no layer, or several places or shapes.
    """
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base  # skip a vision tower
    in_decoder, places = set(decoder.modules()), {}  # {path with {}: {number: layer}}
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and module in in_decoder and LAYER_NUMBER.search(path):
            place, number = split_path(path)
            places.setdefault(place, {})[number] = module

    targets = {}
    for name in names or places:
        found = []  # (place, number)
        for place, layers in places.items():
            for number in layers:
                path = place.format(number)
                if f".{path}".endswith(f".{name}") or f".{place}".endswith(f".{name}"):
                    found.append((place, number))
        where = sorted({place for place, _ in found})
        if not found:
            known = ", ".join(sorted({place.split(".")[-1] for place in places})) or "none at all"
            raise UserError(f"this model has no nn.Linear layers named {name}, but {known}")
        if len(where) > 1:
            raise UserError(f"{name} is in several places; name one of them: {', '.join(where)}")
        layers = {number: places[place][number] for place, number in sorted(found)}
        shapes = {layer.weight.shape for layer in layers.values()}
        if len(shapes) > 1:
            example = where[0].format(min(layers))
            raise UserError(f"{name} has {len(shapes)} shapes; name single layers, such as {example}")
        layer = layers[min(layers)]
        if type(layer).forward is not nn.Linear.forward:
            kind = type(layer).__name__
            raise UserError(f"{name} is {kind}: quantised layers and the like have no adapters")
        ((n_out, n_in),) = shapes
        targets[name] = Target(where[0], list(layers), n_in, n_out)
    return targets


def as_targets(targets: dict) -> dict[str, Target]:
    """Targets from a JSON file."""
    return {name: Target(**entry) if isinstance(entry, dict) else entry for name, entry in targets.items()}


@dataclass
class LoRAConfig:
    """Adapter metadata: the layers it belongs to, and how it is scaled."""

    base_model: str = ""  # a Hugging Face id or a folder
    base_shape: list[int] = field(default_factory=list)  # its layers, hidden size and vocabulary
    n_layers: int = 0  # of the decoder
    targets: dict[str, Target] = field(default_factory=dict)
    r: int = 8
    alpha: float = 16.0
    rslora: bool = True  # rank-stabilised scaling (arXiv 2312.03732), as published
    instruction: bool = False  # prompts in training contained the task's instruction
    calibration: list[float] = field(default_factory=list)  # slope and offset, see `certainty`

    def __post_init__(self):
        self.targets = as_targets(self.targets)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def certainty(self, log_prob: float) -> float:
        """The probability that an answer is right, from the mean log-probability of its tokens.

        A logistic function of it with a calibration (extras/calibrate.py), otherwise its exponential.
        """
        if not self.calibration:
            return math.exp(log_prob)
        slope, offset = self.calibration
        return 1 / (1 + math.exp(-slope * log_prob - offset))

    def adapted_layers(self) -> list[int]:
        """The numbers of the decoder layers that have any target."""
        return sorted({layer for target in self.targets.values() for layer in target.layers})

    def positions(self, name: str) -> slice | list[int]:
        """The indices of a target's layers in `adapted_layers`."""
        adapted, layers = self.adapted_layers(), self.targets[name].layers
        return slice(None) if layers == adapted else [adapted.index(layer) for layer in layers]


def base_shape(config) -> list[int]:
    """[layers, hidden size, vocabulary]: identifies a base model that is stored in a folder."""
    text = config.get_text_config()
    return [text.num_hidden_layers, text.hidden_size, text.vocab_size]


def config_for(base: nn.Module, base_model: str, **settings) -> LoRAConfig:
    """The LoRAConfig of adapters for the injected layers of `base`; `settings` are its further fields."""
    shape = base_shape(base.config)
    return LoRAConfig(base_model, shape, n_layers=shape[0], targets=base.lora_targets, **settings)


# -------------------- Several adapters --------------------


def concat_rank(adapters: list[Adapter]) -> Adapter:
    """The sum of several adapters as one with the same scaling: B1 A1 + B2 A2 = [B1 B2] [A1; A2]."""
    return concat(adapters, dims=(-2, -1))  # A [n, L, r1 + r2 + ..., in]


def select(batch: Adapter, indices) -> Adapter:
    """Some adapters of a batch, as a new batch: a list or tensor of indices, with repetition, or a slice."""
    return {name: (A[indices], B[indices]) for name, (A, B) in batch.items()}


def concat(batches: list[Adapter], dims: tuple[int, int] = (0, 0)) -> Adapter:
    """Several batches as one. A [n1 + n2 + ..., L, r, in]"""
    whole = {}
    for name in batches[0]:
        A = torch.cat([batch[name][0] for batch in batches], dims[0])
        B = torch.cat([batch[name][1] for batch in batches], dims[1])
        whole[name] = (A, B)
    return whole


def statistics(batch: Adapter) -> tuple[Adapter, Adapter]:
    """Mean and standard deviation of n adapters, entry by entry: [n, L, ...] -> [L, ...], not a batch."""
    mean, std = {}, {}
    for name, pair in batch.items():
        correction = 1 if len(pair[0]) > 1 else 0
        mean[name] = tuple(matrix.cpu().double().mean(0) for matrix in pair)  # double: exact if all are equal
        std[name] = tuple(matrix.std(0, correction=correction) + 1e-10 for matrix in pair)
    return mean, std


def no_dots(name: str) -> str:
    """The name of a target as torch takes it for a parameter: without dots."""
    return name.replace(".", "_")


# -------------------- Adapter folders, in PEFT's format --------------------

ADAPTER_FILES = ["adapter_model.safetensors", "adapter_config.json", "prompt.json"]


def save_adapter(folder: str | Path, adapter: Adapter, config: LoRAConfig) -> None:
    """Write one adapter (n = 1) as PEFT does, and prompt.json: what its user has to know besides.

    Its rank is that of its matrices. lora_alpha is scaling * r, so that tools which know no rsLoRA are right.
    """
    tensors, names = {}, []
    for name, (A, B) in adapter.items():
        r, target = A.shape[-2], config.targets[name]
        names += target.paths() if "{}" in name else [name]
        for index, path in enumerate(target.paths()):
            tensors[f"base_model.model.{path}.lora_A.weight"] = A[0, index]
            tensors[f"base_model.model.{path}.lora_B.weight"] = B[0, index]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "inference_mode": True,
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "r": r,
        "lora_alpha": config.scaling * r,
        "use_rslora": False,
    }
    write_file(Path(folder, "adapter_model.safetensors"), tensors)
    write_file(Path(folder, "adapter_config.json"), peft)
    prompt = {"instruction": config.instruction, "calibration": config.calibration}
    write_file(Path(folder, "prompt.json"), prompt)


ADAPTER_KEY = re.compile(r"base_model\.model\.(?P<path>.+\.\d+\..+)\.lora_(?P<matrix>[AB])\.weight")
ANY_VALUE = {  # fields of adapter_config.json that do not change what the A and B of a layer mean
    *("task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules"),
    *("megatron_core", "qalora_group_size"),  # they have values by default, and matter only beside others
}
PLAIN = {"peft_type": ["LORA"], "bias": ["none"]}
PLAIN["init_lora_weights"] = [True, "gaussian", "orthogonal", "eva"]  # these leave the base model as it is


def load_adapter(folder: str | Path) -> tuple[Adapter, LoRAConfig]:
    """Read an adapter folder in PEFT's format: A [1, L, r, in], B [1, L, out, r] per target, and its config.

    Raises UserError if it is anything but a plain LoRA of one rank and one scaling.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds no adapter: {' and '.join(ADAPTER_FILES[:2])} are needed")
    peft = read_json(folder / "adapter_config.json")
    for name, value in peft.items():
        if value and name not in ANY_VALUE and value not in PLAIN.get(name, []):
            raise UserError(f"{folder} is not a plain LoRA adapter: {name} is {value}")
    config = LoRAConfig(base_model=peft.get("base_model_name_or_path") or "", r=peft["r"])
    config.alpha, config.rslora = peft["lora_alpha"], bool(peft.get("use_rslora"))
    if (folder / "prompt.json").exists():
        prompt = read_json(folder / "prompt.json")
        config.instruction = bool(prompt.get("instruction"))
        config.calibration = prompt.get("calibration", [])

    matrices: dict[str, dict[str, Tensor]] = {}  # {path: {"A": [r, in], "B": [out, r]}}
    for tensor_name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = ADAPTER_KEY.fullmatch(tensor_name)
        if not match or config.r not in (len(tensor), tensor.shape[1]):
            raise UserError(f"{folder} holds {tensor_name}, which is no A or B of rank {config.r}")
        matrices.setdefault(match["path"], {})[match["matrix"]] = tensor

    listed = peft["target_modules"] if isinstance(peft.get("target_modules"), list) else []  # or a pattern
    found = {}  # {name of a target: the paths of its layers}
    for path in sorted(matrices, key=lambda path: split_path(path)[1]):
        names = [name for name in listed if f".{path}".endswith(f".{name}")] + [path.split(".")[-1]]
        name = split_path(path)[0] if names[0] == path else names[0]
        found.setdefault(name, []).append(path)
    adapter = {}
    for name, paths in found.items():
        if any(len(matrices[path]) < 2 for path in paths):
            raise UserError(f"{folder}: a layer of {name} has only one of A and B")
        places = sorted({split_path(path)[0] for path in paths})
        if len(places) > 1:
            raise UserError(f"{folder}: {name} is in several places: {', '.join(places)}")
        A = torch.stack([matrices[path]["A"] for path in paths])  # [L, r, in]
        B = torch.stack([matrices[path]["B"] for path in paths])  # [L, out, r]
        adapter[name] = (A[None], B[None])
        layers = [split_path(path)[1] for path in paths]
        config.targets[name] = Target(places[0], layers, A.shape[-1], B.shape[-2])
    config.n_layers = 1 + max(config.adapted_layers())
    return adapter, config


def load_adapters(folders: list[Path], device="cpu") -> tuple[Adapter, LoRAConfig]:
    """Several adapter folders of one training run, as a batch: A [n, L, r, in], B [n, L, out, r].

    Raises UserError if their configs differ.
    """
    adapters, configs = [], []
    for folder in folders:
        adapter, config = load_adapter(folder)
        adapters.append(adapter)
        configs.append(config)
        if (config, list(adapter)) != (configs[0], list(adapters[0])):
            what = "base model, modules, rank, alpha or prompt.json"
            raise UserError(f"the adapters in {folder} and {folders[0]} differ in {what}")
    batch = {name: (A.to(device), B.to(device)) for name, (A, B) in concat(adapters).items()}
    return batch, config
