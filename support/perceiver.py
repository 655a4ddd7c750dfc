"""A Perceiver (arXiv 2103.03206): any number of vectors -> a fixed number, as in published Doc-to-LoRA."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Down(SiLU(Gate x) * Up x)."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int):
        super().__init__()
        self.gate_proj = nn.Linear(n_in, n_hidden, bias=False)
        self.up_proj = nn.Linear(n_in, n_hidden, bias=False)
        self.down_proj = nn.Linear(n_hidden, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in which 4 heads of queries share keys and values. q [b, heads, n, 128], mask [b, T]

    These heads become 4 n queries of one head: with enable_gqa and a mask, torch 2.13 would take its slowest
    kernel on a GPU, which keeps all scores in memory.
    """
    if mask is not None:
        mask = mask[:, None, None].bool()  # [b, 1, 1, T]
    q = q.unflatten(1, (-1, 4)).flatten(2, 3)  # [b, heads / 4, 4 n, 128]
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return h.unflatten(2, (4, -1)).flatten(1, 2)


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

        def split_heads(x: Tensor, heads: int) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [b, heads, n or T, 128]

        context = self.norm_context(context)
        q = split_heads(self.q_proj(self.norm_latents(latents)), self.heads)
        k = split_heads(self.k_proj(context), self.kv_heads)
        v = split_heads(self.v_proj(context), self.kv_heads)
        h = grouped_attention(q, k, v, mask)  # [b, heads, n, 128]
        latents = latents + self.norm_post(self.o_proj(h.transpose(1, 2).flatten(2)))
        return latents + self.norm_postff(self.mlp(self.norm_preff(latents)))


class Perceiver(nn.Module):
    """Any number of vectors -> n_out vectors: latents read the context, then queries read the latents."""

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
