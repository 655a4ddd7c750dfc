"""The adapter: what a LoRA is as data, and how a frozen model runs with one.

An adapter is a plain dictionary, the same everywhere in this project:

    {"q_proj": (A, B), "v_proj": (A, B)}      A [..., L, r, in]    B [..., L, out, r]

with one entry for each kind of linear layer it changes, stacked over the L layers of the base model. Leading
dimensions are a batch of adapters. With it a linear layer computes (LoRA, arXiv 2106.09685, eq. 3)

    y = W x + scaling * B (A x)
"""

import argparse
import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Adapter = dict[str, tuple[Tensor, Tensor]]
SCALING = 16 / 8**0.5  # the paper's: alpha 16, rank 8, rank-stabilised (rsLoRA): alpha / sqrt(r)


class UserError(ValueError):
    """Something the user can put right. The commands print it as one line and exit with code 2."""


# ---------------------------------------------------------------------------------------------------------
# Where the adapter goes
# ---------------------------------------------------------------------------------------------------------


@dataclass
class LoRAConfig:
    """What belongs to an adapter besides its tensors: the base model, where in it each module is, the scaling."""

    base_model: str = ""  # a preset, a Hugging Face id or a folder
    n_layers: int = 0
    paths: dict[str, str] = field(default_factory=dict)  # {"q_proj": "model.layers.{}.self_attn.q_proj"}
    in_features: dict[str, int] = field(default_factory=dict)
    out_features: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: float = 16.0
    rslora: bool = True

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


def find_targets(model: nn.Module, target_modules: list[str]) -> dict[str, list[tuple[str, nn.Linear]]]:
    """{module name: [(path, linear layer) of layer 0, 1, ...]}. The layer is the first number in a path."""
    found = {name: {} for name in target_modules}
    decoder = set(getattr(model, "get_decoder", lambda: model)().modules())  # and not a vision tower beside it
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m in decoder and re.search(r"\.\d+\.", path)}
    for path, module in linears.items():
        name = path.split(".")[-1]
        if name in found:
            layer = int(re.search(r"\.(\d+)\.", path)[1])
            if layer in found[name]:
                raise UserError(f"{name} is in layer {layer} more than once ({found[name][layer][0]}, {path})")
            found[name][layer] = (path, module)
    for name, layers in found.items():
        if not layers:
            there = ", ".join(sorted({path.split(".")[-1] for path in linears})) or "none"
            raise UserError(f"this model has no linear layers named {name}; it has {there} (see --target_modules)")
        if sorted(layers) != list(range(len(layers))) or len(layers) != max(len(x) for x in found.values()):
            raise UserError(f"{name} is not in every layer of this model")
        shapes = {module.weight.shape for _, module in layers.values()}
        if len(shapes) > 1:
            raise UserError(f"{name} changes its shape from layer to layer ({', '.join(str(list(s)) for s in shapes)})")
        if len(places := sorted({template(path) for path, _ in layers.values()})) > 1:
            raise UserError(f"{name} changes its place from layer to layer ({', '.join(places)})")
    return {name: [layers[i] for i in range(len(layers))] for name, layers in found.items()}


def template(path: str) -> str:
    """A module's path with {} for its layer."""
    return re.sub(r"\.\d+\.", ".{}.", path, count=1)


def config_for(model: nn.Module, target_modules: list[str], base_model: str, **settings) -> LoRAConfig:
    """The LoRAConfig of adapters for these modules of `model`."""
    targets = find_targets(model, target_modules)
    first = {name: layers[0] for name, layers in targets.items()}
    return LoRAConfig(
        base_model=base_model,
        n_layers=len(next(iter(targets.values()))),
        paths={name: template(path) for name, (path, _) in first.items()},
        in_features={name: module.in_features for name, (_, module) in first.items()},
        out_features={name: module.out_features for name, (_, module) in first.items()},
        **settings,
    )


