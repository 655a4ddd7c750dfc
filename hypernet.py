"""The networks that write adapters: Text-to-LoRA from a description, Doc-to-LoRA from a document.

    net = load_hypernet("checkpoints/tiny/sft_large")
    net.connect(base, tokenizer)
    adapters = net(["Keep only the animals."])

The end of the file says what a new network must provide.
"""

import importlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
import model
from lora import Adapter, LoRAConfig
from support import UserError, read_json, write_file


@dataclass
class HypernetConfig(LoRAConfig):
    """What any hypernetwork records."""

    recon_loss: str = ""  # by reconstruction: z_score or delta_w; by SFT: ""

    def measure(self, base: nn.Module) -> None:
        """Set the fields that depend on the frozen models."""


# -------------------- Text-to-LoRA (arXiv 2506.06105, section 3) --------------------

SIZES = ("large", "medium", "small")  # 55M, 34M and 5M parameters for Mistral-7B (paper, section 4)


@dataclass
class TextConfig(HypernetConfig):
    """Text-to-LoRA's settings."""

    encoder: str = "hash"  # see model.load_encoder
    input_size: int = 1024  # E, the width of the text encoder's output
    full_stop: bool = True  # descriptions that end in a letter get one, as published (not with "hash")
    dropout: float = 0.1  # in the trunk; that of --dropout, as published
    size: str = "large"  # what one pass through a head writes
    latent_size: int = 128  # width of the trunk; half of it is the task embedding
    head_in_size: int = 256  # width of the input of the heads
    input_dropout: float = 0.1  # of the text encoder's output (not published)
    encoder_rank: int = 0  # of a LoRA on the text encoder (not published); 0 is none
    encoder_targets: dict[str, lora.Target] = field(default_factory=dict)  # its linear layers

    def __post_init__(self):
        super().__post_init__()
        self.encoder_targets = lora.as_targets(self.encoder_targets)

    def measure(self, base: nn.Module) -> None:
        self.input_size = model.encoder_width(self.encoder, base)
        if self.encoder_rank:
            network = model.load_text_model(self.encoder)
            self.encoder_targets = lora.find_targets(network, [])


class EncoderLoRA(lora.LoRABank):
    """A text encoder of the hub with a LoRA on all its layers, which is trained with the network."""

    def connect(self, name: str, device, full_stop: bool) -> None:
        """Load the text encoder. UserError if it is another one than that of the LoRA."""
        encoder = model.TransformerEncoder(name, device)
        lora.inject(encoder.model, list(self.config.targets))
        if encoder.model.lora_targets != self.config.targets:
            raise UserError(f"--encoder {name}: this hypernetwork has a LoRA for another one")
        self.frozen = encoder, full_stop  # in a tuple, it is no part of the network

    def encode(self, texts: list[str]) -> Tensor:
        """n descriptions -> [n, E], in float32, as `model.load_encoder` gives them without a LoRA."""
        encoder, full_stop = self.frozen
        texts = [model.end_sentence(text.strip(), full_stop) for text in texts]
        with torch.autocast(encoder.model.device.type, enabled=False):
            with lora.use(encoder.model, self(0), self.config.scaling):
                return encoder(texts)


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

    The sizes differ in what one pass through a head writes. Medium and small turn each row into 2 or 2 r
    rows, told apart by learned embeddings.

        size      rows after the trunk       one pass writes        width of a head
        large     [n, L, M, head_in]         A and B                r (in + out)
        medium    [n, L, M, 2, head_in]      A or B                 r max(in, out)
        small     [n, L, M, 2, r, head_in]   one rank of A or B     max(in, out)
    """

    arch, reads, modes, config_class = "t2l", "descriptions", ("sft", "recon"), TextConfig

    def __init__(self, config: TextConfig):
        super().__init__()
        c, d, dropout, M = config, config.latent_size, config.dropout, len(config.targets)
        if d % 4 or d == 0:
            raise UserError(f"--latent_size must be a multiple of 4, not {d}")
        self.config, self.layers, z_score = c, c.adapted_layers(), c.recon_loss == "z_score"

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

        if c.encoder_rank:
            self.encoder_lora = EncoderLoRA(LoRAConfig(targets=c.encoder_targets, r=c.encoder_rank), 1)

        # heads, one per module. A matrix is offset + std * (output of the head), where
        #     SFT:       the offset is a LoRA that all descriptions share, trained with the rest; std is 1
        #     z_score:   they are mean and standard deviation of the oracles, entry by entry, and constant
        #     delta_w:   the offset is 0, and constant; std is 1
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

        The published code trains one shared vector per module, in the biases of the heads; in medium and
        small one head writes both A and B, so B would start as A^T. Our offset is per layer and matrix.
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
        """Load the text encoder, `encode`: n descriptions -> [n, E].

        It is a function, so no part of the network (but for its LoRA).
        """
        c, device = self.config, next(self.parameters()).device
        if c.encoder_rank:
            self.encoder_lora.connect(c.encoder, device, c.full_stop)
            self.encode = self.encoder_lora.encode
        else:
            self.encode = model.load_encoder(c.encoder, device, base, tokenizer, c.full_stop)

    def forward(self, texts: list[str]) -> Adapter:
        """n descriptions -> A [n, L, r, in], B [n, L, out, r]."""
        return self.write(self.encode(texts))

    def write(self, text_emb: Tensor) -> Adapter:
        """The text encoder's output [n, E], of any norm -> A [n, L, r, in], B [n, L, out, r]."""
        x = self.trunk(self.rows(self.embed_task(text_emb)))  # [n, L, M, ..., head_in]
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
        """A row for each rank. [..., d] -> [..., r, d]. That mlp2 is applied again is published."""
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


