"""The speed benchmark: that it measures what it says. The figures themselves need a quiet machine, not this."""

import csv
import math
import os
import threading
import time

import benchmark_speed
import h5py
import numpy as np
import onnx
import pytest
import speed_methods
from flops import count_flop
from matplotlib.image import imread
from onnx import TensorProto, helper
from oracle import KERNEL_MODEL
from speed_limits import NETWORKS, OTHER, PARTS, Sampler, fastest, parts
from speed_methods import METHODS, Case, Enough, LazyScan, acquisition, airpi, airpi_lazy, radius, write_scan
from speed_tables import Measured, markdown, memory_table, plot

from airpi_py4d import engine, models, reconstruct

CASE = Case("scan", "airpi", 8, 8, 32, KERNEL_MODEL, 1)


def row(**entries):
    values = {
        **{"section": "scan", "method": "airpi airpi-2", "model": KERNEL_MODEL, "rows": 64, "columns": 64},
        **{"detector": 64, "threads": 2, "batch": None, "positions_per_second": 1000.0, "seconds": 4.0},
        **{"cpu_seconds": 6.0, "peak": 240.0, "before": 150.0, "ratio": 1.5, "note": "CPU"},
    }
    return Measured(**{**values, **entries})


@pytest.fixture
def file(tmp_path):
    write_scan(tmp_path / "scan.h5", 20, 18, 32)
    return tmp_path / "scan.h5"


class TestScan:
    def test_counts(self, file):
        with h5py.File(file) as opened:
            data = opened["data"][()]
        assert data.shape == (20, 18, 32, 32)
        assert data.dtype == np.uint16
        assert data.sum((2, 3)).mean() == pytest.approx(speed_methods.ELECTRONS, rel=0.01)
        np.testing.assert_array_equal(data[:4], data[16:])
        k = np.arange(32) - 16
        disk = np.hypot(*np.meshgrid(k, k)) <= radius(32)
        assert 0.9 < data[..., disk].sum() / data.sum() < 1

    def test_shows_a_specimen(self, file):
        with h5py.File(file) as opened:
            phase = reconstruct(opened["data"], acquisition(32), device="cpu").phase
        assert np.ptp(phase) > 0.1

    def test_lazy_ends(self):
        data = LazyScan((50, 12), 32, 24)
        assert (data[0:1].shape, data[1:2, 3:15].shape) == ((1, 12, 32, 32), (1, 9, 32, 32))
        data[2:3]
        with pytest.raises(Enough):
            data[3:4]

    def test_lazy_is_the_scan_of_the_file(self, file):
        data = LazyScan((20, 16), 32, 1000)
        with h5py.File(file) as opened:
            assert data[3:9].mean() == pytest.approx(opened["data"][3:9, :16].mean(), rel=0.01)


class TestMethods:
    def test_airpi(self, file, monkeypatch):
        sizes = []
        batches = engine.kernel_batches
        monkeypatch.setattr(
            engine, "kernel_batches", lambda rows, spacing, n: sizes.append(n) or batches(rows, spacing, n)
        )
        before = engine._BATCH
        assert airpi(file, CASE._replace(batch=5)) == "CPUExecutionProvider"
        assert (sizes, engine._BATCH) == ([5], before)

    def test_lazy(self, monkeypatch, file):
        monkeypatch.setattr(speed_methods, "LAZY_POSITIONS", 300)
        monkeypatch.setattr(engine, "_BAND_BYTES", 1)
        case = CASE._replace(method="airpi_lazy", rows=100, columns=100)
        assert "stopped" in airpi_lazy(file, case)
        with pytest.raises(RuntimeError, match="ended before 300"):
            airpi_lazy(file, case._replace(rows=5, columns=5))

    @pytest.mark.parametrize("name", ["SSB", "DPC", "parallax", "single-slice"])
    def test_of_py4dstem(self, name, tmp_path):
        write_scan(tmp_path / "small.h5", 8, 8, 32)
        assert METHODS[name](tmp_path / "small.h5", CASE).startswith("py4DSTEM")

    def test_of_libertem(self, tmp_path):
        pytest.importorskip("ptychography40")
        write_scan(tmp_path / "small.h5", 8, 8, 32)
        assert METHODS["LiberTEM SSB"](tmp_path / "small.h5", CASE).startswith("ptychography40")


