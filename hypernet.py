"""The networks that write adapters: Text-to-LoRA from a description, Doc-to-LoRA from a document.

    net = load_hypernet("checkpoints/tiny/sft_large")
    net.connect(base, tokenizer)
    adapters = net(["Keep only the animals."])

The end of the file says what a new network must provide.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
import model
from lora import Adapter, LoRAConfig
from support import hub, processes
from support.files import UserError, read_file, read_object, write_file
from support.flags import setting
from support.perceiver import Perceiver
from support.targets import Target, all_targets, as_targets
from support.text_models import load_text_model


@dataclass
class HypernetConfig(LoRAConfig):
    """What any hypernetwork records."""

    z_score: bool = False  # by reconstruction of z-scores over the oracles

    def measure(self, base: nn.Module) -> None:
        """Set the fields that depend on the frozen models."""


# -------------------- Text-to-LoRA (arXiv 2506.06105, section 3) --------------------

SIZES = ("large", "medium", "small")  # 55M, 34M and 5M parameters for Mistral-7B (paper, section 4)


@dataclass
class TextConfig(HypernetConfig):
    """Text-to-LoRA's settings, with values for the tiny world. With z_score its heads have no bias."""

    encoder: str = "hash"  # see model.load_encoder
    input_size: int = 1024  # E, the width of the text encoder's output
    full_stop: bool = True  # descriptions that end in a letter get one, as published (not with "hash")
    rotary: bool = False  # small, of published checkpoints alone: rank positions are rotations, no table
    dropout: float = 0.1  # in the trunk; that of --dropout, as published
    size: str = setting("large", "what one pass through a head writes", choices=SIZES)
    latent_size: int = setting(128, "width of the trunk; half of it is the task embedding", least=4)
    head_in_size: int = setting(256, "width of the input of the heads", least=1)
    input_dropout: float = setting(0.3, "dropout of the text encoder's output (not published)", most=1)
    head_lr: float = setting(1 / 16, "factor on lr for the heads")
    encoder_rank: int = setting(0, "rank of a LoRA on the text encoder (0: none)", kinds="text")
    offset_lr: float = setting(0.0, "factor on lr for the offset that tasks share (0: fixed)", kinds="text")
    encoder_targets: dict[str, Target] = field(default_factory=dict)  # with encoder_rank: its linear layers

    def __post_init__(self):
        super().__post_init__()
        self.encoder_targets = as_targets(self.encoder_targets)

    def measure(self, base: nn.Module) -> None:
        """The width of the text encoder's output, and with encoder_rank its linear layers."""
        self.input_size = model.encoder_width(self.encoder, base)
        if self.encoder_rank and self.encoder in ("hash", "base"):
            raise UserError("--encoder_rank needs a text encoder that is a network beside the base model")
        if self.encoder_rank:
            self.encoder_targets = all_targets(load_text_model(self.encoder))


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


