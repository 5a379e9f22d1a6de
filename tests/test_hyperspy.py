"""The HyperSpy adapter on HyperSpy's and pyxem's own signals; the engine only records what it is asked."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from airpi_py4d import Acquisition, engine, optics
from airpi_py4d import hyperspy as adapter
from airpi_py4d.result import Reconstruction

hs = pytest.importorskip("hyperspy.api")
da = pytest.importorskip("dask.array")
signal2d = pytest.importorskip("hyperspy._signals.signal2d")

SHAPE = (4, 5, 6, 8)  # y, x, ky, kx
GIVEN = {"beam_energy": 300, "convergence_angle": 20, "scan_step": 0.2, "k_step": 0.05}
ZARR_2 = "ignore:The NestedDirectoryStore is deprecated:FutureWarning"  # rosettasciio's .zspy with zarr 2


@pytest.fixture(scope="module", autouse=True)
def attached():
    adapter.attach(signal2d)


@pytest.fixture(scope="module")
def pyxem_signals():
    return pytest.importorskip("pyxem.signals")


@pytest.fixture
def asked(monkeypatch):
    """What calibration and engine were asked; the former measures nothing, the image has two pixels a scan step."""
    asked = SimpleNamespace(phase_error=None)

    def calibrate(data, **given):
        asked.given = given
        measured = {"semiangle": 20.0, "k_pixel": 0.05, "rotation": 0.0, "transpose": False}
        missing = {name: value for name, value in measured.items() if given[name] is None}
        sources = {**given["sources"], **dict.fromkeys(missing, "measured")}
        values = {**given, **missing, "sources": sources}
        if np.ndim(values["k_pixel"]) == 0:
            values["k_pixel"] = (values["k_pixel"],) * 2
        return Acquisition(**values)

    def reconstruct(data, acquisition, **options):
        asked.data, asked.acquisition, asked.options = data, acquisition, options
        rows, columns = (2 * n - 1 for n in data.shape[:2])
        phase = np.linspace(-1, 1, rows * columns).reshape(rows, columns)
        return Reconstruction(
            object=(0.75 * np.exp(1j * phase)).astype(np.complex64),
            pixel_size=tuple(step / 2 for step in acquisition.scan_step),
            provenance={
                "software": "airpi_py4d",
                "acquisition": acquisition.describe(),
                "scan_shape": list(data.shape[:2]),
                "model": {"name": "airpi-2", "version": "1", "sha256": "ab" * 32},
                "outside_training_domain": [],
                "provider": "CPUExecutionProvider",
                "positions_per_second": 100.0,
            },
            phase_error=asked.phase_error,
        )

    monkeypatch.setattr(adapter, "calibrate", calibrate)
    monkeypatch.setattr(engine, "reconstruct", reconstruct)
    return asked


def make_data(shape=SHAPE):
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


def calibrated_signal(data=None):
    """Every parameter in metadata and axes: 300 keV, 20 mrad, 0.2 A, (0.04, 0.05) 1/A, centre (2, 3) px."""
    axes = [
        {"name": "y", "size": 4, "scale": 0.02, "units": "nm", "navigate": True},
        {"name": "x", "size": 5, "scale": 0.02, "units": "nm", "navigate": True},
        {"name": "ky", "size": 6, "scale": 0.4, "offset": -0.8, "units": "1/nm", "navigate": False},
        {"name": "kx", "size": 8, "scale": 0.5, "offset": -1.5, "units": "1/nm", "navigate": False},
    ]
    s = hs.signals.Signal2D(make_data() if data is None else data, axes=axes)
    s.metadata.set_item("Acquisition_instrument.TEM.beam_energy", 300)
    s.metadata.set_item("Acquisition_instrument.TEM.convergence_angle", 20)
    s.metadata.set_item("Acquisition_instrument.TEM.camera_length", 100)
    s.metadata.set_item("Sample.elements", ["Mo", "S"])
    s.metadata.General.title = "MoS2"
    return s


def plain_signal():
    return hs.signals.Signal2D(make_data())


def flat(tree, path=()):
    """Leaves of nested dictionaries."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {leaf: value for key, branch in tree.items() for leaf, value in flat(branch, (*path, key)).items()}


