"""The two frozen models: the base model that is adapted, and the text encoder that reads the description.

Both come from a preset, a Hugging Face id or a folder. The preset `tiny` needs neither download nor GPU.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lora
from support import processes
from support.files import UserError, read_file
from support.hashing import hash_encoder
from support.hub import encoder_source, fetch, from_pretrained, load_text_model, longest_text
from support.processes import Process

# -------------------- The base model --------------------


def load_base(name: str, device="cpu", dtype: torch.dtype | None = None):
    """(base model, tokenizer): frozen, in eval mode. dtype None is float32 on CPU and bfloat16 elsewhere."""
    tokenizer = from_pretrained(AutoTokenizer, name)
    base = from_pretrained(AutoModelForCausalLM, name, dtype=dtype or default_dtype(device))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        prepends_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        if prepends_bos:
            tokenizer.chat_template = "{{ bos_token }}" + PLAIN_TEMPLATE
    eos = base.generation_config.eos_token_id or tokenizer.eos_token_id
    base.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    return base.to(device).requires_grad_(False).eval(), tokenizer


def default_dtype(device) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_injected(
    name: str, target_modules: list[str], process: Process, dtype=None, dropout: float = 0.0, shard=False
):
    """(base model with LoRA layers, tokenizer). With `shard` its layers are spread over the processes."""
    if not shard:
        base, tokenizer = load_base(name, process.device, dtype)
        return lora.inject(base, target_modules, dropout), tokenizer
    mesh = processes.make_mesh(process)
    with processes.in_turn(process):  # so that host memory holds the whole model only once
        base, tokenizer = load_base(name, "cpu", dtype or default_dtype(process.device))
        lora.inject(base, target_modules, dropout)
        processes.shard_layers(decoder_layers(base), mesh)
        base.to(process.device)
    return base, tokenizer


PLAIN_TEMPLATE = (  # for a base model without a chat template: "input -> answer<eos>", one per line
    "{% for m in messages if m.content or m.role != 'system' %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}\n{% else %}{{ m.content }} ->{% endif %}"
    "{% endfor %}"
)
SUFFIX = " Please complete the task without any explanation."  # appended to the instruction, as published


def chat(tokenizer, text: str, instruction: str = "", shots: list[tuple[str, str]] = ()) -> list[dict]:
    """The messages that ask the base model: an empty system message, then `text` as a user turn (published).

    An `instruction` stands before the text. `shots` are earlier (input, answer) turns, for in-context
    learning.
    """
    messages = []
    if takes_system_message(tokenizer):
        messages.append({"role": "system", "content": ""})
    for question, answer in shots:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": f"{instruction}\n\n{text}".strip()})
    return messages


@cache
def takes_system_message(tokenizer) -> bool:
    """Some chat templates (Gemma's) refuse a system message."""
    try:
        return bool(render(tokenizer, [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]))
    except Exception:  # templates raise arbitrary exceptions
        return False


# some templates print the date; fix it, so that training and use agree (the default of Llama 3.1)
DAY = "26 Jul 2024"
FIXED_DAY = "{%- macro strftime_now(format) %}" + DAY + "{%- endmacro +%}"


def render(tokenizer, messages: list[dict], answer: str | None = None) -> str:
    """The prompt as text; with `answer` the text that the model has to write after it, up to the end mark."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_DAY + template
    settings = dict(chat_template=template, date_string=DAY, enable_thinking=False, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **settings)
    if answer is None:
        return prompt
    messages = [*messages, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, **settings)
    if not whole.startswith(prompt):
        raise UserError("the chat template of this base model does not put answers where it asks for them")
    return whole.removeprefix(prompt).rstrip("\n")


def around_document(tokenizer) -> tuple[str, str]:
    """The text before and after a document: a user turn, as published after an empty system message.

    If the template refuses system messages, the published one writes the empty system text and a blank line
    into the user turn.
    """
    before, after = render(tokenizer, chat(tokenizer, "<<>>")).split("<<>>")
    return before if takes_system_message(tokenizer) else before + "\n\n", after


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text, which has its special tokens from the template."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pad(sequences: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Sequences of different lengths as one tensor [n, T]."""
    T = max(len(sequence) for sequence in sequences)
    padded = []
    for sequence in sequences:
        padding = [value] * (T - len(sequence))
        padded.append(padding + sequence if left else sequence + padding)
    return torch.tensor(padded)


def check_known(tokenizer, texts: list[str]) -> None:
    """Raise UserError for a word that the tokenizer has no token for (the tiny one knows few)."""
    if tokenizer.unk_token_id is None:
        return
    words = sorted({word for text in texts for word in text.split()})
    if tokenizer.unk_token_id not in tokenize(tokenizer, " ".join(words)):
        return
    for word in words:
        if tokenizer.unk_token_id in tokenize(tokenizer, word):
            raise UserError(f"the base model has no token for {word} (the tiny one: see tasks/tiny.json)")


@torch.no_grad()
def answer(base: nn.Module, tokenizer, prompts: list[str], max_new_tokens=32, strip=True) -> list[str]:
    """Greedy answers to rendered prompts, in one batch, with the adapters that are set.

    White space is stripped, but trailing space is kept if the answer was cut off. With strip=False the
    answers are the text after the prompts, unchanged.
    """
    sequences = [tokenize(tokenizer, p) for p in prompts]
    ids = pad(sequences, tokenizer.pad_token_id, left=True).to(base.device)  # [n, T]
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=True).to(base.device)
    out = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    if not strip:  # some tokenizers drop the first space of a text, so decode prompt and answer together
        before = tokenizer.batch_decode(ids, skip_special_tokens=True)
        whole = tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text[len(start) :] for start, text in zip(before, whole)]
    new = out[:, ids.shape[1] :]  # [n, up to max_new_tokens]
    eos = torch.tensor(base.generation_config.eos_token_id or [], device=new.device)
    ended = torch.isin(new, eos).any(1)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() if is_whole else text.lstrip() for text, is_whole in zip(texts, ended)]


