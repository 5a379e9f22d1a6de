"""Stitched feature images of a data set of scans, so that an image network can be trained without its encoder.

    python -m training.features MODEL.keras DATA_FOLDER FEATURES_FOLDER --views 3

The encoder of a `StitchedNetwork` is most of its training's work where scans are dense; with its weights fixed, its
features can be made once. Every scan is seen whole in so many views: augmented and counted as in
`training.scan_batches`, each at a dose of its own, within `--doses` (electrons in 1 / k0^2). A shard of features comes
from a shard of scans and from the seed alone, and appears whole or not at all; only missing ones are made. With
`--first 1000` shard 0 of the scans becomes shard 1000 of the features, so that one folder holds those of several data
sets, or of several doses. With `--teacher` the mean of the network's images over the scan's eight symmetries is kept
too, so that one image can learn from eight (`teacher_weight` of the model's configuration): nine times the work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from training.dataset import load_images, mapped, save_shard, shard_path
from training.losses import PhaseImageError  # noqa: F401 (registers the loss)
from training.scan_batches import SCAN_DOSE_RANGE, ScanBatches, Scans, mirrored

#: Pixels of a batch's images, about.
PIXELS_A_BATCH = 24_000
_PATTERNS_AT_ONCE = 512


def feature_image(model: Any, inputs: dict[str, NDArray]) -> NDArray[np.float32]:
    """Features, level and coverage (channels, pixels, pixels) of one scan, given as by `ScanBatches`.

    As `StitchedNetwork.feature_image` makes them, with the encoder in batches, as whole scans need.
    """
    patterns = inputs["patterns"]
    flat = patterns.reshape(-1, *patterns.shape[3:])
    geometry = np.repeat(inputs["geometry"], len(flat), axis=0)
    patches = model.encoder.predict([flat, geometry], batch_size=_PATTERNS_AT_ONCE, verbose=0)
    return np.asarray(model.stitched(patterns, patches, inputs, inputs["geometry"][:, :1]))[0]


def symmetric_phase(model: Any, inputs: dict[str, NDArray], pixels: int) -> NDArray[np.float32]:
    """Mean over the eight symmetries of one scan of its phase image, each turned back.

    Parameters
    ----------
    model : StitchedNetwork
    inputs : dict
        Of one scan, as by `ScanBatches`.
    pixels : int
        Side of the image without the zeros beyond.

    Returns
    -------
    ndarray, shape (pixels, pixels)
        [rad]
    """
    total = np.zeros((pixels, pixels), np.float32)
    for operation in range(8):
        patterns, _ = mirrored(inputs["patterns"][0], total, operation)
        features = feature_image(model, inputs | {"patterns": np.ascontiguousarray(patterns)[None]})
        phase = np.asarray(model(inputs | {"features": features[None]}))[0, :pixels, :pixels, 0]
        if operation & 4:
            phase = phase.T
        if operation & 2:
            phase = phase[::-1]
        if operation & 1:
            phase = phase[:, ::-1]
        total += phase / 8
    return total


def make_features(
    model: Any,
    data: Path,
    number: int,
    views: int,
    seed: int,
    doses: tuple[float, float] = SCAN_DOSE_RANGE,
    teacher: bool = False,
) -> dict[str, NDArray]:
    """Features of one shard.

    Returns
    -------
    dict of ndarray
        For image n: `features_n` (channels, pixels, pixels), float16, `target_n` (pixels, pixels) [rad] and row n of
        `numbers`: scan step [1 / k0], phases of defocus and C_s [rad], pixel size [1 / k0], 1 / electrons in 1 / k0^2,
        k0 [1/A]; with `teacher` also `teacher_n` (pixels, pixels) [rad], what `symmetric_phase` gives.
    """
    scans = Scans(data, [number])
    arrays: dict[str, NDArray] = {}
    numbers: list[list[float]] = []
    for view in range(views):
        batches = ScanBatches(scans, 0, seed + number, view, whole=True, dose_range=doses)
        for n in range(len(scans)):
            (inputs, target), image = batches[n], len(numbers)
            arrays[f"features_{image}"] = feature_image(model, inputs).astype(np.float16)
            arrays[f"target_{image}"] = target[0, ..., 0]
            others = inputs["pixel_size"][0, 0], target[0, 0, 0, 1], inputs["aperture_radius"][0, 0]
            numbers.append([*inputs["geometry"][0], *others])
            if teacher:
                pixels = len(scans.phases[n])
                phase = symmetric_phase(model, inputs, pixels)
                arrays[f"teacher_{image}"] = np.pad(phase, (0, target.shape[1] - pixels))
    return arrays | {"numbers": np.array(numbers, np.float32)}


def _work(task: tuple[Path, Path, Path, list[int], int, int, int, tuple[float, float], bool]) -> None:
    """Make the features of some shards."""
    weights, data, folder, numbers, first, views, seed, doses, teacher = task
    model = keras.saving.load_model(weights, compile=False)
    for number in tqdm(numbers, unit=" shards"):
        made = make_features(model, data, number, views, seed, doses, teacher)
        save_shard(shard_path(folder, first + number), made)


class Features:
    """Feature images in memory: lists `images` (channels, pixels, pixels), `targets` (pixels, pixels) [rad] and, with
    `teacher`, `teachers` like them (else empty), and rows `numbers` as `make_features` gives them. Teachers of shards
    that were made without one are zeros.

    Parameters
    ----------
    folder : Path
    numbers : list of int
        Shards.
    teacher : bool
    """

    def __init__(self, folder: Path, numbers: list[int], teacher: bool = False) -> None:
        self.numbers, (self.images, self.targets) = load_images(folder, numbers, "numbers", ("features", "target"))
        self.teachers: list[NDArray] = []
        for number in numbers if teacher else ():
            shard = mapped(shard_path(folder, number))
            for n in range(len(shard["numbers"])):
                self.teachers.append(shard.get(f"teacher_{n}", np.zeros_like(shard[f"target_{n}"])))

    def __len__(self) -> int:
        return len(self.images)


def network_inputs(features: NDArray, numbers: NDArray) -> dict[str, NDArray]:
    """What `StitchedNetwork` takes: feature images (n, channels, pixels, pixels) and their rows of `numbers` (n, 6), as
    `make_features` gives them."""
    return {
        "features": features.astype(np.float32),
        "geometry": numbers[:, :3],
        "pixel_size": numbers[:, 3:4],
        "aperture_radius": numbers[:, 5:],
    }


class FeatureBatches(keras.utils.PyDataset):
    """Keras data set of (inputs, target) for `StitchedNetwork` with `features` in place of patterns; target as for
    `losses.PhaseImageError`.

    The images of a batch have the same size; together they have about PIXELS_A_BATCH.

    Parameters
    ----------
    features : Features
    batches : int
        An epoch.
    seed, epoch : int
        They decide which images are taken.

    Raises
    ------
    ValueError
        If teachers were asked for and no shard has one.
    """

    def __init__(self, features: Features, batches: int, seed: int, epoch: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features, self.batches, self.seed, self.epoch = features, batches, seed, epoch
        if features.teachers and not any(teacher.any() for teacher in features.teachers):
            raise ValueError(
                "teacher_weight is set, but none of the features have a teacher; make them with training.features "
                "--teacher, or leave teacher_weight out."
            )
        sizes = np.array([image.shape[1] for image in features.images])
        self.alike = {int(size): np.flatnonzero(sizes == size) for size in np.unique(sizes)}
        pixels = np.array([size**2 * len(images) for size, images in self.alike.items()], float)
        self.shares = pixels / pixels.sum()

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[dict[str, NDArray], NDArray]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        sizes = list(self.alike)
        # Keras takes lengths that are equal in an epoch's first two batches for constant
        size = sizes[-1 - index % len(sizes)] if index < 2 else int(rng.choice(sizes, p=self.shares))
        count = max(2, round(PIXELS_A_BATCH / size**2))
        chosen = rng.choice(self.alike[size], count, replace=len(self.alike[size]) < count)
        numbers = self.features.numbers[chosen]
        target = np.zeros((count, size, size, 3 if self.features.teachers else 2), np.float32)
        target[..., 0] = [self.features.targets[n] for n in chosen]
        target[..., 1] = numbers[:, 4, None, None]
        if self.features.teachers:
            target[..., 2] = [self.features.teachers[n] for n in chosen]
        return network_inputs(np.stack([self.features.images[n] for n in chosen]), numbers), target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "features"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first shard of features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doses", type=float, nargs=2, default=SCAN_DOSE_RANGE, metavar=("LOW", "HIGH"))
    parser.add_argument("--teacher", action="store_true", help="keep the mean over the eight symmetries as well")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.features.mkdir(parents=True, exist_ok=True)
    first = arguments.first
    numbers = [int(path.stem.split("_")[1]) for path in sorted(arguments.data.glob("shard_*.npz"))]
    numbers = [number for number in numbers if not shard_path(arguments.features, first + number).exists()]
    os.environ.update(OMP_NUM_THREADS="1", TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")
    common = first, arguments.views, arguments.seed, tuple(arguments.doses), arguments.teacher
    parts = [numbers[n :: arguments.workers] for n in range(arguments.workers)]
    tasks = [(arguments.model, arguments.data, arguments.features, part, *common) for part in parts if part]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        pool.map(_work, tasks, chunksize=1)


if __name__ == "__main__":
    main()
