"""Text-to-LoRA: the network that writes an adapter (arXiv 2506.06105, section 3).

    description --text encoder--> task_emb --+
                                  layer l ---+--> trunk --> head of module m --> A, B of module m in layer l
                                  module m --+

All layers, modules and descriptions go through it together, as rows of one tensor [n, L, M, d]. The three sizes
differ in what one row has to produce: large, all of A and B; medium, A or B; small, one rank of A or B.

After it: Doc-to-LoRA, which reads a document in place of the description; files; the published checkpoints.
"""

import math
import pickle
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import model
from lora import Adapter, Dropout, LoRAConfig, UserError, read_json, read_safetensors, write_json, write_safetensors

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
    full_stop: bool = False  # descriptions that end in a letter get a full stop, as published
    prompt_with_definition: bool = False  # it was trained with the task's definition before each input


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mlp(n_in: int, n_out: int, dropout: float) -> list[nn.Module]:
    """Two linear layers, four times as wide in between, with SiLU after both, as published."""
    return [nn.Linear(n_in, 4 * n_in), nn.SiLU(), Dropout(dropout), nn.Linear(4 * n_in, n_out), nn.SiLU()]


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
        self.mixer = nn.Sequential(Dropout(drop), *mlp(d, d, drop), Dropout(drop))
        self.mlp1 = Residual(nn.LayerNorm(d), *mlp(d, d, drop), Dropout(drop))
        self.mlp2 = Residual(nn.LayerNorm(d), *mlp(d, d, drop), Dropout(drop))
        self.mlp3 = nn.Sequential(nn.LayerNorm(d), *mlp(d, c.head_in_size, drop))

        # what a row of medium and small has to be told besides: whether to make A or B, and which rank
        if c.size != "large":
            self.AB_emb = nn.Parameter(torch.randn(len(self.names), 2, d))
            self.AB_norm = nn.LayerNorm(d)
        if c.size == "small" and not c.rotary:
            self.rank_emb = nn.Sequential(nn.Embedding(c.r, d), nn.LayerNorm(d))

        # one head a module; in medium and small it makes A and B, as wide as the wider of them, and forward cuts off the rest
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
        """task_emb [n, E], of any norm (it is brought to the published sqrt(E)). A [n, L, r, in], B [n, L, out, r]."""
        c, L, M = self.config, self.config.n_layers, len(self.names)
        if task_emb.shape[-1] != c.task_emb_size:
            raise UserError(f"the text encoder gives {task_emb.shape[-1]} numbers; this hypernetwork was trained on {c.task_emb_size}, with {c.encoder}")
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
        # small goes through mlp2 once more, as published: rotated rows do, or the rank embeddings alone, before they are added
        if c.size == "small" and c.rotary:
            x = self.mlp2(rotate(x, c.r))  # [n, L, M, 2, r, d]
        elif c.size == "small":
            ranks = self.mlp2(self.rank_emb(torch.arange(c.r, device=x.device)))  # [r, d]
            x = x[..., None, :] + ranks  # [n, L, M, 2, r, d]
        x = self.mlp3(x) * c.head_scale  # [n, L, M, ..., head_in]

        adapter = {}
        for m, name in enumerate(self.names):
            n_in, n_out = c.in_features[name], c.out_features[name]
            out = self.heads[name](x[:, :, m])  # [n, L, width]; medium [n, L, 2, width]; small [n, L, 2, r, width]
            if c.size == "large":
                A, B = out.split([c.r * n_in, c.r * n_out], -1)
            else:
                A, B = out.reshape(n, L, 2, -1).unbind(2)
            A = A.reshape(n, L, c.r, -1)[..., :n_in]  # [n, L, r, in]
            B = B.reshape(n, L, c.r, -1)[..., :n_out].mT  # [n, L, out, r]
            A = torch.addcmul(self.shift[f"{name}_A"], self.scale[f"{name}_A"], A)  # shift + scale * A
            B = torch.addcmul(self.shift[f"{name}_B"], self.scale[f"{name}_B"], B)
            adapter[name] = (A, B)
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
            lora.fresh(self.shift[f"{name}_A"])

    @torch.no_grad()
    def tell_apart(self, tasks: list[Tensor]) -> None:
        """Start the task encoder with the linear discriminants of the descriptions of many tasks, embedded as [n, E] each:
        the directions in which tasks differ most, measured by how much the wordings of one task do. They are the main
        components of a ridge regression that says which task a description is of.

        Not in the paper, where it starts at random. Embeddings of task descriptions are much alike, and a good part of
        what differs is the wording, not the task.
        """
        linear, E = self.task_encoder[0], self.config.task_emb_size
        tasks = [F.normalize(x, dim=-1) * E**0.5 for x in tasks]  # as in forward
        y = torch.block_diag(*(torch.full((len(x), 1), 1 / len(x)) for x in tasks))  # [descriptions, tasks]
        x = torch.cat(tasks)  # [descriptions, E]
        center = (y.T @ x).mean(0)
        x = x - center
        which = x.T @ torch.linalg.solve(x @ x.T / len(x) + 0.3 * torch.eye(len(x)), y)  # [E, tasks]; an element's mean square is 1
        _, directions = torch.linalg.eigh(y.T @ x @ which)  # [tasks, tasks], the main one last
        W = 8 * (which @ directions.flip(1)).T[: linear.out_features] / len(tasks) ** 0.5  # [up to latent / 2, E]; 8: large, for training to move slowly
        linear.weight[: len(W)] = W
        linear.bias[: len(W)] = -W @ center

    @torch.no_grad()
    def normalize(self, adapters: Adapter) -> None:
        """For reconstruction of z-scores: take mean and deviation of each element from a batch of adapters."""
        for name, pair in adapters.items():
            for key, target in zip("AB", pair):
                self.shift[f"{name}_{key}"].copy_(target.mean(0, dtype=torch.float64))  # exact where all have the same
                self.scale[f"{name}_{key}"].copy_(target.std(0) + 1e-10)


