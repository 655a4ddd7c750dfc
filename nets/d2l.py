"""Doc-to-LoRA (arXiv 2602.15902): writes adapters from documents. Split, read, write, join.

    document --> chunks --base model--> states of its layers --Perceiver--> A, B of each chunk --> one adapter

A document is split into chunks. The frozen base model reads each chunk. A Perceiver turns the states into r
vectors for each layer and module. An MLP per layer and a head per layer and module turn these vectors into
A and B. The adapters of the chunks are joined along the rank.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
import model
from hypernet import HypernetConfig, setting
from lora import Adapter
from support import UserError


@dataclass
class DocConfig(HypernetConfig):
    """Doc-to-LoRA's settings; the defaults are published values."""

    input_size: int = 1024  # f, the width of the base model's states
    early_exit: bool = setting(False, "read the states after a quarter of the layers, not after each")
    latent_size: int = setting(512, "width of the Perceiver")
    n_latents: int = 8  # latent vectors of the Perceiver
    n_blocks: int = setting(9, "cross-attention blocks of the Perceiver")
    n_heads: int = setting(16, "attention heads of size 128; a quarter as many for keys and values")
    chunk_len: int = setting(512, "maximum tokens per chunk, without template tokens added at cuts")
    chat: bool = setting(True, "read a chunk as a user turn of the base model's chat template")

    def fit_to(self, base: nn.Module) -> None:
        self.input_size = base.config.get_text_config().hidden_size
        window = model.window_of(base)
        if self.chunk_len > window:
            raise UserError(f"--chunk_len {self.chunk_len} is more than the base model's window of {window}")


# -------------------- Split --------------------


def around_document(tokenizer) -> tuple[str, str]:
    """The text before and after a document: a user turn, as published after an empty system message.

    If the template takes no system message, the published one writes the empty system text and a blank line
    into the user turn.
    """
    before, after = model.render(tokenizer, "<<>>").split("<<>>")
    return before if model.turn_of(tokenizer).system else before + "\n\n", after


def split_document(ids: list[int], chunk_len: int) -> list[list[int]]:
    """Split the token ids of a document into as few chunks as possible, of similar length."""
    n = math.ceil(len(ids) / chunk_len)
    size = math.ceil(len(ids) / n)
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def split_documents(config: DocConfig, documents: list, tokenizer) -> tuple[list[list[int]], list[int]]:
    """n documents, each a text or a list of texts -> (token ids of all chunks, how many each document has).

    With config.chat each chunk is a turn of the chat.
    """
    before, after = around_document(tokenizer) if config.chat else ("", "")
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


# -------------------- Read --------------------

TOKENS_READ_AT_ONCE = 4096  # by the base model, to save memory


@torch.no_grad()
def hidden_states(base: nn.Module, input_ids: Tensor, mask: Tensor | None, early_exit=False) -> Tensor:
    """The input of each of the N layers. input_ids, mask [n, T] -> [n, N, T, d].

    The input of the last layer is taken after the final norm, as published. With early_exit: only the states
    after N/4 layers and the final norm, [n, T, d].
    """
    decoder, layers = base.get_decoder(), base.get_decoder().layers
    n_layers = len(layers) // 4 if early_exit else len(layers) - 1
    inputs = []  # of the layers, [n, T, d] each

    def note_input(layer, args, kwargs) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        inputs.append(states[0] if states.dim() == 4 else states)  # Gemma 3n: the first of several versions

    hooks = [layer.register_forward_pre_hook(note_input, with_kwargs=True) for layer in layers]
    decoder.layers = layers[:n_layers]  # the output of later layers is not needed
    try:
        last = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    finally:
        decoder.layers = layers
        for hook in hooks:
            hook.remove()
    return last if early_exit else torch.stack([*inputs, last], 1)


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
        return hidden_states(base, ids, mask, early_exit).float(), mask


# -------------------- Write --------------------


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
        # Each 4 query heads share keys and values, so we compute them as one head with 4 n queries. (With
        # enable_gqa, torch has no fused kernel that takes a mask. The unfused kernel copies k and v 4 times.)
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

        # one block per adapted layer of the base model, one head per adapted layer and module
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
        """Keep the base model, which reads the documents. (In a tuple, it is not part of the network.)"""
        self.frozen = base, tokenizer

    def forward(self, documents: list) -> Adapter:
        """n documents, each a text or a list of texts -> A [n, L, R, in], B [n, L, out, R].

        R is r for each chunk of the longest document, and r for the bias.
        """
        if isinstance(documents, str):
            raise UserError("a list of documents is needed, not a string")
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
            A, B = self.bias[f"{lora.no_dots(name)}_A"], self.bias[f"{lora.no_dots(name)}_B"]
            bias[name] = (A[None], B[None])
            nothing[name] = (torch.zeros_like(A)[None], torch.zeros_like(B)[None])
        chunks, documents = [], []
        for group in written:
            chunks += unbind(group)
        for count in counts:
            of_document, chunks = chunks[:count], chunks[count:]
            padding = [nothing] * (max(counts) - count)
            documents.append(lora.concat_rank([*of_document, bias, *padding]))
        return lora.concat(documents)


def unbind(batch: Adapter) -> list[Adapter]:
    """The n adapters of a batch, each as a batch with n = 1."""
    singles = [{} for _ in next(iter(batch.values()))[0]]
    for name, (A, B) in batch.items():
        for single, single_A, single_B in zip(singles, A.split(1), B.split(1)):
            single[name] = (single_A, single_B)
    return singles


Net = DocToLoRA
