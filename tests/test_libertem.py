"""AirpiUDF gives the engine's image for every partitioning, order and executor."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from oracle import KERNEL_MODEL, numbered_patterns, write_oracle
from two_part_models import write_two_parts

from airpi_py4d import Acquisition, optics, reconstruct
from airpi_py4d.model import Model

pytest.importorskip("libertem")
from libertem.api import Context
from libertem.executor.inline import InlineJobExecutor
from libertem.udf.sum import SumUDF
from libertem.viz.base import Dummy2DPlot

from airpi_py4d.calibration import with_center
from airpi_py4d.libertem import AirpiUDF

SHAPE = (6, 7, 32, 32)
RADIUS = 8.0
K0 = optics.aperture_radius(200e3, 21.0)


class Backwards(InlineJobExecutor):
    """Partitions from the last to the first, and everything pickled on its way."""

    def __init__(self):
        super().__init__(debug=True)

    def run_tasks(self, tasks, *args):
        yield from super().run_tasks(list(tasks)[::-1], *args)


@pytest.fixture(scope="module")
def context():
    return Context.make_with("inline")


@pytest.fixture(scope="module")
def model():
    return Model(device="cpu")


def acquisition(**options):
    defaults = {"energy": 200e3, "semiangle": 21.0, "scan_step": 0.25, "k_pixel": (K0 / RADIUS,) * 2}
    return Acquisition(**{**defaults, "center": (16.0, 15.0), **options})


def counts(shape=SHAPE, electrons=8.0, dtype=np.uint16):
    """Random counts with a slope along rows and columns of the scan and of the detector."""
    rng = np.random.default_rng(1)
    rows, columns = np.ogrid[: shape[2], : shape[3]]
    disk = (rows - 16) ** 2 + (columns - 15) ** 2 <= RADIUS**2
    scan = 1 + 0.1 * np.arange(shape[0])[:, None, None, None] + 0.03 * np.arange(shape[1])[:, None, None]
    return rng.poisson(scan * electrons * (0.02 + (0.5 + 0.03 * rows + 0.01 * columns) * disk)).astype(dtype)


def dataset(context, data, partitions, **options):
    return context.load("memory", data=data, sig_dims=2, num_partitions=partitions, **options)


def starts(data):
    """The first position of each partition."""
    return [partition.slice.origin[0] for partition in data.get_partitions()]


def assert_same(results, udf, expected):
    assert np.ptp(expected.phase) > 1e-3
    for name in ("object", "phase", "confidence"):
        image = getattr(expected, name)
        # the random networks' phases are of 6 rad
        atol = 1e-6 if expected.projected_phase is None else 1e-5
        np.testing.assert_allclose(results[name].data, image, rtol=1e-5, atol=atol)
        assert results[name].data.dtype == image.dtype
        np.testing.assert_array_equal(results[name].valid_mask, expected.confidence > 0)
    result = udf.reconstruction()
    np.testing.assert_array_equal(result.object, results["object"].data)
    assert result.pixel_size == expected.pixel_size
    changing = ("seconds", "positions_per_second")
    ours, theirs = (
        {name: value for name, value in r.provenance.items() if name not in changing} for r in (result, expected)
    )
    assert ours.pop("electrons_per_pattern") == pytest.approx(theirs.pop("electrons_per_pattern"), rel=1e-5)
    assert ours == theirs
    assert 0 < result.provenance["seconds"] < 600
    positions = np.prod(expected.provenance["scan_shape"])
    assert result.provenance["positions_per_second"] == pytest.approx(positions / result.provenance["seconds"])


def check(context, data, acquisition, partitions, expected, **options):
    udf = AirpiUDF(acquisition, device="cpu", **options)
    results = context.run_udf(dataset=dataset(context, data, partitions), udf=udf)
    assert_same(results, udf, expected)


class TestPartitionings:
    @pytest.fixture(scope="class")
    @staticmethod
    def expected(model):
        return reconstruct(counts(), acquisition(), model=model)

    @pytest.mark.parametrize("partitions", [1, 2, 3, 4, 6, 17, 42])
    def test_number(self, context, expected, partitions):
        """One partition; whole rows; one row each (6); parts of rows (4, 17); one position each (42)."""
        first = starts(dataset(context, counts(), partitions))
        assert len(first) == partitions
        assert all(start % 7 == 0 for start in first) == (partitions in (1, 2, 3, 6))
        check(context, counts(), acquisition(), partitions, expected)

    @pytest.mark.parametrize("partitions", [2, 5, 6])
    def test_backwards_and_pickled(self, expected, partitions):
        check(Context(executor=Backwards()), counts(), acquisition(), partitions, expected)

    def test_threads(self, expected):
        with Context.make_with("threads", cpus=2) as context:
            check(context, counts(), acquisition(), 4, expected)

    def test_with_another_udf(self, context, expected):
        """Which makes the patterns float32."""
        udf = AirpiUDF(acquisition(), device="cpu")
        image, total = context.run_udf(dataset=dataset(context, counts(), 4), udf=[udf, SumUDF()])
        assert_same(image, udf, expected)
        np.testing.assert_array_equal(total["intensity"].data, counts().sum(axis=(0, 1)))

    def test_again(self, context, expected):
        """A UDF that ran can run again, on other data too."""
        udf = AirpiUDF(acquisition(), device="cpu")
        context.run_udf(dataset=dataset(context, counts((3, 4, 32, 32)), 2), udf=udf)
        assert udf.reconstruction().provenance["scan_shape"] == [3, 4]
        assert_same(context.run_udf(dataset=dataset(context, counts(), 5), udf=udf), udf, expected)

    def test_model_by_path(self, context, monkeypatch, tmp_path):
        import airpi_py4d

        expected = reconstruct(counts(), acquisition(), model=KERNEL_MODEL, device="cpu")

        monkeypatch.chdir(airpi_py4d.__path__[0])
        udf = AirpiUDF(acquisition(), "models/airpi-2.onnx", device="cpu")
        monkeypatch.chdir(tmp_path)
        assert_same(context.run_udf(dataset=dataset(context, counts(), 3), udf=udf), udf, expected)

    def test_dask(self, expected):
        """Workers in other processes."""
        with Context.make_with("dask", cpus=2) as context:
            check(context, counts(), acquisition(), 4, expected)


ROWS, COLUMNS = np.mgrid[:6, :7]
ACQUISITIONS = {
    "turned": {"rotation": 90.0, "transpose": True, "k_pixel": (K0 / 8, K0 / 7.5)},
    "descan": {"descan": np.stack([0.6 * ROWS - 1, -0.5 * COLUMNS + 1], axis=-1)},
    "repaired": {
        "bad_pixels": np.indices((32, 32)).sum(axis=0) == 29,
        "background": 0.01,
        "gain": 2.0,
        "ellipse": (1.0, 1.05, 30.0),
    },
    "rows close": {"scan_step": (0.12, 0.3)},
    "columns close": {"scan_step": (0.3, 0.15)},
    "aberrations": {"defocus": 20.0, "spherical_aberration": 1e4},
}


@pytest.mark.parametrize("partitions", [2, 5, 6])
@pytest.mark.parametrize("name", ACQUISITIONS)
def test_acquisitions(context, model, name, partitions):
    here = acquisition(**ACQUISITIONS[name])
    expected = reconstruct(counts(), here, model=model)
    plain = reconstruct(counts(), acquisition(), model=model)
    assert expected.object.shape != plain.object.shape or np.abs(expected.phase - plain.phase).max() > 1e-3
    check(context, counts(), here, partitions, expected)


@pytest.mark.parametrize("partitions", [3, 11, 40])
@pytest.mark.parametrize(("sum_neighbours", "stride", "scan_step"), [(5, 2, 0.15), (1, 3, 0.1), (3, 2, (0.1, 0.22))])
def test_data_repetition(context, model, partitions, sum_neighbours, stride, scan_step):
    """With partitions of many rows, of one row (11) and parts of rows (40), and with missing patterns."""
    data = counts((11, 8, 32, 32))
    data[4, 2] = data[9, 7] = 0
    options = {"sum_neighbours": sum_neighbours, "stride": stride}
    with pytest.warns(UserWarning, match="empty"):
        expected = reconstruct(data, acquisition(scan_step=scan_step), model=model, **options)
    with pytest.warns(UserWarning, match="empty"):
        check(context, data, acquisition(scan_step=scan_step), partitions, expected, **options)


def test_oversample(context, model):
    expected = reconstruct(counts(), acquisition(), model=model, oversample=3)
    check(context, counts(), acquisition(), 4, expected, oversample=3)


class TestOracle:
    """Known patches at the right places: the phase of an image pixel at a scan position that nothing else reaches."""

    SHAPE = (23, 5)

    @pytest.fixture(scope="class")
    @staticmethod
    def phases():
        return np.random.default_rng(0).uniform(-2, 2, TestOracle.SHAPE)

    @pytest.fixture(scope="class")
    @staticmethod
    def oracle(phases, tmp_path_factory):
        patches = np.broadcast_to(np.exp(1j * phases)[:, :, None, None], (*phases.shape, 16, 16))
        return write_oracle(tmp_path_factory.mktemp("oracle") / "oracle.onnx", patches)

    @pytest.mark.parametrize("partitions", [1, 3, 7, 23, 40])
    @pytest.mark.parametrize("ratio", [1, 3])
    def test_positions(self, context, phases, oracle, partitions, ratio):
        """Also where kernels reach over several rows, further than a partition (ratio 3)."""
        k0 = optics.aperture_radius(300e3, 20.0)
        here = Acquisition(300e3, 20.0, (1.5 / k0, 1.5 * ratio / k0), (k0 / 12,) * 2, center=(32, 32), gain=1.0)
        data = dataset(context, numbered_patterns(*self.SHAPE), partitions)
        udf = AirpiUDF(here, oracle, device="cpu", oversample=1)
        results = context.run_udf(dataset=data, udf=udf)
        np.testing.assert_allclose(results["phase"].data, phases, atol=1e-5)
        np.testing.assert_allclose(results["confidence"].data, 1, atol=1e-5)


class TestStitchedFeatures:
    """A model that stitches features gives the engine's image too."""

    @pytest.fixture(scope="class")
    @staticmethod
    def path(tmp_path_factory):
        return write_two_parts(tmp_path_factory.mktemp("two_parts") / "two-parts.onnx")

    @pytest.fixture(scope="class")
    @staticmethod
    def expected(path):
        return reconstruct(counts(), acquisition(), model=path, device="cpu")

    @pytest.mark.parametrize("partitions", [1, 2, 4, 6, 17, 42])
    def test_number(self, context, path, expected, partitions):
        check(context, counts(), acquisition(), partitions, expected, model=path)

    @pytest.mark.parametrize("partitions", [2, 5, 6])
    def test_backwards_and_pickled(self, path, expected, partitions):
        check(Context(executor=Backwards()), counts(), acquisition(), partitions, expected, model=path)

    def test_threads(self, path, expected):
        with Context.make_with("threads", cpus=2) as context:
            check(context, counts(), acquisition(), 4, expected, model=path)

    @pytest.mark.parametrize("name", ["turned", "rows close", "aberrations"])
    def test_acquisitions(self, context, path, name):
        here = acquisition(**ACQUISITIONS[name])
        expected = reconstruct(counts(), here, model=path, device="cpu")
        check(context, counts(), here, 5, expected, model=path)

    @pytest.mark.parametrize("partitions", [3, 11, 40])
    @pytest.mark.parametrize(("sum_neighbours", "stride"), [(5, 2), (1, 3), (3, 1)])
    def test_data_repetition(self, context, path, partitions, sum_neighbours, stride):
        data = counts((11, 8, 32, 32))
        data[4, 2] = data[9, 7] = 0
        options = {"sum_neighbours": sum_neighbours, "stride": stride, "model": path}
        with pytest.warns(UserWarning, match="empty"):
            expected = reconstruct(data, acquisition(), device="cpu", **options)
        with pytest.warns(UserWarning, match="empty"):
            check(context, data, acquisition(), partitions, expected, **options)

    def test_image_grows(self, context, path, expected):
        """Image rows that nothing is added to and whose surroundings are complete are final."""
        udf = AirpiUDF(acquisition(), path, device="cpu", oversample=4)
        expected = reconstruct(counts((20, 4, 32, 32)), acquisition(), model=path, device="cpu", oversample=4)
        grown = []
        data = dataset(context, counts((20, 4, 32, 32)), 4)
        for part in context.run_udf_iter(dataset=data, udf=udf):
            phase = part.buffers[0]["phase"].masked_data
            final = np.isclose(phase.filled(np.nan), expected.phase, rtol=1e-4, atol=1e-4).all(axis=1)
            grown.append((final.sum(), (~phase.mask).any(axis=1).sum()))
        assert [count for count, _ in grown] == sorted({count for count, _ in grown})
        assert grown[-1] == (len(expected.phase),) * 2
        np.testing.assert_allclose(udf.reconstruction().phase_error, expected.phase_error, rtol=1e-4)

    def test_nothing_is_carried(self, context, path, monkeypatch):
        """Whole rows need no neighbours."""
        from airpi_py4d import libertem

        carried = []
        monkeypatch.setattr(libertem._Scan, "merge", lambda self, part, model: carried.append(len(part.band.held)))
        data = dataset(context, counts((24, 3, 32, 32)), 3)
        context.run_udf(dataset=data, udf=AirpiUDF(acquisition(), path, device="cpu"))
        assert carried == [0, 0, 0]


