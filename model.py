"""The two frozen models: the base model, which is adapted, and the text encoder, which reads descriptions.

The base model is a preset, a Hugging Face id or a folder; the text encoder "hash", "base", an id or a folder.
"""

import re
import zlib
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lora
from support import processes
from support.files import UserError
from support.hub import from_pretrained, load_weights
from support.processes import Process, default_dtype
from support.templates import PLAIN_TEMPLATE, around_answer, check_known, fill_template, takes_system_message
from support.text_models import TransformerEncoder, text_width

# -------------------- The base model --------------------


def load_base(name: str, device="cpu", dtype: torch.dtype | None = None):
    """(base model, tokenizer): frozen, in eval mode. dtype None is that of `default_dtype`."""
    tokenizer = load_tokenizer(name)
    base = load_weights(AutoModelForCausalLM, name, dtype=dtype or default_dtype(device))
    ends = end_tokens(base, tokenizer)
    base.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id)
    if getattr(base.config.get_text_config(), "attn_logit_softcapping", None):
        base.set_attn_implementation("eager")  # with sdpa, transformers before 5.19 drops Gemma 2's softcap
    return base.to(device).requires_grad_(False).eval(), tokenizer


def load_tokenizer(name: str):
    """The tokenizer of a base model; it has a chat template, and mostly a token for padding."""
    tokenizer = from_pretrained(AutoTokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        prepends_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if prepends_bos else "") + PLAIN_TEMPLATE
    return tokenizer


def end_tokens(base: nn.Module, tokenizer) -> list[int]:
    """The tokens that end an answer: the model's own, and the one that the chat template writes there."""
    own = base.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
    after_answer = tokenize(tokenizer, around_answer(tokenizer)[1])[:1]
    ends = ends + [token for token in after_answer if token in tokenizer.all_special_ids]
    return [token for token in dict.fromkeys(ends) if token is not None]


def load_sharded(name: str, process: Process, dtype: torch.dtype, target_modules: list[str], dropout: float):
    """(base model with LoRA layers, tokenizer), with the decoder's layers spread over the processes."""
    mesh = processes.make_mesh(process)
    with processes.in_turn(process):  # so that host memory holds the whole model only once
        base, tokenizer = load_base(name, "cpu", dtype)
        lora.inject(base, target_modules, dropout)
        processes.shard_layers(base.get_decoder(), decoder_layers(base), mesh)
        base.to(process.device)
    with torch.no_grad():  # the first pass through all layers makes the decoder their root
        base(torch.zeros(1, 1, dtype=torch.long, device=process.device))
    return base, tokenizer


def instruct(description: str) -> str:
    """A description as the instruction of a prompt, with the published words after it."""
    return description + " Please complete the task without any explanation."


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


def render(tokenizer, messages: list[dict], answer: str | None = None) -> str:
    """The prompt as text; with `answer` the text that the model has to write after it, up to the end mark."""
    prompt = fill_template(tokenizer, messages, add_generation_prompt=True)
    prompt += around_answer(tokenizer)[0]
    if answer is None:
        return prompt
    whole = fill_template(tokenizer, [*messages, {"role": "assistant", "content": answer}])
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


@torch.no_grad()
def answer(base: nn.Module, tokenizer, prompts: list[str], max_new_tokens: int = 32) -> list[str]:
    """Greedy answers to rendered prompts, in one batch, with the adapters in use, spaces included.

    Some tokenizers drop the first space of a text, so prompt and answer are decoded together.
    """
    sequences = [tokenize(tokenizer, p) for p in prompts]
    ids = pad(sequences, tokenizer.pad_token_id or 0, left=True).to(base.device)  # [n, T]
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=True).to(base.device)
    out = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    before = tokenizer.batch_decode(ids, skip_special_tokens=True)
    whole = tokenizer.batch_decode(out, skip_special_tokens=True)
    return [text[len(start) :] for start, text in zip(before, whole)]


def answer_logits(base: nn.Module, examples: list[tuple[list[int], list[int]]], neftune_alpha: float = 0.0):
    """Run the base model, with the adapters in use, on n examples (ids of prompt and answer).

    Returns, for all answer tokens: logits [tokens, vocabulary], the index of their example [tokens], and the
    labels, which are the right tokens [tokens]. With neftune_alpha there is noise on the input embeddings.
    """
    sequences, is_answer = [], []
    for prompt, right in examples:
        sequences.append(prompt + right)
        is_answer.append([0] * len(prompt) + [1] * len(right))
    ids = pad(sequences, 0).to(base.device)  # [n, T], padded at the end: a causal model needs no mask
    is_answer = pad(is_answer, 0).to(base.device)  # [n, T]
    # logits at a position predict the next token
    example_index, position = is_answer[:, 1:].nonzero(as_tuple=True)  # [tokens]
    first, last = position.min(), position.max()
    kept = torch.arange(first, last + 1, device=ids.device)  # positions whose logits are needed
    hook = base.get_input_embeddings().register_forward_hook(partial(add_noise, neftune_alpha))
    logits = base(input_ids=ids, logits_to_keep=kept, use_cache=False).logits  # [n, kept, vocabulary]
    hook.remove()
    return logits[example_index, position - first].float(), example_index, ids[example_index, position + 1]