class TestAttach:
    def test_hyperspy(self):
        s = plain_signal()
        for signal in (s, s.as_lazy(), s.inav[1:, :3], s.isig[2:, :], s.as_lazy().inav[:2, :2]):
            assert signal.airpi.__func__ is adapter.airpi

    @pytest.mark.parametrize("name", ["ElectronDiffraction2D", "Diffraction2D"])
    def test_pyxem(self, name, pyxem_signals):
        s = getattr(pyxem_signals, name)(make_data())
        for signal in (s, s.as_lazy(), s.inav[1:, :3]):
            assert name in type(signal).__name__
            assert signal.airpi.__func__ is adapter.airpi

    def test_idempotent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter.attach(signal2d)
        assert signal2d.Signal2D.airpi is adapter.airpi

    def test_foreign(self):
        module = SimpleNamespace(Signal2D=type("Signal2D", (), {"airpi": "foreign"}))
        with pytest.warns(UserWarning, match=r"Signal2D.airpi already exists \('foreign'\)"):
            adapter.attach(module)
        assert module.Signal2D.airpi == "foreign"

    def test_imports_no_host(self):
        code = "import sys, airpi_py4d.hyperspy; assert not {'hyperspy.api', 'pyxem'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestCalibration:
    def test_arguments(self, asked):
        plain_signal().airpi(
            beam_energy=80,
            convergence_angle=21.4,
            scan_step=0.3,
            k_step=(0.04, 0.05),
            center=(2.5, 3.25),
            rotation=-15,
            flip=True,
            defocus=50,
            mask=np.eye(6, 8, dtype=bool),
            gain=2.0,
            background=0.1,
        )
        acquisition = asked.acquisition
        assert acquisition.energy == 80e3
        assert (acquisition.semiangle, acquisition.scan_step, acquisition.k_pixel) == (21.4, (0.3, 0.3), (0.04, 0.05))
        assert (acquisition.center, acquisition.rotation, acquisition.transpose) == ((2.5, 3.25), -15, True)
        assert (acquisition.defocus, acquisition.spherical_aberration) == (50, 0)
        sources = {name: entry["source"] for name, entry in acquisition.describe().items()}
        assert np.array_equal(acquisition.bad_pixels, np.eye(6, 8, dtype=bool))
        assert (acquisition.gain, acquisition.background) == (2, 0.1)
        assert set(sources.values()) == {"argument"}

    def test_signal(self, asked):
        calibrated_signal().airpi()
        acquisition = asked.acquisition
        assert (acquisition.energy, acquisition.semiangle) == (300e3, 20)
        assert acquisition.scan_step == pytest.approx((0.2, 0.2))
        assert acquisition.k_pixel == pytest.approx((0.04, 0.05))
        assert acquisition.center == pytest.approx((2, 3))
        assert (acquisition.rotation, acquisition.transpose, acquisition.defocus) == (0, False, 0)
        assert acquisition.sources == {
            "energy": "metadata",
            "semiangle": "metadata",
            "scan_step": "axes",
            "k_pixel": "axes",
            "center": "axes",
            "rotation": "measured",
            "transpose": "measured",
        }
        for name in ("rotation", "transpose", "bad_pixels", "background"):
            assert asked.given[name] is None

    def test_arguments_come_first(self, asked):
        calibrated_signal().airpi(**{**GIVEN, "beam_energy": 200, "center": (1, 1)})
        assert asked.acquisition.energy == 200e3
        assert asked.acquisition.k_pixel == (0.05, 0.05)
        assert asked.acquisition.center == (1, 1)
        described = asked.acquisition.describe()
        assert described["scan_step"]["source"] == described["center"]["source"] == "argument"

    def test_pyxem(self, asked, pyxem_signals):
        s = pyxem_signals.ElectronDiffraction2D(make_data())
        s.beam_energy = 200
        s.calibration(scale=0.05, units="$A^{-1}$", center=(3, 2))  # pyxem's order is (x, y)
        s.airpi(convergence_angle=20, scan_step=0.2)
        assert asked.acquisition.energy == 200e3
        assert asked.acquisition.k_pixel == pytest.approx((0.05, 0.05))
        assert asked.acquisition.center == pytest.approx((2, 3))

    def test_mrad(self, asked):
        s = calibrated_signal()
        for axis in s.axes_manager.signal_axes:
            axis.units, axis.scale, axis.offset = "mrad", 2.0, -4.0
        s.airpi()
        expected = 2e-3 / optics.wavelength(300e3)
        assert asked.acquisition.k_pixel == pytest.approx((expected, expected))
        assert asked.acquisition.center == (2, 2)

    def test_mixed_units(self, asked):
        s = calibrated_signal()
        x, _ = s.axes_manager.navigation_axes
        x.units, x.scale = "Å", 0.2008
        s.airpi()
        assert asked.acquisition.scan_step == pytest.approx((0.2, 0.2008))

    @pytest.mark.parametrize("given", [{}, {"scan_step": (0.2, 0.3)}])
    def test_anisotropic_scan(self, asked, given):
        s = calibrated_signal()
        s.axes_manager.navigation_axes[0].scale = 0.03
        x, y = s.airpi(**given).axes_manager.signal_axes
        assert asked.acquisition.scan_step == pytest.approx((0.2, 0.3))
        assert (y.scale, x.scale) == pytest.approx((0.1, 0.15))

    @pytest.mark.parametrize(
        ("units", "offsets"),
        [
            ("1/nm", (0.0, 0.0)),  # uncentred
            ("1/nm", (-0.8, 0.0)),  # a corner is no centre
            ("1/nm", (-0.8, -4.0)),  # zero beyond the detector
            ("1/nm", (0.8, 1.5)),  # cropped
            ("px", (-0.8, -1.5)),
            ("V", (-0.8, -1.5)),
        ],
    )
    def test_center_is_measured(self, asked, units, offsets):
        s = calibrated_signal()
        for axis, offset in zip(s.axes_manager.signal_axes[::-1], offsets, strict=True):
            axis.units, axis.offset = units, offset
        s.airpi(k_step=0.05)
        assert asked.given["center"] is None

    def test_cropped_detector(self, asked):
        calibrated_signal().isig[2:, 1:].airpi()
        assert asked.acquisition.center == pytest.approx((1, 1))

    def test_engine_options(self, asked):
        plain_signal().airpi(**GIVEN, model="mine.onnx", device="cuda:1", oversample=3, show_progressbar=False)
        assert asked.options == {
            "model": "mine.onnx",
            "device": "cuda:1",
            "oversample": 3,
            "sum_neighbours": 1,
            "stride": 1,
            "strict": True,
            "show_progress": False,
        }
        plain_signal().airpi(**GIVEN, sum_neighbours=3, stride=2, strict=False)
        assert [asked.options[name] for name in ("sum_neighbours", "stride", "strict")] == [3, 2, False]

    @pytest.mark.parametrize("preference", [True, False])
    def test_show_progressbar_from_preferences(self, asked, monkeypatch, preference):
        monkeypatch.setattr(hs.preferences.General, "show_progressbar", preference)
        plain_signal().airpi(**GIVEN)
        assert asked.options["show_progress"] is preference
        plain_signal().airpi(**GIVEN, show_progressbar=not preference)
        assert asked.options["show_progress"] is not preference


