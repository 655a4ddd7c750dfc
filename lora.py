"""The adapter: LoRA weights as data, and a frozen model that runs with them.

An adapter is a plain dictionary, the same everywhere in this project:

    {"q_proj": (A, B), "v_proj": (A, B)}      A [..., L, r, in]    B [..., L, out, r]

It has one entry per target, stacked over the L decoder layers that have it. A target is a set of linear
layers with the same name, place and shape; in most models each layer has one. Leading dimensions are a batch
of adapters. With an adapter a linear layer computes (LoRA, arXiv 2106.09685, eq. 3)

    y = W x + scaling * B (A x)
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import hub
from support.files import UserError, read_file, read_object, write_file
from support.targets import Target, as_targets, find_targets, one_target, split_path

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
        self.A: Tensor | None = None  # [n, r, in] for n adapters
        self.B: Tensor | None = None  # [n, out, r]
        self.scaling: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [batch, T, out]
        if self.A is None:
            return y
        n = len(self.A)
        if n > 1 and x.dim() == 2:
            raise UserError(f"{self.name} gets tokens without their example (an expert?): adapt other layers")
        assert len(x) % n == 0, f"a batch of {len(x)} cannot be split among {n} adapters"
        x = self.dropout(x.to(self.A.dtype))
        x = x.reshape(n, -1, self.in_features)  # [n, batch/n * T, in]: neighbours share an adapter
        update = self.scaling * (x @ self.A.mT) @ self.B.mT  # [n, batch/n * T, out]
        return y + update.view_as(y).to(y.dtype)


# -------------------- Where it goes --------------------


@dataclass
class LoRAConfig:
    """Adapter metadata: the layers it belongs to, and how it is scaled."""

    base_model: str = ""  # a Hugging Face id, a folder, or "tiny"
    base_shape: list[int] = field(default_factory=list)  # its layers, hidden size and vocabulary
    n_layers: int = 0  # of the decoder
    targets: dict[str, Target] = field(default_factory=dict)  # of each: paths, layers, n_in, n_out
    r: int = 8
    alpha: float = 16.0
    rslora: bool = True  # rank-stabilised scaling (arXiv 2312.03732), as published
    instruction: bool = False  # prompts in training contained the task's instruction

    def __post_init__(self):
        self.targets = as_targets(self.targets)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def adapted_layers(self) -> list[int]:
        """The numbers of the decoder layers that have any target."""
        return sorted({layer for target in self.targets.values() for layer in target.layers})

    def positions(self, name: str) -> slice | list[int]:
        """Where the layers of a target are among `adapted_layers`."""
        adapted, layers = self.adapted_layers(), self.targets[name].layers
        return slice(None) if layers == adapted else [adapted.index(layer) for layer in layers]


def config_for(base: nn.Module, targets: dict[str, Target], base_model: str, **settings) -> LoRAConfig:
    """The LoRAConfig of adapters for these targets of `base`; `settings` are its further fields."""
    shape = hub.base_shape(base.config)
    return LoRAConfig(base_model, shape, n_layers=shape[0], targets=targets, **settings)


# -------------------- Using it --------------------


def inject(base: nn.Module, target_modules: list[str], dropout: float = 0.0) -> nn.Module:
    """Replace each linear layer of these names by a LoRALinear; returns the model.

    `dropout` acts on the input of A, in training only. Without an adapter the output is unchanged.
    """
    return inject_targets(base, find_targets(base, target_modules), dropout)


def inject_targets(base: nn.Module, targets: dict[str, Target], dropout: float = 0.0) -> nn.Module:
    """As `inject`, for targets that are known. `base.lora_layers` are the new layers of each."""
    base.lora_targets, base.lora_layers = targets, {}
    for name, target in targets.items():
        base.lora_layers[name] = []
        for path in target.paths():
            parent, child = path.rsplit(".", 1)
            linear = base.get_submodule(path)
            if isinstance(linear, LoRALinear):
                raise UserError(f"{path} would belong to two targets: {linear.name} and {name}")
            layer = LoRALinear(linear, name, dropout)
            setattr(base.get_submodule(parent), child, layer)
            base.lora_layers[name].append(layer)
    return base


def injected_layers(base: nn.Module) -> list[LoRALinear]:
    """All of them; none before `inject`."""
    return [layer for layers in getattr(base, "lora_layers", {}).values() for layer in layers]


def check_fits(base: nn.Module, adapter: Adapter) -> None:
    """Raise UserError if an adapter does not fit the injected layers of a model."""
    for name, (A, B) in adapter.items():
        shape = (A.shape[-3], A.shape[-1], B.shape[-2])
        layers = base.lora_layers.get(name)
        found = layers and (len(layers), layers[0].in_features, layers[0].out_features)
        if found != shape:
            message = "the adapter is for another model (layers, in, out):"
            raise UserError(f"{message} {name} {shape}, in this one {found}")


@contextmanager
def use(base: nn.Module, adapter: Adapter, scaling: float):
    """Run `base` with an adapter, in a block that holds the forward pass and the backward pass.

    It is computed in the dtype of the base model. A single adapter acts on the whole batch. Of n adapters and
    a batch of n * k, the first k use adapter 0, the next k adapter 1, and so on. {} is none. No nesting.
    """
    check_fits(base, adapter)
    for name, (A, B) in adapter.items():
        layers = base.lora_layers[name]
        weight = layers[0].weight
        A, B = A.to(weight.device, weight.dtype), B.to(weight.device, weight.dtype)
        # unbind: indexing would have a slower backward pass
        for layer, layer_A, layer_B in zip(layers, A.unbind(-3), B.unbind(-3)):
            layer.A = layer_A.view(-1, *A.shape[-2:])  # [n, r, in]
            layer.B = layer_B.view(-1, *B.shape[-2:])  # [n, out, r]
            layer.scaling = scaling
    try:
        yield
    finally:
        for layer in injected_layers(base):
            layer.A = layer.B = None


def set_dropout(base: nn.Module, active: bool) -> None:
    """Switch the dropout on the adapters' inputs on or off. The base model itself stays in eval mode."""
    for layer in injected_layers(base):
        layer.train(active)


