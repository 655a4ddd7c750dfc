"""The two frozen models: the base model, which is adapted, and the text encoder, which reads descriptions.

The base model is a Hugging Face id or a folder (`resolve` knows the presets of --base_model). The text
encoder is "hash", "base" (the base model), an id or a folder.
"""

import os
import re
import sys
import zlib
from collections.abc import Callable
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download  # comes with transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

import lora
from support import UserError, read_json

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# -------------------- Which base model --------------------

TINY = str(Path(__file__).resolve().parent / "checkpoints" / "tiny")
GTE = "Alibaba-NLP/gte-large-en-v1.5"
PRESETS = {  # name for --base_model: (Hugging Face id or folder, text encoder)
    "tiny": (TINY, "hash"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"),
    "gemma-2-2b": ("google/gemma-2-2b-it", GTE),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", GTE),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", GTE),
}


def resolve(name: str) -> str:
    """The Hugging Face id, or the absolute path of the folder, that a name for --base_model stands for."""
    name = PRESETS[name][0] if name in PRESETS else name
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def is_hub_id(name: str) -> bool:
    """Whether a name can only be one on the Hugging Face hub: USER/REPO, perhaps followed by folders."""
    first = name.split("/")[0]  # USER, unless it is a folder here
    return "/" in name and first not in ("", ".", "..", "~") and not Path(first).is_dir()


def is_same_base(name: str, shape: list[int], other: str, other_shape: list[int]) -> bool:
    """Whether two base models are the same. A shape is [layers, hidden size, vocabulary], [] if unknown.

    Two hub ids are compared by name. Folders may be anywhere, so they are compared by shape.
    """
    if is_hub_id(name) and is_hub_id(other):
        return name.lower() == other.lower()
    return name == other or shape == other_shape or not other_shape


def check_base(base: nn.Module, config: lora.LoRAConfig) -> None:
    """Raise UserError if what was trained for one base model is to be used with another."""
    name, shape = base.name_or_path, lora.base_shape(base.config)
    if not is_same_base(name, shape, config.base_model, config.base_shape):
        message = f"what was trained for {config.base_model} cannot be used with {name}"
        raise UserError(f"{message} (layers, hidden size, vocabulary: {config.base_shape} and {shape})")


def fetch(name: str, files: list[str]) -> Path:
    """A folder: `name` itself, or these files of USER/REPO or USER/REPO/SUB/FOLDER on the hub."""
    if not is_hub_id(name):
        return Path(name)
    user, repo, *subfolders = name.strip("/").split("/")
    patterns = ["/".join([*subfolders, file]) for file in files]
    return Path(snapshot_download(f"{user}/{repo}", allow_patterns=patterns), *subfolders)


# -------------------- Loading it --------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device that --device names; a GPU becomes the current one, under torchrun that of the process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no CUDA GPU")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        # without cuDNN's attention, which may plan anew for every length of a batch (not measured)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def join_processes(device: torch.device) -> tuple[int, int]:
    """(number of this process, how many there are): under torchrun they form a group, otherwise (0, 1)."""
    if "RANK" not in os.environ:
        return 0, 1
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device_id)
    return dist.get_rank(), dist.get_world_size()