def fresh(A: Tensor) -> Tensor:
    """Fill A [..., r, in] as a new LoRA has it: uniform up to 1 / sqrt(in). Its B is zero, so it changes nothing yet."""
    return A.uniform_(-(A.shape[-1] ** -0.5), A.shape[-1] ** -0.5)


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU in less than half of its time: a random byte for each element, so p is rounded to 256ths."""

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(256 * self.p)
        if not self.training or not dropped or x.device.type != "cpu":
            return super().forward(x)
        words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,))
        drawn = words.view(torch.uint8)[: x.numel()].view(x.shape)
        kept = drawn.clamp_(dropped - 1, dropped) - (dropped - 1)  # 0 or 1; a comparison is slow when compiled
        return (x * kept).mul_(256 / (256 - dropped))  # in this order the backward pass keeps bytes, not floats


class LoRALinear(nn.Linear):
    """A frozen linear layer with room for an adapter. Its weight stays the base model's own tensor, under its
    old name, so injecting copies nothing and the base model's state dict does not change."""

    def __init__(self, base: nn.Linear, name: str, layer: int, dropout: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.name, self.layer, self.dropout = name, layer, Dropout(dropout)
        self.A = self.B = None  # [n, r, in] and [n, out, r] for n adapters
        self.scaling = SCALING
        self.unmerged = None  # the original weight while an adapter is merged into it

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [rows, T, out]
        if self.A is None:
            return y
        n = len(self.A)
        if len(x) % n:
            raise ValueError(f"{len(x)} batch rows cannot be shared out among {n} adapters")
        x = self.dropout(x.to(self.A.dtype))
        x = x.reshape(n, -1, self.in_features)  # [n, rows/n * T, in]: rows/n neighbouring rows share one adapter
        update = self.scaling * (x @ self.A.mT) @ self.B.mT  # [n, rows/n * T, out]
        return y + update.view_as(y).to(y.dtype)


def inject(model: nn.Module, target_modules: list[str], dropout: float = 0.0) -> nn.Module:
    """Put a LoRALinear in the place of every linear layer with one of these names; returns the model.

    `dropout` acts on the input of A, in training mode only. Without an adapter the model computes what it did.
    """
    for name, layers in find_targets(model, target_modules).items():
        for layer, (path, module) in enumerate(layers):
            parent, child = path.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, LoRALinear(module, name, layer, dropout))
    return model


def lora_layers(model: nn.Module, adapter: Adapter) -> list[LoRALinear]:
    """The injected layers of `model`, after a check that `adapter` fits them."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    n_layers = max((m.layer + 1 for m in layers), default=0)  # each module is in every layer
    have = {m.name: (n_layers, m.in_features, m.out_features) for m in layers}
    for name, (A, B) in adapter.items():
        shape = (A.shape[-3], A.shape[-1], B.shape[-2])
        if have.get(name) != shape:
            raise UserError(
                f"the adapter is for another base model: its {name} is (layers, in, out) = {shape}, "
                f"the model's {have.get(name, 'is not injected')}"
            )
    return layers


def set_adapter(model: nn.Module, adapter: Adapter | None, scaling: float = SCALING) -> None:
    """Run `model` with this adapter from now on; None clears it.

    An adapter without leading dimension acts on all rows of a batch. One with a leading dimension n is n
    adapters: a batch of k * n rows uses adapter 0 for its first k rows, adapter 1 for the next k, and so on.
    """
    adapter = adapter or {}
    layers = {name: (A.unbind(-3), B.unbind(-3)) for name, (A, B) in adapter.items()}  # all at once: one step of the backward pass
    for m in lora_layers(model, adapter):
        m.A = m.B = None
        if m.name in layers:
            A, B = (of_layer[m.layer] for of_layer in layers[m.name])  # [r, in] or [n, r, in]; B likewise
            m.A, m.B = A.view(-1, *A.shape[-2:]), B.view(-1, *B.shape[-2:])  # [n, r, in], [n, out, r]
        m.scaling = scaling


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter, scaling: float = SCALING) -> None:
    """Add one adapter to the weights: W + scaling * B A. The originals are kept aside for `unmerge`."""
    for m in lora_layers(model, adapter):
        if m.unmerged is not None:
            raise UserError("an adapter is merged already; unmerge it first")
        if m.name in adapter:
            A, B = adapter[m.name][0][m.layer], adapter[m.name][1][m.layer]
            m.unmerged = m.weight.data
            m.weight.data = (m.weight.float() + scaling * B.float() @ A.float()).to(m.weight.dtype)


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, to the bit: subtracting the update again would leave rounding errors."""
    for m in lora_layers(model, {}):
        if m.unmerged is not None:
            m.weight.data, m.unmerged = m.unmerged, None


