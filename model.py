"""The two frozen models: the base model that is adapted, and the text encoder that reads the description.

Both come from a preset, a Hugging Face id or a folder. The preset `tiny` needs neither download nor GPU.
"""

import logging
import re
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download  # comes with transformers
from huggingface_hub.errors import HTTPError
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GteConfig, GteModel
from transformers.utils import logging as transformers_logging

from lora import UserError, read, set_adapter

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
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_NEEDED = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # the same weights once more

# -------------------- Names and places --------------------

def is_hub_id(name: str) -> bool:
    """Whether a name can only be one of the Hugging Face hub: USER/REPO, perhaps with folders behind it."""
    return "/" in name and not name.startswith((".", "/")) and not Path(name).is_dir()

def preset_name(base_model: str) -> str:
    """The short name of a base model. A preset, its hub id and a folder of that name are one model."""
    on_hub = is_hub_id(base_model)
    short = base_model.lower() if on_hub else Path(base_model).name.lower()
    for name, (source, _) in PRESETS.items():
        if short in (name, source.lower() if on_hub else Path(source).name.lower()):
            return name
    return short

def full_name(base_model: str) -> str:
    """The name that config files record: a preset's Hugging Face id, or the name as it is."""
    return "tiny" if base_model in ("tiny", TINY) else PRESETS.get(base_model, (base_model,))[0]

def fetch(name: str, files: list[str] = MODEL_FILES) -> Path:
    """A folder: `name` itself, or USER/REPO or USER/REPO/SUB/FOLDER of the hub, downloaded once."""
    if not is_hub_id(name):
        if not Path(name).is_dir():
            raise UserError(f"{name} is no folder, no preset ({', '.join(PRESETS)}) and no Hugging Face id")
        return Path(name)
    user, repo, *sub = name.strip("/").split("/")
    patterns = ["/".join([*sub, file]) for file in files]
    try:
        folder = snapshot_download(f"{user}/{repo}", allow_patterns=patterns, ignore_patterns=NOT_NEEDED)
    except (OSError, ValueError, HTTPError) as e:
        raise UserError(f"{name} is not a folder here, and cannot be downloaded: {str(e)[:200]}") from None
    return Path(folder, *sub)

def load(loader, name: str, **settings):
    """What a transformers loader makes of a model's folder."""
    folder = fetch(name)
    try:
        return loader.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"{name} cannot be loaded: {str(e)[:200]}") from None

# -------------------- The base model --------------------

def load_base(name: str, device="cpu", dtype: torch.dtype | None = None):
    """(base model, tokenizer): frozen, in eval mode. dtype None is float32 on CPU and bfloat16 elsewhere."""
    source = PRESETS.get(name, (name,))[0]
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    tokenizer = load(AutoTokenizer, source)
    model = load(AutoModelForCausalLM, source, dtype=dtype)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        starts = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # it begins every text
        tokenizer.chat_template = "{{ bos_token }}" * starts + PLAIN_TEMPLATE
    eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    return model.to(device).requires_grad_(False).eval(), tokenizer

PLAIN_TEMPLATE = (  # for a base model without a chat template: "input -> answer<eos>", one after another
    "{% for m in messages if m.content or m.role != 'system' %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}\n{% else %}{{ m.content }} ->{% endif %}"
    "{% endfor %}"
)
SUFFIX = " Please complete the task without any explanation."  # published, behind the instruction

def prompt(tokenizer, input: str, instruction: str = "", examples: list[tuple[str, str]] = ()) -> list[dict]:
    """The chat that puts `input` to the model: an empty system message, then a user turn, as published. An
    `instruction` stands before the input; `examples` are earlier turns, for in-context learning."""
    messages = [{"role": "system", "content": ""}] if takes_system(tokenizer) else []
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages + [{"role": "user", "content": f"{instruction}\n\n{input}".strip()}]

@cache
def takes_system(tokenizer) -> bool:
    """Some chat templates (Gemma's) refuse a system message."""
    try:
        return bool(render(tokenizer, [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]))
    except Exception:  # each template raises what it likes
        return False

def render(tokenizer, messages: list[dict], answer: str | None = None) -> str:
    """The prompt as text; with `answer` the text that the model has to write after it, with its end mark."""
    template = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
    text = template(messages, add_generation_prompt=True)
    if answer is None:
        return text
    whole = template(messages + [{"role": "assistant", "content": answer}])
    if not whole.startswith(text):
        raise UserError("the chat template of this base model does not put answers where it asks for them")
    return whole.removeprefix(text).rstrip("\n")

def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text, in which the template has put the special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]