@torch.no_grad()
def merge(base: nn.Module, adapter: Adapter, scaling: float) -> None:
    """Add one adapter to the weights, for good: W + scaling * B A."""
    check_fits(base, adapter)
    for name, (A, B) in adapter.items():
        for layer, layer_A, layer_B in zip(base.lora_layers[name], A, B):
            update = scaling * layer_B.float() @ layer_A.float()  # [out, in]
            weight = layer.weight
            layer.weight.data = (weight.float() + update.to(weight.device)).to(weight.dtype)


# -------------------- Several adapters --------------------


def concat_rank(adapters: list[Adapter]) -> Adapter:
    """One adapter that does what all of these do together, at the same scaling: the ranks add up.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]
    """
    joined = {}
    for name in adapters[0]:
        A = torch.cat([adapter[name][0] for adapter in adapters], -2)  # [..., L, r1 + r2 + ..., in]
        B = torch.cat([adapter[name][1] for adapter in adapters], -1)
        joined[name] = (A, B)
    return joined


def select(adapter: Adapter, index) -> Adapter:
    """Adapters of a batch: an integer takes one, a list or index tensor a new batch, with repetition."""
    return {name: (A[index], B[index]) for name, (A, B) in adapter.items()}


def unbind(batch: Adapter) -> list[Adapter]:
    """The adapters of a batch, one by one."""
    singles = [{} for _ in next(iter(batch.values()))[0]]
    for name, (A, B) in batch.items():
        for single, single_A, single_B in zip(singles, A.unbind(), B.unbind()):
            single[name] = (single_A, single_B)
    return singles


