"""The few words that ranks of one command exchange: what the first one found, what each has done."""

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
# ranks wait for the slowest one at the end; a dead one is the launcher's business
_WAIT = datetime.timedelta(days=7)


class FirstRankError(RuntimeError):
    """An error of rank 0, on the other ranks: rank 0 has the message."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count`, as torchrun and DeepSpeed's launcher start them; alone without a launcher."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_launcher(cls) -> "Ranks":
        """Join the other ranks (over gloo: only small objects travel)."""
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_WAIT)
        return cls(int(os.environ.get("RANK", 0)), count)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which plans and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items: every count-th one."""
        return list(items[self.rank :: self.count])

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank.

        Raises:
            FirstRankError: on the other ranks, where `action` raised an error on rank 0.
        """
        if self.count == 1:
            return action()
        result: list[Any] = [None, False]
        if not self.is_first:
            dist.broadcast_object_list(result, src=0)
            if not result[1]:
                raise FirstRankError("rank 0 ended with an error")
            return result[0]
        try:
            result[:] = action(), True
        finally:
            dist.broadcast_object_list(result, src=0)
        return result[0]