class TestMissing:
    @pytest.mark.parametrize("partitions", [1, 4, 6, 17])
    def test_positions(self, context, model, partitions):
        data = counts(dtype=np.float32)
        data[1, 2], data[1, 3], data[5, 6, 3, 4], data[3] = 0, 7, np.nan, -1
        with pytest.warns(UserWarning, match="missing") as theirs:
            expected = reconstruct(data, acquisition(), model=model)
        with pytest.warns(UserWarning, match="missing") as ours:
            check(context, data, acquisition(), partitions, expected)
        assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]

    @pytest.mark.parametrize("partitions", [2, 4, 17, 42])
    def test_empty_by_chance(self, context, model, partitions):
        """Where a row has few electrons, empty patterns count, though a partition may hold nothing else of it."""
        data = counts(electrons=0.03)
        data[2, 4] = 0
        assert 2 < data.sum(axis=(2, 3)).mean() < 15
        expected = reconstruct(data, acquisition(), model=model)
        check(context, data, acquisition(), partitions, expected)

    @pytest.mark.parametrize("partitions", [2, 4, 17, 42])
    def test_empty_among_bright(self, context, model, partitions):
        """Where a row has many, they don't, though a partition may hold only its dark positions."""
        data = counts(electrons=0.03)
        data[1, :3], data[1, 5] = 10 * counts()[1, :3], 0
        with pytest.warns(UserWarning, match="1 of 42 patterns are missing"):
            expected = reconstruct(data, acquisition(), model=model)
        with pytest.warns(UserWarning, match="1 of 42 patterns are missing"):
            check(context, data, acquisition(), partitions, expected)

    def test_none(self, context):
        udf = AirpiUDF(acquisition(), device="cpu")
        with pytest.raises(ValueError, match="no pattern that can be used"):
            context.run_udf(dataset=dataset(context, np.zeros(SHAPE, np.uint16), 4), udf=udf)

    @pytest.mark.parametrize("offset", [-10, 10])
    def test_data_set_that_is_not_full(self, context, model, offset):
        """Positions without a pattern, because the acquisition began earlier or later than the scan."""
        data = counts().reshape(42, 32, 32)
        shifted = np.zeros_like(data)
        if offset > 0:
            shifted[:-offset] = data[offset:]
        else:
            shifted[-offset:] = data[:offset]
        with pytest.warns(UserWarning, match="10 of 42 patterns are missing"):
            expected = reconstruct(shifted.reshape(SHAPE), acquisition(), model=model)
        udf = AirpiUDF(acquisition(), device="cpu")
        with pytest.warns(UserWarning, match="10 of 42 patterns are missing"):
            results = context.run_udf(dataset=dataset(context, counts(), 4, sync_offset=offset), udf=udf)
        assert_same(results, udf, expected)


