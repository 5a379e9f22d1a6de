"""Epochs over data sets of which a part is in memory at a time."""

import gc
import weakref

import keras
import numpy as np
import pytest

from training import streaming
from training.dataset import KERNELS, load_shards, shard_path
from training.streaming import Shards, StreamedBatches

SHARDS, SCANS, BATCH = 12, 4, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number in range(SHARDS):
        identities = number * SCANS + np.arange(SCANS)
        np.savez(shard_path(folder, number), parameters=identities[:, None], unwanted=np.zeros(9))
    return folder


class Kernels(keras.utils.PyDataset):
    """Batches of the identities of kernels in an order of the seed's."""

    def __init__(self, arrays, seed):
        super().__init__()
        assert set(arrays) == {"parameters"}
        kernels = (arrays["parameters"] * KERNELS + np.arange(KERNELS)).ravel()
        self.order = np.random.default_rng(seed).permutation(kernels)

    def __getitem__(self, index):
        return self.order[index * BATCH : (index + 1) * BATCH]


def streamed(folder, in_memory, epoch=0, **kwargs):
    return StreamedBatches(
        Shards(folder, list(range(SHARDS)), ("parameters",)), in_memory, BATCH, Kernels, 7, epoch, **kwargs
    )


@pytest.mark.parametrize("in_memory", [3, 6, 8, 12])
def test_an_epoch_has_every_kernel_once_in_an_order_of_its_own(folder, in_memory):
    orders = []
    for epoch in (0, 0, 1):
        batches = streamed(folder, in_memory, epoch)
        orders.append(np.concatenate([batches[n] for n in range(len(batches))]))
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(SHARDS * SCANS * KERNELS))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    together = SHARDS if in_memory >= SHARDS else in_memory // streaming.GROUPS
    first = orders[0][: together * SCANS * KERNELS] // (SCANS * KERNELS)
    assert len(np.unique(first)) == together
    assert (np.diff(first) != 0).mean() >= (0 if together == 1 else 0.3)


@pytest.mark.parametrize("in_memory", [3, 6, 7])
def test_no_more_shards_are_in_memory_than_allowed(folder, in_memory, monkeypatch):
    living, peaks = [], []

    def counted(folder, numbers, names):
        loaded = load_shards(folder, numbers, names)
        gc.collect()
        living.extend((weakref.ref(loaded["parameters"]), number) for number in numbers)
        peaks.append(sum(reference() is not None for reference, _ in living))
        return loaded

    class Keeping(Kernels):
        def __init__(self, arrays, seed):
            super().__init__(arrays, seed)
            self.arrays = arrays

    monkeypatch.setattr(streaming, "load_shards", counted)
    batches = streamed(folder, in_memory)
    batches.make = Keeping
    order = np.arange(len(batches)).reshape(-1, 4)[:, [2, 0, 3, 1]].ravel()  # as threads fetch: not quite in order
    fetched = np.concatenate([batches[n] for n in order.tolist()])
    assert len(np.unique(fetched)) == SHARDS * SCANS * KERNELS
    assert len(living) == SHARDS
    assert 2 * (in_memory // streaming.GROUPS) <= max(peaks) <= in_memory
    batches.on_epoch_end()
    gc.collect()
    assert not any(reference() is not None for reference, _ in living)


def test_an_epoch_may_end_early_and_says_what_does_not_fit(folder):
    assert len(streamed(folder, 6, batches=5)) == 5
    assert len(streamed(folder, 6)) == SHARDS * SCANS * KERNELS // BATCH
    shards = Shards(folder, [0, 1, 2, 3], ("parameters",))
    with pytest.raises(ValueError, match="batch_size is 100, but 1 shards in memory have 36 samples; lower it"):
        StreamedBatches(shards, 3, 100, Kernels, 1, 0)
    with pytest.raises(ValueError, match="shards_in_memory is 2, but at least 3"):
        StreamedBatches(shards, 2, 6, Kernels, 1, 0)