def stack(adapters: list[Adapter]) -> Adapter:
    """Adapters as a batch."""
    batch = {}
    for name in adapters[0]:
        A = torch.stack([adapter[name][0] for adapter in adapters])  # [n, L, r, in]
        B = torch.stack([adapter[name][1] for adapter in adapters])
        batch[name] = (A, B)
    return batch


def pad_rank(adapter: Adapter, rank: int) -> Adapter:
    """The same adapter with zeros up to a rank."""
    padded = {}
    for name, (A, B) in adapter.items():
        n = rank - A.shape[-2]
        padded[name] = (F.pad(A, (0, 0, 0, n)), F.pad(B, (0, n)))
    return padded


def statistics(batch: Adapter) -> tuple[Adapter, Adapter]:
    """Mean and standard deviation of n adapters, entry by entry. [n, L, ...] -> [L, ...]"""
    mean, std = {}, {}
    for name, pair in batch.items():
        correction = 1 if len(pair[0]) > 1 else 0
        mean[name] = tuple(matrix.cpu().double().mean(0) for matrix in pair)  # double: exact if all are equal
        std[name] = tuple(matrix.std(0, correction=correction) + 1e-10 for matrix in pair)
    return mean, std


def no_dots(name: str) -> str:
    """The name of a target as torch takes it for a parameter: without dots."""
    return name.replace(".", "_")


class LoRABank(nn.Module):
    """Ordinary LoRAs, all from the same random A; one optimizer trains them as a batch.

    bank([3, 5]) is a batch of two of them, bank(3) is one.
    """

    def __init__(self, config: LoRAConfig, n: int):
        super().__init__()
        self.config, self.ranks, self.lr_factors = config, config.r, {}  # as a hypernetwork has them
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, target in config.targets.items():
            L = len(target.layers)
            A = init_A_(torch.empty(L, config.r, target.n_in))
            self.A[no_dots(name)] = nn.Parameter(A.repeat(n, 1, 1, 1))  # [n, L, r, in]
            self.B[no_dots(name)] = nn.Parameter(torch.zeros(n, L, target.n_out, config.r))

    def forward(self, index: int | list[int]) -> Adapter:
        keys = {name: no_dots(name) for name in self.config.targets}
        return {name: (self.A[key][index], self.B[key][index]) for name, key in keys.items()}


# -------------------- Adapter folders, in PEFT's format --------------------


def save_adapter(folder: str | Path, adapter: Adapter, config: LoRAConfig) -> None:
    """Write one adapter as PEFT does, and prompt.json: whether prompts need the task's instruction.

    Its rank is that of its matrices. If this is not config.r, lora_alpha is set to keep the scaling.
    """
    tensors, names = {}, []
    for name, (A, B) in adapter.items():
        r, target = A.shape[-2], config.targets[name]
        names += target.paths() if "{}" in name else [name]
        for index, path in enumerate(target.paths()):
            tensors[f"base_model.model.{path}.lora_A.weight"] = A[index]
            tensors[f"base_model.model.{path}.lora_B.weight"] = B[index]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub.source_of(config.base_model),
        "inference_mode": True,
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "r": r,
        "lora_alpha": round(config.scaling * (r**0.5 if config.rslora else r), 6),
        "use_rslora": config.rslora,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "adapter_model.safetensors", tensors)
    write_file(folder / "adapter_config.json", peft)
    write_file(folder / "prompt.json", {"instruction": config.instruction})


ADAPTER_FILES = ["adapter_model.safetensors", "adapter_config.json", "prompt.json"]
ADAPTER_KEY = re.compile(r"base_model\.model\.(?P<path>.+\.\d+\..+)\.lora_(?P<matrix>[AB])\.weight")
ANY_VALUE = {  # fields of adapter_config.json that do not change what the A and B of a layer mean
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules"),
    *("megatron_core", "qalora_group_size"),  # they have values by default, and matter only beside others
}
PLAIN = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}  # base unchanged


