"""Speed and memory, from patterns in a file to the image: AIRPI beside the methods of py4DSTEM and LiberTEM.

    python tests/benchmark_speed.py [--model NAME_OR_FILE]... [--only SECTION,...] [--output FOLDER]

Sections, all by default:

    methods    AIRPI with every --model, py4DSTEM's SSB, DPC, parallax and single-slice ptychography, LiberTEM's SSB
    scan       the same, growing with the scan
    detector   AIRPI and SSB, growing with the detector
    threads    AIRPI, growing with the number of threads
    batch      AIRPI, growing with the positions that the network sees at once
    memory     AIRPI: the first 100,000 positions of a lazily made 4096 x 4096 scan, a whole 512 x 512 one in a file
    limits     the network alone, its FLOP/s beside those of a large matrix product, the share of everything else
    parts      CPU time of AIRPI's networks, reading, checks, resampling and stitching, on one thread
    profile    where AIRPI's time goes, by function

Tables are printed, and written with plots and a CSV file if --output is given. Linux only (/proc). LiberTEM's SSB
needs `pip install ptychography40 libertem`, which installs beside everything else (0.1.0, a pure Python package). A
method that isn't installed is a row that says so. Every measurement runs in a process of its own, so that nothing but
it adds to the peak memory; imports and a small scan go before, untimed. Loading the model counts. The scan is
simulated, uint16 in an HDF5 file, which AIRPI and LiberTEM stream and py4DSTEM has to load. What the figures say:
docs/speed.md.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from speed_limits import NETWORKS, PRODUCT, matrix_product, network, parts, profile
from speed_methods import LAZY_SCAN, METHODS, Case, write_scan
from speed_tables import VARIED, Measured, markdown, memory_table, plot, shape_of

from airpi_py4d.model import DEFAULT_MODEL

SECTIONS = ("methods", "scan", "detector", "threads", "batch", "memory", "limits", "parts", "profile")
SMALL = 8  # side of the scan that goes before
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
BATCHES = (8, 16, 32, 64, 128, 256, 512)


def memory(name: str) -> float:
    """VmRSS (now) or VmHWM (at most) of this process [MB]; unlike ru_maxrss, without the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def available_memory() -> float:
    """[MB]"""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))


def measure(small: Path, file: Path, case: Case) -> tuple[float, float, float, float, str]:
    """Seconds, CPU seconds, peak memory and memory before [MB], note; in a process of its own."""
    warm = case._replace(method="airpi") if case.method == "airpi_lazy" else case
    METHODS[warm.method](small, warm)
    before = memory("VmRSS")
    started = time.perf_counter(), time.process_time()
    note = METHODS[case.method](file, case)
    seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    return seconds, cpu, memory("VmHWM"), before, note


def _child(function: Callable, arguments: tuple, results: multiprocessing.Queue) -> None:
    try:
        results.put((function(*arguments), ""))
    except Exception as error:
        results.put((None, f"{type(error).__name__}: {error}".splitlines()[0]))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables that a process which starts meanwhile has."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def apart(function: Callable, arguments: tuple, threads: int, limit: float) -> Any:
    """Result of a function in a new process, every library with so many threads.

    Raises
    ------
    RuntimeError
        If it fails, or takes longer than the limit [s].
    """
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue = context.Queue()
    process = context.Process(target=_child, args=(function, arguments, results))
    with _environment(dict.fromkeys(THREAD_VARIABLES, str(threads))):
        process.start()
    deadline = time.monotonic() + limit
    try:
        while True:
            try:
                result, problem = results.get(timeout=1)
                break
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"ended after {limit:g} s") from None
                if not process.is_alive():
                    raise RuntimeError(f"ended with exit code {process.exitcode}") from None
    finally:
        process.join(5)
        process.kill()
        process.join()
    if problem:
        raise RuntimeError(problem)
    return result


