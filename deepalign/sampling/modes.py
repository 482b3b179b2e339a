"""The one condition every measurement puts on a model: dropout must be off."""

import torch


def check_evaluation_mode(model: torch.nn.Module, name: str) -> None:
    """Refuse a model in training mode: dropout would make the measured distribution a random one.

    The mode is left to the caller, because switching it here would silently change a model in training.

    Raises:
        ValueError: `model.training` is set; `name` says which argument it was.
    """
    if model.training:
        raise ValueError(f"{name} is in training mode, in which dropout is active; call {name}.eval() first")
