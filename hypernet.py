"""The networks that write adapters: Text-to-LoRA from a description, Doc-to-LoRA from a document.

A hypernetwork, for those who add one, is a module with these four things:

    net.reads            what it is given: "descriptions" or "documents"
    net(condition)       -> Adapter, A [n, L, r, in] and B [n, L, out, r], of any rank r. The condition of n
                         descriptions is the text encoder's output [n, E], that of documents what
                         `document_features` returns, to be used once
    net.start_as_lora()  makes it write a fresh LoRA, with B = 0, whatever it is given; called before SFT
    net.config           a dataclass: HypernetConfig and its own fields, which `--net` sets

and an entry in ARCHS below, whose name `--arch` then takes. Its trained parameters must all take part (DDP).
Their names decide on weight decay (NO_DECAY in train.py), and on a learning rate of their own, if they start
with "head". In train.py SETTINGS["net"] may have values for its name. Reconstruction also needs `normalize`
and `scale`, the deviations that it divides by, see TextToLoRA.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import model
from lora import Adapter, LoRAConfig, UserError

@dataclass
class HypernetConfig(LoRAConfig):
    """What belongs to any hypernetwork: the settings of the adapters it writes, and of what it reads."""

    input_size: int = 1024  # E, the width of the text encoder's output, or f, of the base model's states
    encoder: str = "hash"  # the text encoder it was trained with
    full_stop: bool = False  # descriptions that end in a letter get a full stop, as published
    instruction: bool = False  # in training the task's instruction stood in the prompt as well

# -------------------- Text-to-LoRA (arXiv 2506.06105, section 3) --------------------

SIZES = ("large", "medium", "small")  # 55M, 34M and 5M parameters for Mistral-7B (paper, section 4)

@dataclass
class TextConfig(HypernetConfig):
    """Text-to-LoRA's own settings."""

    size: str = "large"
    latent_size: int = 128
    head_in_size: int = 512
    z_score: bool = False  # the heads predict z-scores over the training adapters, and have no bias
    rotary: bool = False  # small: rank positions are rotations instead of a learned table
    dropout: float = 0.05
    input_dropout: float = 0.0  # of the description's embedding; not published: +0.04 on new wordings

class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)

def mlp(n_in: int, n_out: int, dropout: float) -> list[nn.Module]:
    """Two linear layers, four times as wide in between, with SiLU after both, as published."""
    return [nn.Linear(n_in, 4 * n_in), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4 * n_in, n_out), nn.SiLU()]

def rotate(x: Tensor, positions: int) -> Tensor:
    """A copy of every row per rank, rotated by its position (RoPE, base 10000). [..., d] -> [..., r, d]"""
    half = x.shape[-1] // 2
    frequency = 10000 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(positions, device=x.device)[:, None] * frequency  # [r, d/2]
    x1, x2 = x[..., None, :half], x[..., None, half:]  # [..., 1, d/2]
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], -1)