# ---------------------------------------------------------------------------------------------------------
# Doc-to-LoRA (arXiv 2602.15902): a Perceiver reads a document's features, and writes an adapter
# ---------------------------------------------------------------------------------------------------------


@dataclass
class DocConfig(LoRAConfig):
    """A Doc-to-LoRA hypernetwork's settings: those of the adapters it writes, then its own."""

    feature_size: int = 0  # the base model's hidden size
    per_layer: bool = True  # a layer's adapter comes from that layer's activations; else all from one early layer's
    latent_size: int = 512
    n_latents: int = 8
    n_blocks: int = 9
    n_heads: int = 16  # of size 128, whatever the latent size, and a quarter as many for keys and values, as published
    chunk_len: int = 512  # tokens that are read at once; longer documents are read in pieces
    alpha: float = 2 * 8**2  # 2 r^2, for the published scaling of 2 r^1.5


class SwiGLU(nn.Module):
    """Down(SiLU(Gate x) * Up x)."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int):
        super().__init__()
        self.gate_proj = nn.Linear(n_in, n_hidden, bias=False)
        self.up_proj = nn.Linear(n_in, n_hidden, bias=False)
        self.down_proj = nn.Linear(n_hidden, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CrossAttention(nn.Module):
    """Latents look at the context, which has no positions: its order and its padding do not matter."""

    def __init__(self, d: int, heads: int, head_size: int = 128):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads = heads, heads // 4
        self.norm_latents, self.norm_context, self.norm_post, self.norm_preff, self.norm_postff = (nn.RMSNorm(d, eps=1e-6) for _ in range(5))
        self.q_proj = nn.Linear(d, heads * head_size, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * head_size, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * head_size, bias=False)
        self.o_proj = nn.Linear(heads * head_size, d, bias=False)
        self.mlp = SwiGLU(d, 4 * d, d)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """latents [rows, n, d], context [rows, T, d], mask [rows, T] (True where there is a token) -> [rows, n, d]"""
        split = lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [rows, heads, n or T, head size]
        h, context = self.norm_latents(latents), self.norm_context(context)
        q, k, v = split(self.q_proj(h), self.heads), split(self.k_proj(context), self.kv_heads), split(self.v_proj(context), self.kv_heads)
        mask = None if mask is None else mask[:, None, None].bool()  # [rows, 1, 1, T]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # [rows, heads, n, head size]
        latents = latents + self.norm_post(self.o_proj(h.transpose(1, 2).flatten(2)))
        return latents + self.norm_postff(self.mlp(self.norm_preff(latents)))


class Perceiver(nn.Module):
    """Any number of feature vectors -> n_out vectors: latents read the context in blocks, then queries read the latents."""

    def __init__(self, n_features: int, d: int, n_latents: int, n_blocks: int, n_heads: int, n_out: int):
        super().__init__()
        self.project = SwiGLU(n_features, 4 * n_features, d)
        self.latents = nn.Parameter(torch.randn(n_latents, d))
        self.encoder = nn.ModuleList([CrossAttention(d, n_heads) for _ in range(n_blocks)])
        self.encoder_norm = nn.RMSNorm(d, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(n_out, d))
        self.decoder = CrossAttention(d, n_heads)
        self.decoder_norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features [rows, T, f], mask [rows, T] -> [rows, n_out, d]"""
        context = self.project(features)  # [rows, T, d]
        latents = self.latents.expand(len(features), -1, -1)  # [rows, n_latents, d]
        for layer in self.encoder:
            latents = layer(latents, context, mask)
        queries = self.queries.expand(len(features), -1, -1)
        return self.decoder_norm(self.decoder(queries, self.encoder_norm(latents), None))  # [rows, n_out, d]