class TestWarnings:
    """The engine's, with its words."""

    def compare(self, context, model, data, match, here=None, **options):
        here = acquisition() if here is None else here
        with pytest.warns(UserWarning, match=match) as theirs:
            expected = reconstruct(data, here, model=model, **options)
        with pytest.warns(UserWarning, match=match) as ours:
            check(context, data, here, 4, expected, **options)
        assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]

    def test_saturated(self, context, model):
        data = np.minimum(counts(electrons=400.0), 255).astype(np.uint8)
        data[:4] = counts()[:4]
        self.compare(context, model, data, "14 of 42 patterns are saturated")

    def test_negative(self, context, model):
        """Which has a hint of its own for integers."""
        self.compare(context, model, counts(dtype=np.int16) - np.int16(1), "view them as unsigned")

    def test_electrons(self, context, model):
        here = acquisition(gain=1e6)
        self.compare(context, model, counts(), "The electrons per pattern are", here, strict=False)

    def test_domain(self, context, model):
        self.compare(context, model, counts(), "far outside", acquisition(scan_step=6.0), strict=False)


class TestLive:
    def test_image_grows(self, context):
        """An image row is final, but for the offsets, when the partitions of all positions that reach it are there."""
        expected = reconstruct(counts(), acquisition(), model=KERNEL_MODEL, device="cpu").object
        udf = AirpiUDF(acquisition(), KERNEL_MODEL, device="cpu")
        grown = []
        for part in context.run_udf_iter(dataset=dataset(context, counts(), 3), udf=udf):
            image = part.buffers[0]["object"].masked_data
            final = np.isclose(np.abs(image.filled(0)), np.abs(expected), rtol=1e-5, atol=1e-6).all(axis=1)
            turned = np.angle(image.filled(1) * expected.conj())[final]
            assert np.abs(turned).max(initial=0) < 0.1
            assert len(turned) == 0 or np.ptp(turned, axis=1).max() < 0.02
            grown.append((final.sum(), (~image.mask).any(axis=1).sum()))
            arrived = udf.reconstruction().provenance["data_checks"]
        assert arrived == []
        assert [count for count, _ in grown] == sorted({count for count, _ in grown})
        assert grown[-1] == (len(expected),) * 2
        assert grown[0][0] < grown[0][1] < len(expected)

    def test_stopped(self, context):
        udf = AirpiUDF(acquisition(), KERNEL_MODEL, device="cpu")
        parts = context.run_udf_iter(dataset=dataset(context, counts(), 3), udf=udf)
        phase = next(parts).buffers[0]["phase"].masked_data
        parts.close()
        assert udf.reconstruction().provenance["data_checks"] == ["14 of 42 patterns have arrived."]
        assert phase.mask.any()
        assert not phase.mask.all()

    def test_plot(self, context):
        """LiberTEM's live plots find the images."""
        udf = AirpiUDF(acquisition(), device="cpu")
        data = dataset(context, counts(), 3)
        plotting = Context(executor=InlineJobExecutor(), plot_class=Dummy2DPlot)
        plotting.run_udf(dataset=data, udf=udf, plots=[["phase"]])
        plots = [Dummy2DPlot(data, udf, channel=channel) for channel in ("phase", "confidence", ("object", np.abs))]
        results = context.run_udf(dataset=data, udf=udf, plots=plots)
        np.testing.assert_array_equal(plots[0].data, results["phase"].data)