class TestErrors:
    def test_no_metadata(self, asked):
        given = {name: value for name, value in GIVEN.items() if name != "beam_energy"}
        path = "Acquisition_instrument.TEM.beam_energy"
        with pytest.raises(
            ValueError, match=f"beam_energy is unknown, the signal has no metadata.{path}. Give beam_energy "
        ):
            plain_signal().airpi(**given)
        s = plain_signal()
        s.metadata.set_item(path, 300)  # what the message says
        s.airpi(**given)

    @pytest.mark.parametrize("units", ["", "px", "pixels", "<undefined>"])
    def test_uncalibrated(self, asked, units):
        s = calibrated_signal()
        for axis in s.axes_manager.navigation_axes:
            axis.scale, axis.units = 1, units
        with pytest.raises(ValueError, match="scan_step is unknown, navigation axis y ") as error:
            s.airpi()
        assert f"has scale 1 and units {axis.units!r}, which is uncalibrated" in str(error.value)
        assert "Give scan_step [A] or set scale and units of s.axes_manager.navigation_axes." in str(error.value)
        assert not hasattr(asked, "data")

    def test_undefined_units(self, asked):
        given = {name: value for name, value in GIVEN.items() if name != "scan_step"}
        message = r"scan_step is unknown, .* axis Unnamed .* has scale 1 and units <undefined>, which is uncalibrated"
        with pytest.raises(ValueError, match=message):
            plain_signal().airpi(**given)

    @pytest.mark.parametrize(("missing", "kind"), [("scan_step", "navigation"), ("k_step", "signal")])
    def test_unknown_units(self, asked, missing, kind):
        s = calibrated_signal()
        for axis in getattr(s.axes_manager, f"{kind}_axes"):
            axis.units = "V"
        with pytest.raises(ValueError, match=f"{missing} is unknown.*units 'V', but 'V' is no known .*Give {missing} "):
            s.airpi()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (
                300000,
                r"beam_energy is 300000 keV \(argument\), expected 10 to 1000 keV. For 300000 eV give beam_energy=300.",
            ),
            (0.3, r"beam_energy is 0.3 keV \(argument\), expected 10 to 1000 keV.$"),
            (-300, "beam_energy is -300 keV"),
            (np.nan, "beam_energy is nan keV"),
            ("300 kV", r"beam_energy is '300 kV' \(argument\), expected a number in keV."),
        ],
    )
    def test_beam_energy(self, asked, value, message):
        with pytest.raises(ValueError, match=message):
            plain_signal().airpi(**{**GIVEN, "beam_energy": value})

    def test_beam_energy_of_metadata(self, asked):
        s = calibrated_signal()
        s.metadata.Acquisition_instrument.TEM.beam_energy = 0
        with pytest.raises(ValueError, match=r"beam_energy is 0 keV \(metadata\)"):
            s.airpi()

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("convergence_angle", 0.02, "convergence_angle is 0.02 mrad, expected 0.5 to 200 mrad. For 0.02 rad give"),
            ("scan_step", 0, "scan_step is 0 A"),
            ("k_step", (1, 2, 3), "k_step is .*expected two numbers"),
            ("k_step", (0.05, -0.05), "k_step is -0.05 1/A"),
            ("k_step", "0.05 1/A", "k_step is '0.05 1/A', expected a number in 1/A"),
            ("center", 3, "center is 3, expected two numbers"),
            ("rotation", "left", "rotation is 'left', expected a number in degrees"),
            ("defocus", np.inf, "defocus is inf"),
        ],
    )
    def test_names_our_parameters(self, asked, name, value, message):
        with pytest.raises(ValueError, match=message):
            plain_signal().airpi(**{**GIVEN, name: value})

    @pytest.mark.parametrize("index", range(4))
    @pytest.mark.parametrize("scale", [-0.02, 0.0])
    def test_not_ascending(self, asked, index, scale):
        s = calibrated_signal()
        axis = s.axes_manager._axes[index]
        axis.scale = scale
        with pytest.raises(ValueError, match=f"{axis.name} axis has scale {scale:g}, airpi needs ascending axes"):
            s.airpi()

    @pytest.mark.parametrize("index", range(4))
    def test_not_uniform(self, asked, index):
        s = calibrated_signal()
        axis = s.axes_manager._axes[index]
        axis.convert_to_non_uniform_axis()
        with pytest.raises(ValueError, match=f"{axis.name} axis is not uniform"):
            s.airpi(**GIVEN)

    @pytest.mark.parametrize("shape", [(6, 8), (5, 6, 8), (2, 4, 5, 6, 8)])
    def test_dimensions(self, asked, shape):
        s = hs.signals.Signal2D(make_data(shape))
        with pytest.raises(ValueError, match=r"two navigation and two signal axes .* got .*: 8, .*: 6"):
            s.airpi(**GIVEN)

    def test_line_of_a_scan(self, asked):
        with pytest.raises(ValueError, match="two navigation and two signal axes"):
            plain_signal().inav[0].airpi(**GIVEN)