def default_dtype(device: str | torch.device) -> torch.dtype:
    """float32 on a CPU and on GPUs that only emulate bfloat16 (before Ampere), otherwise bfloat16."""
    kind = torch.device(device).type
    if kind == "cpu" or (kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.float32
    return torch.bfloat16


def load_base(name: str, device="cpu", dtype: torch.dtype | None = None):
    """(base model, tokenizer): frozen, in eval mode. dtype None is that of `default_dtype`."""
    if Path(name, "adapter_config.json").exists():
        raise UserError(f"--base_model {name} is an adapter, not a model")
    tokenizer, dtype = load_tokenizer(name), dtype or default_dtype(device)
    base = load_weights(AutoModelForCausalLM, name, dtype=dtype)
    ends = end_tokens(base, tokenizer)
    base.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    if getattr(base.config.get_text_config(), "attn_logit_softcapping", None):
        base.set_attn_implementation("eager")  # with sdpa, transformers before 5.19 drops Gemma 2's softcap
    return base.to(device).requires_grad_(False).eval(), tokenizer


def load_weights(loader, source: str, **settings) -> nn.Module:
    """A model with its weights. Raises UserError if some are missing: they would be random."""
    network, report = loader.from_pretrained(source, output_loading_info=True, **settings)
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # poolers are not used
    if missing:
        raise UserError(f"{source}: {len(missing)} weights are missing, such as {missing[0]}")
    return network


def load_shapes(name: str) -> nn.Module:
    """The base model without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(name))


def load_sharded(name: str, device, dtype: torch.dtype, target_modules: list[str], dropout: float):
    """(base model with LoRA layers, tokenizer), for a base model that is larger than one GPU (FSDP2).

    Each process holds its part of the parameters of every decoder layer, and a layer is gathered only while
    it computes. Embeddings and head stay whole. All processes must run the model equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh  # imported here, because that takes a second
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for turn in range(dist.get_world_size()):  # in turn, so that host memory holds the whole model only once
        if turn == dist.get_rank():
            base, tokenizer = load_base(name, "cpu", dtype)
            lora.inject(base, target_modules, dropout)
            for layer in decoder_layers(base):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            # one root for all layers: they share its streams, and so the memory in which layers are gathered
            whole = {p for p in base.get_decoder().parameters() if not isinstance(p, DTensor)}
            fully_shard(base.get_decoder(), mesh=mesh, ignored_params=whole)
            base.to(device)
        dist.barrier()
    with torch.no_grad():  # the first pass through all layers makes the decoder their root
        base(torch.zeros(1, 1, dtype=torch.long, device=device))
    return base, tokenizer


PLAIN_TEMPLATE = (  # for a base model without a chat template: "input -> answer<eos>", one per line
    "{% for m in messages if m.content or m.role != 'system' %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}\n{% else %}{{ m.content }} ->{% endif %}"
    "{% endfor %}"
)


def load_tokenizer(name: str):
    """The tokenizer of a base model; it has a chat template, and usually a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        prepends_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if prepends_bos else "") + PLAIN_TEMPLATE
    return tokenizer


def end_tokens(base: nn.Module, tokenizer) -> list[int]:
    """The tokens that end an answer: the model's own, and the one that answers end with in training."""
    own = base.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
    ends = ends + tokenize(tokenizer, turn_of(tokenizer).end)[-1:]
    return [token for token in dict.fromkeys(ends) if token is not None]


def window_of(base: nn.Module) -> int:
    """How many tokens the base model can read."""
    n = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return n or 10**9  # some models have no limit


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The decoder's layers. Raises UserError for models that call them otherwise."""
    layers = getattr(base.get_decoder(), "layers", None)
    if layers is None:
        features = "Doc-to-LoRA, --gradient_checkpointing and --shard"
        raise UserError(f"{features} need a decoder with `layers`")
    return layers


def recompute_layers(base: nn.Module) -> None:
    """Keep only the input of each decoder layer, and compute the layer again in the backward pass."""
    for layer in decoder_layers(base):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# -------------------- Prompts --------------------
#
# Of the tiny base model, whose template is PLAIN_TEMPLATE, the prompt for "cat dog" is "cat dog ->", and the
# answer that is learnt " chien<eos>".


def instruct(description: str) -> str:
    """A description as the instruction of a prompt, with the published words after it."""
    return description + " Please complete the task without any explanation."


class Turn(NamedTuple):
    """What a chat template writes around an answer, and before the first question."""

    system: list[dict]  # an empty system message (published), if the template takes one
    before: str  # white space before an answer: " "
    end: str  # the mark after it: "<|im_end|>"


@cache
def turn_of(tokenizer) -> Turn:
    """Find it by an example: a question alone, and with its answer, which must continue the first text.

    The end mark is the first added token after the answer, otherwise the tokenizer's EOS.
    """
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "<<>>"}
    for system in ([{"role": "system", "content": ""}], []):
        try:
            prompt = fill_template(tokenizer, [*system, question], add_generation_prompt=True)
            whole = fill_template(tokenizer, [*system, question, answer])
        except Exception:  # a template that takes no system message raises what it likes
            continue
        before, _, after = whole.removeprefix(prompt).partition("<<>>")
        if not whole.startswith(prompt) or before.strip():
            continue
        marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
        ends = [after.index(mark) + len(mark) for mark in marks if mark in after]
        end = after[: min(ends)] if ends else tokenizer.eos_token
        if not end:
            raise UserError("answers would have no end: chat template and tokenizer have no mark for it")
        return Turn(system, before, end)
    raise UserError("the chat template of this base model does not continue a prompt with its answer")


# some templates print the date; fix it, so that training and use agree (the default of Llama 3.1)
DAY = "26 Jul 2024"
FIXED_DAY = "{%- macro strftime_now(format) %}" + DAY + "{%- endmacro +%}"