# -------------------- Doc-to-LoRA (arXiv 2602.15902): split, read, write, join --------------------


@dataclass
class DocConfig(HypernetConfig):
    """Doc-to-LoRA's settings, with published values."""

    input_size: int = 1024  # f, the width of the base model's states
    early_exit: bool = False  # read the states after a quarter of the layers, not of each layer
    latent_size: int = 512  # width of the Perceiver
    n_latents: int = 8  # latent vectors of the Perceiver
    n_blocks: int = 9  # cross-attention blocks of the Perceiver
    n_heads: int = 16  # attention heads of size 128; a quarter as many for keys and values
    chunk_len: int = 512  # most tokens of a chunk, without the template at its inner ends
    chat: bool = True  # read a chunk as a user turn of the base model's chat template

    def measure(self, base: nn.Module) -> None:
        self.input_size = base.config.get_text_config().hidden_size


TOKENS_READ_AT_ONCE = 4096  # by the base model, to save memory


def split_document(ids: list[int], chunk_len: int) -> list[list[int]]:
    """Split the token ids of a document into as few chunks as possible, of similar length."""
    n = math.ceil(len(ids) / chunk_len)
    size = math.ceil(len(ids) / n)
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def split_documents(config: DocConfig, documents: list, tokenizer) -> tuple[list[list[int]], list[int]]:
    """n documents, each a text or a list of texts -> (token ids of all chunks, how many each document has).

    With config.chat each chunk is a turn of the chat.
    """
    before, after = model.around_document(tokenizer) if config.chat else ("", "")
    before_ids, after_ids = model.tokenize(tokenizer, before), model.tokenize(tokenizer, after)
    chunks, counts = [], []
    for document in documents:
        count = 0
        for text in [document] if isinstance(document, str) else document:
            ids = model.tokenize(tokenizer, before + text.strip() + after)
            pieces = split_document(ids, config.chunk_len)
            for i, piece in enumerate(pieces):
                start = before_ids if i > 0 else []
                end = after_ids if i < len(pieces) - 1 else []
                chunks.append(start + piece + end)
            count += len(pieces)
        counts.append(count)
    return chunks, counts


def read_chunks(base: nn.Module, chunks: list[list[int]], early_exit: bool) -> tuple[Tensor, Tensor | None]:
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
    """Latents attend to the context, then an MLP. The context has no positions: its order does not matter."""

    def __init__(self, d: int, heads: int, head_size: int = 128):
        super().__init__()
        self.heads, self.kv_heads = heads, heads // 4
        self.norm_latents = nn.RMSNorm(d, eps=1e-6)
        self.norm_context = nn.RMSNorm(d, eps=1e-6)
        self.q_proj = nn.Linear(d, self.heads * head_size, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * head_size, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * head_size, bias=False)
        self.o_proj = nn.Linear(self.heads * head_size, d, bias=False)
        self.norm_post = nn.RMSNorm(d, eps=1e-6)
        self.norm_preff = nn.RMSNorm(d, eps=1e-6)
        self.mlp = SwiGLU(d, 4 * d, d)
        self.norm_postff = nn.RMSNorm(d, eps=1e-6)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """latents [b, n, d], context [b, T, d], mask [b, T] (1 for a token) -> [b, n, d]"""
        context = self.norm_context(context)
        q = self.q_proj(self.norm_latents(latents)).unflatten(-1, (self.heads, -1))  # [b, n, heads, 128]
        k = self.k_proj(context).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # [b, heads / 4, T, 128]
        v = self.v_proj(context).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        # 4 heads of queries share keys and values: they become 4 n queries of one head. (With enable_gqa,
        # torch has no fused kernel that takes a mask, and the other one copies k and v four times.)
        q = q.transpose(1, 2).unflatten(1, (-1, 4)).flatten(2, 3)  # [b, heads / 4, 4 n, 128]
        mask = None if mask is None else mask[:, None, None].bool()  # [b, 1, 1, T]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [b, heads / 4, 4 n, 128]
        h = h.unflatten(2, (4, -1)).flatten(1, 2).transpose(1, 2).flatten(2)  # [b, n, heads * 128]
        latents = latents + self.norm_post(self.o_proj(h))
        return latents + self.norm_postff(self.mlp(self.norm_preff(latents)))


