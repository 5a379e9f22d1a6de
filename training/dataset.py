"""Data sets of simulated scans: made from one configuration file, sharded, resumable.

    python -m training.dataset CONFIG FOLDER --shards 90

Shard n depends on the configuration's seed and on n alone, and appears whole or not at all, so a run can be
killed at any moment and started again: only missing shards are made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from training.config import read_config
from training.simulation import MAXIMUM_GRID, SCAN, Scan, random_beam, simulate_scan
from training.structures import random_specimen

KERNELS = (SCAN - 2) ** 2  # samples that one scan gives
#: Columns of a shard's `parameters`: eV, mrad, A, A, A, A.
PARAMETERS = ("energy", "semiangle", "defocus", "spherical_aberration", "scan_step", "thickness")


def make_shard(config: dict, number: int) -> dict[str, NDArray]:
    """Simulate the scans of one shard.

    Returns
    -------
    dict of ndarray
        The arrays of `training.simulation.Scan` with a leading axis over scans, `patterns` as the amplitudes
        sqrt(I) in float16 under `amplitudes`; `parameters` (n, 6) as in PARAMETERS; `kinds` (n,); `skipped`, the
        number of draws that were empty, reserved or too large.
    """
    rng = np.random.default_rng([config["seed"], number])
    scans: list[Scan] = []
    parameters, kinds, skipped = [], [], 0
    while len(scans) < config["scans_per_shard"]:
        beam = random_beam(rng, config)
        specimen = None
        if beam.grid <= MAXIMUM_GRID:
            specimen = random_specimen(rng, beam.grid * beam.pixel_size, config["specimens"])
        if specimen is None:
            skipped += 1
            continue
        scans.append(simulate_scan(specimen, beam, rng, config["simulation"]))
        kinds.append(specimen.kind)
        parameters.append(
            (
                beam.energy,
                beam.semiangle,
                beam.defocus,
                beam.spherical_aberration,
                beam.scan_step,
                specimen.thickness,
            )
        )
    shard = {
        name: np.stack([getattr(scan, name) for scan in scans])
        for name in ("exit_wave", "exit_wave_midplane", "probe", "probe_midplane", "phase")
    }
    shard["amplitudes"] = np.sqrt(np.stack([scan.patterns for scan in scans])).astype(np.float16)
    return shard | {
        "parameters": np.array(parameters),
        "kinds": np.array(kinds),
        "skipped": np.array(skipped),
    }


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return folder / f"shard_{number:05d}.npz"


def write_shard(task: tuple[dict, Path, int]) -> int:
    """Make and write one shard (config, folder, number), atomically; returns its number."""
    config, folder, number = task
    warnings.simplefilter("ignore")
    path = shard_path(folder, number)
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        np.savez(file, **make_shard(config, number))
    os.replace(unfinished, path)
    return number


def generate(config: dict, folder: Path, shards: int, workers: int) -> None:
    """Make the missing ones of the first `shards` shards in `workers` processes.

    Raises
    ------
    ValueError
        If the folder holds shards of another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / "config.json"
    if description.exists() and json.loads(description.read_text()) != config:
        raise ValueError(f"{folder} holds shards of another configuration ({description}); choose another folder.")
    description.write_text(json.dumps(config, indent=1))
    missing = [n for n in range(shards) if not shard_path(folder, n).exists()]
    tasks = [(config, folder, n) for n in missing]
    samples = config["scans_per_shard"] * KERNELS
    # one thread a process: the processes fill the cores
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with (
        multiprocessing.get_context("spawn").Pool(workers) as pool,
        tqdm(total=shards * samples, initial=(shards - len(missing)) * samples, unit=" samples") as progress,
    ):
        for _ in pool.imap_unordered(write_shard, tasks):
            progress.update(samples)


def load_shards(folder: Path, numbers: list[int]) -> dict[str, NDArray]:
    """Concatenate shards along their first axis."""
    loaded = []
    for number in numbers:
        with np.load(shard_path(folder, number)) as shard:
            loaded.append({name: shard[name] for name in shard.files if name != "skipped"})
    return {name: np.concatenate([shard[name] for shard in loaded]) for name in loaded[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, required=True, help="the data set's size, in shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    generate(read_config(arguments.config), arguments.folder, arguments.shards, arguments.workers)


if __name__ == "__main__":
    main()