class DocToLoRA(nn.Module):
    """The features of n chunks of text -> a batch of n adapters; those of one document are joined along the rank."""

    def __init__(self, config: DocConfig):
        super().__init__()
        self.config = c = config
        self.names = sorted(c.paths)
        L, M, d = c.n_layers, len(self.names), c.latent_size
        self.perceiver = Perceiver(c.feature_size, d, c.n_latents, c.n_blocks, c.n_heads, M * c.r * (1 if c.per_layer else L))

        # every layer of the base model has a block and a head of its own
        self.block_in, self.block_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.W1, self.b1 = nn.Parameter(torch.randn(L, d, 4 * d) * d**-0.5), nn.Parameter(torch.zeros(L, 1, 1, 4 * d))
        self.W2, self.b2 = nn.Parameter(torch.randn(L, 4 * d, d) * (4 * d) ** -0.5), nn.Parameter(torch.zeros(L, 1, 1, d))
        width = max(c.in_features[name] + c.out_features[name] for name in self.names)
        self.head = nn.Parameter(torch.randn(L, M, d, width) * d**-0.5)

        # A and B of a chunk are scaled; the bias is one more adapter, added once a document. It starts as a fresh LoRA
        # and B's scale at zero, so that the whole starts as the base model itself.
        self.scale, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for name in self.names:
            n_in, n_out = c.in_features[name], c.out_features[name]
            self.scale[f"{name}_A"] = nn.Parameter(torch.ones(L, c.r, 1))
            self.scale[f"{name}_B"] = nn.Parameter(torch.zeros(L, 1, c.r))
            self.bias[f"{name}_A"] = nn.Parameter(lora.fresh(torch.empty(L, c.r, n_in)))
            self.bias[f"{name}_B"] = nn.Parameter(torch.zeros(L, n_out, c.r))

    def forward(self, features: Tensor, mask: Tensor) -> Adapter:
        """features [n, L, T, f], or [n, T, f] of one early layer; mask [n, T]. A [n, L, r, in], B [n, L, out, r]."""
        c, L, M, n = self.config, self.config.n_layers, len(self.names), len(features)
        if c.per_layer:
            features, mask = features.flatten(0, 1), mask.repeat_interleave(L, 0)  # [n * L, T, f]
        x = self.perceiver(features, mask).reshape(n, L, M, c.r, -1)  # [n, L, M, r, d]
        h = F.silu(torch.einsum("nlmrd,lde->nlmre", self.block_in(x), self.W1) + self.b1)
        x = x + self.block_out(torch.einsum("nlmre,led->nlmrd", h, self.W2) + self.b2)
        x = x / x.norm(dim=-1, keepdim=True)
        x = torch.einsum("nlmrd,lmdw->nlmrw", x, self.head)  # [n, L, M, r, width]
        adapter = {}
        for m, name in enumerate(self.names):
            A, B, _ = x[:, :, m].tensor_split([c.in_features[name], c.in_features[name] + c.out_features[name]], -1)
            adapter[name] = (self.scale[f"{name}_A"] * A, self.scale[f"{name}_B"] * B.mT)
        return adapter

    def join(self, chunks: Adapter, counts: list[int], scalers: Tensor | None = None, bias_scaler: float = 1.0) -> Adapter:
        """The adapters of chunks -> those of documents, counts[i] chunks each: joined along the rank, the bias last.

        `scalers` [chunks] weigh each chunk's A; `bias_scaler` weighs both A and B of the bias, as published. Shorter
        documents get ranks of zeros. A [documents, L, (most chunks + 1) * r, in].
        """
        parts = [lora.select(chunk, 0) for chunk in lora.split(chunks, 1)]
        if scalers is not None:
            parts = [{name: (scaler * A, B) for name, (A, B) in part.items()} for scaler, part in zip(scalers, parts)]
        bias = {name: tuple(bias_scaler * self.bias[f"{name}_{key}"] for key in "AB") for name in self.names}
        rest = iter(parts)
        return lora.stack([lora.concat_rank([*islice(rest, count), bias]) for count in counts])


