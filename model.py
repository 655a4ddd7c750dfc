"""The frozen base model, which is adapted: loading it, prompts, answers, logits.

It is a Hugging Face id or a folder; `resolve` knows the presets of --base_model.
"""

import os
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torch.distributed as dist
import transformers
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache  # comes with transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
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


def preset_encoder(base_model: str) -> str:
    """The text encoder of a base model's preset; the base model itself if it has none."""
    encoders = {base.lower(): encoder for base, encoder in PRESETS.values()}
    return encoders.get(resolve(base_model).lower(), "base")


def is_hub_id(name: str) -> bool:
    """Whether a name is an id on the Hugging Face hub (USER/REPO, perhaps with folders), not a local path."""
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
    """Raise UserError if an adapter or hypernetwork was trained for another base model than `base`."""
    name, shape = base.name_or_path, lora.base_shape(base.config)
    if not is_same_base(name, shape, config.base_model, config.base_shape):
        message = f"what was trained for {config.base_model} cannot be used with {name}"
        raise UserError(f"{message} (layers, hidden size, vocabulary: {config.base_shape} and {shape})")


def fetch(name: str | Path, files: list[str]) -> Path:
    """A folder: `name` itself, or these files of USER/REPO or USER/REPO/SUB/FOLDER on the hub."""
    if not is_hub_id(str(name)):
        return Path(name)
    user, repo, *subfolders = str(name).strip("/").split("/")
    patterns = ["/".join([*subfolders, file]) for file in files]
    return Path(snapshot_download(f"{user}/{repo}", allow_patterns=patterns), *subfolders)


def check_reachable(name: str) -> None:
    """Raise UserError soon if a model of the hub is not on this machine and the hub cannot be reached."""
    if not is_hub_id(name) or try_to_load_from_cache(name, "config.json"):
        return
    try:
        urlopen(Request(f"{constants.ENDPOINT}/{name}/resolve/main/config.json", method="HEAD"), timeout=8)
    except HTTPError:
        return  # the hub answers; loading says what is wrong
    except OSError as e:
        message = f"{name} is not on this machine, and the hub cannot be reached ({e})"
        raise UserError(f"{message}; --base_model and --encoder also take local folders") from None


# -------------------- Loading it --------------------

DEVICES = "cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one"  # the meaning of --device


def pick_device(name: str = "auto") -> torch.device:
    """The device of --device. A GPU becomes the current device; under torchrun each process has its GPU."""
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
            for layer in base.get_decoder().layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            # one root for all layers, so that they share streams and the memory for gathered layers
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
    check_reachable(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        prepends_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if prepends_bos else "") + PLAIN_TEMPLATE
    return tokenizer


def end_tokens(base: nn.Module, tokenizer) -> list[int]:
    """The tokens that end an answer: the model's EOS tokens, and the last token of training answers."""
    own = base.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
    ends = ends + tokenize(tokenizer, turn_of(tokenizer).end)[-1:]
    return [token for token in dict.fromkeys(ends) if token is not None]


def window_of(base: nn.Module) -> int:
    """How many tokens the base model can read."""
    n = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return n or 10**9  # some models have no limit


def recompute_layers(base: nn.Module) -> None:
    """Keep only the input of each decoder layer, and compute the layer again in the backward pass."""
    for layer in base.get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# -------------------- Prompts --------------------
#
# The tiny base model uses PLAIN_TEMPLATE. Its prompt for "cat dog" is "cat dog ->". It learns the answer
# " chien<eos>".


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
        except Exception:  # templates without system messages raise arbitrary exceptions
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
    """The prompt for `text`: a user turn, after an empty system message if the template takes one.

    `instruction` is put before the text. `shots` are earlier (input, answer) turns.
    """
    messages = list(turn_of(tokenizer).system)
    for question, answer in shots:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": f"{instruction}\n\n{text}".strip()})
    return fill_template(tokenizer, messages, add_generation_prompt=True)


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text. The template has already added the special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def example_ids(tokenizer, question: str, answer: str, instruction: str = "") -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer, up to the end mark.

    Both are tokenized together, if the prompt's tokens stay the same. Tokenized alone, the answer may begin
    with another token than the one that the model generates.
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
        words = read_json(Path(__file__).parent / "tasks" / "tiny.json")["words"]  # of the tiny base model
        known = ", ".join(f"{category} ({entries[0][0]})" for category, entries in words.items())
        message = f"the base model has no token for {some}; the tiny one knows {known}"
        raise UserError(f"{message}; python -m tasks.tiny lists all words")


# -------------------- Running the base model, with the adapters in use --------------------


class Answer(NamedTuple):
    """What the base model says to a prompt."""

    text: str
    has_ended: bool  # the model ended it itself
    n_tokens: int  # with the end mark
    log_prob: float  # their mean


class LogProbs(list):
    """Watches greedy decoding: for each token, the log-probability of the likeliest one. [n] each."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()  # [n, vocabulary]
        self.append(scores.max(-1).values - scores.logsumexp(-1))
        return scores


@torch.no_grad()
def answer(base: nn.Module, tokenizer, prompts: list[str], most: int = 64) -> list[Answer]:
    """Greedy answers to rendered prompts, in one batch; of at most `most` tokens, with the end mark."""
    sequences = [tokenize(tokenizer, prompt) for prompt in prompts]
    ids = pad(sequences, tokenizer.pad_token_id or 0, left=True).to(base.device)  # [n, T]
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=True).to(base.device)
    watch, settings = LogProbs(), dict(max_new_tokens=most, do_sample=False)
    out = base.generate(input_ids=ids, attention_mask=mask, logits_processor=[watch], **settings)
    log_probs = torch.stack(watch, 1).tolist()  # [n, new tokens]
    ends, answers = set(base.generation_config.eos_token_id or []), []
    for prompt_ids, row, of_tokens in zip(sequences, out[:, ids.shape[1] :].tolist(), log_probs):
        n_tokens = next((i for i, token in enumerate(row) if token in ends), len(row))
        of_tokens = of_tokens[: n_tokens + 1]  # with the end mark
        # some tokenizers drop the first space of a text, so prompt and answer are decoded together
        before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        whole = tokenizer.decode(prompt_ids + row[:n_tokens], skip_special_tokens=True)
        log_prob = sum(of_tokens) / len(of_tokens)
        answers.append(Answer(whole[len(before) :], n_tokens < len(row), len(of_tokens), log_prob))
    return answers


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
