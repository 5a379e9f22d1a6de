"""Data sets larger than memory: an epoch goes through the shards in random order, a few in memory at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from training.dataset import KERNELS, load_shards, shard_path

#: Groups of shards in memory: the one that batches come from, the one before, for batches that are still being made,
#: and the one after, which is read meanwhile.
GROUPS = 3


@dataclass(frozen=True)
class Shards:
    """Some shards of a data set on disk: its folder, their numbers, the names of the arrays that are wanted."""

    folder: Path
    numbers: list[int]
    names: tuple[str, ...]

    def read(self, numbers: list[int] | None = None) -> dict[str, NDArray]:
        """The arrays of all of them or of those with these numbers, as `load_shards` gives them."""
        return load_shards(self.folder, self.numbers if numbers is None else numbers, self.names)

    def samples(self) -> int:
        """In each of them."""
        with np.load(shard_path(self.folder, self.numbers[0])) as shard:
            return KERNELS * len(shard["parameters"])


class StreamedBatches(keras.utils.PyDataset):
    """One epoch: the shards, in random order, in groups; the batches of one group after those of the other.

    A group gives as many whole batches as it has samples for, so up to one batch of samples a group is left out.

    Parameters
    ----------
    shards : Shards
    in_memory : int
        Shards at most. If there are no more, they are one group.
    batch_size : int
    make : callable
        From the arrays of a group and a seed to its batches, a `keras.utils.PyDataset`.
    seed, epoch : int
        They decide every random choice.
    batches : int, optional
        After which the epoch ends; by default it goes through all shards.
    """

    def __init__(
        self,
        shards: Shards,
        in_memory: int,
        batch_size: int,
        make: Callable[[dict[str, NDArray], int], Any],
        seed: int,
        epoch: int,
        batches: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if in_memory < GROUPS:
            raise ValueError(f"shards_in_memory is {in_memory}, but at least {GROUPS} are needed.")
        self.shards, self.make, self.seed, self.epoch = shards, make, seed, epoch
        count, samples = len(shards.numbers), shards.samples()
        groups = 1 if count <= in_memory else -(-count // (in_memory // GROUPS))
        order = np.random.default_rng([seed, epoch]).permutation(shards.numbers)
        self.groups = [group.tolist() for group in np.array_split(order, groups)]
        self.ends = np.cumsum([len(group) * samples // batch_size for group in self.groups])
        self.batches = int(self.ends[-1]) if batches is None else min(batches, int(self.ends[-1]))
        if self.batches == 0:
            raise ValueError(
                f"batch_size is {batch_size}, but {len(self.groups[0])} shards in memory have "
                f"{len(self.groups[0]) * samples} samples; lower it."
            )
        self.lock, self.reader = threading.Lock(), ThreadPoolExecutor(1)
        self.current, self.held = 0, dict[int, Future]()

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Any:
        group = int(np.searchsorted(self.ends, index, "right"))
        return self.group(group)[index - (self.ends[group - 1] if group else 0)]

    def group(self, number: int) -> Any:
        """The batches of a group, read if it isn't there; the reading of the next one begins."""
        with self.lock:
            if number != self.current - 1:
                self.current = number
            self.held = {n: held for n, held in self.held.items() if abs(n - self.current) <= 1}
            for n in (number, self.current + 1):
                if n not in self.held and n < len(self.groups):
                    self.held[n] = self.reader.submit(self.read, n)
            wanted = self.held[number]
        return wanted.result()

    def read(self, number: int) -> Any:
        """The batches of a group, from disk."""
        seed = np.random.SeedSequence([self.seed, self.epoch, number]).generate_state(1)[0]
        return self.make(self.shards.read(self.groups[number]), int(seed))

    def on_epoch_end(self) -> None:
        """Let all shards go."""
        with self.lock:
            self.held = {}