def cut(ids: list[int], longest: int, pieces: int = 1) -> list[list[int]]:
    """A text in about that many pieces, or in more where they would be longer than `longest` tokens."""
    size = min(longest, math.ceil(len(ids) / pieces))
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def read_documents(
    net: DocToLoRA, base: nn.Module, tokenizer, documents: list[list[str]], chunk_batch: int = 8, n_pieces: int = 1
) -> Adapter:
    """n documents of any length -> a batch of n adapters. Each document is one text or several.

    Each text is read in pieces (see `cut`); the base model reads `chunk_batch` of them at a time, which bounds the memory.
    """
    pieces = [[piece for text in texts for piece in cut(model.tokenize(tokenizer, text), net.config.chunk_len, n_pieces)] for texts in documents]
    pieces, counts = [piece for own in pieces for piece in own], [len(own) for own in pieces]
    lora.set_adapter(base, None)  # it reads as it is
    read = []
    for i in range(0, len(pieces), chunk_batch):
        part = pieces[i : i + chunk_batch]
        ids = model.pad(part, tokenizer.pad_token_id).to(net.head.device)  # [chunk_batch, T]
        mask = model.pad([[1] * len(piece) for piece in part], 0).to(net.head.device)
        read.append(net(model.context_features(base, ids, mask, net.config.per_layer).float(), mask))
    chunks = {name: tuple(torch.cat([adapter[name][k] for adapter in read]) for k in (0, 1)) for name in net.names}
    return net.join(chunks, counts)


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------

ARCHS = {"t2l": (TextToLoRA, HypernetConfig), "d2l": (DocToLoRA, DocConfig)}


FILES = ["hypernet.safetensors", "config.json", "hypermod.pt", "args.yaml", "adapter_config.json"]  # ours, and the published ones


def save_hypernet(net: TextToLoRA | DocToLoRA, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write hypernet.safetensors and config.json; bfloat16 halves the file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "hypernet.safetensors", {k: t.to(dtype) for k, t in net.state_dict().items()})
    arch = next(arch for arch, (kind, _) in ARCHS.items() if isinstance(net, kind))
    write_json(folder / "config.json", {"arch": arch, **asdict(net.config)})


def shipped(base_model: str, name: str = "sft_large") -> str:
    """The folder of the hypernetwork that comes with the project for this base model."""
    folder = Path(__file__).parent / "checkpoints" / model.preset_name(base_model) / name
    if not folder.exists():
        raise UserError(f"no hypernetwork for {base_model} comes with the project; train one and name it with --hypernet")
    return str(folder)


