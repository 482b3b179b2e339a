"""Data: published data sets and JSONL, chat templates, response masks -> row weights, the stream of training steps."""

from deepalign.data.chat import with_thinking
from deepalign.data.masks import SelectedRows, response_mask_to_row_weights, weight_sums
from deepalign.data.show import show_batch
from deepalign.data.sources import load_conversations, load_data, prompt_and_target

__all__ = [
    "SelectedRows",
    "load_conversations",
    "load_data",
    "prompt_and_target",
    "response_mask_to_row_weights",
    "show_batch",
    "weight_sums",
    "with_thinking",
]
