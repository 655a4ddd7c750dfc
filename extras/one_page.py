"""Text-to-LoRA (arXiv 2506.06105) on one page: a network reads a sentence and writes the LoRA weights with
which a frozen language model does what it says.

    python -m extras.one_page        # trains for some minutes, then does 25 tasks that it has never seen

Parameter names match hypernet.py, so its weights load. n texts, T tokens, L layers, M modules, r rank.
"""

import random
import re
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import tiny

BASE = "checkpoints/tiny"  # a Llama of four layers that knows 400 words
TARGETS = {"q_proj": (128, 128), "v_proj": (128, 64)}  # its layers that are adapted: (in, out)
L, M, R, SCALING = 4, 2, 8, 16 / 8**0.5  # scaling is alpha / sqrt(r)
E, D, HEAD_IN = 8192, 128, 256  # widths: text encoder, trunk, input of the heads
STEPS, BATCH, LR = 600, 128, 2e-3
FUNCTION_WORDS = """a an the of to in on at by for from with or but is are was were be been it its this that
    these those them they their there you your i me my we our as then than so what which who whatever any
    some please into out up down . , ; : - ?""".split()


class LoRALinear(nn.Module):
    """A frozen linear layer in which each example of a batch has its own LoRA: W x + scaling * B (A x)."""

    def __init__(self, linear: nn.Linear, adapters: dict[str, tuple[Tensor, Tensor]], name: str, index: int):
        super().__init__()
        self.linear, self.dropout = linear, nn.Dropout(0.1)
        self.adapters, self.name, self.index = adapters, name, index  # one dictionary for all layers

    def forward(self, x: Tensor) -> Tensor:  # [n, T, in]
        A, B = [matrix[:, self.index] for matrix in self.adapters[self.name]]  # [n, r, in], [n, out, r]
        return self.linear(x) + SCALING * self.dropout(x) @ A.mT @ B.mT


def encode(texts: list[str]) -> Tensor:
    """The frozen text encoder; here no network, but hashed words, pairs and pieces of words. [n, E]"""
    out = torch.zeros(len(texts), E)
    for vector, text in zip(out, texts):
        words, features = re.findall(r"\w+|[^\w\s]", text.lower()), []
        weights = [0.3 if word in FUNCTION_WORDS else 1.0 for word in words]
        for i, (word, weight) in enumerate(zip(words, weights)):
            features.append((word, 2 * weight))
            for k in range(i + 1, min(i + 3, len(words))):
                features.append((f"{word} {k - i} {words[k]}", max(weight, weights[k])))
            for size in (3, 4, 5):
                features += [(f"#{word}#"[k : k + size], weight) for k in range(len(word) + 3 - size)]
        for feature, weight in features:
            code = zlib.crc32(feature.encode())
            vector[code % E] += weight if code >> 31 else -weight
    return F.normalize(out, dim=-1)


def mlp(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, 4 * n_in), nn.SiLU(), nn.Dropout(0.1), nn.Linear(4 * n_in, n_out), nn.SiLU()]


