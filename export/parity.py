"""Keras against ONNX Runtime on many samples, and what smaller number formats cost.

    python -m training.dataset CONFIG DATA_FOLDER --shards 10
    python -m export.parity MODEL.keras MODEL.onnx DATA_FOLDER [--samples 10000] [--reduced FOLDER]

The samples are kernels of the data set, with the noise and the detectors' errors of the training: give one that the
model was not trained on. Fails if the float32 file differs by more than TOLERANCE. With --reduced, float16 and int8
files are written there and compared as well; their loss in xc is then that of `python -m training.benchmark FOLDER
--model FILE`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from tqdm import tqdm

from export.reduced import float16, int8
from training.batches import Batches
from training.dataset import load_shards
from training.networks import VacuumObject  # noqa: F401 (registers the layers)

#: Largest |o_onnx - o_keras| / |o_keras| that the float32 file may have.
TOLERANCE = 1e-4
BATCH, SEED = 100, 2026
LABEL = "exit_wave_midplane"  # of which only the inputs are used

Inputs = dict[str, NDArray[np.float32]]
Predictor = Callable[[Inputs], NDArray[np.float32]]


def samples(folder: Path, count: int) -> Iterator[Inputs]:
    """Batches of the model's inputs, BATCH kernels each, `count` in all."""
    shards = load_shards(folder, sorted(int(path.stem.split("_")[1]) for path in folder.glob("shard_*.npz")))
    batches = Batches(shards, 2 * BATCH, count // BATCH, LABEL, SEED)
    for number in range(count // BATCH):
        inputs, _ = batches[number]
        # the second half of a batch is the first with other counts
        yield {name: value[:BATCH] for name, value in inputs.items()}


def runtime(model: onnx.ModelProto) -> Predictor:
    """ONNX Runtime on the CPU."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def compare(reference: Predictor, candidates: dict[str, Predictor], inputs: Iterator[Inputs]) -> list[dict[str, Any]]:
    r"""Differences of the candidates' object patches from the reference's, over all samples.

    Returns
    -------
    list of dict
        For each candidate: `largest relative`, the largest :math:`|o - o_{ref}| / |o_{ref}|` of a pixel, `largest`,
        that of |o - o_ref|, `rms` of |o - o_ref| over all pixels, `rms of the contrast`, that of |o_ref - 1|,
        `samples`, and `samples/s`.
    """
    found = {name: {"relative": 0.0, "largest": 0.0, "squares": 0.0, "seconds": 0.0} for name in candidates}
    count, pixels, contrast = 0, 0, 0.0
    for some in inputs:
        expected = reference(some) @ np.array([1, 1j])
        count, pixels = count + len(expected), pixels + expected.size
        contrast += float((np.abs(expected - 1) ** 2).sum())
        for name, candidate in candidates.items():
            started = time.perf_counter()
            patches = candidate(some)
            found[name]["seconds"] += time.perf_counter() - started
            difference = np.abs(patches @ np.array([1, 1j]) - expected)
            found[name]["relative"] = max(found[name]["relative"], float((difference / np.abs(expected)).max()))
            found[name]["largest"] = max(found[name]["largest"], float(difference.max()))
            found[name]["squares"] += float((difference**2).sum())
    return [
        {
            "file": name,
            "largest relative": values["relative"],
            "largest": values["largest"],
            "rms": (values["squares"] / pixels) ** 0.5,
            "rms of the contrast": (contrast / pixels) ** 0.5,
            "samples": count,
            "samples/s": count / values["seconds"],
        }
        for name, values in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, compare, print, write the reduced files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keras", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("data", type=Path, help="folder of training.dataset")
    parser.add_argument("--samples", type=int, default=10_000, help=f"a multiple of {BATCH}")
    parser.add_argument("--reduced", type=Path, help="folder to write float16 and int8 files to")
    chosen = parser.parse_args(arguments)
    if chosen.samples < BATCH or chosen.samples % BATCH:
        parser.error(f"--samples is {chosen.samples}, expected a multiple of {BATCH}")
    network = keras.saving.load_model(chosen.keras, compile=False)
    models = {"float32": onnx.load(chosen.onnx)}
    if chosen.reduced is not None:
        models |= {kind.__name__: kind(models["float32"]) for kind in (float16, int8)}
        chosen.reduced.mkdir(parents=True, exist_ok=True)
        for name, model in list(models.items())[1:]:
            path = chosen.reduced / f"{chosen.onnx.stem}-{name}.onnx"
            onnx.save(model, path)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    progress = tqdm(samples(chosen.data, chosen.samples), total=chosen.samples // BATCH, unit=f"x{BATCH}")
    rows = compare(network.predict_on_batch, {name: runtime(model) for name, model in models.items()}, iter(progress))
    for row in rows:
        print(
            ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if rows[0]["largest relative"] > TOLERANCE:
        parser.exit(1, f"float32 differs by more than {TOLERANCE}\n")


if __name__ == "__main__":
    main()
