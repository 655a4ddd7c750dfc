"""Text-to-LoRA: the network that writes an adapter (arXiv 2506.06105, section 3).

    description --text encoder--> task_emb --+
                                  layer l ---+--> trunk --> head of module m --> A, B of module m in layer l
                                  module m --+

All layers, modules and descriptions go through it together, as rows of one tensor [n, L, M, d]. The three sizes
differ in what one row has to produce: large, all of A and B; medium, A or B; small, one rank of A or B.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import Adapter, LoRAConfig, UserError, read_json, read_safetensors, write_json, write_safetensors

SIZES = ("large", "medium", "small")  # 55M, 34M and 5M parameters for Mistral-7B (paper, section 4)


@dataclass
class HypernetConfig(LoRAConfig):
    """A hypernetwork's settings: those of the adapters it writes, then its own."""

    encoder: str = "hash"
    task_emb_size: int = 1024
    size: str = "large"
    latent_size: int = 128
    head_in_size: int = 512
    head_scale: float = 1.0  # multiplies what enters the heads; 1 as published
    z_score: bool = False  # the heads predict z-scores over the training adapters, and have no bias
    rotary: bool = False  # small: rank positions are rotations in place of a learned table
    dropout: float = 0.05


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mlp(n_in: int, n_out: int, dropout: float) -> list[nn.Module]:
    """Two linear layers, four times as wide in between, with SiLU after both, as published."""
    return [nn.Linear(n_in, 4 * n_in), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4 * n_in, n_out), nn.SiLU()]


def rotate(x: Tensor, positions: int) -> Tensor:
    """A copy of every row for each rank, turned by its position (RoPE, base 10000). [..., d] -> [..., r, d]"""
    half = x.shape[-1] // 2
    angle = torch.arange(positions, device=x.device)[:, None] / 10000 ** (torch.arange(half, device=x.device) / half)  # [r, d/2]
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x[..., None, :half], x[..., None, half:]  # [..., 1, d/2]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