class TestMeasured:
    """With the real calibration: 20 mrad on a k-pixel of 0.25 and 0.2 1/A, disk at (7.5, 10.2)."""

    @pytest.fixture
    def signal(self, monkeypatch):
        seen = SimpleNamespace()

        def reconstruct(data, acquisition, **options):
            seen.acquisition = acquisition
            return Reconstruction(np.ones((3, 3), np.complex64), (0.1, 0.1), {})

        monkeypatch.setattr(engine, "reconstruct", reconstruct)
        k = np.hypot(*np.meshgrid(np.arange(16) - 7.5, 0.8 * (np.arange(22) - 10.2), indexing="ij"))
        disk = np.clip(optics.aperture_radius(300e3, 20) / 0.25 + 0.5 - k, 0, 1)
        s = hs.signals.Signal2D(np.random.default_rng(0).poisson(0.2 + 40 * disk, (6, 8, 16, 22)).astype(np.uint16))
        s.seen = seen
        return s

    @pytest.mark.parametrize("lazy", [False, True])
    def test_anisotropic_detector(self, signal, lazy):
        s, seen = (signal.as_lazy() if lazy else signal), signal.seen
        s.airpi(beam_energy=300, convergence_angle=20, scan_step=0.2, k_step=(0.25, 0.2), rotation=0, flip=False)
        assert seen.acquisition.center == pytest.approx((7.5, 10.2), abs=0.1)
        assert seen.acquisition.sources["center"].startswith("measured from")

    def test_semiangle(self, signal):
        for axis, scale in zip(signal.axes_manager.signal_axes, (2.0, 2.5), strict=True):
            axis.scale, axis.units = scale, "1/nm"
        signal.airpi(beam_energy=300, scan_step=0.2, rotation=0, flip=False)
        assert signal.seen.acquisition.semiangle == pytest.approx(20, rel=0.02)
        assert signal.seen.acquisition.sources["semiangle"].startswith("measured from")
        assert signal.seen.acquisition.sources["k_pixel"] == "axes"

    def test_contradiction(self, signal):
        with pytest.warns(UserWarning, match=r"^convergence_angle 20 mrad and k_step 0.4 1/A make the radius"):
            signal.airpi(
                beam_energy=300, convergence_angle=20, scan_step=0.2, k_step=(0.4, 0.32), rotation=0, flip=False
            )
        assert signal.seen.acquisition.k_pixel == (0.4, 0.32)

    def test_rotation_and_flip(self, signal):
        with pytest.warns(UserWarning, match="^rotation and flip can't be measured and default to 0 and False"):
            signal.airpi(beam_energy=300, convergence_angle=20, scan_step=0.2, k_step=(0.25, 0.2))

    def test_neither_semiangle_nor_k_pixel(self, signal):
        with pytest.raises(
            ValueError, match=r"^convergence_angle and k_step are both unknown\. Give convergence_angle"
        ):
            signal.airpi(beam_energy=300, scan_step=0.2)


