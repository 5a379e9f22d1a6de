"""Speed and memory of the whole path, raw patterns in a file to image, beside py4DSTEM's SSB on the same data.

    python tests/benchmark_speed.py [--model FILE]

Every measurement runs in a process of its own, that nothing but it adds to the peak memory. The data are Poisson counts
of an empty specimen, uint16, in a memory-mapped file; the network's speed doesn't depend on them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from airpi_py4d import Acquisition, optics, reconstruct

ENERGY, SEMIANGLE, STEP, RADIUS, DETECTOR, ELECTRONS = 300e3, 20.0, 0.2, 12, 64, 1000


def acquisition() -> Acquisition:
    k_pixel = optics.aperture_radius(ENERGY, SEMIANGLE) / RADIUS
    return Acquisition(ENERGY, SEMIANGLE, STEP, (k_pixel, k_pixel), center=(DETECTOR // 2, DETECTOR // 2))


def write_scan(file: Path, positions: int) -> None:
    """Counts of shape (positions, positions, 64, 64), uint16."""
    middle = np.arange(DETECTOR) - DETECTOR // 2
    disk = np.hypot(*np.meshgrid(middle, middle)) <= RADIUS
    data = np.memmap(file, np.uint16, "w+", shape=(positions, positions, DETECTOR, DETECTOR))
    rng = np.random.default_rng(0)
    for row in range(positions):
        data[row] = rng.poisson(np.broadcast_to(ELECTRONS / disk.sum() * disk, data.shape[1:]))
    data.flush()


def open_scan(file: Path, positions: int) -> np.memmap:
    return np.memmap(file, np.uint16, "r", shape=(positions, positions, DETECTOR, DETECTOR))


def airpi(file: Path, positions: int, model: str | None) -> str:
    result = reconstruct(open_scan(file, positions), acquisition(), model=model, device="cpu")
    return f"{result.provenance['provider']}, model {result.provenance['model']['name']}"


def ssb(file: Path, positions: int, model: str | None) -> str:
    from airpi_py4d.demo import ssb_phase

    ssb_phase(open_scan(file, positions), acquisition())
    return "py4DSTEM"


def nothing(file: Path, positions: int, model: str | None) -> str:
    """Imports alone: the interpreter's own memory."""
    import onnxruntime
    import py4DSTEM

    return f"py4DSTEM {py4DSTEM.__version__}, onnxruntime {onnxruntime.__version__}"


def measure(method: Callable, file: Path, positions: int, model: str | None, results: multiprocessing.Queue) -> None:
    started = time.perf_counter()
    note = method(file, positions, model)
    seconds = time.perf_counter() - started
    results.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, note))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| scan | method | positions/s | ratio to SSB | peak memory [MB] | |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for positions in (64, 256):
            file = Path(folder) / f"scan_{positions}.raw"
            write_scan(file, positions)
            rates = {}
            for method in (nothing, ssb, airpi):
                results = context.Queue()
                process = context.Process(target=measure, args=(method, file, positions, arguments.model, results))
                process.start()
                seconds, memory, note = results.get()
                process.join()
                rates[method] = positions**2 / seconds
                rate, ratio = f"{rates[method]:.0f}", f"{rates[method] / rates.get(ssb, np.nan):.2f}"
                if method is nothing:
                    rate, ratio = "", ""
                print(
                    f"| {positions} x {positions} | {method.__name__} | {rate} | {ratio} | {memory:.0f} | {note} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