def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Rows of different lengths as one tensor. [rows, T]"""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows)])

def check_known(tokenizer, texts: list[str]) -> None:
    """Raise UserError for a word that the tokenizer has no token for (the tiny one knows few)."""
    words = dict.fromkeys(word for text in texts for word in text.split())
    unknown = lambda text: tokenizer.unk_token_id in tokenize(tokenizer, text)
    if tokenizer.unk_token_id is not None and unknown(" ".join(words)):
        word = next(filter(unknown, words), "some of them")
        raise UserError(f"the base model has no token for {word} (the tiny one: see assets/tiny_world.json)")

@torch.no_grad()
def answer(model: nn.Module, tokenizer, prompts: list[str], max_new_tokens=32, strip=True) -> list[str]:
    """Greedy answers to rendered prompts, in one batch, with whatever adapters are set. White space is
    stripped, but not at the end of an answer that was cut off: there the model would have said more."""
    rows = [tokenize(tokenizer, p) for p in prompts]
    ids = pad(rows, tokenizer.pad_token_id, left=True).to(model.device)  # [n, T]
    mask = pad([[1] * len(row) for row in rows], 0, left=True).to(model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[:, ids.shape[1] :]  # [n, up to max_new_tokens]
    ended = torch.isin(new, torch.tensor(model.generation_config.eos_token_id, device=new.device)).any(1)
    if not strip:  # some tokenizers drop a text's first space, so cut the answer off the whole
        before, whole = (tokenizer.batch_decode(x, skip_special_tokens=True) for x in (ids, out))
        return [text[len(start) :] for start, text in zip(before, whole)]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() if whole else text.lstrip() for text, whole in zip(texts, ended)]

@torch.no_grad()
def context_features(model: nn.Module, input_ids: Tensor, mask: Tensor, early_exit: bool = False) -> Tensor:
    """The base model's states at each token, for Doc-to-LoRA. input_ids, mask [n, T] -> [n, L, T, d]: what
    each of the L layers reads, for the last one after the final norm, as published; with early_exit only the
    states after L/4 layers, [n, T, d]."""
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[: len(layers) // 4 if early_exit else len(layers) - 1]
    try:
        out = decoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    finally:
        decoder.layers = layers
    return out.last_hidden_state if early_exit else torch.stack(out.hidden_states, 1)

# -------------------- The text encoder: n descriptions -> [n, E], unit vectors --------------------

FUNCTION_WORDS = """a an the of to in on at by for from with or but is are was were be been it its this that
    these those them they their there you your i me my we our as then than so what which who whatever any some
    please into out up down . , ; : - ?""".split()  # they say little about the task

def hash_encoder(texts: list[str], width: int = 8192) -> Tensor:
    """No model at all: words, pairs of near words and 3- to 5-letter pieces, hashed into signed sums."""
    out = np.zeros((len(texts), width), np.float32)  # [n, E]
    for row, text in zip(out, texts):
        words = [(w, 0.3 if w in FUNCTION_WORDS else 1.0) for w in re.findall(r"\w+|[^\w\s]", text.lower())]
        parts = [(w, 2 * k) for w, k in words]
        for gap in (1, 2):
            parts += [(f"{a} {gap} {b}", max(j, k)) for (a, j), (b, k) in zip(words, words[gap:])]
        for n in (3, 4, 5):
            parts += [(f"#{w}#"[i : i + n], k) for w, k in words for i in range(len(w) + 3 - n)]
        for part, weight in parts:
            code = zlib.crc32(part.encode())
            row[code % width] += weight if code >> 31 else -weight
    return F.normalize(torch.from_numpy(out), dim=-1)

class TransformerEncoder:
    """A text encoder of the hub, pooled as its own 1_Pooling/config.json says: mean, CLS or last token."""

    def __init__(self, name: str, device="cpu"):
        folder = fetch(name)
        config = read(folder / "config.json")
        self.tokenizer = load(AutoTokenizer, name)
        is_gte = config.get("model_type") == "new"  # gte-*-v1.5, without the code of its repository
        self.model = load(GteModel, name, config=gte_config(config)) if is_gte else load(AutoModel, name)
        self.model = self.model.to(device).requires_grad_(False).eval()
        self.longest = min(8192, self.model.config.max_position_embeddings)  # tokens
        pooling = folder / "1_Pooling" / "config.json"
        self.pooling = read(pooling) if pooling.exists() else {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        out = []
        for i in range(0, len(texts), 64):
            cut = dict(truncation=True, max_length=self.longest, padding=True, padding_side="right")
            batch = self.tokenizer(texts[i : i + 64], return_tensors="pt", **cut).to(self.model.device)
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

def gte_config(config: dict) -> GteConfig:
    """The config of gte-*-v1.5 for transformers' own implementation of it."""
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if config.get("rope_scaling"):  # NTK scaling by k: theta * k, and all frequencies by k^(-2 / head size)
        k, d = config["rope_scaling"]["factor"], config["hidden_size"] // config["num_attention_heads"]
        rope = {"rope_type": "linear", "factor": k ** (2 / d), "rope_theta": config["rope_theta"] * k}
    replaced = ("auto_map", "rope_scaling", "rope_theta", "model_type")
    return GteConfig(**{k: v for k, v in config.items() if k not in replaced}, rope_parameters=rope)

@torch.no_grad()
def base_encoder(model: nn.Module, tokenizer, texts: list[str]) -> Tensor:
    """The base model as text encoder: its last state at the last token (paper, section 3). [n, E]"""
    check_known(tokenizer, texts)
    set_adapter(model, None)
    rows = [tokenizer(t)["input_ids"] for t in texts]
    ids = pad(rows, tokenizer.pad_token_id).to(model.device)
    h = model.base_model(input_ids=ids).last_hidden_state.float()  # [n, T, E]
    last = torch.tensor([len(row) - 1 for row in rows])
    return F.normalize(h[torch.arange(len(rows)), last], dim=-1)

def load_encoder(name: str, device="cpu", base: tuple | None = None, full_stop: bool = False):
    """The text encoder of a preset, "hash", "base" (with `base` from load_base), a hub id or a folder; or
    several, joined by "+", whose outputs stand side by side.

    A callable: list of n descriptions -> [n, E], a unit vector of each encoder. With `full_stop`,
    descriptions that end in a letter get one, as published.
    """
    name = PRESETS[name][1] if name in PRESETS else name
    encode = partial(base_encoder, *base) if name == "base" else hash_encoder
    if "+" in name:
        parts = [load_encoder(part, device, base) for part in name.split("+")]
        encode = lambda texts: torch.cat([part(texts).to(device) for part in parts], -1)
    elif name not in ("hash", "base"):
        encode = TransformerEncoder(name, device)
    if not full_stop:
        return encode
    return lambda texts: encode([text + "." * text[-1].isalpha() for text in map(str.strip, texts)])