def load_hypernet(folder: str | Path, module_order: list[str] | None = None) -> TextToLoRA | DocToLoRA:
    """Read a hypernetwork, in float32 and eval mode: one that train.py wrote, or a published one (`import_text_to_lora`)."""
    folder = Path(folder)
    if (folder / "hypermod.pt").exists():
        return import_text_to_lora(folder, module_order)
    if not (folder / "hypernet.safetensors").exists():
        raise UserError(f"{folder} holds no hypernetwork (neither hypernet.safetensors, which train.py --mode sft writes, nor a published hypermod.pt)")
    config = read_json(folder / "config.json")
    arch = config.pop("arch", None)
    if arch not in ARCHS:
        raise UserError(f"{folder}/config.json is not that of a hypernetwork")
    if module_order:
        raise UserError(f"--module_order is for published checkpoints; {folder} records the order of its modules")
    tensors = read_safetensors(folder / "hypernet.safetensors")
    try:
        kind, settings = ARCHS[arch]
        net = kind(settings(**config))
        net.load_state_dict({k: t.float() for k, t in tensors.items()})
    except (TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"{folder}: config.json and hypernet.safetensors do not belong together: {e}") from None
    return net.eval()


# ---------------------------------------------------------------------------------------------------------
# The published checkpoints (SakanaAI/text-to-lora): hypermod.pt, args.yaml, adapter_config.json
# ---------------------------------------------------------------------------------------------------------

PUBLISHED = {  # the names there: here
    "task_encoder.mlp": "task_encoder", "layer_depth_encoder": "layer_emb", "layer_type_encoder": "module_emb", "mixer": "mixer",
    "mlp1.mlp": "mlp1", "mlp2.mlp": "mlp2", "mlp3": "mlp3", "heads": "heads", "out_emb_norm": "AB_norm", "pos_emb": "rank_emb",
}  # fmt: skip
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")  # the other linear layers belong to the attention


