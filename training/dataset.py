"""Data sets of simulated scans: made from one configuration file, sharded, resumable.

    python -m training.dataset CONFIG FOLDER --shards 90

Shard n depends on the configuration's seed and on n alone, and appears whole or not at all, so a run can be
killed at any moment and started again: only missing shards are made. `manifest.json` lists them with their hashes.
A configuration with `bright_field_ratio_range` gives patterns on the detector's own grid (`training.supercell`),
others on the aperture grid (`training.simulation`).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from training import scans, supercell
from training.config import read_config
from training.simulation import MAXIMUM_GRID, SCAN, Scan, random_beam, simulate_scan
from training.structures import random_specimen

KERNELS = (SCAN - 2) ** 2  # samples that one scan gives
#: Bytes that an array's header in a file has at most (version 1.0 of NumPy's format).
_LONGEST_HEADER = 10 + 0xFFFF
#: Columns of a shard's `parameters`: eV, mrad, A, A, A, A.
PARAMETERS = ("energy", "semiangle", "defocus", "spherical_aberration", "scan_step", "thickness")


def on_detector_grid(config: dict) -> bool:
    """Whether the configuration's patterns are on the detector's own grid."""
    return "bright_field_ratio_range" in config["scan"]


def parameter_names(config: dict) -> tuple[str, ...]:
    """Columns of `parameters` of the configuration's shards."""
    return supercell.PARAMETERS if on_detector_grid(config) else PARAMETERS


def make_shard(config: dict, number: int, device: str = "cpu") -> dict[str, NDArray]:
    """Simulate the scans of one shard.

    Returns
    -------
    dict of ndarray
        The arrays of `training.simulation.Scan` or `training.supercell.DetectorScan` with a leading axis over scans,
        `patterns` as the amplitudes sqrt(I) in float16 under `amplitudes`; `parameters` as in `parameter_names`;
        `kinds` (n,); `skipped`, the number of draws that were empty, reserved, unphysical or too large.
    """
    rng = np.random.default_rng([config["seed"], number])
    if on_detector_grid(config):
        return _detector_shard(config, rng, device)
    if config.get("whole_scans", False):
        return _whole_scans_shard(config, rng)
    if device != "cpu":
        raise ValueError(f"device is {device!r}; the aperture grid is simulated on the 'cpu' alone.")
    simulated: list[Scan] = []
    parameters, kinds, skipped = [], [], 0
    while len(simulated) < config["scans_per_shard"]:
        beam = random_beam(rng, config)
        specimen = None
        if beam.grid <= MAXIMUM_GRID:
            specimen = random_specimen(rng, beam.grid * beam.pixel_size, config["specimens"])
        if specimen is None:
            skipped += 1
            continue
        simulated.append(simulate_scan(specimen, beam, rng, config["simulation"]))
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
    names = ("exit_wave", "exit_wave_midplane", "probe", "probe_midplane", "phase")
    return _stacked(simulated, names, parameters, kinds, skipped)


def _detector_shard(config: dict, rng: np.random.Generator, device: str) -> dict[str, NDArray]:
    simulated: list[supercell.DetectorScan] = []
    parameters, kinds, skipped = [], [], 0
    while len(simulated) < config["scans_per_shard"]:
        illumination = supercell.random_detector_illumination(rng, config)
        specimen = random_specimen(rng, illumination.side, config["specimens"])
        if specimen is None:
            skipped += 1
            continue
        simulated.append(supercell.simulate_detector_scan(specimen, illumination, rng, config["simulation"], device))
        kinds.append(specimen.kind)
        parameters.append(supercell.parameters(specimen, illumination, simulated[-1]))
    shard = _stacked(simulated, ("exit_wave", "phase"), parameters, kinds, skipped)
    return shard | {"phase": shard["phase"].astype(np.float16)}


def _whole_scans_shard(config: dict, rng: np.random.Generator) -> dict[str, NDArray]:
    """Scans of different sizes: `amplitudes_N` (n, n, 64, 64) and `phase_N` for scan N of the shard."""
    arrays: dict[str, NDArray] = {}
    kinds: list[str] = []
    parameters, skipped = [], 0
    while len(kinds) < config["scans_per_shard"]:
        illumination = scans.random_scan_illumination(rng, config)
        specimen = None
        if illumination.grid <= MAXIMUM_GRID:
            side = illumination.grid * illumination.pixel_size
            specimen = random_specimen(rng, side, config["specimens"])
        if specimen is None:
            skipped += 1
            continue
        patterns, phase = scans.simulate_scan(specimen, illumination, rng, config["simulation"])
        arrays[f"amplitudes_{len(kinds)}"] = np.sqrt(patterns).astype(np.float16)
        arrays[f"phase_{len(kinds)}"] = phase
        kinds.append(specimen.kind)
        beam = (getattr(illumination, name) for name in PARAMETERS[:4])
        parameters.append((*beam, illumination.relative_step / illumination.k0, specimen.thickness))
    described = {"parameters": np.array(parameters), "kinds": np.array(kinds), "skipped": np.array(skipped)}
    return arrays | described


