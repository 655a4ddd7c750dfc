"""Doc-to-LoRA (arXiv 2602.15902) on one page: a network reads a document and writes the LoRA weights with
which a frozen language model answers questions about it, without the document in its prompt.

    python -m extras.doc_page      # trains for 15 minutes, then answers questions about unseen documents

Parameter names match nets/d2l.py. n documents, c chunks, L layers, r rank per chunk, R rank per document.
"""

import functools
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import facts

BASE = "checkpoints/tiny"  # a Llama of four layers that knows 400 words
L, RANK, N_IN, N_OUT, SCALING = 4, 2, 384, 128, 128 / 2**0.5  # of down_proj; scaling is alpha / sqrt(r)
F_IN, D, HEADS, HEAD_SIZE, LATENTS = 128, 128, 4, 128, 8  # F_IN: width of the base model's states
CHUNK = 3  # tokens: a line such as "cat lamp <eos>", which says that lamp is the answer to cat
STEPS, BATCH, QUESTIONS, LR = 1500, 32, 8, 5e-4
linear = functools.partial(nn.Linear, bias=False)


class LoRALinear(nn.Module):
    """A frozen linear layer in which each document of a batch has its own LoRA: W x + scaling * B (A x)."""

    def __init__(self, linear: nn.Linear, adapters: dict[str, Tensor], index: int):
        super().__init__()
        self.linear, self.adapters, self.index = linear, adapters, index  # one dictionary for all layers

    def forward(self, x: Tensor) -> Tensor:  # [n * questions, T, in]: neighbours ask about the same document
        A, B = self.adapters["A"][:, self.index], self.adapters["B"][:, self.index]  # [n, R, in], [n, out, R]
        update = SCALING * x.reshape(len(A), -1, N_IN) @ A.mT @ B.mT  # [n, questions * T, out]
        return self.linear(x) + update.view(*x.shape[:2], N_OUT)