class TestData:
    def test_view(self, asked):
        s = plain_signal()
        s.airpi(**GIVEN)
        assert np.shares_memory(asked.data, s.data)
        np.testing.assert_array_equal(asked.data, make_data())

    def test_memory_map(self, asked, tmp_path):
        np.save(tmp_path / "scan.npy", make_data())
        hs.signals.Signal2D(np.load(tmp_path / "scan.npy", mmap_mode="r")).airpi(**GIVEN)
        np.testing.assert_array_equal(asked.data, make_data())

    @pytest.mark.parametrize("order", [(2, 3, 0, 1), (3, 1, 0, 2), (1, 0, 3, 2)])
    @pytest.mark.parametrize("lazy", [False, True])
    def test_axis_order(self, asked, order, lazy):
        """Data may hold the axes in any order: navigation_axes and signal_axes say which is which."""
        sizes = dict(zip(("y", "x", "ky", "kx"), SHAPE, strict=True))
        data = make_data().transpose(order)
        names = [list(sizes)[index] for index in order]
        axes = [{"name": name, "size": sizes[name], "navigate": name in "xy"} for name in names]
        s = hs.signals.Signal2D(da.from_array(data) if lazy else data, axes=axes)
        s = s.as_lazy() if lazy else s
        image = s.airpi(**GIVEN)
        # HyperSpy's x is the last navigation axis of the data, whatever its name.
        flip_scan, flip_detector = order.index(0) > order.index(1), order.index(2) > order.index(3)
        expected = make_data().swapaxes(0, 1) if flip_scan else make_data()
        expected = expected.swapaxes(2, 3) if flip_detector else expected
        np.testing.assert_array_equal(np.asarray(asked.data), expected)
        assert image.data.shape == tuple(2 * n - 1 for n in expected.shape[:2])

    def test_lazy(self, asked):
        """The dask array itself goes to the engine, nothing is computed."""

        def read(_):
            raise AssertionError("computed")

        data = da.zeros(SHAPE, dtype=np.uint16, chunks=(2, 2, 6, 8)).map_blocks(
            read, dtype=np.uint16, meta=np.array(())
        )
        s = calibrated_signal(data).as_lazy()
        image = s.airpi()
        assert asked.data is s.data
        assert s._lazy
        assert not image._lazy

    def test_untouched(self, asked):
        s = calibrated_signal()
        original = s.deepcopy()
        image = s.airpi()
        image.metadata.Sample.elements.append("W")
        image.metadata.Acquisition_instrument.TEM.beam_energy = 1
        np.testing.assert_array_equal(s.data, original.data)
        assert s.metadata.as_dictionary() == original.metadata.as_dictionary()
        for axis, before in zip(s.axes_manager._axes, original.axes_manager._axes, strict=True):
            assert axis.get_axis_dictionary() == before.get_axis_dictionary()