def answer_logits(base: nn.Module, examples: list[tuple[list[int], list[int]]], neftune_alpha: float = 0.0):
    """Run the base model, with the adapters that are set, on n examples (ids of prompt and answer).

    `neftune_alpha` adds noise to the input embeddings (NEFTune, arXiv 2310.05914). Returns, for all answer
    tokens: logits [tokens, vocabulary], the index of their example [tokens], the right tokens [tokens].
    """
    sequences = [prompt + answer for prompt, answer in examples]
    labels = [[-1] * len(prompt) + answer for prompt, answer in examples]  # -1 is not part of the answer
    ids = pad(sequences, 0).to(base.device)  # [n, T], padded at the end: a causal model needs no mask
    labels = pad(labels, -1).to(base.device)  # [n, T]
    example_index, position = (labels[:, 1:] >= 0).nonzero(
        as_tuple=True
    )  # logits here predict an answer token
    first, last = position.min(), position.max()
    kept = torch.arange(first, last + 1, device=ids.device)  # of the whole batch

    def add_noise(embeddings: nn.Module, _, x: Tensor) -> Tensor:
        """Uniform noise, scaled so that its expected norm does not grow with T and d. x [n, T, d]"""
        noise = torch.empty_like(x).uniform_(-1, 1) * neftune_alpha / (x.shape[1] * x.shape[2]) ** 0.5
        return x + noise * getattr(embeddings, "embed_scale", 1.0)  # Gemma's embeddings are multiplied by it

    hook = base.get_input_embeddings().register_forward_hook(add_noise) if neftune_alpha else None
    try:
        logits = base(input_ids=ids, logits_to_keep=kept, use_cache=False).logits  # [n, kept, vocabulary]
    finally:
        if hook:
            hook.remove()
    answer_logits = logits[example_index, position - first].float()
    return answer_logits, example_index, labels[example_index, position + 1]


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The decoder's layers. Raises UserError for models that call them otherwise."""
    layers = getattr(base.get_decoder(), "layers", None)
    if layers is None:
        raise UserError("Doc-to-LoRA, --gradient_checkpointing and --shard need a decoder with `layers`")
    return layers


