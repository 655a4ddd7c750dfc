"""The two frozen models: the base model that is adapted, and the text encoder that reads the description.

Both come from a preset, a Hugging Face id or a local folder. The preset `tiny` needs neither download nor GPU.
"""

import logging
import re
import socket
import zlib
from functools import cache, partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download  # comes with transformers
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GteConfig, GteModel, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from lora import UserError, read_json, set_adapter

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what goes wrong is raised as well

TINY = str(Path(__file__).parent / "checkpoints" / "tiny")
PRESETS = {  # name: (base model, text encoder)
    "tiny": (TINY, "hash"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"),
    "gemma-2-2b": ("google/gemma-2-2b-it", "Alibaba-NLP/gte-large-en-v1.5"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", "Alibaba-NLP/gte-large-en-v1.5"),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", "Alibaba-NLP/gte-large-en-v1.5"),
}

# ---------------------------------------------------------------------------------------------------------
# The base model
# ---------------------------------------------------------------------------------------------------------


def preset_name(base_model: str) -> str:
    """The short name of a base model: the preset's, its Hugging Face id and a folder of that name are one model."""
    short = Path(base_model).name.lower()
    if short in PRESETS:  # but google/gemma-2-2b is not google/gemma-2-2b-it
        return base_model.lower() if is_hub_id(base_model) else short
    return next((name for name, (source, _) in PRESETS.items() if short == Path(source).name.lower()), short)


def is_hub_id(name: str) -> bool:
    """Whether a name can only be one of the Hugging Face hub: USER/REPO, and perhaps more."""
    return "/" in name and not name.startswith((".", "/")) and not Path(name).is_dir()


def full_name(base_model: str) -> str:
    """What a config file calls a base model: the preset's Hugging Face id, or the name as it is. The one that comes along is tiny."""
    source = PRESETS.get(base_model, (base_model,))[0]
    return "tiny" if Path(source).resolve() == Path(TINY).resolve() else source


@cache
def hub_is_there() -> bool:
    """Whether the Hugging Face hub answers. Asked once, so that a machine without it does not wait for retries."""
    url = urlsplit(ENDPOINT)
    try:
        if not getproxies().get(url.scheme):
            socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), timeout=5).close()
        return True
    except OSError:
        return False


CANNOT_LOAD = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, HTTPError)  # what transformers and the hub raise


def local_folder(name: str, files: list[str]) -> Path:
    """`name` as a folder: itself, or else the files of a Hugging Face repository, USER/REPO or USER/REPO/SUB/FOLDER."""
    if not is_hub_id(name):
        return Path(name)
    parts = name.strip("/").split("/")
    repo, sub = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        wanted = [f"{sub}/{file}".lstrip("/") for file in files]
        return Path(snapshot_download(repo, allow_patterns=wanted, local_files_only=not hub_is_there())) / sub
    except CANNOT_LOAD as e:
        raise UserError(f"{name} is neither a folder nor on this machine, and {hub_says(e)}") from None


def hub_says(error: Exception) -> str:
    """Why something did not come from the hub."""
    return f"the Hugging Face hub says: {first_line(error)}" if hub_is_there() else "the Hugging Face hub cannot be reached"


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load(loader, kind: str, name: str, **settings):
    """Call a transformers loader; what it cannot find is a UserError."""
    here = Path(name).is_dir()
    if name.startswith((".", "/")) and not here:
        raise UserError(f"{kind} {name}: there is no such folder")
    try:
        return loader.from_pretrained(name, local_files_only=here or not hub_is_there(), **settings)
    except CANNOT_LOAD as e:
        raise UserError(
            f"{kind} {name}: the folder cannot be read: {first_line(e)}"
            if here
            else f"{kind} {name} is not on this machine, and {hub_says(e)}. It may be a folder, a Hugging Face id or a preset ({', '.join(PRESETS)})"
        ) from None


