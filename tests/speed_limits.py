"""What bounds AIRPI's speed: the network alone, the machine's arithmetic, and where the time goes."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from flops import count_flop
from speed_methods import Case, airpi

from airpi_py4d import engine, models
from airpi_py4d.checks import BadPositions
from airpi_py4d.domain import ElectronCheck
from airpi_py4d.feature_stitching import FeatureStitcher
from airpi_py4d.model import Model
from airpi_py4d.patterns import Resampling
from airpi_py4d.stitching import Stitcher

PRODUCT = 1024  # side of the matrices whose product is the machine's peak
INTERVAL = 0.005  # between samples of the profile [s]
TQDM = "tqdm_monitor"  # a thread that only waits


def fastest(function: Callable[[], object], seconds: float) -> float:
    """Shortest of its calls within so many seconds, at least three."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def matrix_product(seconds: float = 2) -> float:
    """FLOP/s of a product of large float32 matrices in NumPy."""
    left, right = (np.random.default_rng(n).random((PRODUCT, PRODUCT), np.float32) for n in (0, 1))
    return 2 * PRODUCT**3 / fastest(lambda: np.matmul(left, right), seconds)


def network(name: str, threads: int, batch: int, seconds: float = 2) -> tuple[float, float]:
    """FLOP a position, and positions/s of the network without anything around it; of two parts, of the encoder."""
    model = Model(name, "cpu", threads)
    n, values, side = model.contract.grid_pixels, model.contract.geometry_values, model.contract.kernel_side
    kernel = (n, n) if side == 1 else (side, side, n, n)
    patterns = np.random.default_rng(0).poisson(1.0, (batch, *kernel)).astype(np.float32)
    geometry = np.full((batch, values), 0.2, np.float32)
    flop = sum(count_flop(models.find(name), {"patterns": patterns[:1], "geometry": geometry[:1]}).values())
    return flop, batch / fastest(lambda: model(patterns, geometry), seconds)


#: What the time of a reconstruction is divided into: functions, none of which calls another one.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "encoder, or the whole network": [(Model, "__call__")],
    "image network": [(Model, "image")],
    "loading the model": [(Model, "__init__")],
    "matrices": [(Resampling, "__init__"), (FeatureStitcher, "__init__"), (Stitcher, "__init__")],
    "reading": [(engine, "read")],
    "checks": [(BadPositions, "add"), (ElectronCheck, "add")],
    "resampling": [(Resampling, "__call__")],
    "stitching": [(FeatureStitcher, "add_row"), (Stitcher, "add_row"), (Stitcher, "result")],
    "feature image": [(FeatureStitcher, "feature_image")],
}
NETWORKS = list(PARTS)[:2]
OTHER = "everything else"


@contextmanager
def timed_parts(seconds: Counter[str]) -> Iterator[None]:
    """Add the CPU time of the threads that call the functions of PARTS to `seconds` meanwhile."""

    def timed(part: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                seconds[part] += time.thread_time() - started

        return call

    places = [(part, owner, name) for part, entries in PARTS.items() for owner, name in entries]
    before = [getattr(owner, name) for _, owner, name in places]
    try:
        for (part, owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, timed(part, function))
        yield
    finally:
        for (_, owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def parts(small: Path, file: Path, case: Case) -> dict[str, float]:
    """CPU time [microseconds a position] of every part; with one thread nothing runs in threads that aren't timed."""
    airpi(small, case)
    seconds: Counter[str] = Counter()
    started = time.process_time()
    with timed_parts(seconds):
        airpi(file, case)
    total = time.process_time() - started
    seconds[OTHER] = total - sum(seconds.values())
    return {part: 1e6 * seconds[part] / case.positions for part in (*PARTS, OTHER)}


class Sampler(threading.Thread):
    """Counts, every INTERVAL, the innermost function of this package in every other thread, as py-spy would.

    Attributes
    ----------
    count : Counter of (str, str)
        Thread and function.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.count: Counter[tuple[str, str]] = Counter()
        self.samples = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(INTERVAL):
            self.samples += 1
            names = {thread.ident: thread.name for thread in threading.enumerate() if thread is not self}
            for number, frame in sys._current_frames().items():
                if number in names:
                    self.count[names[number], innermost(frame)] += 1

    def stop(self) -> None:
        self._ended.set()
        self.join()


def innermost(frame: FrameType | None) -> str:
    """The function of airpi_py4d that a thread is in; waiting, or other code."""
    if frame is not None and Path(frame.f_code.co_filename).name in ("threading.py", "queue.py"):
        return "waiting"
    while frame is not None:
        if Path(frame.f_code.co_filename).parent.name == "airpi_py4d":
            return f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "other code"


def profile(small: Path, file: Path, case: Case) -> list[tuple[str, str, float]]:
    """Thread, function of this package, and share of the time in it and what it calls outside; longest first."""
    airpi(small, case)
    sampler = Sampler()
    sampler.start()
    airpi(file, case)
    sampler.stop()
    shares = [(*where, count / sampler.samples) for where, count in sampler.count.most_common()]
    return [share for share in shares if share[2] >= 0.01 and share[:2] != (TQDM, "waiting")]