class Benchmark:
    """Runs cases, each in a new process, and keeps the rows.

    Parameters
    ----------
    folder : Path
        For the scans, each written once.
    limit : float
        Longest measurement [s]; a longer one is ended.
    repeats : int
        The fastest of so many counts.
    device : str
        That AIRPI runs on.
    """

    def __init__(self, folder: Path, limit: float, repeats: int, device: str = "cpu") -> None:
        self._folder, self._limit, self._repeats, self._device = folder, limit, repeats, device
        self.rows: list[Measured] = []

    def scan(self, rows: int, columns: int, detector: int) -> Path:
        file = self._folder / f"{rows}_{columns}_{detector}.h5"
        if not file.exists():
            write_scan(file, rows, columns, detector)
        return file

    def run(self, case: Case) -> Measured:
        """Measure a case; one that would exceed the limit or the memory, judged by a smaller scan, is left out."""
        case = case._replace(device=self._device)
        nothing = (np.nan,) * 4
        seconds = self._expected_seconds(case)
        if seconds > self._limit:
            return self._add(case, (*nothing, f"left out: at least {seconds:.0f} s"))
        needed, there = self._expected_memory(case), available_memory()
        if needed > there:
            return self._add(case, (*nothing, f"left out: {needed:.0f} MB, of which {there:.0f} are there"))
        small = self.scan(SMALL, SMALL, case.detector)
        file = small if case.method == "airpi_lazy" else self.scan(case.rows, case.columns, case.detector)
        try:
            figures = min(self.apart(measure, small, file, case) for _ in range(self._repeats))
        except RuntimeError as error:
            figures = (*nothing, str(error))
        return self._add(case, figures)

    def apart(self, function: Callable, small: Path, file: Path, case: Case) -> Any:
        return apart(function, (small, file, case), case.threads, self._limit)

    def _measured(self, case: Case) -> list[Measured]:
        return [
            row for row in self.rows if (row.method, row.detector) == (case.label, case.detector) and row.seconds > 0
        ]

    def _expected_seconds(self, case: Case) -> float:
        return min((case.positions / row.positions_per_second for row in self._measured(case)), default=0.0)

    def _expected_memory(self, case: Case) -> float:
        """[MB]; of AIRPI, which streams, 0: little of it grows with the scan."""
        if case.method.startswith("airpi"):
            return 0.0
        grown = ((row.peak - row.before) / (row.rows * row.columns) for row in self._measured(case))
        return min((case.positions * a_position for a_position in grown), default=0.0)

    def _add(self, case: Case, figures: tuple[float, float, float, float, str]) -> Measured:
        seconds, cpu, peak, before, note = figures
        rate = case.positions / seconds
        shape = case.rows, case.columns, case.detector
        ssb = [row.positions_per_second for row in self.rows if row.method == "SSB" and shape_of(row) == shape]
        ratio = 1.0 if case.method == "SSB" else rate / ssb[-1] if ssb else np.nan
        scan = (*shape, case.threads, case.batch)
        row = Measured(case.section, case.label, case.model or "", *scan, rate, seconds, cpu, peak, before, ratio, note)
        self.rows.append(row)
        print(markdown([row]).splitlines()[-1], flush=True)
        return row


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """All measurements, in the order in which they run."""
    cores, side, detector = arguments.threads, arguments.scan, arguments.detector
    others = [name for name in METHODS if not name.startswith("airpi")]
    every = [*((name, None) for name in others), *(("airpi", model) for model in arguments.model)]
    first = [("SSB", None), ("airpi", arguments.model[0])]

    def chosen(section: str) -> bool:
        return section in arguments.only

    if chosen("methods"):
        yield from (Case("methods", name, side, side, detector, model, cores) for name, model in every)
    if chosen("scan"):
        for size in sorted(arguments.scans):
            yield from (Case("scan", name, size, size, detector, model, cores) for name, model in every)
    if chosen("detector"):
        for size in sorted(arguments.detectors):
            yield from (Case("detector", name, side, side, size, model, cores) for name, model in first)
    if chosen("threads"):
        counts = sorted({*(2**n for n in range(cores.bit_length())), cores})
        for threads in counts:
            yield from (Case("threads", "airpi", side, side, detector, model, threads) for model in arguments.model)
    if chosen("batch"):
        rows, columns = max(3, side**2 // max(BATCHES)), max(BATCHES)
        for batch in BATCHES:
            for model in arguments.model:
                yield Case("batch", "airpi", rows, columns, detector, model, cores, batch)
    if chosen("memory"):
        lazy, whole = arguments.lazy_scan, arguments.whole_scan
        for model in arguments.model:
            yield Case("memory", "airpi_lazy", lazy, lazy, detector, model, cores)
            yield Case("memory", "airpi", whole, whole, detector, model, cores)


def limits(arguments: argparse.Namespace, benchmark: Benchmark) -> str:
    """The network beside the machine's arithmetic, and beside the whole path."""
    threads, side = arguments.threads, arguments.scan
    peak = apart(matrix_product, (), threads, arguments.limit)
    lines = [
        f"Float32 product of two {PRODUCT} x {PRODUCT} matrices in NumPy: {peak / 1e9:.0f} GFLOP/s, {threads} threads.",
        "",
        "| model | MFLOP a position | network alone [positions/s] | GFLOP/s | of the product's "
        "| whole path [positions/s] | share of everything else |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in arguments.model:
        flop, alone = apart(network, (name, threads, min(64, side)), threads, arguments.limit)
        case = Case("limits", "airpi", side, side, arguments.detector, name, threads)
        whole = benchmark.run(case).positions_per_second
        lines.append(
            f"| {Path(name).stem} | {flop / 1e6:.1f} | {alone:.0f} | {flop * alone / 1e9:.1f} "
            f"| {flop * alone / peak:.2f} | {whole:.0f} | {1 - whole / alone:.2f} |"
        )
    return "\n".join(lines)


def shares(arguments: argparse.Namespace, benchmark: Benchmark) -> str:
    """Table of the profile."""
    lines = ["| model | thread | function | share |", "| --- | --- | --- | --- |"]
    small, file = (benchmark.scan(n, n, arguments.detector) for n in (SMALL, arguments.scan))
    for name in arguments.model:
        case = Case("profile", "airpi", arguments.scan, arguments.scan, arguments.detector, name, arguments.threads)
        for thread, function, share in benchmark.apart(profile, small, file, case):
            lines.append(f"| {Path(name).stem} | {thread} | {function} | {share:.2f} |")
    return "\n".join(lines)


def breakdown(arguments: argparse.Namespace, benchmark: Benchmark) -> str:
    """Table of the parts."""
    small, file = (benchmark.scan(n, n, arguments.detector) for n in (SMALL, arguments.scan))
    found: dict[str, dict[str, float]] = {}
    for name in arguments.model:
        case = Case("parts", "airpi", arguments.scan, arguments.scan, arguments.detector, name, 1)
        found[Path(name).stem] = benchmark.apart(parts, small, file, case)
    lines = [
        f"CPU time [microseconds a position], one thread, {arguments.scan} x {arguments.scan} positions, "
        f"{arguments.detector} px.",
        "",
        f"| | {' | '.join(found)} |",
        f"| --- |{' --- |' * len(found)}",
    ]
    for part in next(iter(found.values())):
        lines.append(f"| {part} | {' | '.join(f'{times[part]:.1f}' for times in found.values())} |")
    shares = [1 - sum(times[part] for part in NETWORKS) / sum(times.values()) for times in found.values()]
    lines.append(f"| share of everything but the networks | {' | '.join(f'{share:.2f}' for share in shares)} |")
    return "\n".join(lines)


def machine(arguments: argparse.Namespace) -> str:
    """What the figures hold for."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("airpi_py4d", "onnxruntime", "numpy", "scipy", "py4DSTEM")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores, {cpu[0].split(': ')[1] if cpu else platform.machine()}, Python "
        f"{platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}; load before "
        f"the run (1, 5, 15 minutes) {load}; fastest of {arguments.repeats}."
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"again for every model (default: {DEFAULT_MODEL})")
    parser.add_argument("--device", default="cpu", help="that AIRPI runs on, but in limits, parts and profile: the CPU")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--output", type=Path, help="folder for speed_tables.md, speed.csv and speed.png")
    parser.add_argument("--scan", type=int, default=64, help="side of the scan where it isn't varied")
    parser.add_argument("--scans", type=int, nargs="+", default=[32, 64, 128, 256], help="sides in the section scan")
    parser.add_argument("--detector", type=int, default=64, help="side of the detector where it isn't varied [px]")
    parser.add_argument("--detectors", type=int, nargs="+", default=[64, 128, 256], help="sides in that section [px]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="where they aren't varied (default: cores)")
    parser.add_argument("--lazy-scan", type=int, default=LAZY_SCAN, help="side of the lazily made scan")
    parser.add_argument("--whole-scan", type=int, default=512, help="side of the whole scan of the section memory")
    parser.add_argument("--limit", type=float, default=600, help="longest measurement [s]")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts")
    chosen = parser.parse_args(arguments)
    chosen.model = chosen.model or [DEFAULT_MODEL]
    chosen.only = chosen.only.split(",")
    if unknown := sorted(set(chosen.only) - set(SECTIONS)):
        parser.error(f"--only names {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    texts = [machine(chosen)]
    print(texts[0], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(Path(folder), chosen.limit, chosen.repeats, chosen.device)
        for case in cases(chosen):
            benchmark.run(case)
        described = {"limits": limits, "parts": breakdown, "profile": shares}
        for section in chosen.only:
            rows = [row for row in benchmark.rows if row.section == section]
            if rows:
                texts += [f"## {section}", markdown(rows)]
            if section == "memory":
                texts.append(memory_table(rows))
                print(texts[-1], flush=True)
            elif section in described:
                texts += [f"## {section}", described[section](chosen, benchmark)]
                print(texts[-1], flush=True)
    if chosen.output is not None:
        chosen.output.mkdir(parents=True, exist_ok=True)
        (chosen.output / "speed_tables.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        with (chosen.output / "speed.csv").open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, [field.name for field in fields(Measured)])
            writer.writeheader()
            writer.writerows(map(asdict, benchmark.rows))
        plotted = [row for row in benchmark.rows if row.section in VARIED]
        if plotted:
            plot(plotted, chosen.output / "speed.png")


if __name__ == "__main__":
    main()