class TestRefused:
    def refuse(self, context, match, data=None, here=None, **options):
        data = counts((3, 4, 32, 32)) if data is None else data
        udf = AirpiUDF(acquisition() if here is None else here, device="cpu", **options)
        with pytest.raises(ValueError, match=match):
            context.run_udf(dataset=dataset(context, data, 1), udf=udf)

    def test_region_of_interest(self, context):
        udf = AirpiUDF(acquisition(), device="cpu")
        with pytest.raises(ValueError, match="roi was given"):
            context.run_udf(dataset=dataset(context, counts(), 2), udf=udf, roi=np.eye(6, 7, dtype=bool))

    def test_no_center(self):
        with pytest.raises(ValueError, match="acquisition has no center"):
            AirpiUDF(acquisition(center=None))

    def test_loaded_model(self, model):
        with pytest.raises(ValueError, match="give its name or path"):
            AirpiUDF(acquisition(), model)

    def test_no_such_model(self, context):
        self.refuse(context, "neither a file nor a shipped model", model="nothing")

    def test_too_few_positions(self, context):
        self.refuse(context, "need at least 3 x 3", counts((2, 4, 32, 32)))

    def test_stack(self, context):
        self.refuse(context, "expected 4 dimensions", counts((3, 4, 32, 32))[0])

    def test_oversample(self, context):
        self.refuse(context, "oversample is 0", oversample=0)

    def test_disk(self, context):
        self.refuse(context, "larger than the detector", here=acquisition(k_pixel=(K0 / 40,) * 2))

    def test_descan(self, context):
        self.refuse(context, "descan has the shape", here=acquisition(descan=np.zeros((4, 3, 2))))

    def test_outside_of_the_domain(self, context, model):
        here = acquisition(scan_step=8.0)
        with pytest.raises(ValueError, match="far outside") as theirs:
            reconstruct(counts((3, 4, 32, 32)), here, model=model)
        self.refuse(context, "^" + str(theirs.value)[:60].replace("(", r"\(").replace(")", r"\)"), here=here)

    def test_electrons(self, context):
        """As soon as it shows."""
        self.refuse(context, "The electrons per pattern are", here=acquisition(gain=1e9))

    def test_not_run(self):
        with pytest.raises(ValueError, match="wasn't run"):
            AirpiUDF(acquisition()).reconstruction()


