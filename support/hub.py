"""Where models are: presets, ids on the Hugging Face hub, folders. Loading them with errors of one line."""

import logging
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download  # comes with transformers
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from support.files import UserError, read_object

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
}
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_NEEDED = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # duplicate formats


def is_hub_id(name: str) -> bool:
    """Whether a name can only be one on the Hugging Face hub: USER/REPO, perhaps followed by folders."""
    first = name.split("/")[0]  # USER, unless it is a folder here
    return "/" in name and first not in ("", ".", "..", "~") and not Path(first).is_dir()


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


def base_shape(config) -> list[int]:
    """[layers, hidden size, vocabulary]: identifies a base model that is stored in a folder."""
    text = config.get_text_config()
    return [text.num_hidden_layers, text.hidden_size, text.vocab_size]


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


def fetch(name: str, files: list[str] = MODEL_FILES, flag: str = "--base_model") -> Path:
    """A folder: `name` itself, or USER/REPO or USER/REPO/SUB/FOLDER of the hub, downloaded once.

    Errors name the flag with which a user gave the name.
    """
    if not is_hub_id(name):
        if not Path(name).is_dir():
            presets = f", a preset ({', '.join(PRESETS)})" if flag == "--base_model" else ""
            raise UserError(f"{flag} {name} is neither a folder{presets} nor USER/REPO on the hub")
        return Path(name)
    user, repo, *subfolders = name.strip("/").split("/")
    patterns = ["/".join([*subfolders, file]) for file in files]
    try:
        folder = snapshot_download(f"{user}/{repo}", allow_patterns=patterns, ignore_patterns=NOT_NEEDED)
    except (OSError, ValueError, HTTPError) as e:
        message = f"{name} is not a folder here, and cannot be downloaded: {first_line(e)}"
        raise UserError(f"{message}; if it is on this machine, pass its folder as {flag}") from None
    return Path(folder, *subfolders)


def first_line(error: Exception) -> str:
    """What an error says first; the messages of libraries go on for pages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# -------------------- Loading --------------------


def from_pretrained(loader, name: str, flag: str = "--base_model", **settings):
    """loader.from_pretrained on a preset's base model, a folder or a Hugging Face id."""
    folder = fetch(source_of(name), flag=flag)
    if (folder / "adapter_config.json").exists() or (folder / "hypernet.safetensors").exists():
        raise UserError(f"{flag} {name} is an adapter or a hypernetwork, not a model")
    try:
        return loader.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError) as e:
        raise UserError(f"{name} cannot be loaded: {first_line(e)}") from None


def load_weights(loader, name: str, flag: str = "--base_model", **settings) -> nn.Module:
    """A model with its weights. Raises UserError if some are missing: they would be random."""
    network, report = from_pretrained(loader, name, flag, output_loading_info=True, **settings)
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # poolers are not used
    if missing:
        raise UserError(f"{name} cannot be loaded: {len(missing)} weights are missing, such as {missing[0]}")
    return network


def load_skeleton(name: str) -> nn.Module:
    """The base model without weights, on the meta device: only its shapes."""
    config = from_pretrained(AutoConfig, name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def window_of(base: nn.Module) -> int:
    """How many tokens the base model can read."""
    n = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return n or 10**9  # some models have no limit


# -------------------- What is shipped --------------------


def shipped_hypernet(base_model: str, reads: str) -> Path:
    """The folder of the hypernetwork in checkpoints/ for a base model; UserError if there is none."""
    shape = None
    if Path(base_model).is_dir():
        shape = base_shape(from_pretrained(AutoConfig, base_model))
    name = "d2l" if reads == "documents" else "sft_large"
    for file in CHECKPOINTS.glob(f"*/{name}/config.json"):
        config = read_object(file)
        same_name = config["base_model"].lower() == full_name(base_model).lower()
        if same_name or config["base_shape"] == shape:
            return file.parent
    raise UserError(f"no hypernetwork for {base_model} is shipped; train one and pass it with --hypernet")


def examples(base_model: str) -> dict:
    """What to show for a base model, from examples.json beside what is shipped for it."""
    path = CHECKPOINTS / preset_of(base_model) / "examples.json"
    return read_object(path) if preset_of(base_model) and path.exists() else {}


def say_length(inputs: list[str], base_model: str) -> None:
    """The tiny world's inputs have four words."""
    n_words = examples(base_model).get("words_per_input")
    if n_words and any(len(text.split()) != n_words for text in inputs):
        print(f"note: in training inputs had {n_words} words; others get wrong answers", file=sys.stderr)
