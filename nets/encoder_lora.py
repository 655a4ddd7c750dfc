"""Text-to-LoRA with a LoRA on its text encoder. The LoRA is trained with the network (not published).

    python train.py @config/families.args --out_dir out/families

The text encoder itself stays frozen.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import encoders
import hypernet
import lora
from encoders import hub
from hypernet import setting
from lora import LoRAConfig, Target
from nets.bank import LoRABank
from support import UserError


@dataclass
class EncoderLoRAConfig(hypernet.TextConfig):
    """Text-to-LoRA's settings, and those of the LoRA."""

    encoder_rank: int = setting(8, "rank of the LoRA on all linear layers of the text encoder")
    encoder_targets: dict[str, Target] = field(default_factory=dict)  # these layers

    def __post_init__(self):
        super().__post_init__()
        self.encoder_targets = lora.as_targets(self.encoder_targets)

    def fit_to(self, base: nn.Module) -> None:
        """Find the linear layers of the text encoder. UserError if it is none of the hub or a folder."""
        if self.encoder in encoders.NAMES:
            message = f"--arch encoder_lora needs a text encoder of the hub or a folder, not {self.encoder}"
            raise UserError(message)
        super().fit_to(base)
        self.encoder_targets = lora.find_targets(hub.load_text_model(self.encoder), [])


class Net(hypernet.TextToLoRA):
    """TextToLoRA whose text encoder is adapted."""

    arch, config_class = "encoder_lora", EncoderLoRAConfig

    def __init__(self, config: EncoderLoRAConfig):
        super().__init__(config)
        encoder_config = LoRAConfig(targets=config.encoder_targets, r=config.encoder_rank)
        self.encoder_lora = LoRABank(encoder_config, 1)

    def connect(self, base, tokenizer) -> None:
        """Load the text encoder. Raises UserError if the LoRA is for another text encoder."""
        name, targets = self.config.encoder, self.config.encoder_targets
        self.encoder = hub.TransformerEncoder(name, next(self.parameters()).device)
        lora.inject(self.encoder.model, list(targets))
        if self.encoder.model.lora_targets != targets:
            raise UserError(f"--encoder {name}: this hypernetwork has a LoRA for another one")

    def encode(self, texts: list[str]) -> Tensor:
        """n descriptions -> [n, E], in float32."""
        texts = [encoders.end_sentence(text.strip(), self.config.full_stop) for text in texts]
        adapter, scaling = self.encoder_lora([0]), self.encoder_lora.config.scaling
        with torch.autocast(self.encoder.model.device.type, enabled=False):
            with lora.use(self.encoder.model, adapter, scaling):
                return self.encoder(texts)
