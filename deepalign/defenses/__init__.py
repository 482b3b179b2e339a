"""Baseline defences that the paper compares with, on peft and transformers; see docs/defenses.md.

Ways to fine-tune with adapters (`evaluate.finetune` runs them): `PlainLora`, `SafeLora`, `SaLora`. Ways to train the
aligned model beforehand: `align_with_vaccine`, `augment_safety`.
"""

from deepalign.defenses.lora import AdapterMethod, LoraSettings, PlainLora, merged_model
from deepalign.defenses.safe_lora import SafeLora, project_lora
from deepalign.defenses.safety_augmentation import (
    AugmentationSettings,
    SafetyTriplet,
    augment_safety,
    distilled_anchor,
    spliced_examples,
)
from deepalign.defenses.salora import SaLora, SaLoraSettings, attach_salora
from deepalign.defenses.training import SftSettings, mean_answer_loss
from deepalign.defenses.vaccine import VaccineSettings, align_with_vaccine, attention_perturbation, perturbed_attention

__all__ = [
    "AdapterMethod",
    "AugmentationSettings",
    "LoraSettings",
    "PlainLora",
    "SaLora",
    "SaLoraSettings",
    "SafeLora",
    "SafetyTriplet",
    "SftSettings",
    "VaccineSettings",
    "align_with_vaccine",
    "attach_salora",
    "attention_perturbation",
    "augment_safety",
    "distilled_anchor",
    "mean_answer_loss",
    "merged_model",
    "perturbed_attention",
    "project_lora",
    "spliced_examples",
]