class TestFlop:
    def graph(self, path, nodes, inputs, weights):
        entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
        result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        held = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
        graph = helper.make_graph(nodes, "test", entries, [result], held)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        return count_flop(path, {name: array.astype(np.float32) for name, array in inputs.items()})

    def test_convolutions(self, tmp_path):
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Conv", ["y", "d"], ["z"], group=6),
            helper.make_node("ConvTranspose", ["z", "t"], ["u"], strides=[2, 2]),
            helper.make_node("Relu", ["u"], ["v"]),
        ]
        weights = {"w": np.ones((6, 4, 3, 3)), "d": np.ones((6, 1, 1, 1)), "t": np.ones((6, 2, 2, 2))}
        count = self.graph(tmp_path / "c.onnx", nodes, {"x": np.ones((1, 4, 8, 8))}, weights)
        assert count["Conv"] == 2 * (6 * 16 * 4 * 9 + 6 * 16)
        assert count["ConvTranspose"] == 2 * (6 * 16 * 2 * 4)

    def test_products(self, tmp_path):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Squeeze", ["y"], ["z"]),
            helper.make_node("Gemm", ["z", "g"], ["u"], transA=1),
        ]
        weights = {"w": np.ones((7, 3)), "g": np.ones((5, 2))}
        count = self.graph(tmp_path / "m.onnx", nodes, {"x": np.ones((1, 5, 7))}, weights)
        assert count == {"MatMul": 2 * 5 * 7 * 3, "Gemm": 2 * 3 * 5 * 2}

    def test_shipped(self):
        inputs = {"patterns": np.ones((1, 3, 3, 64, 64), np.float32), "geometry": np.full((1, 3), 0.2, np.float32)}
        count = count_flop(models.find(KERNEL_MODEL), inputs)
        assert 40e6 < sum(count.values()) < 80e6  # its card: 55 MFLOP


class TestParts:
    def test_are_all_found(self, file):
        places = [place for entries in PARTS.values() for place in entries]
        before = [getattr(*place) for place in places]
        for model, idle in (("airpi-3-fast", set()), (KERNEL_MODEL, {"image network", "feature image"})):
            times = parts(file, file, CASE._replace(model=model, rows=20, columns=18))
            assert {part for part, time in times.items() if time == 0} == idle
            assert times[OTHER] > 0
            assert set(NETWORKS) < set(times)
        assert [getattr(*place) for place in places] == before

    def test_table(self, tmp_path, capsys):
        benchmark_speed.main(["--only", "parts", "--scan", "8", "--model", "airpi-3-fast"])
        lines = capsys.readouterr().out.splitlines()
        assert "| | airpi-3-fast |" in lines
        assert lines[-1].startswith("| share of everything but the networks | 0.")


class TestProfile:
    def test_finds_the_slow_function(self, file, monkeypatch):
        monkeypatch.setattr(engine, "_BATCH", 4)
        sampler = Sampler()
        sampler.start()
        airpi(file, CASE)
        sampler.stop()
        functions = {function for thread, function in sampler.count if thread == threading.current_thread().name}
        assert "model.py __call__" in functions

    def test_fastest(self):
        assert fastest(lambda: time.sleep(0.01), 0.03) >= 0.01