def read_peft_config(folder: Path) -> dict:
    """The adapter_config.json of a plain LoRA; UserError names what is not plain."""
    peft = read_object(folder / "adapter_config.json")
    if peft.get("peft_type") != "LORA":
        raise UserError(f"{folder} is not a LoRA adapter: peft_type is {peft.get('peft_type')}")
    for name, value in peft.items():
        if value and name not in ANY_VALUE and value not in PLAIN.get(name, []):
            raise UserError(f"{folder} is not a plain LoRA adapter: {name} is {value}")
    for name in ("r", "lora_alpha"):
        value = peft.get(name)
        if not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f"{folder}/adapter_config.json: {name} must be a number above 0, not {value!r}")
    return peft


def load_adapter(folder: str | Path) -> tuple[Adapter, LoRAConfig]:
    """Read an adapter folder in PEFT's format: A [L, r, in], B [L, out, r] per target, and its config.

    Raises UserError if it is anything but a plain LoRA of one rank and one scaling.
    """
    folder = Path(folder)
    peft = read_peft_config(folder)
    config = LoRAConfig(base_model=peft.get("base_model_name_or_path") or "", r=peft["r"])
    config.alpha, config.rslora = peft["lora_alpha"], bool(peft.get("use_rslora"))
    if (folder / "prompt.json").exists():
        config.instruction = bool(read_object(folder / "prompt.json").get("instruction"))

    matrices: dict[str, dict[str, Tensor]] = {}  # {path: {"A": [r, in], "B": [out, r]}}
    for tensor_name, tensor in read_file(folder / "adapter_model.safetensors").items():
        match = ADAPTER_KEY.fullmatch(tensor_name)
        if not match:
            raise UserError(f"{folder} holds {tensor_name}, which is not the A or B of a layer")
        matrices.setdefault(match["path"], {})[match["matrix"]] = tensor
    if not matrices:
        raise UserError(f"{folder} holds an adapter without tensors")

    shapes = {}  # {target: {path: (out, in)}}
    for path, pair in matrices.items():
        if len(pair) < 2:
            raise UserError(f"{folder} holds only {' and '.join(pair)} of {path}")
        A, B = pair["A"], pair["B"]
        if A.dim() != 2 or B.dim() != 2 or len(A) != config.r or B.shape[1] != config.r:
            raise UserError(f"{folder}: {path} has another rank than r = {config.r}")
        shapes.setdefault(target_name(path, peft.get("target_modules")), {})[path] = (len(B), A.shape[1])
    adapter = {}
    for name in shapes:
        by_layer = dict(sorted(shapes[name].items(), key=lambda item: split_path(item[0])[1]))
        target = config.targets[name] = one_target(name, by_layer)
        A = torch.stack([matrices[path]["A"] for path in target.paths()])  # [L, r, in]
        B = torch.stack([matrices[path]["B"] for path in target.paths()])  # [L, out, r]
        adapter[name] = (A, B)
    config.n_layers = 1 + max(config.adapted_layers())
    return adapter, config


def target_name(path: str, target_modules) -> str:
    """Which of PEFT's target_modules a layer belongs to; if they are a pattern, the end of its path."""
    if isinstance(target_modules, list):
        for name in target_modules:
            if path == name:
                return split_path(path)[0]
            if f".{path}".endswith(f".{name}"):
                return name
    return path.split(".")[-1]


def load_adapters(folders: list[Path], device="cpu") -> tuple[Adapter, LoRAConfig]:
    """Several adapter folders of one training run, as a batch: A [n, L, r, in], B [n, L, out, r].

    Raises UserError if they differ in modules, rank, scaling or what stood in prompts.
    """
    adapters, kinds = [], []
    for folder in folders:
        adapter, config = load_adapter(folder)
        adapters.append(adapter)
        kinds.append((list(config.targets.items()), config.r, config.scaling, config.instruction))
        if kinds[-1] != kinds[0]:
            what = "modules, rank, scaling or prompt.json"
            raise UserError(f"the adapters in {folder} and {folders[0]} differ in {what}")
    batch = {name: (A.to(device), B.to(device)) for name, (A, B) in stack(adapters).items()}
    return batch, config
