"""Where models are: presets, ids on the Hugging Face hub, folders. Loading them with errors of one line."""

import logging
import re
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download  # comes with transformers
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from support.files import UserError, read_file

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # errors are raised anyway

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
GTE = "Alibaba-NLP/gte-large-en-v1.5"
PRESETS = {  # name: (base model, text encoder)
    "tiny": (str(CHECKPOINTS / "tiny"), "hash"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"),
    "gemma-2-2b": ("google/gemma-2-2b-it", GTE),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", GTE),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", GTE),
    "qwen3.5-4b": ("Qwen/Qwen3.5-4B", GTE),  # shapes tested, never run
    "gemma-4-e2b": ("google/gemma-4-E2B-it", GTE),  # shapes tested, never run
}
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_NEEDED = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # duplicate formats


def is_hub_id(name: str) -> bool:
    """Whether a name can only be one on the Hugging Face hub: USER/REPO, perhaps followed by folders."""
    return "/" in name and not name.startswith((".", "/")) and not Path(name).is_dir()


def source_of(base_model: str) -> str:
    """Where a base model comes from: a Hugging Face id or a folder."""
    return PRESETS[base_model][0] if base_model in PRESETS else base_model


def full_name(base_model: str) -> str:
    """The name that config files record: a preset's Hugging Face id, "tiny", an id or a folder."""
    if base_model in ("tiny", PRESETS["tiny"][0]):
        return "tiny"
    return source_of(base_model)


def preset_of(base_model: str) -> str:
    """The preset with this name or Hugging Face id; "" if there is none."""
    for preset in PRESETS:
        if full_name(preset).lower() == full_name(base_model).lower():
            return preset
    return ""


def preset_encoder(base_model: str) -> str:
    """The text encoder of a base model's preset; otherwise the base model itself."""
    preset = preset_of(base_model)
    return PRESETS[preset][1] if preset else "base"


def encoder_source(encoder: str) -> str:
    """What --encoder names; a preset's name stands for its text encoder."""
    return PRESETS[encoder][1] if encoder in PRESETS else encoder


def check_base(name: str, shape: list[int], trained_for: str, trained_shape: list[int]) -> None:
    """Raise UserError if what was trained for one base model is to be used with another.

    A shape is [layers, hidden size, vocabulary], [] if it is not known. Two hub ids are compared by name.
    Folders may be anywhere, so they are compared by shape.
    """
    ours, theirs = full_name(name), full_name(trained_for)
    if is_hub_id(ours) and is_hub_id(theirs):
        same = ours.lower() == theirs.lower()
    else:
        same = ours == theirs or not trained_shape or trained_shape == shape
    if not same:
        message = f"what was trained for {trained_for} cannot be used with {name}"
        raise UserError(f"{message} (layers, hidden size, vocabulary: {trained_shape} and {shape})")


def fetch(name: str, files: list[str] = MODEL_FILES) -> Path:
    """A folder: `name` itself, or USER/REPO or USER/REPO/SUB/FOLDER of the hub, downloaded once."""
    if not is_hub_id(name):
        if not Path(name).is_dir():
            presets = ", ".join(PRESETS)
            raise UserError(f"{name} is neither a folder, nor a preset ({presets}), nor a Hugging Face id")
        return Path(name)
    user, repo, *subfolders = name.strip("/").split("/")
    patterns = ["/".join([*subfolders, file]) for file in files]
    try:
        folder = snapshot_download(f"{user}/{repo}", allow_patterns=patterns, ignore_patterns=NOT_NEEDED)
    except (OSError, ValueError, HTTPError) as e:
        reason = first_line(e)
        raise UserError(f"{name} is not a folder here, and cannot be downloaded: {reason}") from None
    return Path(folder, *subfolders)


def fetch_models(base_model: str, encoder: str) -> None:
    """Download a base model and a text encoder, if they are not on this machine yet."""
    if encoder_source(encoder) not in ("hash", "base"):
        fetch(encoder_source(encoder))
    fetch(source_of(base_model))


def first_line(error: Exception) -> str:
    """What an error says first; the messages of libraries go on for pages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# -------------------- Loading --------------------


def from_pretrained(loader, name: str, **settings):
    """loader.from_pretrained on a preset's base model, a folder or a Hugging Face id."""
    folder = fetch(source_of(name))
    try:
        return loader.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"{name} cannot be loaded: {first_line(e)}") from None


def load_skeleton(name: str) -> nn.Module:
    """The base model without weights, on the meta device: only its shapes."""
    config = from_pretrained(AutoConfig, name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_text_model(name: str):
    """The network of a text encoder; that of gte-*-v1.5 without the code of its repository."""
    config = read_file(fetch(name) / "config.json")
    if config.get("model_type") != "new":
        return from_pretrained(AutoModel, name)
    if not hasattr(transformers, "GteModel"):
        raise UserError(f"{name} needs transformers 5.18 or newer")
    return from_pretrained(transformers.GteModel, name, config=gte_config(config))


def longest_text(text_model: nn.Module) -> int:
    """How many tokens a text encoder has positions for."""
    n_positions = getattr(text_model.config, "max_position_embeddings", 8192)  # T5 has no limit
    table = getattr(getattr(text_model, "embeddings", None), "position_embeddings", None)
    unused = getattr(table, "padding_idx", None)  # RoBERTa-style models start positions at padding_idx + 1
    return n_positions if unused is None else n_positions - unused - 1


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


# -------------------- What to show for a shipped hypernetwork --------------------


def examples(base_model: str) -> dict[str, list]:
    """What to show for a base model, from examples.json beside what is shipped for it."""
    path = CHECKPOINTS / preset_of(base_model) / "examples.json"
    return read_file(path) if path.exists() else {"descriptions": [], "documents": [], "sorts": []}


def example_inputs(base_model: str, description: str) -> list[str]:
    """Inputs to show an adapter on: of the sort that the description names most, otherwise the first."""
    best, most_named = [], -1
    for sort in examples(base_model)["sorts"]:
        named = [word for word in sort["words"] if re.search(rf"\b{word}", description.lower())]
        if len(named) > most_named:
            best, most_named = sort["inputs"], len(named)
    return best
