"""Rerun the paper's demonstrations in simulation: tables and figures of every part.

    python -m training.benchmark FOLDER [--model FILE ...] [--only dose,step] [--positions 56] [--validation [weak]]

abTEM simulates the scans once and keeps them in FOLDER; what is there is not made again. benchmark.csv, benchmark.md
and the figures are written there. With --validation the specimens are others, to choose between models, with
--validation weak such that few electrons say least of; there is no ptychography then, and no figure.
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import partial
from pathlib import Path

from airpi_py4d.model import Model
from training.benchmark import parts
from training.benchmark.cases import PARTS, POSITIONS, SEED, VALIDATION, WEAK_VALIDATION, Case, selected
from training.benchmark.figures import FIGURES
from training.benchmark.methods import ITERATIONS, Request, images, model_names
from training.benchmark.parts import Results
from training.benchmark.scans import in_processes, load, simulate_all

_CONDITIONS = """
abTEM's own multislice of the whole supercell (`training/reference.py`), four frozen-phonon configurations of 0.08 A,
C_s 0.001 mm at Scherzer defocus, Poisson counts, seed {seed}; no noise means the expected counts at 1e7 electrons a
pattern. The truth is the projected phase sigma v_z up to 2.67 alpha / lambda. xc is Pearson's correlation with it
(eq. 14) at the scan positions without a margin of 5 (2 A for large steps). {specimens} All methods got the same counts,
calibration and aberrations. SSB and DPC (times 2 pi) are py4DSTEM's.{ptychography}
"""
_REPORTED = """
The crystals are not in the training set of this project's networks; single atoms of every element are.
"""
_CHOICE = """
These specimens are there to choose between models and not kept out of the training set.
"""
_PTYCHOGRAPHY = """
 So is single-slice ptychography ({iterations} iterations, the true probe): the offline reference, which
needs all patterns at once.
"""


def all_images(cases: tuple[Case, ...], request: Request, jobs: int) -> Results:
    """Simulate, and make every image of every case at every dose."""
    simulate_all(cases, request.positions, request.folder, jobs)
    tasks = [(case, dose) for case in cases for dose in case.doses]
    results = Results({case.name: load(case, case.scaled(request.positions), request.folder) for case in cases}, {})
    for (case, dose), made in zip(tasks, in_processes(partial(images, request=request), tasks, jobs), strict=True):
        results.images[case.name, dose] = made
        print(f"{case.name}, {parts.dose_name(dose)}", flush=True)
    parts.measure(results)
    return results


def write_table(results: Results, path: Path) -> None:
    """All figures as CSV, a row a specimen, dose and method."""
    rows = parts.table_rows(results)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def heading(request: Request, command: str, validation: bool) -> str:
    """What the report is of: models with their SHA-256, the command, the conditions."""
    loaded = [Model(path, "cpu") for path in request.models]
    named = [
        f"{name}: model {model.contract.name} {model.contract.version}, SHA-256 {model.sha256}"
        for name, model in zip(model_names(request.models), loaded, strict=True)
    ]
    offline = _PTYCHOGRAPHY.format(iterations=ITERATIONS) if request.ptychography else ""
    specimens = (_CHOICE if validation else _REPORTED).strip()
    conditions = parts.prose(_CONDITIONS.format(seed=request.seed, ptychography=offline, specimens=specimens))
    return f"Simulations only. {'; '.join(named)}.\n\n    {command}\n\n{conditions}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(
        "python -m training.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    line.add_argument("folder", type=Path)
    line.add_argument("--model", action="append", help="ONNX file or name of a shipped model; again for more")
    line.add_argument("--only", help=f"parts, separated by commas; of {', '.join(PARTS)}")
    line.add_argument("--positions", type=int, default=POSITIONS, help="cut the scans down from this many a side")
    line.add_argument("--jobs", type=int, default=2, help="processes, of one thread each if there are more than one")
    line.add_argument(
        "--validation",
        nargs="?",
        const="mixed",
        choices=("mixed", "weak"),
        help="the specimens to choose between models with, or weak ones for the choice at few electrons",
    )
    line.add_argument("--seed", type=int, default=SEED, help="of the electrons")
    line.add_argument("--untold", action="store_true", help="AIRPI without the aberrations as well")
    line.add_argument("--without-ptychography", action="store_true", help="leave out the slowest method")
    line.add_argument("--simulate", action="store_true", help="simulate the scans and stop")
    return line


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line says."""
    given = sys.argv[1:] if arguments is None else arguments
    command_line = parser()
    chosen = command_line.parse_args(given)
    only = tuple(chosen.only.split(",")) if chosen.only else PARTS
    if unknown := set(only) - set(PARTS):
        command_line.error(f"--only has {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}.")
    choices = {"mixed": VALIDATION, "weak": WEAK_VALIDATION}
    cases = choices[chosen.validation] if chosen.validation else selected(only)
    if chosen.simulate:
        simulate_all(cases, chosen.positions, chosen.folder, chosen.jobs)
        return
    models = tuple(chosen.model) if chosen.model else (None,)
    ptychography = not (chosen.validation or chosen.without_ptychography)
    sums = "repetition" in only
    request = Request(models, chosen.folder, chosen.positions, ptychography, chosen.untold, sums, chosen.seed)
    results = all_images(cases, request, chosen.jobs)
    command = " ".join(["python -m training.benchmark", *(Path(word).name for word in given)])
    text = [
        f"# {'Validation' if chosen.validation else 'Benchmark'}",
        heading(request, command, bool(chosen.validation)),
    ]
    if chosen.validation:
        text.append(parts.validation(results))
    else:
        for part in (part for part in PARTS if part in only):
            title, section = parts.SECTIONS[part]
            text += [f"## {title}", section(results)]
            FIGURES[part](results, chosen.folder)
    text += ["## Distance to the oracle", parts.ceiling(results)]
    write_table(results, chosen.folder / "benchmark.csv")
    report = "\n\n".join(block.strip() for block in text) + "\n"
    (chosen.folder / "benchmark.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
