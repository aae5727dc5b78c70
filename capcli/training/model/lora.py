"""LoRA adapters (Hu et al., 2021) of the peft package: added to a model before training, saved as plain peft loads them."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from capcli.errors import UsageError
from capcli.imports import importing
from capcli.models import adapters
from capcli.models.checkpoint import quiet_transformers
from capcli.options import TrainOptions
from capcli.text import counted
from capcli.training.model.pretrained import seeded

LAYERS = "q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2"
TEXT_LAYERS = rf".*\b(language_model|text_model)\b.*\.({LAYERS})"
# The linear layers of a model's text decoder, by model_type: a regular expression for their whole names.
TARGETS = {
    "blip": r".*\btext_decoder\b.*\.(query|key|value|dense)",
    "git": r".*\bgit\.encoder\b.*\.(query|key|value|dense)",
}
CARD = "README.md"  # peft writes one of its own


def add_lora(model: Any, options: TrainOptions) -> tuple[Any, str]:
    """The model with an adapter, whose weights alone are trainable, and a line that says so.

    The adapter changes nothing before training. Raises UsageError where no layer matches, CapcliError where peft is missing.
    """
    with importing("peft", "peft", adapters.MISSING, "pip install --force-reinstall peft"):
        import peft
    targets = options.lora_targets or TARGETS.get(model.config.model_type, TEXT_LAYERS)
    alpha: Any = options.lora_alpha or 2 * options.lora_rank
    config = peft.LoraConfig(r=options.lora_rank, lora_alpha=alpha, target_modules=targets)
    try:
        with quiet_transformers(), warnings.catch_warnings(), seeded(options.data.seed, "lora"):
            warnings.simplefilter("ignore")  # of transformers, about names that peft still uses
            adapted: Any = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"--lora: no linear layer of {options.model.model} can be adapted ({error}): give --lora-targets"
        ) from error
    base = str(options.model.model)
    folder = os.path.expanduser(base)
    config.base_model_name_or_path = os.path.abspath(folder) if os.path.isdir(folder) else base
    layers = sum(hasattr(module, "lora_A") for module in adapted.modules())
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    whole = sum(weight.numel() for weight in adapted.parameters()) - trainable
    line = f"LoRA of rank {options.lora_rank} in {counted(layers, 'layer')}: {trainable:,} parameters trainable, {whole:,} frozen"
    return adapted, line


def is_adapted(model: Any) -> bool:
    """Whether a model has an adapter of `add_lora`."""
    return hasattr(model, "peft_config")


def save_adapter(folder: str, model: nn.Module) -> None:
    """Writes the adapter's two files to a folder. Raises OSError, and errors of the types of safetensors."""
    os.makedirs(folder, exist_ok=True)
    adapted: Any = model
    with quiet_transformers():
        adapted.save_pretrained(folder)
    if os.path.exists(card := os.path.join(folder, CARD)):
        os.remove(card)