class SwiGLU(nn.Module):
    """An MLP whose hidden values are multiplied by gates."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int):
        super().__init__()
        self.gate_proj, self.up_proj = linear(n_in, n_hidden), linear(n_in, n_hidden)
        self.down_proj = linear(n_hidden, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CrossAttention(nn.Module):
    """Some vectors read others, then an MLP. All heads share keys and values."""

    def __init__(self):
        super().__init__()
        for name in ("norm_latents", "norm_context", "norm_post", "norm_preff", "norm_postff"):
            setattr(self, name, nn.RMSNorm(D, eps=1e-6))
        self.q_proj, self.o_proj = linear(D, HEADS * HEAD_SIZE), linear(HEADS * HEAD_SIZE, D)
        self.k_proj, self.v_proj = linear(D, HEAD_SIZE), linear(D, HEAD_SIZE)
        self.mlp = SwiGLU(D, 4 * D, D)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:  # [b, k, D], [b, T, D] -> [b, k, D]
        context = self.norm_context(context)
        q = self.q_proj(self.norm_latents(latents)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.k_proj(context)[:, None], self.v_proj(context)[:, None]  # [b, 1, T, 128]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [b, k, heads * 128]
        latents = latents + self.norm_post(self.o_proj(h))
        return latents + self.norm_postff(self.mlp(self.norm_preff(latents)))


class Perceiver(nn.Module):
    """Latents read any number of vectors, then r queries read the latents."""

    def __init__(self):
        super().__init__()
        self.project = SwiGLU(F_IN, 4 * F_IN, D)
        self.latents, self.queries = nn.Parameter(torch.randn(LATENTS, D)), nn.Parameter(torch.randn(RANK, D))
        self.encoder, self.encoder_norm = nn.ModuleList([CrossAttention()]), nn.RMSNorm(D, eps=1e-6)
        self.decoder, self.decoder_norm = CrossAttention(), nn.RMSNorm(D, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:  # [b, T, f] -> [b, r, D]
        latents, queries = [x.expand(len(features), -1, -1) for x in (self.latents, self.queries)]
        latents = self.encoder[0](latents, self.project(features))
        return self.decoder_norm(self.decoder(queries, self.encoder_norm(latents)))


class DocToLoRA(nn.Module):
    """The hypernetwork: each chunk becomes an adapter; those of a document are joined along the rank."""

    def __init__(self):
        super().__init__()
        self.perceiver, self.block_in, self.block_out = Perceiver(), nn.LayerNorm(D), nn.LayerNorm(D)
        # these are the same for all layers; each of the following has its own entry per layer
        self.W1 = nn.Parameter(torch.randn(L, D, 4 * D) / D**0.5)
        self.W2 = nn.Parameter(torch.randn(L, 4 * D, D) / (4 * D) ** 0.5)
        self.b1, self.b2 = [nn.Parameter(torch.zeros(L, 1, 1, width)) for width in (4 * D, D)]
        self.head = nn.Parameter(torch.randn(L, 1, D, N_IN + N_OUT) / D**0.5)
        # the bias is one learned adapter, joined to those of every document. At first all B are 0, as in LoRA
        A, B = torch.empty(L, RANK, N_IN).uniform_(-1, 1) / N_IN**0.5, torch.zeros(L, N_OUT, RANK)
        self.bias = nn.ParameterDict({"down_proj_A": A, "down_proj_B": B})
        scale_A, scale_B = torch.ones(L, RANK, 1), torch.zeros(L, 1, RANK)
        self.scaler = nn.ParameterDict({"down_proj_A": scale_A, "down_proj_B": scale_B})

    def write_chunks(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The states of c chunks in each layer [c, L, T, f] -> A [c, L, r, in], B [c, L, out, r]"""
        x = self.perceiver(features.flatten(0, 1)).view(-1, L, 1, RANK, D)  # (1: a single module)
        h = F.silu(torch.einsum("nlmrd,lde->nlmre", self.block_in(x), self.W1) + self.b1)  # [c, L, 1, r, 4 D]
        x = F.normalize(x + self.block_out(torch.einsum("nlmre,led->nlmrd", h, self.W2) + self.b2), dim=-1)
        x = torch.einsum("nlmrd,lmdw->nlmrw", x, self.head)[:, :, 0]  # [c, L, r, in + out]
        A, B = x.split([N_IN, N_OUT], -1)
        return self.scaler["down_proj_A"] * A, self.scaler["down_proj_B"] * B.mT

    def forward(self, reader: nn.Module, tokenizer, documents: list[str]) -> dict[str, Tensor]:
        """n documents -> A [n, L, R, in], B [n, L, out, R], zero-padded along the rank R."""
        ids = tokenizer(documents)["input_ids"]
        counts, chunks = [len(row) // CHUNK for row in ids], torch.tensor(sum(ids, [])).view(-1, CHUNK)
        with torch.no_grad():  # the input of each layer, that of the last one after the norm (published)
            states = reader.model(chunks, output_hidden_states=True).hidden_states  # [c, T, f] each
            features = torch.stack([*states[: L - 1], reader.model.norm(states[L - 1])], 1)  # [c, L, T, f]
        A, B = self.write_chunks(features)
        all_A, all_B = [], []
        for own_A, own_B in zip(A.split(counts), B.split(counts)):  # joining along the rank adds up B A
            all_A.append(torch.cat([*own_A, self.bias["down_proj_A"]], 1).transpose(0, 1))  # [R, L, in]
            all_B.append(torch.cat([*own_B, self.bias["down_proj_B"]], 2).permute(2, 0, 1))  # [R, L, out]
        A, B = pad_sequence(all_A, batch_first=True), pad_sequence(all_B, batch_first=True)  # [n, R, L, ...]
        return {"A": A.transpose(1, 2), "B": B.permute(0, 2, 3, 1)}


def task_loss(base: nn.Module, tokenizer, examples: list) -> Tensor:
    """The loss of answers of one word. (The published loss is `distill_loss` in train.py.)"""
    ids = tokenizer([f"{e.input} -> {e.answers[0]}<eos>" for e in examples], return_tensors="pt")["input_ids"]
    logits = base(input_ids=ids).logits[:, 1:-1]  # which predict the last two tokens: the answer and its end
    return F.cross_entropy(logits.mT, ids[:, 2:])


def main() -> None:
    torch.manual_seed(0)
    splits = facts.document_splits(facts.document, "facts", [1, 4, 16])  # without other text
    net, adapters, tokenizer = DocToLoRA(), {}, AutoTokenizer.from_pretrained(BASE)
    # the frozen base model twice: the reader has no adapters
    base, reader = [AutoModelForCausalLM.from_pretrained(BASE).eval().requires_grad_(False) for _ in range(2)]
    for i, layer in enumerate(base.model.layers):
        layer.mlp.down_proj = LoRALinear(layer.mlp.down_proj, adapters, i)

    train = sorted(splits["train"], key=lambda task: len(task.descriptions[0]))  # short documents come first
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    rate = lambda step: min(25 * (step + 1) / STEPS, (1 - step / STEPS) / 0.96)  # warm-up, then linear to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in (bar := trange(STEPS)):
        rng = random.Random(step)
        tasks = rng.sample(train[: int(len(train) * min(1, 1 / 6 + 5 / 3 * step / STEPS))], BATCH)
        adapters.update(net(reader, tokenizer, [task.descriptions[0] for task in tasks]))
        asked = []
        for task in tasks:  # the same fact is asked twice only if there are too few
            draw = rng.sample if len(task.train) >= QUESTIONS else rng.choices
            asked += draw(task.train, k=QUESTIONS)
        loss = task_loss(base, tokenizer, asked)
        optimizer.zero_grad()
        loss.backward()  # through the frozen base model, the adapters and the network that wrote them
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    net.requires_grad_(False)
    for n_facts in (1, 4, 16):
        tasks, right = [task for task in splits["long"] if task.name == f"{n_facts} lines"], []
        asked = [task.train[i % n_facts] for task in tasks for i in range(QUESTIONS)]  # 8 of each document
        for order in (tasks, tasks[1:] + tasks[:1]):  # each document's own adapter, and that of the next one
            adapters.update(net(reader, tokenizer, [task.descriptions[0] for task in order]))
            ids = tokenizer([f"{e.input} ->" for e in asked], return_tensors="pt")["input_ids"]
            said = tokenizer.convert_ids_to_tokens(base(ids).logits[:, -1].argmax(-1).tolist())
            right.append(sum(word in e.answers for word, e in zip(said, asked)) / len(asked))
        print(f"{n_facts:2} facts: right {right[0]:.2f}, with another document's adapter {right[1]:.2f}")


if __name__ == "__main__":
    main()