def fill_template(tokenizer, messages: list[dict], **settings) -> str:
    """The text that the chat template makes of messages."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_DAY + template
    settings |= dict(chat_template=template, date_string=DAY, enable_thinking=False, tokenize=False)
    return tokenizer.apply_chat_template(messages, **settings)


def render(tokenizer, text: str, instruction: str = "", shots: list[tuple[str, str]] = ()) -> str:
    """The prompt that asks for the answer to `text`: a user turn, after an empty system message.

    An `instruction` stands before the text. `shots` are earlier (input, answer) turns.
    """
    messages = list(turn_of(tokenizer).system)
    for question, answer in shots:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": f"{instruction}\n\n{text}".strip()})
    return fill_template(tokenizer, messages, add_generation_prompt=True)


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text, which has its special tokens from the template."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def example_ids(tokenizer, question: str, answer: str, instruction: str = "") -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer, up to the end mark.

    They are tokenized together, if the prompt's tokens stay the same: tokenized alone, the answer may begin
    with a different token from the one that the model generates.
    """
    turn, prompt = turn_of(tokenizer), render(tokenizer, question, instruction)
    answer = turn.before + answer + turn.end
    prompt_ids, whole = tokenize(tokenizer, prompt), tokenize(tokenizer, prompt + answer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    return prompt_ids, tokenize(tokenizer, answer)


def pad(sequences: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Sequences of different lengths as one tensor [n, T]."""
    T = max(len(sequence) for sequence in sequences)
    padded = []
    for sequence in sequences:
        padding = [value] * (T - len(sequence))
        padded.append(padding + sequence if left else sequence + padding)
    return torch.tensor(padded)


def check_known(tokenizer, texts: list[str]) -> None:
    """Raise UserError for words that the tokenizer has no token for (the tiny one knows few)."""
    if tokenizer.unk_token_id is None:
        return
    words = sorted({word for text in texts for word in text.split()})
    if tokenizer.unk_token_id not in tokenize(tokenizer, " ".join(words)):
        return
    unknown = [word for word in words if tokenizer.unk_token_id in tokenize(tokenizer, word)]
    if unknown:
        some = ", ".join(unknown[:20]) + (", ..." if len(unknown) > 20 else "")
        known = ", ".join(tokenizer.convert_ids_to_tokens(range(20, 120, 20)))
        message = f"the base model has no token for {some}; it knows words such as {known}"
        raise UserError(f"{message} (all those of the tiny one: tasks/tiny.json)")


# -------------------- Running the base model, with the adapters in use --------------------


@torch.no_grad()
def answer(base: nn.Module, tokenizer, prompts: list[str], most: int | list[int] = 64):
    """Greedy answers to rendered prompts, in one batch: (texts, whether the model ended each one itself).

    `most` is how many tokens an answer may have, with the end mark; a list has a number for each.
    """
    limits = most if isinstance(most, list) else [most] * len(prompts)
    sequences = [tokenize(tokenizer, prompt) for prompt in prompts]
    ids = pad(sequences, tokenizer.pad_token_id or 0, left=True).to(base.device)  # [n, T]
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=True).to(base.device)
    out = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False)
    ends, texts, ended = set(base.generation_config.eos_token_id or []), [], []
    for prompt_ids, row, limit in zip(ids.tolist(), out[:, ids.shape[1] :].tolist(), limits):
        n_tokens = next((i for i, token in enumerate(row[:limit]) if token in ends), limit)
        ended.append(n_tokens < min(limit, len(row)))
        row = row[:n_tokens]
        # some tokenizers drop the first space of a text, so prompt and answer are decoded together
        before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        whole = tokenizer.decode(prompt_ids + row, skip_special_tokens=True)
        texts.append(whole[len(before) :])
    return texts, ended


def answer_logits(base: nn.Module, examples: list[tuple[list[int], list[int]]], neftune_alpha: float = 0.0):
    """Run the base model on n examples (ids of prompt and answer).

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
    with base.get_input_embeddings().register_forward_hook(partial(add_noise, neftune_alpha)):
        logits = base(input_ids=ids, logits_to_keep=kept, use_cache=False).logits  # [n, kept, vocabulary]
    return logits[example_index, position - first].float(), example_index, ids[example_index, position + 1]


def add_noise(alpha: float, embeddings: nn.Module, _, x: Tensor) -> Tensor:
    """NEFTune (arXiv 2310.05914): uniform noise whose norm does not grow with T and d. x [n, T, d]"""
    if not alpha:
        return x
    noise = torch.empty_like(x).uniform_(-1, 1) * alpha / (x.shape[1] * x.shape[2]) ** 0.5
    return x + noise * getattr(embeddings, "embed_scale", 1.0)  # Gemma's embeddings are multiplied by it


# -------------------- The text encoder: n descriptions -> [n, E] --------------------


def load_encoder(
    name: str, device="cpu", base=None, tokenizer=None, full_stop=False
) -> Callable[[list[str]], Tensor]:
    """The text encoder of this name: "hash", "base" (the base model), a hub id or a folder.

    It is a function: n descriptions -> [n, E], in float32. With `full_stop`, descriptions that end in a
    letter get one, as published (not with "hash").
    """
    if name == "hash":
        return lambda texts: hash_encoder(texts).to(device)
    encode = partial(base_encoder, base, tokenizer) if name == "base" else TransformerEncoder(name, device)

    @lru_cache(2**13)  # frozen: each text is read once, and alone, so that nothing depends on its batch
    @torch.no_grad()
    def encode_one(text: str) -> Tensor:
        with torch.autocast(torch.device(device).type, enabled=False):
            return encode([end_sentence(text, full_stop)])[0]

    return lambda texts: torch.stack([encode_one(text.strip()) for text in texts])


def end_sentence(text: str, full_stop: bool) -> str:
    """With `full_stop`, a text that ends in a letter gets one."""
    return f"{text}." if full_stop and text[-1:].isalpha() else text


def encoder_width(name: str, base: nn.Module) -> int:
    """E of a text encoder; only its config is read."""
    if name == "hash":
        return HASH_WIDTH
    if name == "base":
        return base.config.get_text_config().hidden_size
    fields, _ = PretrainedConfig.get_config_dict(name)
    if "hidden_size" in fields:  # also of gte-*-v1.5, whose type AutoConfig does not know
        return fields["hidden_size"]
    return transformers.AutoConfig.from_pretrained(name).hidden_size


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


class TransformerEncoder:
    """A text encoder of the hub, pooled as its own 1_Pooling/config.json says: mean, CLS or last token."""

    def __init__(self, name: str, device="cpu"):
        self.tokenizer, self.pooling = AutoTokenizer.from_pretrained(name), read_pooling(name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.model = load_text_model(name).to(device).requires_grad_(False).eval()
        positions = getattr(self.model.config, "max_position_embeddings", 0)  # T5 and XLNet have no limit
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        unused = getattr(table, "padding_idx", None)  # RoBERTa-style models start at padding_idx + 1
        positions -= 0 if unused is None else unused + 1
        self.max_length = min(8192, positions) if positions > 0 else 8192  # tokens

    def __call__(self, texts: list[str]) -> Tensor:
        settings = dict(padding=True, padding_side="right", truncation=True, max_length=self.max_length)
        batch = self.tokenizer(texts, return_tensors="pt", **settings).to(self.model.device)
        if batch["input_ids"].shape[1] == self.max_length:
            print(f"note: the text encoder reads {self.max_length} tokens of a description", file=sys.stderr)
        h = self.model(**batch).last_hidden_state.float()  # [n, T, E]
        mask = batch["attention_mask"]  # [n, T]
        if self.pooling == "cls":
            h = h[:, 0]
        elif self.pooling == "lasttoken":
            h = h[torch.arange(len(h)), mask.sum(1) - 1]
        else:
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(h, dim=-1)  # [n, E]


def read_pooling(name: str) -> str:
    """cls, lasttoken or mean, in the old or the new format of sentence-transformers; mean without a file."""
    file = cached_file(name, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    fields = read_json(file) if file else {}
    modes = [fields["pooling_mode"]] if "pooling_mode" in fields else []  # "cls"
    for key, active in fields.items():
        if key.startswith("pooling_mode_") and active:  # "pooling_mode_cls_token": true
            modes.append(key.removeprefix("pooling_mode_").removesuffix("s").removesuffix("_token"))
    mode, *others = modes or ["mean"]
    if others or mode not in ("mean", "cls", "lasttoken"):
        raise UserError(f"--encoder {name}: pooling by {', '.join(map(str, modes))} is not implemented")
    return mode


def load_text_model(name: str) -> nn.Module:
    """The network of a text encoder in float32; that of gte-*-v1.5 without the code of its repository."""
    fields, _ = PretrainedConfig.get_config_dict(name)
    if fields.get("model_type") == "new":
        if not hasattr(transformers, "GteModel"):
            raise UserError(f"{name} needs transformers 5.18 or newer")
        config = gte_config(fields)
        return load_weights(transformers.GteModel, name, config=config, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(name)
    of_encoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # of T5 only its encoder
    loader = transformers.AutoModelForTextEncoding if of_encoder else transformers.AutoModel
    return load_weights(loader, name, dtype=torch.float32)


def gte_config(config: dict):
    """The config of gte-*-v1.5 for transformers' implementation of it."""
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if config.get("rope_scaling"):  # NTK scaling by k: theta * k, and all frequencies by k^(-2 / head size)
        k = config["rope_scaling"]["factor"]
        head_size = config["hidden_size"] // config["num_attention_heads"]
        rope = {"rope_type": "linear", "factor": k ** (2 / head_size), "rope_theta": config["rope_theta"] * k}
    replaced = ("auto_map", "rope_scaling", "rope_theta", "model_type")
    kept = {key: value for key, value in config.items() if key not in replaced}
    return transformers.GteConfig(**kept, rope_parameters=rope)
