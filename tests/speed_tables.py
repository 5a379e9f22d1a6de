"""Tables and plots of what `benchmark_speed.py` measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from speed_methods import Case, image_bytes


@dataclass(frozen=True)
class Measured:
    """A row of the tables.

    Attributes
    ----------
    section, method, model, rows, columns, detector, threads, batch
        See `Case`.
    seconds, cpu_seconds : float
        NaN if it wasn't measured.
    peak : float
        Memory [MB].
    before : float
        Memory after a small scan [MB].
    ratio : float
        Positions/s over those of SSB on the same scan, NaN without one.
    note : str
    """

    section: str
    method: str
    model: str
    rows: int
    columns: int
    detector: int
    threads: int
    batch: int | None
    positions_per_second: float
    seconds: float
    cpu_seconds: float
    peak: float
    before: float
    ratio: float
    note: str


def shape_of(row: Measured) -> tuple[int, int, int]:
    return row.rows, row.columns, row.detector


def markdown(rows: list[Measured]) -> str:
    """Table of measurements."""
    lines = [
        "| scan | detector | method | threads | batch | positions/s | ratio to SSB | CPU s/s | peak memory [MB] "
        "| of it after a small scan [MB] | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = (
            f"{row.positions_per_second:.0f}",
            f"{row.ratio:.2f}",
            f"{row.cpu_seconds / row.seconds:.2f}",
            f"{row.peak:.0f}",
            f"{row.before:.0f}",
        )
        cells = (
            f"{row.rows} x {row.columns}",
            row.detector,
            row.method,
            row.threads,
            row.batch or "",
            *figures,
            row.note,
        )
        lines.append(f"| {' | '.join('' if cell == 'nan' else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def memory_table(rows: list[Measured]) -> str:
    """What a scan adds to the memory, besides the image."""
    lines = [
        "| scan | method | positions | added [MB] | image [MB] | rest [MB] |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name, (rows_, columns, detector) = row.method.split()[0], shape_of(row)
        case = Case("memory", name, rows_, columns, detector, row.model, row.threads)
        added, image = row.peak - row.before, image_bytes(case) / 2**20
        figures = f"{added:.0f} | {image:.0f} | {added - image:.0f}"
        lines.append(f"| {rows_} x {columns} | {row.method} | {case.positions} | {figures} |")
    return "\n".join(lines)


VARIED = {
    "scan": ("rows", "side of the scan"),
    "detector": ("detector", "side of the detector [px]"),
    "threads": ("threads", "threads"),
    "batch": ("batch", "batch [positions]"),
}


def plot(rows: list[Measured], file: Path) -> None:
    """Positions/s against what each section varies, a panel each."""
    from matplotlib.figure import Figure

    sections = [section for section in VARIED if any(row.section == section for row in rows)]
    figure = Figure(figsize=(5.5 * len(sections), 4.5), layout="constrained")
    methods = list(dict.fromkeys(row.method for row in rows))
    for axes, section in zip(figure.subplots(1, len(sections), squeeze=False)[0], sections, strict=True):
        attribute, label = VARIED[section]
        of_section = [row for row in rows if row.section == section]
        for number, method in enumerate(methods):
            of_it = [row for row in of_section if row.method == method]
            places = [getattr(row, attribute) for row in of_it]
            axes.loglog(places, [row.positions_per_second for row in of_it], "o-", color=f"C{number}", label=method)
        ticks = sorted({getattr(row, attribute) for row in of_section})
        axes.set_xticks(ticks, ticks)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set(xlabel=label, ylabel="positions/s")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=100)
