"""Train the tiny base model from scratch: python -m extras.pretrain OUT_DIR

A Llama of 0.84M parameters. First it reads lines of random words and continues one of them. So it learns to
look things up in its prompt. Then two sorts of text alternate. The first is 8 examples of one training task,
so that it learns a task from examples in its prompt. The second is a document of facts with 8 questions, so
that it learns to look up facts. It never sees a description, a validation task or a test task.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import model
from data import Example
from support import UserError, command, make_parser, write_file
from tasks import facts, tiny

TEXTS = 16  # per step
EXAMPLES = 8  # per text
LR = 2e-3
WARMUP = 0.03  # fraction of the steps
IDS = {word: i for i, word in enumerate(tiny.VOCABULARY)}
TASKS = tiny.splits()["train"]
WEIGHTS = [2 if "reversed" in parts else 1 for parts in TASKS]  # the hardest layout to learn


def draw(step: int, steps: int) -> list[list[Example]]:
    """The texts of a step, each a list of examples. Long ones come late, otherwise little is learnt."""
    rng, done = random.Random(f"0 {step}"), step / steps
    if done < 0.1:
        return [lines(rng) for _ in range(TEXTS)]
    if step % 2:
        n_facts = 2 ** rng.randint(0, min(5, int(10 * done) + 1))
        return [questions(rng, n_facts) for _ in range(TEXTS)]
    lengths = {0.2: (1, 2), 0.3: (2, 3), 0.4: (2, 4), 2: (3, 4)}
    shortest, longest = next(lengths[end] for end in lengths if done < end)
    texts = []
    for parts in rng.choices(TASKS, WEIGHTS, k=TEXTS):
        texts.append([tiny.example(parts, rng, rng.randint(shortest, longest)) for _ in range(EXAMPLES)])
    return texts


def lines(rng: random.Random) -> list[Example]:
    """One or two lines of words, and how a line goes on after one of its words."""
    words = rng.sample(facts.WORDS, 16)
    parts = [words[:8][: rng.randint(3, 8)], words[8:][: rng.randint(3, 8)]][: rng.randint(1, 2)]
    examples = []
    for _ in range(EXAMPLES):
        line = rng.choice(parts)
        i = rng.randrange(1, len(line))
        examples.append(Example(line[i - 1], [" ".join(line[i:])]))
    return after("\n".join(" ".join(line) + " <eos>" for line in parts), examples)


def questions(rng: random.Random, n_facts: int) -> list[Example]:
    """Questions about a document."""
    document = facts.document(rng, n_facts)
    return after(document.descriptions[0], rng.choices(document.train, k=EXAMPLES))


def after(document: str, examples: list[Example]) -> list[Example]:
    """Examples with a document before the first of them."""
    first, *others = examples
    return [Example(f"{document} {first.input}", first.answers), *others]


def tokenize(text: list[Example]) -> tuple[list[int], list[int]]:
    """Token ids and labels of "question -> answer<eos>", one after another."""
    ids, labels = [], []
    for example in text:
        prompt = [IDS[word] for word in [*example.input.split(), "->"]]
        target = [IDS[word] for word in [*example.answers[0].split(), "<eos>"]]
        ids += prompt + target
        labels += [-100] * len(prompt) + target
    return ids, labels


def save(net: LlamaForCausalLM, folder: Path) -> None:
    """Write model and tokenizer as an ordinary Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [word for word in tiny.VOCABULARY if word.startswith("<")]
    options = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [dict(id=IDS[word], content=word, **options) for word in special],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": IDS, "unk_token": "<unk>"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    weights = {k: t for k, t in net.state_dict().items() if k != "lm_head.weight"}
    write_file(folder / "config.json", net.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    write_file(folder / "model.safetensors", weights)
    write_file(folder / "tokenizer.json", tokenizer)
    config |= {f"{word[1:-1]}_token": word for word in special}
    config["chat_template"] = model.PLAIN_TEMPLATE
    write_file(folder / "tokenizer_config.json", config)


def make_model() -> LlamaForCausalLM:
    """The model with random weights, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(IDS), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0}, initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=IDS["<eos>"], pad_token_id=IDS["<pad>"],
        )
    )  # fmt: skip


def train(net: LlamaForCausalLM, steps: int) -> Iterator[float]:
    """Train step by step; yields the loss of each."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = max(1, round(WARMUP * steps))
    for step in range(steps):
        rises, falls = (step + 1) / warmup, (steps - step) / max(1, steps - warmup)
        optimizer.param_groups[0]["lr"] = LR * min(rises, falls)
        texts = [tokenize(text) for text in draw(step, steps)]
        ids = model.pad([ids for ids, _ in texts], IDS["<pad>"]).to(net.device)  # [texts, T]
        labels = model.pad([labels for _, labels in texts], -100).to(net.device)
        logits = net(ids).logits[:, :-1]  # [texts, T - 1, vocabulary]
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")  # 0 for no label
        loss = (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out_dir", type=Path, help="a new folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=20_000, help="training steps")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: a CUDA GPU if there is one")
    args = parser.parse_args()
    if args.out_dir.exists() and any(args.out_dir.iterdir()):
        raise UserError(f"{args.out_dir} is in use; choose another folder")
    net, metrics = make_model().to(model.pick_device(args.device)), ""
    with tqdm(total=args.steps) as bar:
        for step, loss in enumerate(train(net, args.steps), 1):
            metrics += json.dumps({"step": step, "loss": loss}) + "\n"
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    save(net, args.out_dir)
    write_file(args.out_dir / "metrics.jsonl", metrics)


if __name__ == "__main__":
    command(main)