def test_center_from_the_mean(context, model):
    """As the engine measures it of a scan."""
    data = dataset(context, counts(), 3)
    mean = context.run_udf(dataset=data, udf=SumUDF())["intensity"].data / 42
    here = with_center(mean[None, None], acquisition(center=None))
    results = context.run_udf(dataset=data, udf=AirpiUDF(here, device="cpu"))
    expected = reconstruct(counts(), acquisition(center=None), model=model)
    np.testing.assert_allclose(here.center, expected.provenance["acquisition"]["center"]["value"], atol=1e-4)
    np.testing.assert_allclose(results["phase"].data, expected.phase, atol=1e-4)


def test_carried_patterns(context, monkeypatch):
    """Of a partition's patterns only two rows at each end go to the main process."""
    from airpi_py4d import libertem

    carried = []

    def merge(self, part, model):
        carried.append(SimpleNamespace(rows=sorted(part.band.held), fragments=len(part.fragments)))

    monkeypatch.setattr(libertem._Scan, "merge", merge)
    data = dataset(context, counts((24, 3, 32, 32)), 3)
    context.run_udf(dataset=data, udf=AirpiUDF(acquisition(), KERNEL_MODEL, device="cpu"))
    assert [part.rows for part in carried] == [[6, 7], [8, 9, 14, 15], [16, 17]]
    assert not any(part.fragments for part in carried)


def test_not_imported_without_need():
    code = "import sys, airpi_py4d; sys.exit('libertem' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_acquisition_is_kept(context):
    """Also its sources, for provenance."""
    here = replace(acquisition(), sources={"scan_step": "metadata"})
    udf = AirpiUDF(here, device="cpu")
    context.run_udf(dataset=dataset(context, counts((3, 4, 32, 32)), 2), udf=udf)
    assert udf.reconstruction().provenance["acquisition"] == here.describe()