class TestProcesses:
    def test_result(self):
        assert benchmark_speed.apart(math.sqrt, (4,), 1, 60) == 2

    def test_threads(self):
        before = os.environ.get("OMP_NUM_THREADS")
        assert benchmark_speed.apart(os.getenv, ("OMP_NUM_THREADS",), 3, 60) == "3"
        assert os.environ.get("OMP_NUM_THREADS") == before

    def test_error(self):
        with pytest.raises(RuntimeError, match="ValueError: math domain error"):
            benchmark_speed.apart(math.sqrt, (-1,), 1, 60)

    def test_takes_too_long(self):
        with pytest.raises(RuntimeError, match="ended after 0 s"):
            benchmark_speed.apart(time.sleep, (60,), 1, 0)

    def test_what_would_take_too_long_is_left_out(self, tmp_path, monkeypatch):
        benchmark = benchmark_speed.Benchmark(tmp_path, limit=10, repeats=1)
        benchmark.rows.append(row(detector=32))
        measured = benchmark.run(CASE._replace(rows=512, columns=512))
        assert measured.note == "left out: at least 262 s"
        assert math.isnan(measured.seconds)

    def test_what_would_take_too_much_memory_is_left_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(benchmark_speed, "available_memory", lambda: 1000.0)
        benchmark = benchmark_speed.Benchmark(tmp_path, limit=1e9, repeats=1)
        benchmark.rows.append(row(method="SSB", detector=32))  # 90 MB
        measured = benchmark.run(CASE._replace(method="SSB", model=None, rows=256, columns=256))
        assert measured.note == "left out: 1440 MB, of which 1000 are there"
        monkeypatch.setattr(benchmark_speed, "apart", lambda *arguments: (1.0, 1.0, 200.0, 150.0, "ran"))
        assert benchmark.run(CASE._replace(method="SSB", model=None, rows=128, columns=128)).note == "ran"

    def test_what_fails_is_a_row(self, tmp_path, monkeypatch):
        def refused(*arguments):
            raise RuntimeError("ModuleNotFoundError: No module named 'ptychography40'")

        monkeypatch.setattr(benchmark_speed, "apart", refused)
        measured = benchmark_speed.Benchmark(tmp_path, limit=10, repeats=1).run(CASE)
        assert measured.note == "ModuleNotFoundError: No module named 'ptychography40'"
        assert "nan" not in markdown([measured])


class TestOutput:
    def test_markdown(self):
        assert markdown([row()]).splitlines()[-1] == (
            "| 64 x 64 | 64 | airpi airpi-2 | 2 |  | 1000 | 1.50 | 1.50 | 240 | 150 | CPU |"
        )

    def test_memory(self):
        lines = memory_table([row(method="airpi_lazy airpi-2", rows=4096, columns=4096), row()]).splitlines()
        assert lines[-2].startswith("| 4096 x 4096 | airpi_lazy airpi-2 | 100000 | 90 | ")
        assert lines[-1].startswith("| 64 x 64 | airpi airpi-2 | 4096 | 90 | ")

    @pytest.mark.parametrize("sections", [["scan", "detector", "threads", "batch"], ["batch"]])
    def test_plot(self, sections, tmp_path):
        missing = {"rows": 128, "note": "left out", "positions_per_second": math.nan}
        rows = [row(section=section, batch=8, **more) for section in sections for more in ({}, missing)]
        plot(rows, tmp_path / "plot.png")
        height, width = imread(tmp_path / "plot.png").shape[:2]
        assert (height, width) == (450, 550 * len(sections))

    def test_all_cases(self):
        chosen = benchmark_speed.parse(["--model", "a", "--model", "b.onnx", "--threads", "6"])
        found = list(benchmark_speed.cases(chosen))
        methods = {case.label for case in found if case.section == "methods"}
        assert methods == {"SSB", "DPC", "parallax", "single-slice", "LiberTEM SSB", "airpi a", "airpi b"}
        assert sorted({case.threads for case in found if case.section == "threads"}) == [1, 2, 4, 6]
        assert {case.rows for case in found if case.section == "memory"} == {4096, 512}
        assert min(case.rows for case in found if case.section == "batch") >= 3

    def test_device(self, tmp_path, monkeypatch):
        asked = []

        def ran(function, arguments, *_):
            asked.append(arguments[2].device)
            return 1.0, 1.0, 200.0, 150.0, "ran"

        monkeypatch.setattr(benchmark_speed, "apart", ran)
        benchmark_speed.Benchmark(tmp_path, limit=10, repeats=1, device="cuda:1").run(CASE)
        assert asked == ["cuda:1"]

    def test_unknown_section(self, capsys):
        with pytest.raises(SystemExit):
            benchmark_speed.parse(["--only", "speed"])
        assert "--only names speed; there are methods, scan" in capsys.readouterr().err

    def test_files(self, tmp_path, capsys):
        benchmark_speed.main(["--only", "threads", "--threads", "1", "--scan", "8", "--output", str(tmp_path)])
        assert {path.name for path in tmp_path.iterdir()} == {"speed_tables.md", "speed.csv", "speed.png"}
        with (tmp_path / "speed.csv").open() as opened:
            (only,) = csv.DictReader(opened)
        assert (only["section"], only["threads"], only["note"]) == ("threads", "1", "CPUExecutionProvider")
        assert 0 < float(only["before"]) <= float(only["peak"])
        assert "## threads" in (tmp_path / "speed_tables.md").read_text()
        assert "fastest of 1" in capsys.readouterr().out