# ---------------------------------------------------------------------------------------------------------
# Several adapters
# ---------------------------------------------------------------------------------------------------------


def concat_rank(adapters: list[Adapter]) -> Adapter:
    """One adapter that does what all of these do together, at the same scaling: the ranks add up.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]
    """
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    pairs = {name: [adapter[name] for adapter in adapters if name in adapter] for name in names}
    return {name: (torch.cat([A for A, _ in p], -2), torch.cat([B for _, B in p], -1)) for name, p in pairs.items()}


def select(adapter: Adapter, index) -> Adapter:
    """Adapters out of a batch: an integer takes one, a list or an index tensor a new batch (rows may repeat)."""
    return {name: (A[index], B[index]) for name, (A, B) in adapter.items()}


def split(adapter: Adapter, size: int) -> list[Adapter]:
    """A batch in parts of `size` adapters, the last of them perhaps smaller."""
    parts = [zip(A.split(size), B.split(size)) for A, B in adapter.values()]
    return [dict(zip(adapter, part)) for part in zip(*parts)]


def stack(adapters: list[Adapter]) -> Adapter:
    """A batch out of single adapters; those of lower rank get ranks of zeros. A [n, L, r, in], B [n, L, out, r]."""
    batch = {}
    for name in adapters[0]:
        As, Bs = zip(*(adapter[name] for adapter in adapters))
        r = max(A.shape[-2] for A in As)
        batch[name] = (torch.stack([F.pad(A, (0, 0, 0, r - A.shape[-2])) for A in As]), torch.stack([F.pad(B, (0, r - B.shape[-1])) for B in Bs]))
    return batch


# ---------------------------------------------------------------------------------------------------------
# Files: an adapter folder as PEFT writes and reads it
# ---------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path):
    """A temporary name to write to. What is written is renamed to `path` when it is whole, so that a reader never meets half a
    file; if it never is, it goes."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, whole or not at all."""
    with replacing(path) as tmp:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, tmp, metadata={"format": "pt"})


def read_json(path: Path) -> dict:
    """Read a JSON object; a missing or broken file is a UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no object")
        return content
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read tensors; a missing or broken file is a UserError."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read as safetensors: {e}") from None


def save_adapter(folder: str | Path, adapter: Adapter, config: LoRAConfig) -> None:
    """Write one adapter as PEFT does. Ranks are read off the tensors, lora_alpha follows from config.scaling."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, {}
    for name, (A, B) in adapter.items():
        ranks[name] = A.shape[-2]
        for layer in range(len(A)):
            key = "base_model.model." + config.paths[name].format(layer)
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A[layer], B[layer]
    r = max(ranks.values())
    alpha = {name: round(config.scaling * (k**0.5 if config.rslora else k), 6) for name, k in ranks.items()}
    uneven = [name for name in ranks if ranks[name] != r]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "inference_mode": True,
        "target_modules": list(adapter),
        "r": r,
        "lora_alpha": max(alpha.values()),
        "lora_dropout": 0.0,
        "use_rslora": config.rslora,
        "bias": "none",
        "rank_pattern": {name: ranks[name] for name in uneven},
        "alpha_pattern": {name: alpha[name] for name in uneven},
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", peft)