def load_base(name: str, device="cpu", dtype: torch.dtype | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base model, frozen and in eval mode, and its tokenizer, with a chat template in any case.

    dtype None is float32 on CPU and bfloat16 elsewhere.
    """
    source = PRESETS.get(name, (name,))[0]
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    tokenizer = load(AutoTokenizer, "base model", source)
    model = load(AutoModelForCausalLM, "base model", source, dtype=dtype)  # with sdpa attention where it has that
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        starts = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # it begins every text with that token
        tokenizer.chat_template = "{{ bos_token }}" * starts + PLAIN_TEMPLATE
    model.generation_config = type(model.generation_config)(  # greedy, and none of the model's own sampling settings
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.to(device).requires_grad_(False).eval(), tokenizer


# For a base model that knows no chat: "input -> answer<eos>", one after another.
PLAIN_TEMPLATE = (
    "{% for m in messages if m.content or m.role != 'system' %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}\n"
    "{% else %}{{ m.content }} ->{% endif %}{% endfor %}"
)


def prompt(tokenizer, input: str, description: str = "", examples: list[tuple[str, str]] = ()) -> list[dict]:
    """The messages that put `input` before the model, as published: an empty system message, then the input alone.

    The description is not in it (it reaches the model through its weights), unless given here: the paper's benchmarks
    have the task's definition in the prompt. `examples` are earlier turns, for in-context learning.
    """
    messages = [{"role": "system", "content": ""}] if takes_system(tokenizer) else []
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages + [{"role": "user", "content": f"{description}\n\n{input}".strip()}]


def takes_system(tokenizer) -> bool:
    """Some chat templates (Gemma's) refuse a system message."""
    if not hasattr(tokenizer, "takes_system"):
        try:
            render(tokenizer, [{"role": "system", "content": ""}, {"role": "user", "content": "x"}])
            tokenizer.takes_system = True
        except Exception:  # each template raises what it likes
            tokenizer.takes_system = False
    return tokenizer.takes_system


def render(tokenizer, messages: list[dict], answer: str | None = None) -> str:
    """The prompt as text; with `answer` the text that the model has to write after it, its end mark included."""
    template = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)  # Qwen 3 would think first
    text = template(messages, add_generation_prompt=True)
    if answer is None:
        return text
    whole = template(messages + [{"role": "assistant", "content": answer}])
    if not whole.startswith(text):
        raise UserError("the chat template of this base model does not put answers where it asks for them")
    return whole.removeprefix(text).rstrip("\n")


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text (the template has put in the special tokens)."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenize_example(tokenizer, question: str, answer: str, description: str = "") -> tuple[list[int], list[int]]:
    """One training example: the ids of its prompt, and those of its answer with the end mark."""
    messages = prompt(tokenizer, question, description)
    return tokenize(tokenizer, render(tokenizer, messages)), tokenize(tokenizer, render(tokenizer, messages, answer))


def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Rows of different lengths as one tensor. [rows, T]"""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows])


def lm_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits for chosen last hidden states. [n, d] -> [n, vocabulary]"""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raise UserError for a base model whose logits are not those of `lm_head` (some scale them)."""
    ids = torch.arange(5, device=model.device)[None]
    logits = model(ids).logits[0]  # [5, vocabulary]
    if (lm_head(model, model.base_model(ids).last_hidden_state[0]) - logits).abs().max() > 0.05 * logits.abs().max():
        raise UserError(f"{type(model).__name__} makes its logits in a way that is not known here, so it cannot be trained with")


def check_known(tokenizer, texts: list[str]) -> None:
    """Raise UserError for texts with words that the tokenizer has no token for (the tiny one knows few)."""
    if tokenizer.unk_token_id is None:
        return
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    unknown = lambda text: tokenizer.unk_token_id in tokenize(tokenizer, text)
    if unknown(" ".join(words)):
        word = next(filter(unknown, words), "some of them")
        raise UserError(f"the base model has no token for {word} (the tiny one knows the 56 words of assets/tiny_world.txt and their forms)")


@torch.no_grad()
def answer(model: nn.Module, tokenizer, prompts: list[str], max_new_tokens: int = 32) -> list[str]:
    """Greedy answers to rendered prompts, in one batch, under whatever adapters are set.

    White space at the end is left out, but not of an answer that was cut off: that is not all that the model would have said.
    """
    rows = [tokenize(tokenizer, p) for p in prompts]
    ids, mask = pad(rows, tokenizer.pad_token_id, left=True), pad([[1] * len(row) for row in rows], 0, left=True)
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens, do_sample=False
    )
    new = out[:, ids.shape[1] :]  # [n, up to max_new_tokens]
    ended = torch.isin(new, torch.tensor(model.generation_config.eos_token_id, device=new.device)).any(1)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() if whole else text.lstrip() for text, whole in zip(texts, ended)]


@torch.no_grad()
def context_features(model: nn.Module, input_ids: Tensor, mask: Tensor, per_layer: bool = True) -> Tensor:
    """What Doc-to-LoRA reads of a text: the base model's own states, up to its last layer but one, or from a quarter of its
    layers (early exit); the last one after the final norm. input_ids, mask [n, T] -> [n, L, T, d], or [n, T, d]."""
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[: len(layers) - 1 if per_layer else len(layers) // 4]
    try:
        out = decoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    finally:
        decoder.layers = layers
    return torch.stack(out.hidden_states, 1) if per_layer else out.last_hidden_state


# ---------------------------------------------------------------------------------------------------------
# The text encoder: list of n descriptions -> [n, E], unit vectors
# ---------------------------------------------------------------------------------------------------------


FUNCTION_WORDS = set(  # they say little about the task, and so does most punctuation
    "a an the of to in on at by for from with or but is are was were be been it its this that these those them they their there "
    "you your i me my we our as then than so what which who whatever any some please into out up down . , ; : - ?".split()
)


class HashEncoder:
    """No model at all: words, pairs of words next to or next but one to each other, and 3- to 5-letter pieces of words,
    hashed into 8192 signed sums."""

    width = 8192

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.from_numpy(np.stack([self.embed(t) for t in texts]))  # [n, E]

    def embed(self, text: str) -> np.ndarray:
        """The unit vector of one text. [E]"""
        words = [(w, 0.3 if w in FUNCTION_WORDS else 1.0) for w in re.findall(r"\w+|[^\w\s]", text.lower())]
        parts = [(w, 2 * k) for w, k in words]
        parts += [(f"{a} {gap} {b}", max(j, k)) for gap in (1, 2) for (a, j), (b, k) in zip(words, words[gap:])]
        parts += [(f"#{w}#"[i : i + n], k) for w, k in words for n in (3, 4, 5) for i in range(len(w) + 3 - n)]
        hashes = np.array([zlib.crc32(part.encode()) for part, _ in parts])
        weights = np.array([k for _, k in parts], np.float32)
        sums = np.zeros(self.width, np.float32)
        np.add.at(sums, hashes % self.width, np.where(hashes >> 31, weights, -weights))
        return sums / max(np.linalg.norm(sums), 1e-12)


class TextModel(AutoModel):
    """AutoModel, and gte-*-v1.5 without the code of its repository: transformers has the architecture, as "gte"."""

    @classmethod
    def from_pretrained(cls, name: str, **settings) -> nn.Module:
        """The model of a Hugging Face id or a folder."""
        config, _ = PreTrainedConfig.get_config_dict(name, **settings)
        if config.get("model_type") != "new":
            return AutoModel.from_pretrained(name, **settings)
        if config.get("rope_scaling"):  # NTK: theta times k, and all frequencies divided by k^(2 / head size)
            k, head_size = config["rope_scaling"]["factor"], config["hidden_size"] // config["num_attention_heads"]
            rope = {"rope_type": "linear", "factor": k ** (2 / head_size), "rope_theta": config["rope_theta"] * k}
        else:
            rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        config = {k: v for k, v in config.items() if k not in ("auto_map", "rope_scaling", "rope_theta", "model_type")}
        return GteModel.from_pretrained(name, config=GteConfig(**config, rope_parameters=rope), **settings)


class TransformerEncoder:
    """A text encoder of the Hugging Face hub, pooled as its own 1_Pooling/config.json says (mean, CLS or last token)."""

    def __init__(self, name: str, device="cpu"):
        self.tokenizer = load(AutoTokenizer, "text encoder", name)
        self.model = load(TextModel, "text encoder", name).to(device).requires_grad_(False).eval()
        offline = Path(name).is_dir() or not hub_is_there()
        config = cached_file(name, "1_Pooling/config.json", local_files_only=offline, _raise_exceptions_for_missing_entries=False)
        config = read_json(config) if config else {}
        self.pool = "cls" if config.get("pooling_mode_cls_token") else "last" if config.get("pooling_mode_lasttoken") else "mean"

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        out = []
        for i in range(0, len(texts), 64):
            batch = self.tokenizer(
                texts[i : i + 64], padding=True, truncation=True, max_length=512, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            h = self.model(**batch).last_hidden_state.float()  # [n, T, E]
            mask = batch["attention_mask"][..., None]  # [n, T, 1]
            if self.pool == "cls":
                h = h[:, 0]
            elif self.pool == "last":
                h = h[torch.arange(len(h)), mask[..., 0].sum(1) - 1]
            else:
                h = (h * mask).sum(1) / mask.sum(1)
            out.append(F.normalize(h, dim=-1))  # [n, E]
        return torch.cat(out)


class BaseEncoder:
    """The base model reads the description itself: its last state at the last token (paper, section 3)."""

    def __init__(self, model: nn.Module, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        check_known(self.tokenizer, texts)
        set_adapter(self.model, None)
        rows = [self.tokenizer(t)["input_ids"] for t in texts]
        ids = pad(rows, self.tokenizer.pad_token_id).to(self.model.device)
        h = self.model.base_model(input_ids=ids).last_hidden_state.float()  # [n, T, E]
        last = torch.tensor([len(r) - 1 for r in rows])
        return F.normalize(h[torch.arange(len(rows)), last], dim=-1)  # [n, E]


def load_encoder(name: str, device="cpu", base: tuple[nn.Module, PreTrainedTokenizerBase] | None = None, full_stop: bool = False):
    """The text encoder of a preset, "hash", "base" (with `base` from load_base), a Hugging Face id or a folder.

    Returns a callable: list of n descriptions -> unit vectors [n, E]. With `full_stop` it adds one to a description that
    ends in a letter, as the published code does.
    """
    name = PRESETS[name][1] if name in PRESETS else name
    encoder = HashEncoder() if name == "hash" else BaseEncoder(*base) if name == "base" else TransformerEncoder(name, device)
    if not full_stop:
        return encoder
    return lambda texts: encoder([text + "." * text[-1].isalpha() for text in map(str.strip, texts)])
