"""Train the tiny base model from scratch: python checkpoints/tiny/pretrain.py OUT_DIR [STEPS]

A Llama of 0.84M parameters. In turn it learns 8 examples of one training task in a row, so that it can do a
task from examples in its prompt, and a document of facts with 8 questions, so that it can look facts up. It
never sees a description, and no validation or test task. Give OUT_DIR the name `tiny`: then train.py
takes it for a base model of the tiny world. 8,000 steps (the default) take 11 minutes on two cores.
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import lora
import model

STEPS, TEXTS, EXAMPLES, LR, WARMUP = 8000, 16, 8, 3e-3, 0.1
IDS = {word: i for i, word in enumerate(data.VOCABULARY)}
TASKS = data.tiny_splits()["train"]
WEIGHTS = [2 if "reversed" in parts else 1 for parts in TASKS]  # the hardest layout to learn

def draw(step: int) -> list[list[data.Example]]:
    """The texts of a step, each a list of examples. Long ones come late: else it learns next to nothing."""
    rng, done = random.Random(f"0 {step}"), step / STEPS
    if step % 2:
        n_lines, texts = 2 ** rng.randint(0, min(6, int(12 * done))), []
        for _ in range(TEXTS):
            document = data.fact_document(rng, n_lines)
            (first, answers), *others = rng.choices(document.train, k=EXAMPLES)
            texts.append([(f"{document.descriptions[0]} {first}", answers), *others])
        return texts
    shortest, longest = (1, 2) if done < 0.12 else (2, 3) if done < 0.25 else (2, 4) if done < 0.4 else (3, 4)
    example = lambda parts: data.tiny_example(parts, rng, rng.randint(shortest, longest))
    return [[example(parts) for _ in range(EXAMPLES)] for parts in rng.choices(TASKS, WEIGHTS, k=TEXTS)]

def tokenize(text: list[data.Example]) -> tuple[list[int], list[int]]:
    """Token ids and labels of "question -> answer<eos>", one after another."""
    ids, labels = [], []
    for question, (answer,) in text:
        prompt = [IDS[word] for word in [*question.split(), "->"]]
        target = [IDS[word] for word in [*answer.split(), "<eos>"]]
        ids, labels = ids + prompt + target, labels + [-100] * len(prompt) + target
    return ids, labels

def save(net: LlamaForCausalLM, folder: Path) -> None:
    """Write model and tokenizer as an ordinary Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [word for word in data.VOCABULARY if word.startswith("<")]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [dict(id=IDS[word], content=word, **flags) for word in special],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": IDS, "unk_token": "<unk>"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    weights = {k: t for k, t in net.state_dict().items() if k != "lm_head.weight"}
    lora.write(folder / "config.json", net.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    lora.write(folder / "model.safetensors", weights)
    lora.write(folder / "tokenizer.json", tokenizer)
    lora.write(folder / "tokenizer_config.json", config | {f"{word[1:-1]}_token": word for word in special})

def main(out_dir: Path, steps: int) -> None:
    global STEPS
    STEPS = steps
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(IDS), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0}, initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=IDS["<eos>"], pad_token_id=IDS["<pad>"],
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup, bar = round(WARMUP * steps), tqdm(range(steps))
    for step in bar:
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        texts = [tokenize(text) for text in draw(step)]
        ids = model.pad([ids for ids, _ in texts], IDS["<pad>"])  # [texts, T]
        labels = model.pad([labels for _, labels in texts], -100)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(ids).logits[:, :-1].float()  # [texts, T - 1, vocabulary]
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")  # 0 for no label
        loss = (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save(net, out_dir)

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS)
