"""Speed and memory of the whole path, raw patterns in a file to image, beside py4DSTEM's SSB on the same data.

    python tests/benchmark_speed.py [--model FILE]

Every measurement runs in a process of its own, so that nothing but it adds to the peak memory; imports and one small
scan go before, untimed. The data are Poisson counts of an empty specimen, uint16, in an HDF5 file, which AIRPI streams
and SSB has to load; the network's speed doesn't depend on the counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
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
    rng = np.random.default_rng(0)
    with h5py.File(file, "w") as opened:
        data = opened.create_dataset("data", (positions, positions, DETECTOR, DETECTOR), np.uint16)
        for row in range(positions):
            data[row] = rng.poisson(np.broadcast_to(ELECTRONS / disk.sum() * disk, data.shape[1:]))


def airpi(data: h5py.Dataset, model: str | None) -> str:
    result = reconstruct(data, acquisition(), model=model, device="cpu")
    return f"{result.provenance['provider']}, model {result.provenance['model']['name']}"


def ssb(data: h5py.Dataset, model: str | None) -> str:
    from airpi_py4d.demo import ssb_phase

    ssb_phase(data[()], acquisition())
    return "py4DSTEM, 1 job"


def measure(method: Callable, small: Path, file: Path, model: str | None, results: multiprocessing.Queue) -> None:
    with h5py.File(small) as opened:
        method(opened["data"], model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with h5py.File(file) as opened:
        started = time.perf_counter()
        note = method(opened["data"], model)
        seconds = time.perf_counter() - started
    results.put((seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, note))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| scan | method | positions/s | ratio to SSB | peak memory [MB] | of it after an 8 x 8 scan [MB] | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.h5"
        write_scan(small, 8)
        for positions in (64, 256):
            file = Path(folder) / f"scan_{positions}.h5"
            write_scan(file, positions)
            rates = {}
            for method in (ssb, airpi):
                results = context.Queue()
                process = context.Process(target=measure, args=(method, small, file, arguments.model, results))
                process.start()
                seconds, before, memory, note = results.get()
                process.join()
                rates[method] = positions**2 / seconds
                ratio = rates[method] / rates[ssb]
                print(
                    f"| {positions} x {positions} | {method.__name__} | {rates[method]:.0f} | {ratio:.2f} "
                    f"| {memory:.0f} | {before:.0f} | {note} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