def add_noise(alpha: float, embeddings: nn.Module, _, x: Tensor) -> Tensor:
    """NEFTune (arXiv 2310.05914): uniform noise, whose expected norm does not depend on T, d. x [n, T, d]"""
    if not alpha:
        return x
    noise = torch.empty_like(x).uniform_(-1, 1) * alpha / (x.shape[1] * x.shape[2]) ** 0.5
    return x + noise * getattr(embeddings, "embed_scale", 1.0)  # Gemma's embeddings are multiplied by it


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The decoder's layers. Raises UserError for models that call them otherwise."""
    layers = getattr(base.get_decoder(), "layers", None)
    if layers is None:
        features = "Doc-to-LoRA, --gradient_checkpointing and --shard"
        raise UserError(f"{features} need a decoder with `layers`")
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


def encoder_width(name: str, base: nn.Module) -> int:
    """E of a text encoder; only its config is read."""
    if name == "hash":
        return HASH_WIDTH
    return base.config.get_text_config().hidden_size if name == "base" else text_width(name)


def load_encoder(name: str, device="cpu", base=None, tokenizer=None, full_stop=False) -> "TextEncoder":
    """The text encoder of this name: "hash", "base" (the base model), a hub id or a folder."""
    width = encoder_width(name, base)
    if name == "hash":
        embed = hash_encoder
    elif name == "base":
        embed = partial(base_encoder, base, tokenizer)
    else:
        embed = TransformerEncoder(name, device)
    return TextEncoder(name, embed, width, device, full_stop)


CACHED_NUMBERS = 2**24  # 64 MB of embeddings


class TextEncoder:
    """A callable: list of n descriptions -> [n, E], in float32.

    With `full_stop`, descriptions that end in a letter get a full stop, as published (not with "hash").
    """

    def __init__(self, name: str, embed, width: int, device, full_stop: bool):
        self.name, self.embed, self.device, self.full_stop = name, embed, torch.device(device), full_stop
        self.embed_once = lru_cache(CACHED_NUMBERS // width)(lambda text: embed([text])[0])

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        texts = self.prepare(texts)
        if self.name == "hash":  # fast, and its long vectors would fill the memory
            return self.embed(texts).to(self.device)
        # frozen: each text is read once, and alone, so that its embedding does not depend on the batch
        with torch.autocast(self.device.type, enabled=False):
            return torch.stack([self.embed_once(text) for text in texts])

    def prepare(self, texts: list[str]) -> list[str]:
        """Texts as they are read."""
        texts = [text.strip() for text in texts]
        if self.full_stop and self.name != "hash":
            texts = [f"{text}." if text[-1].isalpha() else text for text in texts]
        return texts


FUNCTION_WORDS = """a an the of to in on at by for from with or but is are was were be been it its this that
    these those them they their there you your i me my we our as then than so what which who whatever any some
    please into out up down . , ; : - ?""".split()  # they say little about the task
HASH_WIDTH = 8192


def hash_encoder(texts: list[str]) -> Tensor:
    """Feature hashing, no network: signed sums of words, pairs of near words and 3- to 5-letter pieces."""
    out = np.zeros((len(texts), HASH_WIDTH), np.float32)  # [n, E]
    for vector, text in zip(out, texts):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        weights = [0.3 if word in FUNCTION_WORDS else 1.0 for word in words]
        features = [(word, 2 * weight) for word, weight in zip(words, weights)]
        for gap in (1, 2):
            for i in range(len(words) - gap):
                features.append((f"{words[i]} {gap} {words[i + gap]}", max(weights[i], weights[i + gap])))
        for n in (3, 4, 5):
            for word, weight in zip(words, weights):
                marked = f"#{word}#"
                features += [(marked[i : i + n], weight) for i in range(len(marked) + 1 - n)]
        for feature, weight in features:
            code = zlib.crc32(feature.encode())
            vector[code % HASH_WIDTH] += weight if code >> 31 else -weight
    return F.normalize(torch.from_numpy(out), dim=-1)


def base_encoder(base: nn.Module, tokenizer, texts: list[str]) -> Tensor:
    """The base model as text encoder: its last state at the last token (paper, section 3). [n, E]"""
    check_known(tokenizer, texts)
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    ids = pad(sequences, 0).to(base.device)  # [n, T]
    h = base.base_model(input_ids=ids).last_hidden_state.float()  # [n, T, E]
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    return F.normalize(h[torch.arange(len(texts)), last], dim=-1)