def load_adapter(folder: str | Path, device="cpu") -> tuple[Adapter, LoRAConfig]:
    """Read an adapter folder in PEFT's format.

    Raises UserError if it is none, if it holds more than A and B (DoRA, biases, saved modules), or if a module's
    shape changes from layer to layer.
    """
    folder = Path(folder)
    peft = read_json(folder / "adapter_config.json")
    own_ways = ("use_dora", "modules_to_save", "alora_invocation_tokens", "layer_replication")  # of PEFT, which are more than A and B
    changes_base = str(peft.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq"))  # when PEFT loads it
    if peft.get("peft_type") != "LORA" or peft.get("bias", "none") != "none" or changes_base or any(map(peft.get, own_ways)):
        raise UserError(f"{folder} is not a plain LoRA adapter")
    if not all(isinstance(peft.get(key), (int, float)) and peft[key] > 0 for key in ("r", "lora_alpha")):
        raise UserError(f"{folder}/adapter_config.json lacks r and lora_alpha, numbers above 0")
    stacks: dict[str, dict[str, dict[int, Tensor]]] = {}
    paths = {}
    for key, tensor in read_safetensors(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+?)\.(\d+)\.(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise UserError(f"{folder} holds {key}, which is not the A or B of a layer")
        name, path = match[3].split(".")[-1], f"{match[1]}.{{}}.{match[3]}"
        if paths.setdefault(name, path) != path:
            raise UserError(f"{folder} has {name} in two places, {paths[name]} and {path}")
        stacks.setdefault(name, {"A": {}, "B": {}})[match[4]][int(match[2])] = tensor
    try:
        adapter = {
            name: tuple(torch.stack([ab[k][i] for i in range(len(ab[k]))]) for k in "AB") for name, ab in stacks.items()
        }
        n_layers = max(len(A) for A, _ in adapter.values())
    except (KeyError, RuntimeError, ValueError):
        raise UserError(f"{folder}: a module is missing in some layers or changes its shape from layer to layer") from None
    config = LoRAConfig(
        base_model=peft.get("base_model_name_or_path") or "",
        n_layers=n_layers,
        paths=paths,
        in_features={name: A.shape[-1] for name, (A, _) in adapter.items()},
        out_features={name: B.shape[-2] for name, (_, B) in adapter.items()},
        r=peft["r"],
        alpha=peft["lora_alpha"],
        rslora=peft.get("use_rslora", False),
    )

    def alpha(path: str) -> float:
        return next((v for k, v in peft.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({k})", path)), config.alpha)

    for name, (A, B) in adapter.items():  # PEFT may scale every module in its own way; here one scaling holds for all
        alphas = torch.tensor([alpha(paths[name].format(layer)) for layer in range(len(A))])[:, None, None]  # [L, 1, 1]
        r = A.shape[-2]
        adapter[name] = (A.to(device), (B * (alphas / (r**0.5 if config.rslora else r) / config.scaling).to(B.dtype)).to(device))
    return adapter, config


def load_adapters(folders: list[str | Path], device="cpu") -> tuple[Adapter, LoRAConfig]:
    """Several adapter folders as a batch. Raises UserError where they are not of one kind."""
    loaded = [load_adapter(folder, device) for folder in folders]
    kinds = [(config.paths, config.r, config.scaling) for _, config in loaded]
    for folder, kind in zip(folders, kinds):
        if kind != kinds[0]:
            raise UserError(f"{folder} is of other modules, another rank or another scaling than {folders[0]}; they were not trained together")
    return stack([adapter for adapter, _ in loaded]), loaded[0][1]


# ---------------------------------------------------------------------------------------------------------
# What the commands share: types of flags, the refusal of those without effect, and mistakes that end in one line
# ---------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("it takes 1 or more")
    return int(text)


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError("it takes a share, from 0 to 1")
    return float(text)


def amount(text: str) -> float:
    """An argparse type: a number from 0."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError("it takes a number, 0 or more")
    return float(text)


def device(text: str) -> str:
    """An argparse type: a device that this machine has."""
    try:
        torch.empty(1, device=text).tolist()
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{text}: {str(e).splitlines()[0]}") from None
    return text


def refuse_idle(args, parser, run: str, serves: dict[tuple[str, ...], tuple[str, ...]]) -> None:
    """Raise UserError for a flag that is empty or would have no effect: `serves` is {flags: kinds of run in which they have one}."""
    for flag, value in vars(args).items():
        if value == "":  # as of a shell variable that is not set
            raise UserError(f"--{flag} is empty")
    for flags, runs in serves.items():
        for flag in flags:
            if getattr(args, flag) != parser.get_default(flag) and run not in runs:
                raise UserError(f"--{flag} is for {', '.join(runs)}")


def run(main) -> None:
    """Run a command's main(); a UserError, or a file that cannot be read or written, ends in one line on stderr (of one
    process a machine) and exit code 2."""
    try:
        main()
    except BrokenPipeError:  # nobody reads on, as in `| head`
        sys.exit(1)
    except (UserError, OSError, SafetensorError) as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