class Buffers(nn.Module):
    """A dictionary of buffers, as nn.ParameterDict is one of parameters."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]


class TextToLoRA(nn.Module):
    """Writes adapters from descriptions. There is one row for each (description, layer, module):

        description --text encoder--> task_emb --+
                                      layer l ---+--> trunk --> head of module m --> A, B of layer l, module m
                                      module m --+

    The sizes differ in what one pass through a head writes. Medium and small turn each row into 2 or 2 r
    rows, told apart by learned embeddings.

        size      rows after the trunk       one pass writes        width of a head
        large     [n, L, M, head_in]         A and B                r (in + out)
        medium    [n, L, M, 2, head_in]      A or B                 r max(in, out)
        small     [n, L, M, 2, r, head_in]   one rank of A or B     max(in, out)
    """

    reads = "descriptions"
    modes = ("sft", "recon")
    config_class = TextConfig

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config, self.ranks = config, config.r
        self.lr_factors = {"heads": config.head_lr, "offset": config.offset_lr}
        c, d, dropout = config, config.latent_size, config.dropout
        if d % 4:
            raise UserError(f"--latent_size must be a multiple of 4, not {d}")
        self.names, self.layers = list(c.targets), c.adapted_layers()
        self.positions = {name: c.positions(name) for name in c.targets}  # of a target's layers among them
        half, quarter = d // 2, d // 4

        # rows: the embeddings of task, layer and module
        self.task_encoder = nn.Sequential(nn.Linear(c.input_size, half), nn.LayerNorm(half))
        self.layer_emb = nn.Sequential(nn.Embedding(c.n_layers, quarter), nn.LayerNorm(quarter))
        self.module_emb = nn.Sequential(nn.Embedding(len(self.names), quarter), nn.LayerNorm(quarter))

        # trunk
        self.mixer = nn.Sequential(nn.Dropout(dropout), *mlp(d, d, dropout), nn.Dropout(dropout))
        self.mlp1 = Residual(nn.LayerNorm(d), *mlp(d, d, dropout), nn.Dropout(dropout))
        self.mlp2 = Residual(nn.LayerNorm(d), *mlp(d, d, dropout), nn.Dropout(dropout))
        self.mlp3 = nn.Sequential(nn.LayerNorm(d), *mlp(d, c.head_in_size, dropout))
        if c.size != "large":  # tells a row to make A or B
            self.AB_emb = nn.Parameter(torch.randn(len(self.names), 2, d))
            self.AB_norm = nn.LayerNorm(d)
        if c.size == "small" and not c.rotary:  # tells a row which rank to make
            self.rank_emb = nn.Sequential(nn.Embedding(c.r, d), nn.LayerNorm(d))

        if c.encoder_rank:  # a LoRA on the text encoder, one for all texts (not published)
            encoder_config = LoRAConfig(targets=c.encoder_targets, r=c.encoder_rank)
            self.encoder_lora = lora.LoRABank(encoder_config, 1)

        # heads: one per module
        self.heads = nn.ModuleDict()
        for name, target in c.targets.items():
            larger = max(target.n_in, target.n_out)
            widths = {"large": c.r * (target.n_in + target.n_out), "medium": c.r * larger, "small": larger}
            self.heads[lora.no_dots(name)] = nn.Linear(c.head_in_size, widths[c.size], bias=not c.z_score)

        # matrix = offset + std * (output of the head)
        #     SFT:       the offset is LoRA's initialisation, std is 1
        #     z-scores:  they are mean and standard deviation over the oracles, entry by entry
        # With --offset_lr the offset is trained as well: a LoRA that all descriptions share (not published)
        offset, std = {}, {}
        for name, target in c.targets.items():
            L = len(target.layers)
            for matrix, shape in (("A", (L, c.r, target.n_in)), ("B", (L, target.n_out, c.r))):
                offset[f"{lora.no_dots(name)}_{matrix}"] = torch.zeros(shape)
                std[f"{lora.no_dots(name)}_{matrix}"] = torch.ones(shape if c.z_score else ())
        self.offset = nn.ParameterDict(offset) if c.offset_lr else Buffers(offset)
        self.std = Buffers(std)

    def connect(self, base: nn.Module | None, tokenizer) -> None:
        """Load the text encoder, maybe the base model. (It is no nn.Module, so no part of the network.)"""
        c, device = self.config, next(self.parameters()).device
        self.encoder = model.load_encoder(c.encoder, device, base, tokenizer, c.full_stop)
        if c.encoder_rank:
            network = getattr(self.encoder.embed, "model", None)  # "hash" and "base" have none
            if network is None or all_targets(network) != c.encoder_targets:
                raise UserError(f"--encoder {c.encoder}: this hypernetwork has a LoRA for another one")
            lora.inject_targets(network, c.encoder_targets)

    def forward(self, texts: list[str]) -> Adapter:
        """n descriptions -> A [n, L, r, in], B [n, L, out, r]."""
        return self.write(self.encode(texts))

    def encode(self, texts: list[str]) -> Tensor:
        """The text encoder's output for n descriptions [n, E]; frozen, but for the LoRA of encoder_rank."""
        if not self.config.encoder_rank:
            return self.encoder(texts)
        network, scaling = self.encoder.embed.model, self.encoder_lora.config.scaling
        with torch.autocast(network.device.type, enabled=False):
            with lora.use(network, self.encoder_lora(0), scaling):
                return self.encoder.embed(self.encoder.prepare(texts))

    def write(self, text_emb: Tensor) -> Adapter:
        """The text encoder's output [n, E], of any norm -> A [n, L, r, in], B [n, L, out, r]."""
        x = self.trunk(self.rows(self.embed_task(text_emb)))  # [n, L, M, ..., head_in]
        adapter = {}
        for m, name in enumerate(self.names):
            layers = self.positions[name]  # those that have the target: all of them in most models
            adapter[name] = self.write_module(name, x[:, layers, m])
        return adapter

    def embed_task(self, text_emb: Tensor) -> Tensor:
        """The task embeddings, from the text encoder's output at norm sqrt(E). [n, E] -> [n, d/2]"""
        E, found = self.config.input_size, text_emb.shape[-1]
        if found != E:
            message = f"this hypernetwork reads {E} numbers per description, from {self.config.encoder}"
            raise UserError(f"{message}; the text encoder gives {found}")
        text_emb = F.normalize(text_emb, dim=-1) * E**0.5
        return self.task_encoder(F.dropout(text_emb, self.config.input_dropout, self.training))

    def rows(self, task_emb: Tensor) -> Tensor:
        """The embeddings of task, layer and module, side by side. [n, d/2] -> [n, L, M, d]"""
        n, L, M, device = len(task_emb), len(self.layers), len(self.names), task_emb.device
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
        """A row for each rank. [..., d] -> [..., r, d]

        mlp2(rotated x) if rotary, otherwise x + mlp2(rank_emb). That mlp2 is applied again is published.
        """
        if self.config.rotary:
            return self.mlp2(rotate(x, self.config.r))
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
        B = B.reshape(n, L, c.r, -1)[..., :n_out]  # [n, L, r, out]
        B = B.mT  # [n, L, out, r]
        A = self.offset[f"{key}_A"] + self.std[f"{key}_A"] * A
        B = self.offset[f"{key}_B"] + self.std[f"{key}_B"] * B
        return A, B

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """For SFT: write LoRA's initialisation (A random, B zero) for every description.

        The published code puts it in the biases of the heads; in medium and small one head writes both, so B
        would start as A^T. We store the initialisation in the offset instead, and B = 0 in all sizes.
        """
        for name in self.names:
            nn.init.zeros_(self.heads[lora.no_dots(name)].weight)
            nn.init.zeros_(self.heads[lora.no_dots(name)].bias)
            lora.init_A_(self.offset[f"{lora.no_dots(name)}_A"])

    @torch.no_grad()
    def start_at(self, mean: Adapter, std: Adapter) -> None:
        """For z-scores over oracles: their mean [L, ...] and standard deviation [L, ...]."""
        if self.config.z_score:  # for delta_w it starts from random weights, as published
            for name in self.names:
                for i, matrix in enumerate("AB"):
                    self.offset[f"{lora.no_dots(name)}_{matrix}"].copy_(mean[name][i])
                    self.std[f"{lora.no_dots(name)}_{matrix}"].copy_(std[name][i])


