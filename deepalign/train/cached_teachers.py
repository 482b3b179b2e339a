"""The frozen teachers out of a cache: hidden states from disk, and two lm_heads (one if they are equal) in memory."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from deepalign.data.steps import Batch
from deepalign.output_head import OutputHead
from deepalign.train.frozen_heads import load_output_heads
from deepalign.train.teacher_cache import TEACHERS, TeacherCache, damaged_shards, read_index, refuse_damaged
from deepalign.train.teacher_fingerprint import check_fingerprint
from deepalign.train.teachers import Teachers

_CHECKERS = 4  # threads; checksums let go of the interpreter


class CachedTeachers(Teachers):
    """Teachers whose hidden states were written before (`deepalign cache-teacher`).

    Args:
        cache: opened.
        aligned_head, base_head: of the models the cache was made from.
    """

    def __init__(self, cache: TeacherCache, aligned_head: OutputHead, base_head: OutputHead) -> None:
        self.cache = cache
        self._heads = {"aligned": aligned_head, "base": base_head}

    @classmethod
    def open(
        cls,
        folder: Path,
        fingerprint: Mapping[str, Any],
        paths: Mapping[str, str],
        dtype: torch.dtype,
        progress: bool = False,
    ) -> "CachedTeachers":
        """Check a cache as a whole, map it and load the heads.

        Args:
            folder: of the cache.
            fingerprint: of the run that wants to use it, see `teacher_fingerprint`.
            paths: "aligned" and "base": folders or hub ids.
            dtype: of the heads, and of the hidden states that `hidden` gives.
            progress: show a bar while checksums are compared.

        Raises:
            FileNotFoundError: no cache in `folder`.
            ValueError: a cache of something else, or shards that are missing or damaged (`DamagedShardError`).
        """
        index = read_index(folder)
        remedy = "restore these settings, or write another cache: `deepalign cache-teacher` with another teacher_cache"
        check_fingerprint(folder, index.fingerprint, fingerprint, remedy)
        shards = index.all_shards
        with ThreadPoolExecutor(_CHECKERS) as pool:
            checked = pool.map(lambda shard: damaged_shards(folder, index, [shard]), shards)
            bar = tqdm(checked, desc="check the teacher cache", total=len(shards), unit="shard", disable=not progress)
            refuse_damaged(folder, [problem for found in bar for problem in found])
        heads = load_output_heads({name: paths[name] for name in TEACHERS}, dtype)
        return cls(TeacherCache(folder, index), heads["aligned"], heads["base"])

    @property
    def aligned_head(self) -> OutputHead:
        """The head of the aligned model."""
        return self._heads["aligned"]

    @property
    def base_head(self) -> OutputHead:
        """The head of the base model."""
        return self._heads["base"]

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Read the batch's rows, in the dtype and on the device of the heads."""
        answer_row_R = batch["answer_row"].cpu()
        return self._rows("aligned", answer_row_R), self._rows("base", answer_row_R)

    def to(self, device: torch.device) -> None:
        """Move the heads; equal ones stay one."""
        moved: dict[int, Tensor] = {}
        for name, head in self._heads.items():
            key = head.lm_head.data_ptr()
            moved.setdefault(key, head.lm_head.to(device))
            self._heads[name] = dataclasses.replace(head, lm_head=moved[key])

    def _rows(self, teacher: str, answer_row_R: Tensor) -> Tensor:
        matrix = self._heads[teacher].lm_head
        hidden_RH = self.cache.rows(teacher, answer_row_R, pin_memory=matrix.is_cuda)
        return hidden_RH.to(matrix.device, non_blocking=True).to(matrix.dtype)
