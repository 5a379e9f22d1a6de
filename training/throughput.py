"""Training throughput: batches as they are made, against the same step on one batch held in memory.

    python -m training.throughput CONFIG DATA_FOLDER --batches 20

Their ratio is 1 less the share of the time that training waits for its batches; 0.85 and more is good.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from training.config import read_config
from training.recipes import Recipe, recipe


class FixedBatch(keras.utils.PyDataset):
    """The same batch `batches` times."""

    def __init__(self, batch: Any, batches: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch, self.batches = batch, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Any:
        return self.batch


def rates(chosen: Recipe, shards: Any, batch_size: int, rounds: int = 5) -> NDArray[np.float64]:
    """Samples/s with batches as they are made, reading included, and with the first of them held in memory.

    One short epoch each in turns, so that what else runs on the machine slows both alike; two steps of warm-up before.

    Returns
    -------
    ndarray, shape (rounds, 2)
    """
    model = chosen.network()
    chosen.compile(model, 0, None)
    made = chosen.batches(shards, 0)
    fixed = FixedBatch(made[0], len(made))
    model.fit(FixedBatch(made[0], 2), verbose=0)

    def rate(batches: keras.utils.PyDataset) -> float:
        started = time.perf_counter()
        model.fit(batches, shuffle=False, verbose=0)
        return len(batches) * batch_size / (time.perf_counter() - started)

    return np.array([(rate(made), rate(fixed)) for _ in range(rounds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batches", type=int, default=20, help="in an epoch")
    arguments = parser.parse_args()
    config = read_config(arguments.config) | {"batches_per_epoch": arguments.batches}
    keras.config.set_dtype_policy(config.get("precision", "float32"))
    chosen = recipe(config)
    numbers = sorted(int(path.stem.split("_")[1]) for path in arguments.data.glob("shard_*.npz"))
    measured = rates(chosen, chosen.load(arguments.data, numbers), config.get("batch_size", 1))
    made, fixed = np.median(measured, 0)
    ratios = np.sort(measured[:, 0] / measured[:, 1])
    print(
        f"{made:.1f} samples/s; one batch held in memory: {fixed:.1f} samples/s (medians of {len(ratios)}); "
        f"ratio {np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