@torch.no_grad()
def hidden_states(base: nn.Module, input_ids: Tensor, mask: Tensor | None, early_exit=False) -> Tensor:
    """The input of each of the L layers, for Doc-to-LoRA. input_ids, mask [n, T] -> [n, L, T, d].

    The input of the last layer is taken after the final norm, as published. With early_exit: only the states
    after L/4 layers and the final norm, [n, T, d].
    """
    decoder, layers = base.get_decoder(), decoder_layers(base)
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


def recompute_layers(base: nn.Module) -> None:
    """Keep only the input of each decoder layer, and compute the layer again in the backward pass."""
    for layer in decoder_layers(base):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# -------------------- The text encoder: n descriptions -> [n, E] --------------------


def load_encoder(name: str, device="cpu", base_and_tokenizer=(), full_stop=False, with_lora=False):
    """A text encoder, as a callable: list of n descriptions -> [n, E].

    `name` is a preset, "hash", "base" (with `base_and_tokenizer`), a hub id or a folder. With `full_stop`,
    descriptions that end in a letter get a full stop, as published. With `with_lora` its network,
    `encode.network`, has LoRA layers.
    """
    name = encoder_source(name)
    if name == "hash":
        embed = hash_encoder
    elif name == "base":
        embed = partial(base_encoder, *base_and_tokenizer)
    else:
        embed = TransformerEncoder(name, device)

    def encode(texts: list[str]) -> Tensor:
        texts = [text.strip() for text in texts]
        if full_stop:
            texts = [f"{text}." if text[-1].isalpha() else text for text in texts]
        return embed(texts).to(device)

    if with_lora:
        if name in ("hash", "base"):
            raise UserError(f"--encoder_rank, a LoRA on the text encoder, needs one with layers, not {name}")
        encode.network = embed.model
        lora.inject(encode.network, lora.linear_names(encode.network))
    return encode


class TransformerEncoder:
    """A text encoder of the hub, pooled as its own 1_Pooling/config.json says: mean, CLS or last token."""

    def __init__(self, name: str, device="cpu"):
        self.tokenizer = from_pretrained(AutoTokenizer, name)
        self.model = load_text_model(name).to(device).requires_grad_(False).eval()
        self.max_length = min(8192, longest_text(self.model))  # tokens
        pooling = fetch(name) / "1_Pooling" / "config.json"
        self.pooling = read_file(pooling) if pooling.exists() else {}

    def __call__(self, texts: list[str]) -> Tensor:
        out = []
        settings = dict(padding=True, padding_side="right", truncation=True, max_length=self.max_length)
        for i in range(0, len(texts), 64):
            batch = self.tokenizer(texts[i : i + 64], return_tensors="pt", **settings).to(self.model.device)
            h = self.model(**batch).last_hidden_state.float()  # [n, T, E]
            mask = batch["attention_mask"]  # [n, T]
            if self.pooling.get("pooling_mode_cls_token"):
                h = h[:, 0]
            elif self.pooling.get("pooling_mode_lasttoken"):
                h = h[torch.arange(len(h)), mask.sum(1) - 1]
            else:
                h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out.append(F.normalize(h, dim=-1))  # [n, E]
        return torch.cat(out)


@torch.no_grad()
def base_encoder(base: nn.Module, tokenizer, texts: list[str]) -> Tensor:
    """The base model as text encoder: its last state at the last token (paper, section 3). [n, E]"""
    check_known(tokenizer, texts)
    lora.set_adapter(base, None)
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    ids = pad(sequences, tokenizer.pad_token_id).to(base.device)  # [n, T]
    h = base.base_model(input_ids=ids).last_hidden_state.float()  # [n, T, E]
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    return F.normalize(h[torch.arange(len(texts)), last], dim=-1)