class TestImage:
    def test_phase(self, asked):
        image = calibrated_signal().airpi()
        assert type(image) is hs.signals.Signal2D
        assert image.data.shape == (7, 9)
        assert image.data.dtype == np.float32
        np.testing.assert_allclose(image.data, np.linspace(-1, 1, 63).reshape(7, 9), atol=1e-6)

    def test_complex(self, asked):
        image = calibrated_signal().airpi(return_complex=True)
        assert type(image) is hs.signals.ComplexSignal2D
        assert image.data.dtype == np.complex64
        np.testing.assert_allclose(np.abs(image.data), 0.75, rtol=1e-6)
        assert image.metadata.General.title == "MoS2 AIRPI object"

    def test_axes(self, asked):
        x, y = calibrated_signal().airpi().axes_manager.signal_axes
        assert [(axis.name, axis.size, axis.units, axis.offset) for axis in (y, x)] == [
            ("y", 7, "Å", 0),
            ("x", 9, "Å", 0),
        ]
        assert (y.scale, x.scale) == pytest.approx((0.1, 0.1))
        x.convert_to_units("nm")  # pint
        assert x.scale == pytest.approx(0.01)

    def test_slice(self, asked):
        s = calibrated_signal()
        for axis, offset in zip(s.axes_manager.navigation_axes, (3.0, 5.0), strict=True):
            axis.offset = offset  # [nm]
        image = s.inav[1:, 1:].airpi()
        np.testing.assert_array_equal(asked.data, make_data()[1:, 1:])
        x, y = image.axes_manager.signal_axes
        assert (x.offset, y.offset) == pytest.approx((30.2, 50.2))
        assert asked.acquisition.center == pytest.approx((2, 3))

    def test_slice_of_uncalibrated_axes(self, asked):
        x, y = plain_signal().inav[2:, 1:].airpi(**GIVEN).axes_manager.signal_axes
        assert (x.offset, y.offset) == pytest.approx((0.4, 0.2))

    def test_metadata(self, asked):
        s = calibrated_signal()
        s.metadata.set_item("Signal.Noise_properties.variance", 1.0)
        image = s.airpi()
        assert image.metadata.General.title == "MoS2 AIRPI phase"
        assert image.metadata.Signal.quantity == "Phase (rad)"
        assert not image.metadata.has_item("Signal.Noise_properties")
        for node in ("Sample", "Acquisition_instrument"):
            assert image.metadata.get_item(node).as_dictionary() == s.metadata.get_item(node).as_dictionary()
        assert image.metadata.AiRPI.confidence_median == pytest.approx(0.75)
        assert image.metadata.AiRPI.acquisition.as_dictionary() == asked.acquisition.describe()
        assert image.metadata.AiRPI.model.name == "airpi-2"
        assert image.tmp_parameters.as_dictionary() == {}

    def test_error(self, asked, tmp_path):
        """Of a model that judges its own: HyperSpy's variance, an image like the phase, that is saved with it."""
        error = np.linspace(0.1, 0.5, 63, dtype=np.float32).reshape(7, 9)
        error[2, 3] = np.inf
        asked.phase_error = error
        image = calibrated_signal().airpi()
        image.save(tmp_path / "image.hspy")
        for each in (image, hs.load(tmp_path / "image.hspy")):
            variance = each.get_noise_variance()
            assert type(variance) is hs.signals.Signal2D
            np.testing.assert_array_equal(variance.data, error**2)
            assert each.metadata.AiRPI.phase_error_median == np.median(error)
            for axis, of_image in zip(variance.axes_manager._axes, image.axes_manager._axes, strict=True):
                assert axis.get_axis_dictionary() == of_image.get_axis_dictionary()

    def test_error_of_the_object(self, asked):
        """The variance is the phase's; of the object, the modulus tells."""
        asked.phase_error = np.full((7, 9), 0.2, np.float32)
        image = calibrated_signal().airpi(return_complex=True)
        assert image.get_noise_variance() is None
        assert image.metadata.AiRPI.phase_error_median == pytest.approx(0.2)

    def test_no_error(self, asked):
        image = calibrated_signal().airpi()
        assert image.get_noise_variance() is None
        assert not image.metadata.has_item("AiRPI.phase_error_median")

    def test_no_title(self, asked):
        assert plain_signal().airpi(**GIVEN).metadata.General.title == "AIRPI phase"