# -------------------- Doc-to-LoRA (arXiv 2602.15902): split, read, write, join --------------------


@dataclass
class DocConfig(HypernetConfig):
    """Doc-to-LoRA's settings; what makes its network has published values."""

    input_size: int = 1024  # f, the width of the base model's states
    early_exit: bool = setting(False, "read the states after a quarter of the layers, not of each layer")
    latent_size: int = setting(512, "width of the Perceiver", least=1)
    n_latents: int = 8  # latent vectors of the Perceiver
    n_blocks: int = setting(9, "cross-attention blocks of the Perceiver", least=1)
    n_heads: int = setting(16, "attention heads of size 128; a quarter as many for keys and values", least=4)
    chunk_len: int = setting(512, "most tokens of a chunk, without the template at its inner ends", least=1)
    chat: bool = setting(True, "read a chunk as a user turn of the base model's chat template")
    head_lr: float = setting(1 / 16, "factor on lr for the head")

    def measure(self, base: nn.Module) -> None:
        self.input_size = base.config.get_text_config().hidden_size


Chunk = list[int]  # token ids
TOKENS_READ_AT_ONCE = 4096  # by the base model, to save memory


def split_document(ids: Chunk, config: DocConfig) -> list[Chunk]:
    """Split the token ids of a document into as few chunks as possible, of similar length."""
    n = math.ceil(len(ids) / config.chunk_len)
    size = math.ceil(len(ids) / n)
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def split_documents(config: DocConfig, documents: list, tokenizer):
    """n documents, each a text or a list of texts -> (chunks, how many of them each document has).

    With config.chat each chunk is a turn of the chat.
    """
    before, after = model.around_document(tokenizer) if config.chat else ("", "")
    before_ids, after_ids = model.tokenize(tokenizer, before), model.tokenize(tokenizer, after)
    chunks, counts = [], []
    for document in documents:
        count = 0
        texts = [document] if isinstance(document, str) else document
        for text in texts:
            ids = model.tokenize(tokenizer, before + text.strip() + after)
            pieces = split_document(ids, config)
            for i, piece in enumerate(pieces):
                start = before_ids if i > 0 else []
                end = after_ids if i < len(pieces) - 1 else []
                chunks.append(start + piece + end)
            count += len(pieces)
        counts.append(count)
    return chunks, counts