class TextToLoRA(nn.Module):
    """task_emb [n, E] -> a batch of n adapters."""

    def __init__(self, config: HypernetConfig):
        super().__init__()
        if config.size not in SIZES:
            raise UserError(f"unknown size {config.size}; there are {', '.join(SIZES)}")
        self.config = c = config
        self.names = list(c.paths)
        quarter = c.latent_size // 4
        d = c.latent_size // 2 + 2 * quarter
        drop = c.dropout

        # one row for each (description, layer, module)
        self.task_encoder = nn.Sequential(nn.Linear(c.task_emb_size, c.latent_size // 2), nn.LayerNorm(c.latent_size // 2))
        self.layer_emb = nn.Sequential(nn.Embedding(c.n_layers, quarter), nn.LayerNorm(quarter))
        self.module_emb = nn.Sequential(nn.Embedding(len(self.names), quarter), nn.LayerNorm(quarter))

        # the trunk
        self.mixer = nn.Sequential(nn.Dropout(drop), *mlp(d, d, drop), nn.Dropout(drop))
        self.mlp1 = Residual(nn.LayerNorm(d), *mlp(d, d, drop), nn.Dropout(drop))
        self.mlp2 = Residual(nn.LayerNorm(d), *mlp(d, d, drop), nn.Dropout(drop))
        self.mlp3 = nn.Sequential(nn.LayerNorm(d), *mlp(d, c.head_in_size, drop))

        # what a row of medium and small has to be told besides: whether to make A or B, and which rank
        if c.size != "large":
            self.AB_emb = nn.Parameter(torch.randn(len(self.names), 2, d))
            self.AB_norm = nn.LayerNorm(d)
        if c.size == "small" and not c.rotary:
            self.rank_emb = nn.Sequential(nn.Embedding(c.r, d), nn.LayerNorm(d))

        # one head a module
        self.heads = nn.ModuleDict()
        for name in self.names:
            n_in, n_out = c.in_features[name], c.out_features[name]
            width = {"large": c.r * (n_in + n_out), "medium": c.r * max(n_in, n_out), "small": max(n_in, n_out)}[c.size]
            self.heads[name] = nn.Linear(c.head_in_size, width, bias=not c.z_score)

        # A and B are shift + scale * (what the heads say). Both are frozen: `start_as_lora` and `normalize` set them.
        self.shift, self.scale = nn.ParameterDict(), nn.ParameterDict()
        for name in self.names:
            for key, shape in (("A", (c.r, c.in_features[name])), ("B", (c.out_features[name], c.r))):
                shape = (c.n_layers, *shape)
                self.shift[f"{name}_{key}"] = nn.Parameter(torch.zeros(shape), requires_grad=False)
                self.scale[f"{name}_{key}"] = nn.Parameter(torch.ones(shape if c.z_score else ()), requires_grad=False)

    def forward(self, task_emb: Tensor) -> Adapter:
        """task_emb [n, E], of any length (it is brought to the published sqrt(E)). A [n, L, r, in], B [n, L, out, r]."""
        c, L, M = self.config, self.config.n_layers, len(self.names)
        task_emb = F.normalize(task_emb, dim=-1) * c.task_emb_size**0.5
        n = len(task_emb)
        task = self.task_encoder(task_emb)[:, None, None].expand(n, L, M, -1)
        layer = self.layer_emb(torch.arange(L, device=task.device))[None, :, None].expand(n, L, M, -1)
        module = self.module_emb(torch.arange(M, device=task.device))[None, None].expand(n, L, M, -1)
        x = torch.cat([task, layer, module], -1)  # [n, L, M, d]
        x = self.mlp1(self.mixer(x))
        if c.size == "large":
            x = self.mlp2(x)
        else:
            x = self.mlp2(x[..., None, :] + self.AB_norm(self.AB_emb))  # [n, L, M, 2, d]
        if c.size == "small" and c.rotary:
            x = self.mlp2(rotate(x, c.r))  # [n, L, M, 2, r, d]
        elif c.size == "small":
            ranks = self.mlp2(self.rank_emb(torch.arange(c.r, device=x.device)))  # [r, d]
            x = x[..., None, :] + ranks  # [n, L, M, 2, r, d]
        x = self.mlp3(x) * c.head_scale  # [n, L, M, ..., head_in]

        adapter = {}
        for m, name in enumerate(self.names):
            n_in, n_out = c.in_features[name], c.out_features[name]
            out = self.heads[name](x[:, :, m])
            if c.size == "large":
                A, B = out.split([c.r * n_in, c.r * n_out], -1)
            else:
                A, B = out.reshape(n, L, 2, -1).unbind(2)
            A = A.reshape(n, L, c.r, -1)[..., :n_in]  # [n, L, r, in]
            B = B.reshape(n, L, c.r, -1)[..., :n_out].mT  # [n, L, out, r]
            adapter[name] = (
                self.shift[f"{name}_A"] + self.scale[f"{name}_A"] * A,
                self.shift[f"{name}_B"] + self.scale[f"{name}_B"] * B,
            )
        return adapter

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """For SFT: whatever the description, start as a fresh LoRA (A random, B zero), so as the base model itself.

        The paper's bias-HyperInit puts that LoRA into the heads' biases. In its medium and small size, where one
        head makes A and B alike, the published code then starts with B = A^T, not zero. Here the LoRA is the
        shift and the heads start at zero, which is the same for large, and right for all.
        """
        for name in self.names:
            nn.init.zeros_(self.heads[name].weight)
            nn.init.zeros_(self.heads[name].bias)
            nn.init.uniform_(self.shift[f"{name}_A"], -self.config.in_features[name] ** -0.5, self.config.in_features[name] ** -0.5)

    @torch.no_grad()
    def normalize(self, adapters: Adapter) -> None:
        """For reconstruction of z-scores: take mean and deviation of each element from a batch of adapters."""
        for name, pair in adapters.items():
            for key, target in zip("AB", pair):
                self.shift[f"{name}_{key}"].copy_(target.mean(0))
                self.scale[f"{name}_{key}"].copy_(target.std(0) + 1e-10)


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------


def save_hypernet(net: TextToLoRA, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write hypernet.safetensors and config.json; bfloat16 halves the file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "hypernet.safetensors", {k: t.to(dtype) for k, t in net.state_dict().items()})
    write_json(folder / "config.json", {"arch": "t2l", **asdict(net.config)})


def shipped(base_model: str) -> str:
    """The folder of the hypernetwork that comes with the project for this base model."""
    folder = Path(__file__).parent / "checkpoints" / base_model / "sft_large"
    if not folder.exists():
        raise UserError(f"no hypernetwork for {base_model} comes with the project; train one and name it with --hypernet")
    return str(folder)


def load_hypernet(folder: str | Path) -> TextToLoRA:
    """Read a hypernetwork that train.py wrote, in float32 and eval mode."""
    folder = Path(folder)
    if not (folder / "hypernet.safetensors").exists():
        raise UserError(f"{folder} holds no hypernetwork (no hypernet.safetensors); train.py --mode sft writes one")
    config = read_json(folder / "config.json")
    if config.pop("arch", None) != "t2l":
        raise UserError(f"{folder}/config.json is not that of a Text-to-LoRA hypernetwork")
    tensors = read_safetensors(folder / "hypernet.safetensors")
    try:
        net = TextToLoRA(HypernetConfig(**config))
        net.load_state_dict({k: t.float() for k, t in tensors.items()})
    except (TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"{folder}: config.json and hypernet.safetensors do not belong together: {e}") from None
    return net.eval()