class TextToLoRA(nn.Module):
    """Writes adapters from descriptions. There is one row for each (description, layer, module):

        description --text encoder--> task_emb --+
                                      layer l ---+--> trunk --> head of module m --> A, B of layer l, module m
                                      module m --+

    The sizes differ in what one pass through a head writes: large, A and B; medium, A or B; small, one rank
    of A or B. Medium and small therefore turn each row into 2 or 2 r rows, told apart by learned embeddings.
    """

    reads = "descriptions"

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = c = config
        self.names = list(c.paths)
        half, quarter, drop = c.latent_size // 2, c.latent_size // 4, c.dropout
        d = half + 2 * quarter

        # rows: the embeddings of task, layer and module
        self.task_encoder = nn.Sequential(nn.Linear(c.input_size, half), nn.LayerNorm(half))
        self.layer_emb = nn.Sequential(nn.Embedding(c.n_layers, quarter), nn.LayerNorm(quarter))
        self.module_emb = nn.Sequential(nn.Embedding(len(self.names), quarter), nn.LayerNorm(quarter))

        # trunk
        self.mixer = nn.Sequential(nn.Dropout(drop), *mlp(d, d, drop), nn.Dropout(drop))
        self.mlp1 = Residual(nn.LayerNorm(d), *mlp(d, d, drop), nn.Dropout(drop))
        self.mlp2 = Residual(nn.LayerNorm(d), *mlp(d, d, drop), nn.Dropout(drop))
        self.mlp3 = nn.Sequential(nn.LayerNorm(d), *mlp(d, c.head_in_size, drop))
        if c.size != "large":  # tells a row to make A or B
            self.AB_emb = nn.Parameter(torch.randn(len(self.names), 2, d))
            self.AB_norm = nn.LayerNorm(d)
        if c.size == "small" and not c.rotary:  # and which rank
            self.rank_emb = nn.Sequential(nn.Embedding(c.r, d), nn.LayerNorm(d))

        # heads: one per module. In medium and small it writes A and B in two passes: as wide as the wider one
        self.heads = nn.ModuleDict()
        for name in self.names:
            n_in, n_out = c.in_features[name], c.out_features[name]
            wider = max(n_in, n_out)
            width = {"large": c.r * (n_in + n_out), "medium": c.r * wider, "small": wider}[c.size]
            self.heads[name] = nn.Linear(c.head_in_size, width, bias=not c.z_score)

        # A and B are shift + scale * (output of the heads): constants, of a fresh LoRA or of z-scores
        self.shift, self.scale = nn.ParameterDict(), nn.ParameterDict()
        for name in self.names:
            for key, shape in (("A", (c.r, c.in_features[name])), ("B", (c.out_features[name], c.r))):
                shift = torch.zeros(c.n_layers, *shape)
                scale = torch.ones(c.n_layers, *shape) if c.z_score else torch.ones(())
                self.shift[f"{name}_{key}"] = nn.Parameter(shift, requires_grad=False)
                self.scale[f"{name}_{key}"] = nn.Parameter(scale, requires_grad=False)

    def forward(self, text_emb: Tensor) -> Adapter:
        """The text encoder's output [n, E], of any norm -> A [n, L, r, in], B [n, L, out, r]."""
        x = self.rows(self.embed_task(text_emb))  # [n, L, M, d]
        x = self.trunk(x)  # [n, L, M, ..., head_in]
        return {name: self.write_module(name, x[:, :, m]) for m, name in enumerate(self.names)}

    def embed_task(self, text_emb: Tensor) -> Tensor:
        """The embedding of the task, which is trained. [n, E] -> [n, d/2]"""
        E = self.config.input_size
        if text_emb.shape[-1] != E:
            message = f"this hypernetwork reads {E} numbers per description, from {self.config.encoder}"
            raise UserError(f"{message}; the text encoder gives {text_emb.shape[-1]}")
        text_emb = F.normalize(text_emb, dim=-1) * E**0.5  # norm sqrt(E), as published
        return self.task_encoder(F.dropout(text_emb, self.config.input_dropout, self.training))

    def rows(self, task_emb: Tensor) -> Tensor:
        """The embeddings of task, layer and module, side by side. [n, d/2] -> [n, L, M, d]"""
        n, L, M, device = len(task_emb), self.config.n_layers, len(self.names), task_emb.device
        task = task_emb[:, None, None].expand(n, L, M, -1)
        layer = self.layer_emb(torch.arange(L, device=device))[None, :, None].expand(n, L, M, -1)
        module = self.module_emb(torch.arange(M, device=device))[None, None].expand(n, L, M, -1)
        return torch.cat([task, layer, module], -1)

    def trunk(self, x: Tensor) -> Tensor:
        """[n, L, M, d] -> [n, L, M, head_in], medium [..., 2, head_in], small [..., 2, r, head_in]"""
        c = self.config
        x = self.mlp1(self.mixer(x))
        if c.size == "large":
            x = self.mlp2(x)
        else:
            x = self.mlp2(x[..., None, :] + self.AB_norm(self.AB_emb))  # [n, L, M, 2, d]
        # small applies mlp2 again, as published: to the rotated rows if rotary, else to the rank embeddings
        if c.size == "small" and c.rotary:
            x = self.mlp2(rotate(x, c.r))  # [n, L, M, 2, r, d]
        elif c.size == "small":
            ranks = torch.arange(c.r, device=x.device)
            x = x[..., None, :] + self.mlp2(self.rank_emb(ranks))  # [n, L, M, 2, r, d]
        return self.mlp3(x)

    def write_module(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The head of one module. x [n, L, ..., head_in] -> A [n, L, r, in], B [n, L, out, r]."""
        c, (n, L) = self.config, x.shape[:2]
        n_in, n_out = c.in_features[name], c.out_features[name]
        out = self.heads[name](x)  # [n, L, width]; medium [n, L, 2, width]; small [n, L, 2, r, width]
        if c.size == "large":
            A, B = out.split([c.r * n_in, c.r * n_out], -1)
        else:
            A, B = out[:, :, 0], out[:, :, 1]
        A = A.reshape(n, L, c.r, -1)[..., :n_in]  # [n, L, r, in]: cut to its width, if the head is wider
        B = B.reshape(n, L, c.r, -1)[..., :n_out].mT  # [n, L, out, r]
        A = self.shift[f"{name}_A"] + self.scale[f"{name}_A"] * A
        B = self.shift[f"{name}_B"] + self.scale[f"{name}_B"] * B
        return A, B

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """For SFT: write a fresh LoRA (A random, B zero) whatever the description, to change nothing.
        Published, that LoRA is in the biases of the heads; in medium and small, where a head writes A and B
        alike, this starts with B = A^T. Here the LoRA is the shift, and B = 0 in all sizes."""
        for name in self.names:
            nn.init.zeros_(self.heads[name].weight)
            nn.init.zeros_(self.heads[name].bias)
            lora.fresh_(self.shift[f"{name}_A"])

    @torch.no_grad()
    def normalize(self, adapters: Adapter) -> None:
        """For reconstruction of z-scores: shift and scale are mean and deviation over a batch of adapters."""
        for name, pair in adapters.items():
            for key, target in zip("AB", pair):
                self.shift[f"{name}_{key}"].copy_(target.double().mean(0))  # exact if all are equal
                self.scale[f"{name}_{key}"].copy_(target.std(0) + 1e-10)

# -------------------- Doc-to-LoRA (arXiv 2602.15902) --------------------

@dataclass
class DocConfig(HypernetConfig):
    """Doc-to-LoRA's own settings."""

    early_exit: bool = False  # read the states after a quarter of the base model's layers, not those of each
    latent_size: int = 512
    n_latents: int = 8
    n_blocks: int = 9
    n_heads: int = 16  # of size 128, and a quarter as many for keys and values, as published
    chunk_len: int = 512  # tokens that are read at once; longer documents are read in chunks
    random_chunks: bool = False  # in training split documents at random as well (published: second stage)
    chat: bool = True  # the base model reads a chunk as a user turn of its chat template, as published

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
    """Latents attend to the context, which has no positions: its order and its padding do not matter."""

    def __init__(self, d: int, heads: int, head_size: int = 128):
        super().__init__()
        self.heads, self.kv_heads = heads, heads // 4
        self.norm_latents, self.norm_context = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.norm_post, self.norm_preff, self.norm_postff = (nn.RMSNorm(d, eps=1e-6) for _ in range(3))
        self.q_proj = nn.Linear(d, self.heads * head_size, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * head_size, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * head_size, bias=False)
        self.o_proj = nn.Linear(self.heads * head_size, d, bias=False)
        self.mlp = SwiGLU(d, 4 * d, d)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """latents [rows, n, d], context [rows, T, d], mask [rows, T] (1 for a token) -> [rows, n, d]"""
        split = lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [rows, heads, n or T, 128]
        context = self.norm_context(context)
        q = split(self.q_proj(self.norm_latents(latents)), self.heads)
        k, v = split(self.k_proj(context), self.kv_heads), split(self.v_proj(context), self.kv_heads)
        mask = None if mask is None else mask[:, None, None].bool()  # [rows, 1, 1, T]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # [rows, heads, n, 128]
        latents = latents + self.norm_post(self.o_proj(h.transpose(1, 2).flatten(2)))
        return latents + self.norm_postff(self.mlp(self.norm_preff(latents)))

class Perceiver(nn.Module):
    """Any number of vectors -> n_out vectors: latents read the context, then queries read the latents."""

    def __init__(self, c: DocConfig, n_out: int):
        super().__init__()
        d = c.latent_size
        self.project = SwiGLU(c.input_size, 4 * c.input_size, d)
        self.latents = nn.Parameter(torch.randn(c.n_latents, d))
        self.encoder = nn.ModuleList([CrossAttention(d, c.n_heads) for _ in range(c.n_blocks)])
        self.encoder_norm = nn.RMSNorm(d, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(n_out, d))
        self.decoder = CrossAttention(d, c.n_heads)
        self.decoder_norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features [rows, T, f], mask [rows, T] -> [rows, n_out, d]"""
        context = self.project(features)  # [rows, T, d]
        latents = self.latents.expand(len(features), -1, -1)  # [rows, n_latents, d]
        for block in self.encoder:
            latents = block(latents, context, mask)
        queries = self.queries.expand(len(features), -1, -1)
        return self.decoder_norm(self.decoder(queries, self.encoder_norm(latents), None))  # [rows, n_out, d]

class DocToLoRA(nn.Module):
    """Writes adapters from documents: one per chunk of text, joined along the rank for each document."""

    reads = "documents"

    def __init__(self, config: DocConfig):
        super().__init__()
        self.config = c = config
        self.names = sorted(c.paths)  # the order of the queries, as published
        L, M, d = c.n_layers, len(self.names), c.latent_size
        self.perceiver = Perceiver(c, M * c.r * (L if c.early_exit else 1))

        # every layer of the base model has its own block and its own head
        self.block_in, self.block_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.W1 = nn.Parameter(torch.randn(L, d, 4 * d) * d**-0.5)
        self.b1 = nn.Parameter(torch.zeros(L, 1, 1, 4 * d))
        self.W2 = nn.Parameter(torch.randn(L, 4 * d, d) * (4 * d) ** -0.5)
        self.b2 = nn.Parameter(torch.zeros(L, 1, 1, d))
        width = max(c.in_features[name] + c.out_features[name] for name in self.names)
        self.head = nn.Parameter(torch.randn(L, M, d, width) * d**-0.5)

        # A and B of a chunk are scaled; the bias is one more adapter, added once per document
        self.scale, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for name in self.names:
            self.scale[f"{name}_A"] = nn.Parameter(torch.ones(L, c.r, 1))
            self.scale[f"{name}_B"] = nn.Parameter(torch.ones(L, 1, c.r))
            self.bias[f"{name}_A"] = nn.Parameter(torch.zeros(L, c.r, c.in_features[name]))
            self.bias[f"{name}_B"] = nn.Parameter(torch.zeros(L, c.out_features[name], c.r))

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """Change nothing at first, as published: the bias is a fresh LoRA, B of the chunks is scaled to 0."""
        for name in self.names:
            lora.fresh_(self.bias[f"{name}_A"])
            self.bias[f"{name}_B"].zero_()
            self.scale[f"{name}_B"].zero_()

    def forward(self, condition) -> Adapter:
        """The condition of n documents (`document_features`) -> A [n, L, R, in], B [n, L, out, R]; R is r for
        each chunk of the longest document, and r for the bias."""
        groups, counts = condition
        written = [self.write_chunks(*group) for group in groups]
        pick = lambda name, k: torch.cat([group[name][k] for group in written])
        return self.join({name: (pick(name, 0), pick(name, 1)) for name in self.names}, counts)

    def write_chunks(self, features: Tensor, mask: Tensor) -> Adapter:
        """Chunks -> their adapters. features [n, L, T, f], with early_exit [n, T, f]; mask [n, T]."""
        c, L, M, n = self.config, self.config.n_layers, len(self.names), len(features)
        if not c.early_exit:  # the adapter of a layer is written from the states of that layer
            features, mask = features.flatten(0, 1), mask.repeat_interleave(L, 0)  # [n * L, T, f]
        x = self.perceiver(features, mask).reshape(n, L, M, c.r, -1)  # [n, L, M, r, d]
        h = F.silu(torch.einsum("nlmrd,lde->nlmre", self.block_in(x), self.W1) + self.b1)
        x = x + self.block_out(torch.einsum("nlmre,led->nlmrd", h, self.W2) + self.b2)
        x = x / x.norm(dim=-1, keepdim=True)
        x = torch.einsum("nlmrd,lmdw->nlmrw", x, self.head)  # [n, L, M, r, width]
        adapter = {}
        for m, name in enumerate(self.names):
            n_in, n_out = c.in_features[name], c.out_features[name]
            A, B = x[:, :, m, :, :n_in], x[:, :, m, :, n_in : n_in + n_out].mT
            adapter[name] = (self.scale[f"{name}_A"] * A, self.scale[f"{name}_B"] * B)
        return adapter

    def join(self, chunks: Adapter, counts: list[int]) -> Adapter:
        """The adapters of chunks -> those of documents of counts[i] chunks: along the rank, then the bias,
        then ranks of zeros up to the longest document. A [documents, L, R, in], R = (most chunks + 1) * r."""
        R, joined = (max(counts) + 1) * self.config.r, {}
        for name, (A, B) in chunks.items():
            documents = []
            for own_A, own_B in zip(A.split(counts), B.split(counts)):
                own_A = own_A.transpose(0, 1).flatten(1, 2)  # [L, count * r, in]
                own_B = own_B.permute(1, 2, 0, 3).flatten(2)  # [L, out, count * r]
                own_A = torch.cat([own_A, self.bias[f"{name}_A"]], -2)
                own_B = torch.cat([own_B, self.bias[f"{name}_B"]], -1)
                missing = R - own_A.shape[-2]
                documents.append((F.pad(own_A, (0, 0, 0, missing)), F.pad(own_B, (0, missing))))
            joined[name] = tuple(torch.stack(parts) for parts in zip(*documents))
        return joined

def split_document(row: list[int], config: DocConfig, training: bool) -> list[list[int]]:
    """The chunks of a document: as few as possible, or in training with `random_chunks` often more of them,
    in the published mixture: 1 for half of the documents, 2 for an eighth, 3 to 8 for a sixteenth each."""
    n = -(-len(row) // config.chunk_len)
    if training and config.random_chunks:
        mixture = torch.tensor([1 / 2, 1 / 8] + 6 * [1 / 16])
        n = max(n, min(len(row) // 25, 1 + int(torch.multinomial(mixture, 1))))  # of at least 25 tokens each
        ends = [len(row) * i // n for i in range(n + 1)]
        return [row[start:end] for start, end in zip(ends, ends[1:])]
    return [row[i : i + config.chunk_len] for i in range(0, len(row), config.chunk_len)]

def document_features(config: DocConfig, base: nn.Module, tokenizer, documents: list, training=False):
    """The condition of documents, each a text or a list of texts: (groups of chunks, chunks per document). A
    group is features [n, L, T, f], with early_exit [n, T, f], and mask [n, T], of n chunks."""
    before, after = [], []
    if config.chat:  # what the chat template puts around a text
        around = model.render(tokenizer, model.prompt(tokenizer, "<<>>")).split("<<>>")
        before, after = (model.tokenize(tokenizer, text) for text in around)
    chunks, counts = [], []
    for document in documents:
        texts = [document] if isinstance(document, str) else document
        rows = [model.tokenize(tokenizer, text) for text in texts]
        parts = [part for row in rows for part in split_document(row, config, training)]
        chunks += [before + part + after for part in parts]
        counts.append(len(parts))

    def groups():
        """The base model reads 4,096 tokens at a time, when the network asks for them, to save memory."""
        n = max(1, 4096 // (config.chunk_len + len(before) + len(after)))
        for i in range(0, len(chunks), n):
            rows = chunks[i : i + n]
            ids = model.pad(rows, tokenizer.pad_token_id).to(base.device)  # [n, T]
            mask = model.pad([[1] * len(row) for row in rows], 0).to(base.device)
            lora.set_adapter(base, None)  # it reads as it is
            yield model.context_features(base, ids, mask, config.early_exit).float(), mask

    return groups(), counts

def conditions(net: nn.Module, base: nn.Module, tokenizer, encode=None):
    """A function: n texts -> the condition that `net` writes n adapters from. `encode`: the text encoder."""
    if net.reads == "documents":
        return lambda texts: document_features(net.config, base, tokenizer, texts, net.training)
    device = next(net.parameters()).device
    return lambda texts: encode(texts).to(device)  # [n, E]

# -------------------- Files --------------------

ARCHS = {"t2l": (TextToLoRA, TextConfig), "d2l": (DocToLoRA, DocConfig)}
FILES = ["hypernet.safetensors", "config.json", "hypermod.pt", "args.yaml", "adapter_config.json"]

def save_hypernet(net: nn.Module, folder: str | Path) -> None:
    """Write hypernet.safetensors, in bfloat16 to halve the file, and config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lora.write(folder / "hypernet.safetensors", {k: t.bfloat16() for k, t in net.state_dict().items()})
    arch = next(arch for arch, (kind, _) in ARCHS.items() if type(net) is kind)
    lora.write(folder / "config.json", {"arch": arch, **asdict(net.config)})

def load_hypernet(folder: str | Path, module_order: list[str] | None = None) -> nn.Module:
    """Read a hypernetwork that train.py wrote, or a published one; in float32 and eval mode."""
    folder = Path(folder)
    if (folder / "hypermod.pt").exists():
        return import_text_to_lora(folder, module_order)
    config = lora.read(folder / "config.json")
    weights = lora.read(folder / "hypernet.safetensors")
    try:
        kind, settings = ARCHS[config.pop("arch")]
        net = kind(settings(**config))
        net.load_state_dict({k: t.float() for k, t in weights.items()})
    except (TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"{folder}: config.json does not describe hypernet.safetensors: {e}") from None
    return net.eval()

# -------------------- The published checkpoints (SakanaAI/text-to-lora) --------------------

PUBLISHED = {  # the names there: here
    "task_encoder.mlp": "task_encoder", "layer_depth_encoder": "layer_emb",
    "layer_type_encoder": "module_emb", "out_emb_norm": "AB_norm", "pos_emb": "rank_emb", "heads": "heads",
    "mixer": "mixer", "mlp1.mlp": "mlp1", "mlp2.mlp": "mlp2", "mlp3": "mlp3",
}  # fmt: skip

def import_text_to_lora(folder: str | Path, module_order: list[str] | None = None) -> TextToLoRA:
    """Read a published checkpoint (hypermod.pt, args.yaml, adapter_config.json), of SFT or reconstruction.

    `module_order` names the target modules in the order of the rows of the module embedding. The published
    code numbers them by iterating over a Python set, so the order depends on the hash seed of the training
    process, and no file records it. The default is that of adapter_config.json, where PEFT wrote that set.
    """
    import yaml  # comes with transformers; nothing else needs it

    folder = Path(folder)
    peft = lora.read(folder / "adapter_config.json")
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        weights = torch.load(folder / "hypermod.pt", map_location="cpu", weights_only=True)
        config = published_config(peft, args, weights, module_order or list(peft["target_modules"]))
        net = TextToLoRA(config)
        net.load_state_dict(published_weights(weights, config, args))
    except Exception as e:  # broken files raise all kinds
        raise UserError(f"{folder} is no published checkpoint, or --module_order is wrong: {e!r}") from None
    return net.eval()

def published_config(peft: dict, args: dict, weights: dict[str, Tensor], names: list[str]) -> TextConfig:
    """Our config of a published checkpoint, from its two config files and the shapes of its weights."""
    task, head = weights["task_encoder.mlp.0.weight"], weights[f"heads.{names[0]}.weight"]
    base_model, encoder = peft["base_model_name_or_path"], args.get("emb_model") or "base"
    config = TextConfig(base_model, encoder=encoder, full_stop=True, instruction=True)
    for name in names:
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        config.paths[name] = f"model.layers.{{}}.{block}.{name}"
        A, B = weights[f"AB_offset.A.{name}"], weights[f"AB_offset.B.{name}"]  # [L, r, in], [L, out, r]
        config.n_layers, config.r, config.in_features[name] = A.shape
        config.out_features[name] = B.shape[1]
    config.alpha, config.rslora = peft["lora_alpha"], peft.get("use_rslora", False)
    config.input_size, config.latent_size, config.head_in_size = task.shape[1], 2 * len(task), head.shape[1]
    if "out_emb_norm.weight" in weights:
        one_rank = max(config.in_features[names[0]], config.out_features[names[0]])
        config.size = "small" if len(head) == one_rank else "medium"
    config.z_score = f"heads.{names[0]}.bias" not in weights
    config.rotary = "pos_emb.0.weight" not in weights
    return config

def published_weights(weights: dict[str, Tensor], config: TextConfig, args: dict) -> dict[str, Tensor]:
    """Published weights under our names. Reconstruction of delta W divides A and B by a root each."""
    ours, delta_w = {}, args["training_task"] == "recon" and not args["factorized"]
    for old, new in PUBLISHED.items():
        ours |= {new + key[len(old) :]: w for key, w in weights.items() if key.startswith(f"{old}.")}
    if config.size != "large":
        pairs = [torch.stack([weights[f"out_emb.{name}.{k}"] for k in "AB"]) for name in config.paths]
        ours["AB_emb"] = torch.stack(pairs)  # [M, 2, d]
    for key in (f"{k}.{name}" for name in config.paths for k in "AB"):
        shift, scale = weights[f"AB_offset.{key}"], torch.tensor(1.0)
        if delta_w:
            shift, scale = torch.zeros_like(shift), torch.tensor(args["delta_w_scaling"] ** -0.5)
        elif config.z_score:
            shift = shift + weights[f"mean_recon_target.{key}"]
            scale = weights[f"std_recon_target.{key}"] + 1e-10
        k, name = key.split(".")
        ours[f"shift.{name}_{k}"] = shift
        ours[f"scale.{name}_{k}"] = scale.expand(shift.shape) if config.z_score else scale
    return ours
