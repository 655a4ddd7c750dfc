"""Where models are: presets, ids on the Hugging Face hub, folders, and what is shipped in this folder."""

import logging
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download  # comes with transformers
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GteConfig, GteModel
from transformers.utils import logging as transformers_logging

from lora import LoRAConfig, UserError, base_shape, read_file

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # errors are raised anyway

CHECKPOINTS = Path(__file__).parent
GTE = "Alibaba-NLP/gte-large-en-v1.5"
PRESETS = {  # name: (base model, text encoder)
    "tiny": (str(CHECKPOINTS / "tiny"), "hash"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2+hash"),
    "gemma-2-2b": ("google/gemma-2-2b-it", GTE),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", GTE),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", GTE),
}
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_NEEDED = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # duplicate formats

def is_hub_id(name: str) -> bool:
    """Whether a name can only be one on the Hugging Face hub: USER/REPO, perhaps followed by folders."""
    return "/" in name and not name.startswith((".", "/")) and not Path(name).is_dir()

def full_name(base_model: str) -> str:
    """The name that config files record: a preset's Hugging Face id, "tiny", an id or a folder."""
    if base_model in ("tiny", PRESETS["tiny"][0]):
        return "tiny"
    return PRESETS[base_model][0] if base_model in PRESETS else base_model

def preset_of(base_model: str) -> str:
    """The preset with this name or Hugging Face id; "" if there is none."""
    for preset in PRESETS:
        if full_name(preset).lower() == full_name(base_model).lower():
            return preset
    return ""

def fetch(name: str, files: list[str] = MODEL_FILES) -> Path:
    """A folder: `name` itself, or USER/REPO or USER/REPO/SUB/FOLDER of the hub, downloaded once."""
    if not is_hub_id(name):
        if not Path(name).is_dir():
            raise UserError(f"{name} is no folder, no preset ({', '.join(PRESETS)}) and no Hugging Face id")
        return Path(name)
    user, repo, *subfolders = name.strip("/").split("/")
    patterns = ["/".join([*subfolders, file]) for file in files]
    try:
        folder = snapshot_download(f"{user}/{repo}", allow_patterns=patterns, ignore_patterns=NOT_NEEDED)
    except (OSError, ValueError, HTTPError) as e:
        raise UserError(f"{name} is not a folder here, and cannot be downloaded: {str(e)[:200]}") from None
    return Path(folder, *subfolders)

def load(loader, name: str, **settings):
    """loader.from_pretrained on a folder or Hugging Face id, with errors of one line."""
    folder = fetch(name)
    try:
        return loader.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"{name} cannot be loaded: {str(e)[:200]}") from None

# -------------------- What belongs to a base model --------------------

def check_base(trained: LoRAConfig, name: str, shape: list[int]) -> None:
    """Raise UserError if `trained` belongs to another base model than this one, of that name and shape.

    Two hub ids are compared by name. Folders may be anywhere, so they are compared by shape.
    """
    ours, theirs = full_name(name), full_name(trained.base_model)
    if is_hub_id(ours) and is_hub_id(theirs):
        same = ours.lower() == theirs.lower()
    else:
        same = ours == theirs or not trained.base_shape or trained.base_shape == shape
    if not same:
        message = f"what was trained for {trained.base_model} does not go with {name}"
        raise UserError(f"{message} (layers, hidden size, vocabulary: {trained.base_shape} and {shape})")

def shipped_hypernet(base_model: str, reads: str) -> Path:
    """The folder of the hypernetwork in checkpoints/ for a base model; UserError if there is none."""
    shape = None
    if Path(base_model).is_dir():
        shape = base_shape(load(AutoConfig, base_model))
    name = "d2l" if reads == "documents" else "sft_large"
    for file in CHECKPOINTS.glob(f"*/{name}/config.json"):
        config = read_file(file)
        same_name = config["base_model"].lower() == full_name(base_model).lower()
        if same_name or config["base_shape"] == shape:
            return file.parent
    raise UserError(f"no hypernetwork for {base_model} is shipped; train one and pass it with --hypernet")

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

# -------------------- Networks --------------------

def load_skeleton(name: str) -> nn.Module:
    """The base model without weights, on the meta device: only its shapes."""
    config = load(AutoConfig, PRESETS[name][0] if name in PRESETS else name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)

def load_text_model(name: str):
    """The network of a text encoder; that of gte-*-v1.5 without the code of its repository."""
    config = read_file(fetch(name) / "config.json")
    if config.get("model_type") == "new":
        return load(GteModel, name, config=gte_config(config))
    return load(AutoModel, name)

def gte_config(config: dict) -> GteConfig:
    """The config of gte-*-v1.5 for transformers' implementation of it."""
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if config.get("rope_scaling"):  # NTK scaling by k: theta * k, and all frequencies by k^(-2 / head size)
        k = config["rope_scaling"]["factor"]
        head_size = config["hidden_size"] // config["num_attention_heads"]
        rope = {"rope_type": "linear", "factor": k ** (2 / head_size), "rope_theta": config["rope_theta"] * k}
    replaced = ("auto_map", "rope_scaling", "rope_theta", "model_type")
    kept = {key: value for key, value in config.items() if key not in replaced}
    return GteConfig(**kept, rope_parameters=rope)