class Perceiver(nn.Module):
    """Any number of vectors -> n_out vectors: latents read the context, then queries read the latents.

    arXiv 2103.03206, as in published Doc-to-LoRA.
    """

    def __init__(self, n_in: int, d: int, n_latents: int, n_blocks: int, n_heads: int, n_out: int):
        super().__init__()
        self.project = SwiGLU(n_in, 4 * n_in, d)
        self.latents = nn.Parameter(torch.randn(n_latents, d))
        self.encoder = nn.ModuleList([CrossAttention(d, n_heads) for _ in range(n_blocks)])
        self.encoder_norm = nn.RMSNorm(d, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(n_out, d))
        self.decoder = CrossAttention(d, n_heads)
        self.decoder_norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """features [b, T, f], mask [b, T] -> [b, n_out, d]"""
        context = self.project(features)  # [b, T, d]
        latents = self.latents.expand(len(features), -1, -1)  # [b, n_latents, d]
        for block in self.encoder:
            latents = block(latents, context, mask)
        queries = self.queries.expand(len(features), -1, -1)
        return self.decoder_norm(self.decoder(queries, self.encoder_norm(latents), None))  # [b, n_out, d]


class DocToLoRA(nn.Module):
    """Writes adapters from documents: one per chunk of text, joined along the rank for each document."""

    arch, reads, modes, config_class = "d2l", "documents", ("sft",), DocConfig

    def __init__(self, config: DocConfig):
        super().__init__()
        self.config = c = config
        self.recompute = False  # True: compute the Perceiver again in the backward pass, to save memory
        if c.n_heads % 4:
            raise UserError(f"--n_heads must be a multiple of 4, not {c.n_heads}")
        self.names = sorted(c.targets)  # the order of the queries, as published
        self.layers = c.adapted_layers()
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
            target, key, L = c.targets[name], lora.no_dots(name), len(c.targets[name].layers)
            self.scaler[f"{key}_A"] = nn.Parameter(torch.ones(L, c.r, 1))
            self.scaler[f"{key}_B"] = nn.Parameter(torch.ones(L, 1, c.r))
            self.bias[f"{key}_A"] = nn.Parameter(torch.zeros(L, c.r, target.n_in))
            self.bias[f"{key}_B"] = nn.Parameter(torch.zeros(L, target.n_out, c.r))

    def no_decay(self) -> list[nn.Parameter]:
        """Parameters with two or more dimensions that have no weight decay, as published."""
        own = [self.b1, self.b2, self.perceiver.latents, self.perceiver.queries]
        return own + [*self.scaler.values(), *self.bias.values()]

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
        base, tokenizer = self.frozen
        chunks, counts = split_documents(self.config, documents, tokenizer)
        at_once = max(1, TOKENS_READ_AT_ONCE // max(len(chunk) for chunk in chunks))
        written = []
        for i in range(0, len(chunks), at_once):
            features, mask = read_chunks(base, chunks[i : i + at_once], self.config.early_exit)
            if self.recompute:
                written.append(checkpoint(self.write_chunks, features, mask, use_reentrant=False))
            else:
                written.append(self.write_chunks(features, mask))
        return self.join(written, counts)

    def write_chunks(self, features: Tensor, mask: Tensor | None) -> Adapter:
        """Chunks -> their adapters. features [n, N, T, f], with early_exit [n, T, f]; mask [n, T]."""
        # in the einsums: n chunk, l layer, m module, r rank; d, e and w are widths
        c, L, M, n = self.config, len(self.layers), len(self.names), len(features)
        if not c.early_exit:  # the adapter of a layer is written from the states of that layer
            if L < c.n_layers:  # not all N have a target
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
            out = x[:, c.positions(name), m]  # [n, L, r, width], of the layers that have it
            A, B = out[..., : target.n_in], out[..., target.n_in : target.n_in + target.n_out].mT
            adapter[name] = (self.scaler[f"{key}_A"] * A, self.scaler[f"{key}_B"] * B)
        return adapter

    def join(self, written: list[Adapter], counts: list[int]) -> Adapter:
        """The adapters of all chunks -> those of documents; the i-th document has counts[i] of the chunks.

        The rank dimension holds the chunks, then the bias, then zero padding up to the longest document.
        A [documents, L, R, in] and B [documents, L, out, R] with R = (most chunks + 1) * r.
        """
        bias, nothing = {}, {}
        for name in self.names:
            A, B = bias[name] = (self.bias[f"{lora.no_dots(name)}_A"], self.bias[f"{lora.no_dots(name)}_B"])
            nothing[name] = (torch.zeros_like(A), torch.zeros_like(B))
        chunks, documents = [], []
        for group in written:
            chunks += lora.unbind(group)
        for count in counts:
            own, chunks = chunks[:count], chunks[count:]
            documents.append(lora.concat_rank([*own, bias] + [nothing] * (max(counts) - count)))
        return lora.stack(documents)


# -------------------- Files --------------------

FILES = ["hypernet.safetensors", "config.json"]
ARCHS = {"t2l": TextToLoRA, "d2l": DocToLoRA}


def find_arch(arch: str):
    """The class of a network: one of ARCHS, or `Net` of the module extras/ARCH.py."""
    if arch not in ARCHS and arch.isidentifier():
        return importlib.import_module(f"extras.{arch}").Net
    return ARCHS[arch]


def save_hypernet(net: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write hypernet.safetensors and config.json. bfloat16 halves the file."""
    weights = {key: tensor.to(dtype) for key, tensor in net.state_dict().items()}
    write_file(Path(folder, "hypernet.safetensors"), weights)
    write_file(Path(folder, "config.json"), {"arch": net.arch, **asdict(net.config)})


def load_hypernet(folder: str | Path) -> nn.Module:
    """Read a hypernetwork that train.py wrote, in float32 and eval mode. `connect` it before it is called."""
    if Path(folder, "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, not a hypernetwork; PEFT loads it")
    if Path(folder, "train.args").exists() and not Path(folder, "config.json").exists():
        raise UserError(f"the run in {folder} has not saved weights yet; train.py --resume continues it")
    settings = read_json(Path(folder, "config.json"))
    net_class = find_arch(settings.pop("arch", ""))
    with torch.device("meta"):  # only shapes: the weights are put in place of its parameters
        net = net_class(net_class.config_class(**settings))
    weights = load_file(Path(folder, "hypernet.safetensors"))
    weights = {key: tensor.float() for key, tensor in weights.items()}
    net.load_state_dict(weights, assign=True)
    return net.eval()


MAY_DIFFER = {"base_model", "base_shape", "instruction", "full_stop", "dropout", "input_dropout", "chunk_len"}


def copy_weights(folder: str, net: nn.Module) -> None:
    """Start a network from the weights of another one, for the same base model and of the same settings."""
    start = load_hypernet(folder)
    ours, theirs = net.config, start.config
    model.check_base(ours.base_model, ours.base_shape, theirs.base_model, theirs.base_shape)
    for name, value in vars(ours).items():
        other = getattr(theirs, name, None)
        differs = other != value or (name == "targets" and list(other) != list(value))
        if name == "encoder":  # a folder may hold any
            differs = differs and not Path(value).is_dir() and not Path(str(other)).is_dir()
        if differs and name not in MAY_DIFFER:
            message = f"--init_from {folder}: that network has other settings"
            raise UserError(f"{message} ({name}: {other}, not {value})")
    net.load_state_dict(start.state_dict())


# -------------------- A new network --------------------
#
# Write an nn.Module with these members, called Net, in a file of its own: --arch NAME finds extras/NAME.py.
# extras/linear.py is one.
#
#     net_class.arch       the name of that file
#     net_class.reads      "descriptions" or "documents": the tasks that it is trained on
#     net_class.modes      how train.py may train it: "sft", "recon"
#     net_class.config_class
#                          a dataclass: HypernetConfig and its own fields. One that has the name of a flag of
#                          train.py gets its value; a flag for another one is a line there
#     config.measure(base) sets fields that depend on the frozen models
#     net_class(config)    the network, with random weights; net.config is its config
#     net.connect(base, tokenizer)
#                          gives it what it reads with, frozen and no part of its weights: a text encoder, or
#                          the base model
#     net(texts)           -> Adapter: A [n, L, r, in] and B [n, L, out, r], of any rank r, for n texts (in
#                          place of a document, a list of texts is joined to one adapter)
#     net.recompute        set by --gradient_checkpointing: compute activations again, to save memory
#     net.start_as_lora()  for SFT: write LoRA's initialisation, with B = 0, for every text
#     net.start_at(mean, std)
#                          for reconstruction: these are the oracles' mean and standard deviation, as Adapters
#     net.no_decay()       parameters with two or more dimensions without weight decay; may be left out
#
# Parameters with requires_grad must all receive gradients (DDP requires it).