def read_chunks(base: nn.Module, chunks: list[Chunk], early_exit: bool) -> tuple[Tensor, Tensor | None]:
    """The base model's states of n chunks: features [n, N, T, f] of all N layers, and a mask [n, T].

    With early_exit the features are [n, T, f]. The mask is 1 for a token and 0 for padding, or None if
    nothing is padded.
    """
    ids = model.pad(chunks, 0).to(base.device)  # [n, T]
    mask = None
    if len({len(chunk) for chunk in chunks}) > 1:
        mask = model.pad([[1] * len(chunk) for chunk in chunks], 0).to(base.device)
    with torch.autocast(base.device.type, enabled=False):
        return model.hidden_states(base, ids, mask, early_exit).float(), mask


class DocToLoRA(nn.Module):
    """Writes adapters from documents: one per chunk of text, joined along the rank for each document."""

    reads = "documents"
    modes = ("sft",)
    config_class = DocConfig

    def __init__(self, config: DocConfig):
        super().__init__()
        self.config = c = config
        self.ranks, self.lr_factors = c.r, {"head": c.head_lr}
        self.recompute = False  # True: compute the Perceiver again in the backward pass, to save memory
        if c.n_heads % 4:
            raise UserError(f"--n_heads must be a multiple of 4, not {c.n_heads}")
        self.names = sorted(c.targets)  # the order of the queries, as published
        self.layers = c.adapted_layers()
        self.positions = {name: c.positions(name) for name in c.targets}
        L, M, d = len(self.layers), len(self.names), c.latent_size
        n_out = M * c.r * (L if c.early_exit else 1)
        self.perceiver = Perceiver(c.input_size, d, c.n_latents, c.n_blocks, c.n_heads, n_out)

        # every layer of the base model that has a target has its own block and its own head
        self.block_in, self.block_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.W1 = nn.Parameter(torch.randn(L, d, 4 * d) * d**-0.5)
        self.b1 = nn.Parameter(torch.zeros(L, 1, 1, 4 * d))
        self.W2 = nn.Parameter(torch.randn(L, 4 * d, d) * (4 * d) ** -0.5)
        self.b2 = nn.Parameter(torch.zeros(L, 1, 1, d))
        width = max(target.n_in + target.n_out for target in c.targets.values())
        self.head = nn.Parameter(torch.randn(L, M, d, width) * d**-0.5)

        # A and B of a chunk are multiplied by a scaler; the bias is one more adapter, added once per document
        self.scaler, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for name in self.names:
            target, key = c.targets[name], lora.no_dots(name)
            n_layers = len(target.layers)
            self.scaler[f"{key}_A"] = nn.Parameter(torch.ones(n_layers, c.r, 1))
            self.scaler[f"{key}_B"] = nn.Parameter(torch.ones(n_layers, 1, c.r))
            self.bias[f"{key}_A"] = nn.Parameter(torch.zeros(n_layers, c.r, target.n_in))
            self.bias[f"{key}_B"] = nn.Parameter(torch.zeros(n_layers, target.n_out, c.r))

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """Change nothing at first, as published: the bias is LoRA's initialisation, and B of chunks is 0."""
        for name in self.names:
            lora.init_A_(self.bias[f"{lora.no_dots(name)}_A"])
            self.bias[f"{lora.no_dots(name)}_B"].zero_()
            self.scaler[f"{lora.no_dots(name)}_B"].zero_()

    def connect(self, base: nn.Module, tokenizer) -> None:
        """What reads documents is the base model itself. (In a tuple, it is no part of the network.)"""
        self.frozen = base, tokenizer

    def forward(self, documents: list) -> Adapter:
        """n documents, each a text or a list of texts -> A [n, L, R, in], B [n, L, out, R].

        R is r for each chunk of the longest document, and r for the bias.
        """
        return self.write(*self.encode(documents))

    def encode(self, documents: list) -> tuple[Iterator[tuple[Tensor, Tensor | None]], list[int]]:
        """(features and mask of a group of chunks after another, how many chunks each document has).

        A group is read when `write` asks for it: the states of all chunks at once would fill the memory.
        """
        base, tokenizer = self.frozen
        chunks, counts = split_documents(self.config, documents, tokenizer)
        size = max(1, TOKENS_READ_AT_ONCE // max(len(chunk) for chunk in chunks))
        groups = [chunks[i : i + size] for i in range(0, len(chunks), size)]
        return self.read(base, groups), counts

    def read(self, base: nn.Module, groups: list[list[Chunk]]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What `read_chunks` makes of each group."""
        n_reads = processes.most(len(groups), base)
        for group in groups:
            yield read_chunks(base, group, self.config.early_exit)
        for _ in range(len(groups), n_reads):  # all processes have to run a sharded base model equally often
            read_chunks(base, groups[0], self.config.early_exit)

    def write(self, groups: Iterable[tuple[Tensor, Tensor | None]], counts: list[int]) -> Adapter:
        """What `encode` returns -> the adapters of n documents."""
        written = []
        for features, mask in groups:
            if self.recompute:
                written.append(checkpoint(self.write_chunks, features, mask, use_reentrant=False))
            else:
                written.append(self.write_chunks(features, mask))
        chunks = {}
        for name in self.names:
            A = torch.cat([adapter[name][0] for adapter in written])  # [chunks, L, r, in]
            B = torch.cat([adapter[name][1] for adapter in written])
            chunks[name] = (A, B)
        return self.join(chunks, counts)

    def write_chunks(self, features: Tensor, mask: Tensor | None) -> Adapter:
        """Chunks -> their adapters. features [n, N, T, f], with early_exit [n, T, f]; mask [n, T]."""
        # N layers are read, L of them have a target
        # in the einsums: n chunk, l layer, m module, r rank; d, e and w are widths
        c, L, M, n = self.config, len(self.layers), len(self.names), len(features)
        if not c.early_exit:  # the adapter of a layer is written from the states of that layer
            if L < c.n_layers:
                features = features[:, self.layers]  # [n, L, T, f]
            features = features.flatten(0, 1)  # [n * L, T, f]
            mask = mask if mask is None else mask.repeat_interleave(L, 0)  # [n * L, T]
        x = self.perceiver(features, mask)  # [n * L, M * r, d], with early_exit [n, L * M * r, d]
        x = x.reshape(n, L, M, c.r, -1)
        # an MLP for each layer, vectors of length 1, a head for each layer and module
        h = F.silu(torch.einsum("nlmrd,lde->nlmre", self.block_in(x), self.W1) + self.b1)  # [n, L, M, r, 4 d]
        x = x + self.block_out(torch.einsum("nlmre,led->nlmrd", h, self.W2) + self.b2)
        x = x / x.norm(dim=-1, keepdim=True)
        x = torch.einsum("nlmrd,lmdw->nlmrw", x, self.head)  # [n, L, M, r, width]
        adapter = {}
        for m, name in enumerate(self.names):
            target, key = c.targets[name], lora.no_dots(name)
            out = x[:, self.positions[name], m]  # [n, L, r, width], of the layers that have it
            A, B = out[..., : target.n_in], out[..., target.n_in : target.n_in + target.n_out].mT
            adapter[name] = (self.scaler[f"{key}_A"] * A, self.scaler[f"{key}_B"] * B)
        return adapter

    def join(self, chunks: Adapter, counts: list[int]) -> Adapter:
        """The adapters of chunks -> those of documents; the i-th document has counts[i] of the chunks.

        The rank dimension holds the chunks, then the bias, then zero padding up to the longest document.
        A [documents, L, R, in] and B [documents, L, out, R] with R = (most chunks + 1) * r.
        """
        bias = {}
        for name in self.names:
            bias[name] = (self.bias[f"{lora.no_dots(name)}_A"], self.bias[f"{lora.no_dots(name)}_B"])
        # without the padding; read by the loss of the weights' size
        self.ranks = (1 + torch.tensor(counts, device=self.head.device)) * self.config.r  # [documents]
        singles, documents = lora.unbind(chunks), []
        for count in counts:
            own, singles = singles[:count], singles[count:]
            documents.append(lora.pad_rank(lora.concat_rank([*own, bias]), int(self.ranks.max())))
        return lora.stack(documents)


# -------------------- Files --------------------

FILES = ["hypernet.safetensors", "config.json"]


def save_hypernet(net: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write hypernet.safetensors and config.json. bfloat16 halves the file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arch = next(arch for arch in ARCHS if ARCHS[arch] is type(net))
    weights = {key: tensor.to(dtype) for key, tensor in net.state_dict().items()}
    write_file(folder / "hypernet.safetensors", weights)
    write_file(folder / "config.json", {"arch": arch, **asdict(net.config)})


def load_hypernet(folder: str | Path) -> nn.Module:
    """Read a hypernetwork that train.py wrote, in float32 and eval mode. `connect` it before it is called."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, not a hypernetwork; PEFT loads it")
    settings = read_object(folder / "config.json")
    weights = read_file(folder / "hypernet.safetensors")
    try:
        net_class = ARCHS[settings.pop("arch")]
        with torch.device("meta"):  # only shapes: the weights are put in place of its parameters
            net = net_class(net_class.config_class(**settings))
        # the shipped files say deviation in place of std
        weights = {key.replace("deviation", "std"): w.float().contiguous() for key, w in weights.items()}
        net.load_state_dict(weights, assign=True)
    except (TypeError, KeyError, AttributeError, RuntimeError, ValueError) as e:
        raise UserError(f"{folder}: the weights do not match their settings: {e!r}") from None
    return net.eval()


MAY_DIFFER = {"base_model", "base_shape", "instruction", "full_stop"}  # in a network to start from
MAY_DIFFER |= {"dropout", "input_dropout", "head_lr", "offset_lr", "chunk_len"}


def copy_weights(folder: str, net: nn.Module) -> None:
    """Start a network from the weights of another one, for the same base model and of the same settings."""
    start = load_hypernet(folder)
    ours, theirs = net.config, start.config
    hub.check_base(ours.base_model, ours.base_shape, theirs.base_model, theirs.base_shape)
    for name, value in vars(ours).items():
        other = getattr(theirs, name, None)
        differs = other != value or (name == "targets" and list(other) != list(value))
        if name == "encoder":  # a folder may hold any
            differs = differs and not Path(value).is_dir() and not Path(str(other)).is_dir()
        if differs and name not in MAY_DIFFER:
            if isinstance(value, dict):  # of targets
                other, value = ", ".join(other), ", ".join(value)
            message = f"--init_from {folder}: that network has other settings"
            raise UserError(f"{message} ({name}: {other}, not {value})")
    net.load_state_dict(start.state_dict())


# -------------------- A new network --------------------
#
# Write an nn.Module with these members, as in tests/test_extras.py, and add it to ARCHS.
#
#     net_class.reads      "descriptions" or "documents": the tasks that it is trained on
#     net_class.modes      how train.py may train it: "sft", "recon"
#     net_class.config_class
#                          a dataclass: HypernetConfig and its own fields. Those that are made by `setting`
#                          are flags of train.py; one that has the name of another flag gets its value
#     config.measure(base) sets fields that depend on the frozen models
#     net_class(config)    the network, with random weights; net.config is its config
#     net.connect(base, tokenizer)
#                          gives it what it reads with, frozen and no part of its weights: a text encoder, or
#                          the base model
#     net(texts)           -> Adapter: A [n, L, r, in] and B [n, L, out, r], of any rank r, for n texts. Ours
#                          are write(encode(texts)): what frozen models compute, then the network proper
#     net.ranks            the rank of the adapters written last; a tensor [n] if some are padded with zeros
#     net.lr_factors       {first part of a parameter's name: factor on its learning rate}; others have 1
#     net.recompute        set by --gradient_checkpointing: compute activations again, to save memory
#     net.start_as_lora()  for SFT: write LoRA's initialisation, with B = 0, for every text
#     net.start_at(mean, std)
#                          for reconstruction: these are the oracles' mean and standard deviation, as Adapters
#
# All parameters are trained and must receive gradients (DDP requires it). Constants are persistent buffers.
# NO_DECAY in train.py says which have no weight decay.

ARCHS = {"t2l": TextToLoRA, "d2l": DocToLoRA}
