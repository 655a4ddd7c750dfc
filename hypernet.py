"""Text-to-LoRA, the hypernetwork that writes adapters from descriptions; and the files of any hypernetwork.

    net = load_hypernet("checkpoints/tiny/sft_large")
    net.connect(base, tokenizer)
    adapters = net(["Keep only the animals."])

Other networks are in nets/, a file each. The end of this file says what a new one must provide.
"""

import importlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import encoders
import lora
import model
from lora import Adapter, LoRAConfig
from support import UserError, read_json, write_file


def setting(default, meaning: str, *choices):
    """A field of a config that is a flag of train.py."""
    return field(default=default, metadata={"setting": (default, meaning, *choices)})


def settings_of(config_class) -> list[tuple]:
    """The fields of a config that are flags: (name, default, meaning, *choices)."""
    return [(f.name, *f.metadata["setting"]) for f in fields(config_class) if "setting" in f.metadata]


@dataclass
class HypernetConfig(LoRAConfig):
    """What any hypernetwork records."""

    recon_loss: str = ""  # by reconstruction: z_score or delta_w; by SFT: ""

    def fit_to(self, base: nn.Module) -> None:
        """Set the fields that depend on the frozen models."""


# -------------------- Text-to-LoRA (arXiv 2506.06105, section 3) --------------------


@dataclass
class TextConfig(HypernetConfig):
    """Text-to-LoRA's settings."""

    encoder: str = "hash"  # that of train.py's --encoder
    input_size: int = 1024  # E, the width of the text encoder's output
    full_stop: bool = True  # append one to descriptions that end in a letter, as published (not with "hash")
    dropout: float = 0.1  # in the trunk; that of train.py's --dropout, as published
    size: str = setting("large", "what one pass through a head writes", "large", "medium", "small")
    latent_size: int = setting(128, "width of the trunk; half of it is the task embedding")
    head_in_size: int = setting(256, "width of the input of the heads")
    input_dropout: float = setting(0.1, "dropout of the text encoder's output (not published)")
    skip: float = setting(0.0, "factor on the task embedding, added to the heads' input (published: 0)")

    def fit_to(self, base: nn.Module) -> None:
        self.input_size = encoders.width(self.encoder, base)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mlp(n_in: int, n_out: int, dropout: float) -> list[nn.Module]:
    """Two linear layers, four times as wide in between, with SiLU after both, as published."""
    return [nn.Linear(n_in, 4 * n_in), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4 * n_in, n_out), nn.SiLU()]