def _stacked(
    made: list, names: tuple[str, ...], parameters: list, kinds: list[str], skipped: int
) -> dict[str, NDArray]:
    shard = {name: np.stack([getattr(scan, name) for scan in made]) for name in names}
    shard["amplitudes"] = np.sqrt(np.stack([scan.patterns for scan in made])).astype(np.float16)
    return shard | {
        "parameters": np.array(parameters),
        "kinds": np.array(kinds),
        "skipped": np.array(skipped),
    }


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return folder / f"shard_{number:05d}.npz"


def save_shard(path: Path, arrays: dict[str, NDArray]) -> str:
    """Write one shard so that it appears whole or not at all; returns its SHA-256."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        np.savez(file, **arrays)
    digest = sha256(unfinished)
    os.replace(unfinished, path)
    return digest


def load_images(
    folder: Path, numbers: list[int], table: str, names: tuple[str, ...]
) -> tuple[NDArray, list[list[NDArray]]]:
    """Of shards that hold arrays of different sizes, `name_0`, `name_1` and so on, one for each row of `table`.

    Returns
    -------
    ndarray, list of list of ndarray
        The rows of all shards, in memory, and for every name its arrays in the same order, as `mapped` gives them.
    """
    rows: list[NDArray] = []
    lists: list[list[NDArray]] = [[] for _ in names]
    for number in numbers:
        shard = mapped(shard_path(folder, number))
        rows.append(np.array(shard[table]))
        for n in range(len(rows[-1])):
            for name, found in zip(names, lists, strict=True):
                found.append(shard[f"{name}_{n}"])
    return np.concatenate(rows), lists


def mapped(path: Path) -> dict[str, NDArray]:
    """The arrays of a file of `save_shard`, read-only views of the file.

    The system reads what is used and keeps it as long as memory is free, once for all processes: so a data set may be
    larger than memory, and several trainings may share it.

    Parameters
    ----------
    path : Path
        Not compressed, as `save_shard` leaves it.

    Returns
    -------
    dict of str to ndarray
        By name, with the shapes, types and units that they were saved with.
    """
    whole = np.memmap(path, np.uint8, "r")
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            # a local header of 30 bytes, which ends with the lengths of the name and of the extra field behind it
            lengths = whole[member.header_offset + 26 : member.header_offset + 30].view("<u2")
            start = member.header_offset + 30 + int(lengths.sum())
            header = io.BytesIO(whole[start : start + _LONGEST_HEADER].tobytes())
            np.lib.format.read_magic(header)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
            data = whole[start + header.tell() : start + member.file_size].view(dtype)
            arrays[member.filename.removesuffix(".npy")] = data.reshape(shape, order="F" if fortran else "C")
    return arrays


def write_shard(task: tuple[dict, Path, int] | tuple[dict, Path, int, str]) -> tuple[int, str]:
    """Make and write one shard (config, folder, number, device), atomically; returns its number and SHA-256."""
    config, folder, number, *device = task
    warnings.simplefilter("ignore")
    return number, save_shard(shard_path(folder, number), make_shard(config, number, *device))


def sha256(path: Path) -> str:
    """Hash of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(config: dict, folder: Path, hashes: dict[str, str]) -> None:
    """Write `manifest.json`, atomically: size, the configuration's hash and that of every shard."""
    canonical = json.dumps(config, sort_keys=True).encode()
    manifest = {
        "samples": len(hashes) * config["scans_per_shard"] * KERNELS,
        "configuration_sha256": hashlib.sha256(canonical).hexdigest(),
        "shards": dict(sorted(hashes.items())),
    }
    unfinished = folder / "manifest.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=1))
    os.replace(unfinished, folder / "manifest.json")


def generate(config: dict, folder: Path, shards: int, workers: int, device: str = "cpu") -> None:
    """Make the missing ones of the first `shards` shards in `workers` processes on `device`, "cpu" or "gpu".

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
    manifest = folder / "manifest.json"
    known = json.loads(manifest.read_text())["shards"] if manifest.exists() else {}
    there = [path for path in (shard_path(folder, n) for n in range(shards)) if path.exists()]
    hashes = {path.name: known.get(path.name) or sha256(path) for path in there}
    missing = [n for n in range(shards) if not shard_path(folder, n).exists()]
    tasks = [(config, folder, n, device) for n in missing]
    samples = config["scans_per_shard"] * KERNELS
    # one thread a process: the processes fill the cores
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with (
        multiprocessing.get_context("spawn").Pool(workers) as pool,
        tqdm(total=shards * samples, initial=(shards - len(missing)) * samples, unit=" samples") as progress,
    ):
        for number, digest in pool.imap_unordered(write_shard, tasks):
            hashes[shard_path(folder, number).name] = digest
            write_manifest(config, folder, hashes)
            progress.update(samples)
    write_manifest(config, folder, hashes)


def load_shards(folder: Path, numbers: list[int], names: tuple[str, ...] | None = None) -> dict[str, NDArray]:
    """Concatenate shards along their first axis, all arrays but `skipped` or those of the given names."""
    loaded = []
    for number in numbers:
        with np.load(shard_path(folder, number)) as shard:
            loaded.append({name: shard[name] for name in names or shard.files if name != "skipped"})
    return {name: np.concatenate([shard[name] for shard in loaded]) for name in loaded[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, required=True, help="the data set's size, in shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="gpu needs CuPy; then few workers")
    arguments = parser.parse_args()
    config = read_config(arguments.config)
    generate(config, arguments.folder, arguments.shards, arguments.workers, arguments.device)


if __name__ == "__main__":
    main()