class TextToLoRA(nn.Module):
    """The hypernetwork: each row (text, layer, module) goes through MLPs and the head of its module."""

    def __init__(self):
        super().__init__()
        self.task_encoder = nn.Sequential(nn.Linear(E, D // 2), nn.LayerNorm(D // 2))
        self.layer_emb = nn.Sequential(nn.Embedding(L, D // 4), nn.LayerNorm(D // 4))
        self.module_emb = nn.Sequential(nn.Embedding(M, D // 4), nn.LayerNorm(D // 4))
        self.mixer = nn.Sequential(nn.Dropout(0.1), *mlp(D, D), nn.Dropout(0.1))
        self.mlp1 = nn.Sequential(nn.LayerNorm(D), *mlp(D, D), nn.Dropout(0.1))
        self.mlp2 = nn.Sequential(nn.LayerNorm(D), *mlp(D, D), nn.Dropout(0.1))
        self.mlp3 = nn.Sequential(nn.LayerNorm(D), *mlp(D, HEAD_IN))
        self.heads, self.offset = nn.ModuleDict(), nn.ParameterDict()  # the offset is a LoRA for all texts
        for name, (n_in, n_out) in TARGETS.items():  # at first heads write 0, and the offset is a new LoRA
            self.heads[name] = nn.Linear(HEAD_IN, R * (n_in + n_out))
            nn.init.zeros_(self.heads[name].weight)
            nn.init.zeros_(self.heads[name].bias)
            self.offset[f"{name}_A"] = nn.Parameter(torch.empty(L, R, n_in).uniform_(-1, 1) / n_in**0.5)
            self.offset[f"{name}_B"] = nn.Parameter(torch.zeros(L, n_out, R))

    def forward(self, texts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """n descriptions -> {module: (A [n, L, r, in], B [n, L, out, r])}"""
        n, adapters = len(texts), {}
        text_emb = F.dropout(encode(texts) * E**0.5, 0.1, self.training)  # [n, E]
        task = self.task_encoder(text_emb)[:, None, None].expand(n, L, M, -1)
        layer = self.layer_emb(torch.arange(L))[None, :, None].expand(n, L, M, -1)
        module = self.module_emb(torch.arange(M))[None, None].expand(n, L, M, -1)
        x = self.mixer(torch.cat([task, layer, module], -1))  # [n, L, M, D]
        x = x + self.mlp1(x)
        x = self.mlp3(x + self.mlp2(x))  # [n, L, M, head_in]
        for m, (name, (n_in, n_out)) in enumerate(TARGETS.items()):
            A, B = self.heads[name](x[:, :, m]).split([R * n_in, R * n_out], -1)  # [n, L, r * in or r * out]
            A, B = A.view(n, L, R, n_in), B.view(n, L, R, n_out).mT
            adapters[name] = (self.offset[f"{name}_A"] + A, self.offset[f"{name}_B"] + B)
        return adapters


def task_loss(base: nn.Module, tokenizer, examples: list) -> Tensor:
    """The loss of the base model's answers to n examples, with the adapters that its layers have."""
    texts = [f"{e.input} -> {e.answers[0]}<eos>" for e in examples]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, is_answer = batch["input_ids"], batch["attention_mask"]  # [n, T]
    for row, e in zip(is_answer, examples):
        row[: len(tokenizer(f"{e.input} ->")["input_ids"])] = 0  # the prompt
    logits = base(input_ids=ids).logits[:, :-1]  # of the next token [n, T - 1, vocabulary]
    losses = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none") * is_answer[:, 1:]  # [n, T - 1]
    return (losses.sum(1) / is_answer.sum(1)).mean()


def main() -> None:
    torch.manual_seed(0)
    splits, net, adapters = tiny.load(), TextToLoRA(), {}
    base, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    for i, layer in enumerate(base.train().requires_grad_(False).model.layers):
        for name in TARGETS:
            setattr(layer.self_attn, name, LoRALinear(getattr(layer.self_attn, name), adapters, name, i))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    rate = lambda step: min(10 * (step + 1) / STEPS, (1 - step / STEPS) / 0.9)  # warm-up, then linear to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in (bar := trange(STEPS)):
        rng = random.Random(step)
        tasks = rng.sample(splits["train"], BATCH)
        adapters.update(net([rng.choice(task.descriptions) for task in tasks]))  # all adapters of the step
        loss = task_loss(base, tokenizer, [rng.choice(task.train) for task in tasks])
        optimizer.zero_grad()
        loss.backward()  # through the frozen base model, the adapters and the network that wrote them
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    asked = [(task.descriptions[i], *task.test[i]) for task in splits["test"] for i in range(25)]
    descriptions, questions, right = zip(*asked)
    adapters.update(net.eval().requires_grad_(False)(descriptions))
    batch = tokenizer([f"{q} ->" for q in questions], padding=True, padding_side="left", return_tensors="pt")
    out = base.eval().generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    for i in (0, 250, 500):
        print(f"\n{descriptions[i]}\n{questions[i]} -> {answers[i]}")
    print(f"\nright answers on unseen tasks: {sum(a in b for a, b in zip(answers, right)) / len(right):.2f}")


if __name__ == "__main__":
    main()