class TextToLoRA(nn.Module):
    """Writes adapters from descriptions. There is one row for each (description, layer, module):

        description --text encoder--> task_emb --+
                                      layer l ---+--> trunk --> head of module m --> A, B of layer l, module m
                                      module m --+

    The sizes differ in the output of one pass through a head. Medium turns each row into 2 rows, small into
    2 r rows. Learned embeddings distinguish these rows.

        size      rows after the trunk       one pass writes        width of a head
        large     [n, L, M, head_in]         A and B                r (in + out)
        medium    [n, L, M, 2, head_in]      A or B                 r max(in, out)
        small     [n, L, M, 2, r, head_in]   one rank of A or B     max(in, out)
    """

    arch, reads, modes, config_class = "t2l", "descriptions", ("sft", "recon"), TextConfig

    def __init__(self, config: TextConfig):
        super().__init__()
        c, d, dropout, M = config, config.latent_size, config.dropout, len(config.targets)
        self.config, self.layers, z_score = c, c.adapted_layers(), c.recon_loss == "z_score"
        if d % 4:
            raise UserError(f"--latent_size must be a multiple of 4, not {d}")
        if c.skip and c.head_in_size < d // 2:
            raise UserError(f"--skip needs --head_in_size {d // 2} or more, half of --latent_size")

        # rows: the embeddings of task, layer and module
        self.task_encoder = nn.Sequential(nn.Linear(c.input_size, d // 2), nn.LayerNorm(d // 2))
        self.layer_emb = nn.Sequential(nn.Embedding(c.n_layers, d // 4), nn.LayerNorm(d // 4))
        self.module_emb = nn.Sequential(nn.Embedding(M, d // 4), nn.LayerNorm(d // 4))

        # trunk
        self.mixer = nn.Sequential(nn.Dropout(dropout), *mlp(d, d, dropout), nn.Dropout(dropout))
        self.mlp1 = Residual(nn.LayerNorm(d), *mlp(d, d, dropout), nn.Dropout(dropout))
        self.mlp2 = Residual(nn.LayerNorm(d), *mlp(d, d, dropout), nn.Dropout(dropout))
        self.mlp3 = nn.Sequential(nn.LayerNorm(d), *mlp(d, c.head_in_size, dropout))
        if c.size != "large":  # tells a row to make A or B
            self.AB_emb = nn.Parameter(torch.randn(M, 2, d))
            self.AB_norm = nn.LayerNorm(d)
        if c.size == "small":  # tells a row which rank to make
            self.rank_emb = nn.Sequential(nn.Embedding(c.r, d), nn.LayerNorm(d))

        # heads, one per module. A matrix is offset + std * (output of the head):
        #     SFT:       offset is a trained LoRA that all descriptions share; std is 1
        #     z_score:   offset and std are mean and standard deviation of the oracles per entry; constant
        #     delta_w:   offset is 0 and constant; std is 1
        self.heads, self.offset, self.std = nn.ModuleDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, target in c.targets.items():
            key, L, larger = lora.no_dots(name), len(target.layers), max(target.n_in, target.n_out)
            widths = {"large": c.r * (target.n_in + target.n_out), "medium": c.r * larger, "small": larger}
            self.heads[key] = nn.Linear(c.head_in_size, widths[c.size], bias=not z_score)
            for matrix, shape in (("A", (L, c.r, target.n_in)), ("B", (L, target.n_out, c.r))):
                self.offset[f"{key}_{matrix}"] = nn.Parameter(torch.zeros(shape))
                if z_score:
                    self.std[f"{key}_{matrix}"] = nn.Parameter(torch.ones(shape))
        self.offset.requires_grad_(not c.recon_loss)
        self.std.requires_grad_(False)

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """For SFT: write LoRA's initialisation (A random, B zero) for every description.

        The published code trains the biases of the heads instead, which all layers share. In medium and small
        one head writes both A and B, so B would start as A^T. We have one offset per layer and matrix.
        """
        for key, head in self.heads.items():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            lora.init_A_(self.offset[f"{key}_A"])

    @torch.no_grad()
    def start_at(self, mean: Adapter, std: Adapter) -> None:
        """For reconstruction: mean [L, ...] and standard deviation [L, ...] of the oracles.

        Only z-scores use them; delta_w starts from random weights alone, as published.
        """
        for name in mean if self.config.recon_loss == "z_score" else ():
            for i, matrix in enumerate("AB"):
                self.offset[f"{lora.no_dots(name)}_{matrix}"].copy_(mean[name][i])
                self.std[f"{lora.no_dots(name)}_{matrix}"].copy_(std[name][i])

    def connect(self, base: nn.Module | None, tokenizer) -> None:
        """Load the frozen text encoder: a function of texts, whose weights are not this network's."""
        c, device = self.config, next(self.parameters()).device
        width = encoders.width(c.encoder, base)
        if width != c.input_size:
            trained = f"this network was trained with {c.input_size}"
            raise UserError(f"--encoder {c.encoder} is {width} wide; {trained}")
        self.encoder = encoders.load(c.encoder, device, base, tokenizer, c.full_stop)

    def forward(self, texts: list[str]) -> Adapter:
        """n descriptions -> A [n, L, r, in], B [n, L, out, r]."""
        if isinstance(texts, str):
            raise UserError("a list of descriptions is needed, not a string")
        return self.write(self.encode(texts))

    def encode(self, texts: list[str]) -> Tensor:
        """n descriptions -> the text encoder's output [n, E], in float32."""
        return self.encoder(texts)

    def write(self, text_emb: Tensor) -> Adapter:
        """The text encoder's output [n, E], of any norm -> A [n, L, r, in], B [n, L, out, r]."""
        task_emb = self.embed_task(text_emb)  # [n, d/2]
        x = self.trunk(self.rows(task_emb))  # [n, L, M, ..., head_in]
        if self.config.skip:  # a skip connection around the trunk: the heads learn faster
            direct = F.pad(task_emb, (0, x.shape[-1] - task_emb.shape[-1]))  # [n, head_in]
            x = x + self.config.skip * direct.view(len(direct), *[1] * (x.dim() - 2), -1)
        adapter = {}
        for m, name in enumerate(self.config.targets):
            layers = self.config.positions(name)  # those that have the target: all of them in most models
            adapter[name] = self.write_module(name, x[:, layers, m])
        return adapter

    def embed_task(self, text_emb: Tensor) -> Tensor:
        """The task embeddings, from the text encoder's output at norm sqrt(E). [n, E] -> [n, d/2]"""
        text_emb = F.normalize(text_emb, dim=-1) * self.config.input_size**0.5
        return self.task_encoder(F.dropout(text_emb, self.config.input_dropout, self.training))

    def rows(self, task_emb: Tensor) -> Tensor:
        """The embeddings of task, layer and module, side by side. [n, d/2] -> [n, L, M, d]"""
        n, L, M, device = len(task_emb), len(self.layers), len(self.config.targets), task_emb.device
        task = task_emb[:, None, None].expand(n, L, M, -1)
        layer = self.layer_emb(torch.tensor(self.layers, device=device))[None, :, None].expand(n, L, M, -1)
        module = self.module_emb(torch.arange(M, device=device))[None, None].expand(n, L, M, -1)
        return torch.cat([task, layer, module], -1)

    def trunk(self, x: Tensor) -> Tensor:
        """[n, L, M, d] -> [n, L, M, head_in], medium [..., 2, head_in], small [..., 2, r, head_in]"""
        x = self.mlp1(self.mixer(x))
        if self.config.size == "large":
            x = self.mlp2(x)
        else:
            x = self.mlp2(x[..., None, :] + self.AB_norm(self.AB_emb))  # [n, L, M, 2, d]
        if self.config.size == "small":
            x = self.add_ranks(x)  # [n, L, M, 2, r, d]
        return self.mlp3(x)

    def add_ranks(self, x: Tensor) -> Tensor:
        """A row for each rank. [..., d] -> [..., r, d]. mlp2 is applied a second time, as published."""
        ranks = torch.arange(self.config.r, device=x.device)
        return x[..., None, :] + self.mlp2(self.rank_emb(ranks))

    def write_module(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The head of one module. x [n, L, ..., head_in] -> A [n, L, r, in], B [n, L, out, r]."""
        c, key = self.config, lora.no_dots(name)
        n, L = x.shape[:2]
        n_in, n_out = c.targets[name].n_in, c.targets[name].n_out
        out = self.heads[key](x)  # [n, L, width]; medium [n, L, 2, width]; small [n, L, 2, r, width]
        if c.size == "large":
            A, B = out.split([c.r * n_in, c.r * n_out], -1)
        else:
            A, B = out[:, :, 0], out[:, :, 1]
        A = A.reshape(n, L, c.r, -1)[..., :n_in]  # [n, L, r, in]; medium, small: cut to its width
        B = B.reshape(n, L, c.r, -1)[..., :n_out].mT  # [n, L, out, r]
        # a matrix is offset + std * (output of the head)
        if c.recon_loss == "z_score":
            A, B = A * self.std[f"{key}_A"], B * self.std[f"{key}_B"]
        return self.offset[f"{key}_A"] + A, self.offset[f"{key}_B"] + B


# -------------------- A new network, and its files --------------------

FILES = ["hypernet.safetensors", "config.json"]
KNOWN = ["known.json", "known.safetensors"]  # of extras/calibrate.py, if they are there


def find_arch(arch: str):
    """The class of a network: "t2l" is TextToLoRA, any other name is `Net` of the file nets/NAME.py."""
    if arch == "t2l":
        return TextToLoRA
    names = {path.stem for path in Path(__file__).parent.glob("nets/*.py")} - {"bank"}
    if arch not in names:
        known = ", ".join(sorted(names))
        raise UserError(f"--arch {arch}: there is no such network, but t2l, {known} (in nets/)")
    return importlib.import_module(f"nets.{arch}").Net


def new_hypernet(args, lora_config: LoRAConfig, base: nn.Module, mean=None, std=None) -> nn.Module:
    """The network of train.py's settings for adapters of this config, with random weights or --init_from.

    Reconstruction passes mean and standard deviation of the oracles.
    """
    net_class = find_arch(args.arch)
    config = net_class.config_class(**vars(lora_config))
    for name in ["encoder", "dropout"] + [name for name, *_ in settings_of(net_class.config_class)]:
        if hasattr(config, name):
            setattr(config, name, getattr(args, name))
    config.recon_loss = args.recon_loss if mean else ""
    config.fit_to(base)
    net = net_class(config)
    net.recompute = args.gradient_checkpointing
    if mean:
        net.start_at(mean, std)
    else:
        net.start_as_lora()
    if args.init_from and not args.resume:
        copy_weights(args.init_from, net, base)
    return net


MAY_DIFFER = {
    *("base_model", "base_shape", "instruction", "full_stop", "dropout", "input_dropout", "chunk_len"),
    *("alpha", "rslora", "calibration"),  # scaling must agree
}


def copy_weights(folder: str, net: nn.Module, base: nn.Module) -> None:
    """Copy the weights of another network for the same base model. Settings must agree (see MAY_DIFFER)."""
    start = load_hypernet(folder)
    model.check_base(base, start.config)
    ours, theirs = vars(net.config), vars(start.config)
    pairs = {name: (ours[name], theirs.get(name)) for name in ours if name not in MAY_DIFFER}
    pairs["modules"] = list(ours["targets"]), list(theirs["targets"])  # in this order
    pairs["scaling"] = net.config.scaling, start.config.scaling
    pairs["arch"] = net.arch, start.arch
    if Path(ours.get("encoder", "")).is_dir() or Path(theirs.get("encoder", "")).is_dir():
        del pairs["encoder"]  # a folder may be anywhere
    for name in reversed(pairs):
        our, their = pairs[name]
        if our != their:
            message = f"--init_from {folder}: that network has other settings"
            raise UserError(f"{message} ({name}: {their}, not {our})")
    learned = [name for name, p in net.named_parameters() if p.requires_grad]  # not the oracles' mean and std
    weights = start.state_dict()
    net.load_state_dict({name: weights[name] for name in learned}, strict=False)


def save_hypernet(net: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write hypernet.safetensors and config.json. bfloat16 halves the file."""
    weights = {key: tensor.to(dtype) for key, tensor in net.state_dict().items()}
    write_file(Path(folder, "hypernet.safetensors"), weights)
    config = {"arch": net.arch, **asdict(net.config)}
    if config["base_model"] == model.TINY:  # a folder of this project, wherever it is
        config["base_model"] = "tiny"
    write_file(Path(folder, "config.json"), config)


def load_hypernet(folder: str | Path) -> nn.Module:
    """Read a hypernetwork that train.py wrote, in float32 and eval mode. `connect` it before it is called."""
    file = Path(folder, "config.json")
    settings = read_json(file) if file.exists() else {}
    if "arch" not in settings:
        message = f"{folder} holds no hypernetwork: {' and '.join(FILES)} of train.py are needed"
        raise UserError(f"{message} (an adapter is used with generate.py --adapter)")
    net_class = find_arch(settings.pop("arch"))
    if settings["base_model"] == "tiny":
        settings["base_model"] = model.TINY
    with torch.device("meta"):  # only shapes: the weights are put in place of its parameters
        net = net_class(net_class.config_class(**settings))
    weights = load_file(Path(folder, "hypernet.safetensors"))
    weights = {key: tensor.float() for key, tensor in weights.items()}
    net.load_state_dict(weights, assign=True)
    return net.eval()


# To add a network, write an nn.Module with the members of nets/linear.py, which is short, as `Net` in a file
# of nets/. The fields of its config that are a `setting` are flags of train.py, of names that no other flag
# has; fields `encoder` and `dropout` have the values of those flags. Further members:
#
#     reads = "documents"    instead of "descriptions"; a document may also be a list of texts
#     net.recompute          set by --gradient_checkpointing: compute activations again, to save memory
#     net.no_decay()         parameters with two or more dimensions without weight decay; may be left out
#
# A and B may have any rank r; if the ranks of a batch differ, they are zero-padded to the largest. What
# `connect` gives the network to read with is no part of its weights. Parameters with requires_grad must all
# receive gradients (DDP requires it).