def import_text_to_lora(folder: str | Path, module_order: list[str] | None = None) -> TextToLoRA:
    """Read a published checkpoint: SFT or reconstruction (of z-scores, of A and B, of delta W), in any size.

    Shapes are those of the weights; args.yaml says how it was trained, adapter_config.json what it adapts.

    `module_order` names the target modules in the order of the rows of the module embedding. The published code numbers
    them by going through a Python set, so the order depends on the hash seed of the training process, and no file says
    it. The best evidence is adapter_config.json, where PEFT writes that set out as a list: if the training process wrote
    the file, it is in the training order. So that is the default. Raises UserError where files are missing or broken.
    """
    import yaml  # comes with transformers; nothing else needs it

    folder = Path(folder)
    peft = read_json(folder / "adapter_config.json")
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        weights = torch.load(folder / "hypermod.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"{e.filename} is missing") from None
    except (OSError, ValueError, yaml.YAMLError, pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise UserError(f"{folder} cannot be read as a published checkpoint: {e}") from None
    names = list(peft.get("target_modules") or [])
    if module_order and sorted(module_order) != sorted(names):
        raise UserError(f"--module_order {','.join(module_order)}: the target modules of {folder} are {', '.join(names)}")
    try:
        config = published_config(peft, args, weights, module_order or names)
        net = TextToLoRA(config)
        delta_w = args["training_task"] == "recon" and not args["factorized"]
        net.load_state_dict(published_weights(weights, config, args["delta_w_scaling"] if delta_w else None))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder} is not a published Text-to-LoRA checkpoint of a kind known here: {e}") from None
    return net.eval()


def published_config(peft: dict, args: dict, weights: dict[str, Tensor], names: list[str]) -> HypernetConfig:
    """Our config of a published checkpoint: its adapter_config.json, its args.yaml, and the shapes of its weights."""
    A = {name: weights[f"AB_offset.A.{name}"] for name in names}  # [L, r, in]
    B = {name: weights[f"AB_offset.B.{name}"] for name in names}  # [L, out, r]
    n_layers, r, n_in = A[names[0]].shape
    head = weights[f"heads.{names[0]}.weight"]
    one_rank = len(head) == max(n_in, B[names[0]].shape[1])
    return HypernetConfig(
        base_model=peft["base_model_name_or_path"],
        n_layers=n_layers,
        paths={name: f"model.layers.{{}}.{'mlp' if name in MLP_MODULES else 'self_attn'}.{name}" for name in names},
        in_features={name: A[name].shape[2] for name in names},
        out_features={name: B[name].shape[1] for name in names},
        r=r,
        alpha=peft["lora_alpha"],
        rslora=peft.get("use_rslora", False),
        encoder=args.get("emb_model") or "base",
        task_emb_size=weights["task_encoder.mlp.0.weight"].shape[1],
        size="large" if "out_emb_norm.weight" not in weights else "small" if one_rank else "medium",
        latent_size=2 * len(weights["task_encoder.mlp.0.weight"]),
        head_in_size=head.shape[1],
        z_score=f"heads.{names[0]}.bias" not in weights,
        rotary="pos_emb.0.weight" not in weights,
        full_stop=True,
    )


def published_weights(weights: dict[str, Tensor], config: HypernetConfig, delta_w_scaling: float | None) -> dict[str, Tensor]:
    """The weights of a published checkpoint under our names; `delta_w_scaling` is that of a reconstruction of delta W."""
    ours = {new + k[len(old) :]: t for k, t in weights.items() for old, new in PUBLISHED.items() if k.startswith(f"{old}.")}
    if config.size != "large":
        ours["AB_emb"] = torch.stack([torch.stack([weights[f"out_emb.{name}.{k}"] for k in "AB"]) for name in config.paths])
    for name in config.paths:
        for k in "AB":
            shift, scale = weights[f"AB_offset.{k}.{name}"], torch.tensor(1.0)
            if delta_w_scaling:
                shift, scale = torch.zeros_like(shift), torch.tensor(delta_w_scaling**-0.5)
            elif config.z_score:
                shift, scale = shift + weights[f"mean_recon_target.{k}.{name}"], weights[f"std_recon_target.{k}.{name}"] + 1e-10
            ours[f"shift.{name}_{k}"], ours[f"scale.{name}_{k}"] = shift, scale.expand(shift.shape if config.z_score else ())
    return ours


# ---------------------------------------------------------------------------------------------------------
# python hypernet.py: the paper's sizes
# ---------------------------------------------------------------------------------------------------------

PAPER_SHAPES = {  # layers, in_features and out_features of q_proj and v_proj
    "mistral-7b": (32, dict(q_proj=4096, v_proj=4096), dict(q_proj=4096, v_proj=1024)),
    "llama-3.1-8b": (32, dict(q_proj=4096, v_proj=4096), dict(q_proj=4096, v_proj=1024)),
    "gemma-2-2b": (26, dict(q_proj=2304, v_proj=2304), dict(q_proj=2048, v_proj=1024)),
}


def paper_net(base_model: str, size: str, **changes) -> TextToLoRA:
    """The paper's hypernetwork (its Table of hyper-parameters: latent 128, head input 512) for one of its base models."""
    n_layers, n_in, n_out = PAPER_SHAPES[base_model]
    paths = {name: f"model.layers.{{}}.self_attn.{name}" for name in n_in}
    config = HypernetConfig(base_model, n_layers, paths, n_in, n_out, size=size, **changes)
    return TextToLoRA(config)


def main() -> None:
    """Print the number of trained parameters in each size, for the paper's base models."""
    print("| base model | one adapter | size | hypernetwork, SFT | reconstruction of z-scores |\n|---|---|---|---|---|")
    with torch.device("meta"):
        for base_model in PAPER_SHAPES:
            for size in SIZES:
                nets = [paper_net(base_model, size, z_score=z_score) for z_score in (False, True)]
                sft, recon = (sum(p.numel() for p in net.parameters() if p.requires_grad) for net in nets)
                adapter = sum(p.numel() for p in nets[0].shift.values())
                print(f"| {base_model} | {adapter:,} | {size} | {sft:,} | {recon:,} |")


if __name__ == "__main__":
    main()