@pytest.mark.filterwarnings(ZARR_2)
@pytest.mark.parametrize("extension", ["hspy", "zspy"])
@pytest.mark.parametrize("return_complex", [False, True])
def test_round_trip(asked, tmp_path, extension, return_complex):
    image = calibrated_signal().airpi(return_complex=return_complex)
    path = tmp_path / f"image.{extension}"
    image.save(path)
    loaded = hs.load(path)
    assert type(loaded) is type(image)
    np.testing.assert_array_equal(loaded.data, image.data)
    for axis, before in zip(loaded.axes_manager._axes, image.axes_manager._axes, strict=True):
        assert axis.get_axis_dictionary() == before.get_axis_dictionary()
    expected = flat(image.metadata.AiRPI.as_dictionary())
    assert flat(loaded.metadata.AiRPI.as_dictionary()) == expected
    assert loaded.metadata.Sample.elements == ["Mo", "S"]


@pytest.mark.filterwarnings(ZARR_2)
@pytest.mark.parametrize("extension", ["hspy", "zspy"])
def test_loads_without_plugin(asked, tmp_path, extension):
    path = tmp_path / f"image.{extension}"
    calibrated_signal().airpi().save(path)
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "airpi" not in type(finder).__module__]
for name in [name for name in sys.modules if name.startswith("airpi_py4d")]:
    del sys.modules[name]
sys.modules["airpi_py4d"] = None
import hyperspy.api as hs
image = hs.load({str(path)!r})
assert not hasattr(image, "airpi")
assert image.data.shape == (7, 9) and image.metadata.AiRPI.acquisition.energy.value == 300e3
"""
    subprocess.run([sys.executable, "-c", code], check=True)
