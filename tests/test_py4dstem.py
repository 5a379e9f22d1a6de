"""The py4DSTEM adapter with the real py4DSTEM; the engine is replaced by one that records its arguments."""

import copy
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import py4DSTEM
import pytest
from emdfile import Array, PointListArray

from airpi_py4d import Acquisition, Reconstruction, engine, optics
from airpi_py4d import py4dstem as adapter
from airpi_py4d.patterns import detector_to_scan

ENERGY = 300e3
WAVELENGTH = optics.wavelength(ENERGY)
GIVEN = {
    "semiangle_cutoff": 20.0,
    "force_scan_sampling": 0.2,
    "force_reciprocal_sampling": 0.25,
    "force_com_rotation": 0.0,
    "force_com_transpose": False,
    "verbose": False,
}
UNMEASURED = {"energy": "argument", "gain": "default", "background": "default"}
UNMEASURED |= {"defocus": "default", "spherical_aberration": "default"}


@pytest.fixture(autouse=True)
def _attached():
    adapter.attach(sys.modules["py4DSTEM.datacube.datacube"])


@pytest.fixture
def data():
    """A bright-field disk of 20 mrad with a k-pixel of 0.25 1/A, at (7.5, 8.25)."""
    k = np.hypot(*np.meshgrid(np.arange(16) - 7.5, np.arange(18) - 8.25, indexing="ij"))
    disk = np.clip(optics.aperture_radius(ENERGY, 20.0) / 0.25 + 0.5 - k, 0, 1)
    return np.random.default_rng(0).poisson(0.2 + 40 * disk, (5, 6, 16, 18)).astype(np.uint16)


@pytest.fixture
def datacube(data):
    return py4DSTEM.DataCube(data)


@pytest.fixture
def calibrated(datacube):
    """All that the calibration can say."""
    calibration = datacube.calibration
    calibration.set_R_pixel_size(0.2)
    calibration.set_R_pixel_units("A")
    calibration.set_Q_pixel_size(0.25)
    calibration.set_Q_pixel_units("A^-1")
    calibration.set_convergence_semiangle_mrad(20.0)
    calibration.set_origin((7.5 + 0.1 * (np.indices((5, 6))[0] - 2), np.full((5, 6), 8.25)))
    calibration.set_QR_rotflip_degrees((30.0, True))
    return datacube


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call of the engine, which answers with a gradient that names its call."""
    seen = []

    def reconstruct(data, acquisition, **options):
        seen.append(SimpleNamespace(data=data, acquisition=acquisition, options=options))
        phase = np.linspace(-1, 1, 13 * 16).reshape(13, 16)
        provenance = {
            "software": "airpi_py4d",
            "acquisition": acquisition.describe(),
            "outside_training_domain": [],
            "scan_shape": [5, 6],
            "oversample": [3, 3],
            "model": {"name": "test", "version": "1", "sha256": "0" * 64},
            "provider": "CPUExecutionProvider",
            "positions_per_second": 10.5,
            "call": len(seen),
        }
        return Reconstruction(np.complex64(0.5) * np.exp(1j * phase).astype(np.complex64), (0.1, 0.2), provenance)

    monkeypatch.setattr(engine, "reconstruct", reconstruct)
    return seen


def resolved(datacube, calls, **arguments):
    """The acquisition that reaches the engine."""
    datacube.airpi_reconstruct(ENERGY, verbose=False, **arguments)
    return calls[-1].acquisition


def assert_unchanged(datacube, data, params):
    assert np.array_equal(datacube.data, data)
    assert datacube.data.dtype == data.dtype
    assert repr(datacube.calibration._params) == repr(params)


class TestAttach:
    def test_reaches_public_class(self):
        assert py4DSTEM.DataCube.airpi_reconstruct is adapter.airpi_reconstruct

    def test_idempotent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter.attach(sys.modules["py4DSTEM.datacube.datacube"])

    def test_leaves_foreign_method(self):
        def foreign():
            pass

        module = SimpleNamespace(DataCube=type("DataCube", (), {"airpi_reconstruct": foreign}))
        with pytest.warns(UserWarning, match=r"already exists .*foreign.*airpi_py4d leaves it"):
            adapter.attach(module)
        assert module.DataCube.airpi_reconstruct is foreign

    def test_attached_while_py4dstem_is_imported(self):
        code = """if True:
            import sys
            from airpi_py4d import hosts, py4dstem
            assert not {"py4DSTEM", "emdfile"} & set(sys.modules)
            hosts.when_imported("py4DSTEM.datacube.datacube", py4dstem.attach)
            assert not {"py4DSTEM", "emdfile"} & set(sys.modules)
            import py4DSTEM
            assert py4DSTEM.DataCube.airpi_reconstruct is py4dstem.airpi_reconstruct
        """
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


class TestCalibration:
    def test_from_arguments_alone(self, datacube, calls):
        acquisition = resolved(
            datacube,
            calls,
            semiangle_cutoff=16.2,
            force_scan_sampling=0.3,
            force_reciprocal_sampling=0.2,
            force_com_rotation=-40,
            force_com_transpose=True,
            defocus=12,
            mask=np.eye(16, 18, dtype=bool),
            gain=2.0,
            background=0.1,
        )
        assert acquisition.energy == ENERGY
        assert acquisition.semiangle == 16.2
        assert acquisition.scan_step == (0.3, 0.3)
        assert acquisition.k_pixel == (0.2, 0.2)
        assert np.array_equal(acquisition.bad_pixels, np.eye(16, 18, dtype=bool))
        assert (acquisition.gain, acquisition.background) == (2, 0.1)
        assert acquisition.center == pytest.approx((7.5, 8.25), abs=0.1)
        assert acquisition.rotation == -40
        assert acquisition.transpose is True
        assert acquisition.defocus == 12
        sources = {name: entry["source"] for name, entry in acquisition.describe().items()}
        assert sources.pop("center").startswith("measured from the bright-field disk")
        assert sources.pop("ellipse") == sources.pop("spherical_aberration") == "default"
        assert set(sources.values()) == {"argument"}

    def test_from_calibration_alone(self, calibrated, calls):
        acquisition = resolved(calibrated, calls)
        assert acquisition.semiangle == 20
        assert acquisition.scan_step == (0.2, 0.2)
        assert acquisition.k_pixel == (0.25, 0.25)
        assert acquisition.center == pytest.approx((7.5, 8.25))
        assert acquisition.rotation == pytest.approx(30)
        assert acquisition.transpose is True
        assert acquisition.defocus == 0
        assert acquisition.bad_pixels is None
        assert acquisition.descan[:, 0, 0] == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])
        assert acquisition.descan[..., 1] == pytest.approx(np.zeros((5, 6)))
        expected = dict.fromkeys(
            ("semiangle", "scan_step", "k_pixel", "center", "descan", "rotation", "transpose"), "calibration"
        )
        expected |= {**UNMEASURED, "ellipse": "default", "bad_pixels": "measured from the mean pattern"}
        assert acquisition.sources == expected

    def test_measured(self, datacube, calls):
        """Nothing but energy, semi-angle and step."""
        with pytest.warns(UserWarning, match="^force_com_rotation and force_com_transpose can't be measured"):
            acquisition = resolved(datacube, calls, semiangle_cutoff=20, force_scan_sampling=0.2)
        assert acquisition.center == pytest.approx((7.5, 8.25), abs=0.1)
        assert acquisition.k_pixel == pytest.approx((0.25, 0.25), rel=0.02)
        assert acquisition.bad_pixels is None
        assert acquisition.descan is None
        assert (acquisition.rotation, acquisition.transpose) == (0, False)
        for name in ("center", "k_pixel", "bad_pixels", "descan"):
            assert acquisition.sources[name].startswith("measured from")
        for name in ("rotation", "transpose"):
            assert acquisition.sources[name].startswith("default, not measured: the centre of mass")
        assert acquisition.sources["semiangle"] == acquisition.sources["scan_step"] == "argument"

    def test_semiangle_is_measured(self, datacube, calls):
        given = {name: value for name, value in GIVEN.items() if name != "semiangle_cutoff"}
        datacube.airpi_reconstruct(ENERGY, **given)
        assert calls[0].acquisition.semiangle == pytest.approx(20, rel=0.02)
        assert calls[0].acquisition.sources["semiangle"].startswith("measured from")

    def test_contradiction(self, datacube, calls):
        with pytest.warns(UserWarning, match=r"^semiangle_cutoff 20 mrad and force_reciprocal_sampling 0.15 1/A make"):
            datacube.airpi_reconstruct(ENERGY, **{**GIVEN, "force_reciprocal_sampling": 0.15})
        assert calls[0].acquisition.k_pixel == (0.15, 0.15)

    def test_one_origin(self, calibrated, calls):
        """Of a calibration without origins of the positions, the rest is measured."""
        calibrated.calibration.set_origin((7.4, 8.2))
        acquisition = resolved(calibrated, calls)
        assert acquisition.center == (7.4, 8.2)
        assert acquisition.descan is None
        assert acquisition.sources["descan"].startswith("measured")

    @pytest.mark.parametrize("theta", [0.0, 0.4, 2.0])
    def test_ellipse_is_that_of_py4dstem(self, calibrated, calls, theta):
        """Detector vectors become what py4DSTEM makes of Bragg vectors."""
        calibrated.calibration.set_ellipse((1.06, 0.98, theta))
        acquisition = resolved(calibrated, calls)
        assert acquisition.sources["ellipse"] == "calibration"
        bragg = py4DSTEM.BraggVectors((5, 6), (16, 18), calibration=calibrated.calibration)
        vectors = np.array([[1.0, 0.25], [-2.0, 3.0]])
        peaks = PointListArray([("qx", float), ("qy", float), ("intensity", float)], (5, 6))
        peaks[2, 3].add(np.array([(row, column, 1.0) for row, column in vectors], dtype=peaks.dtype))
        bragg.set_raw_vectors(peaks)
        expected = bragg.get_vectors(2, 3, center=False, ellipse=True, pixel=True, rotate=True)
        found = detector_to_scan(acquisition) @ vectors.T
        assert found == pytest.approx(np.array([expected.qx, expected.qy]))

    def test_ellipse_makes_circles(self, calibrated, calls):
        """py4DSTEM's ellipse, by its own formula for elliptical coordinates, becomes a circle."""
        a, b, theta = 1.06, 0.98, 0.4
        calibrated.calibration.set_ellipse((a, b, theta))
        phi = np.linspace(0, 2 * np.pi, 9)
        ellipse = [
            a * np.cos(phi) * np.cos(theta) + b * np.sin(phi) * np.sin(theta),
            a * np.cos(phi) * np.sin(theta) - b * np.sin(phi) * np.cos(theta),
        ]
        radius = np.hypot(*(detector_to_scan(resolved(calibrated, calls)) @ ellipse))
        assert radius == pytest.approx(np.full(9, b * 0.25))

    def test_arguments_win(self, calibrated, calls):
        acquisition = resolved(
            calibrated,
            calls,
            semiangle_cutoff=16.2,
            force_scan_sampling=0.3,
            force_angular_sampling=4,
            force_com_rotation=0,
            force_com_transpose=False,
        )
        assert acquisition.semiangle == 16.2
        assert acquisition.scan_step == (0.3, 0.3)
        assert acquisition.k_pixel[0] == pytest.approx(4e-3 / WAVELENGTH)
        assert acquisition.rotation == 0
        assert acquisition.transpose is False
        for name in ("semiangle", "scan_step", "k_pixel", "rotation", "transpose"):
            assert acquisition.sources[name] == "argument"

    @pytest.mark.parametrize(
        ("size", "units", "expected"),
        [(0.2, units, 0.2) for units in ("A", "\u00c5", "\u212b", "Angstrom", "angstroms", "Ang")]
        + [(0.02, "nm", 0.2), (20, "pm", 0.2)]
        + [(2e-5, units, 0.2) for units in ("um", "\u00b5m", "\u03bcm", "micron")],
    )
    def test_real_space_units(self, calibrated, calls, size, units, expected):
        calibrated.calibration.set_R_pixel_size(size)
        calibrated.calibration.set_R_pixel_units(units)
        assert resolved(calibrated, calls).scan_step == pytest.approx((expected, expected))

    @pytest.mark.parametrize(
        ("size", "units", "expected"),
        [
            (0.25, units, 0.25)
            for units in ("A^-1", "\u00c5^-1", "\u212b^-1", "1/A", "1/\u00c5", "A-1", "\u00c5\u207b\u00b9", "A**-1")
        ]
        + [(2.5, units, 0.25) for units in ("nm^-1", "1/nm", "nm-1")]
        + [(5, "mrad", 5e-3 / WAVELENGTH), (5e-3, "rad", 5e-3 / WAVELENGTH)],
    )
    def test_reciprocal_space_units(self, calibrated, calls, size, units, expected):
        calibrated.calibration.set_Q_pixel_size(size)
        calibrated.calibration["Q_pixel_units"] = units  # the setter takes "A^-1" and "mrad" only
        assert resolved(calibrated, calls).k_pixel == pytest.approx((expected, expected))

    def test_size_of_one_is_fine_with_a_unit(self, calibrated, calls):
        calibrated.calibration.set_R_pixel_size(1)
        assert resolved(calibrated, calls).scan_step == (1, 1)

    def test_semiangle_from_probe_radius(self, calibrated, calls):
        calibrated.calibration.set_convergence_semiangle_mrad(None)
        calibrated.calibration.set_probe_semiangle(4.1)
        acquisition = resolved(calibrated, calls)
        assert acquisition.semiangle == pytest.approx(4.1 * 0.25 * WAVELENGTH * 1e3)
        assert acquisition.aperture_radius == pytest.approx(4.1 * 0.25)
        assert acquisition.sources["semiangle"] == "calibration"

    def test_semiangle_in_mrad_goes_before_probe_radius(self, calibrated, calls):
        calibrated.calibration.set_probe_semiangle(4.5)
        assert resolved(calibrated, calls).semiangle == 20

    def test_center_from_probe_measurement(self, calibrated, calls):
        calibrated.calibration.set_probe_param((4.5, 7.3, 8.5))
        assert resolved(calibrated, calls).center == (7.3, 8.5)

    @pytest.mark.parametrize(
        ("set_calibration", "rotation", "transpose"),
        [
            (lambda c: None, (0, "measured"), (False, "measured")),
            (lambda c: c.set_QR_rotation(np.pi / 6), (30, "calibration"), (False, "calibration")),
            (lambda c: c.set_QR_rotation_degrees(-30), (-30, "calibration"), (False, "calibration")),
            (lambda c: c.set_QR_rotflip((np.pi / 6, True)), (30, "calibration"), (True, "calibration")),
            (lambda c: c.set_QR_flip(True), (0, "measured"), (True, "calibration")),
        ],
    )
    def test_rotation_and_transpose(self, datacube, calls, monkeypatch, set_calibration, rotation, transpose):
        asked = {}

        def calibrate(data, **given):
            asked.update(given)
            return Acquisition(given["energy"], 20.0, 0.2, (0.25, 0.25))

        monkeypatch.setattr(adapter, "calibrate", calibrate)
        set_calibration(datacube.calibration)
        datacube.airpi_reconstruct(ENERGY, 20.0, force_scan_sampling=0.2, verbose=False)
        for name, (value, source) in {"rotation": rotation, "transpose": transpose}.items():
            assert asked[name] == (None if source == "measured" else pytest.approx(value))
            assert asked["sources"].get(name, "measured") == source

    @pytest.mark.parametrize("transpose", [False, True])
    def test_rotation_is_that_of_py4dstem(self, calibrated, calls, transpose):
        """A vector on the detector goes where py4DSTEM's calibrated Bragg vectors and phase classes put it."""
        calibrated.calibration.set_QR_rotflip_degrees((30.0, transpose))
        acquisition = resolved(calibrated, calls)
        detector = np.array([1.0, 0.25])  # row, column
        angle = np.deg2rad(acquisition.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        scan = turn @ (detector[::-1] if acquisition.transpose else detector)

        bragg = py4DSTEM.BraggVectors((5, 6), (16, 18), calibration=calibrated.calibration)
        peaks = PointListArray([("qx", float), ("qy", float), ("intensity", float)], (5, 6))
        peaks[0, 0].add(np.array([(*detector, 1.0)], dtype=peaks.dtype))
        bragg.set_raw_vectors(peaks)
        vectors = bragg.get_vectors(0, 0, center=False, ellipse=False, pixel=False, rotate=True)
        assert (vectors.qx[0], vectors.qy[0]) == pytest.approx(tuple(scan))

        shift = detector + np.array([7.5, 8.25])
        dpc = py4DSTEM.process.phase.DPC(energy=ENERGY, datacube=spots(shift), verbose=False)
        dpc.preprocess(
            force_com_rotation=acquisition.rotation,
            force_com_transpose=acquisition.transpose,
            fit_function="constant",
            plot_rotation=False,
            plot_center_of_mass=None,
        )
        moved = np.array([dpc._com_x[0, 0] - dpc._com_x[1, 1], dpc._com_y[0, 0] - dpc._com_y[1, 1]])
        assert moved / np.hypot(*moved) == pytest.approx(scan / np.hypot(*scan), abs=1e-3)


class TestErrors:
    @pytest.mark.parametrize("units", ["pixels", "", None])
    def test_scan_step_unknown(self, datacube, calls, units):
        datacube.calibration["R_pixel_units"] = units
        with pytest.raises(
            ValueError, match=r"^force_scan_sampling is unknown.* R_pixel_size 1 and R_pixel_units"
        ) as e:
            datacube.airpi_reconstruct(ENERGY, 20.0, force_reciprocal_sampling=0.25)
        assert repr(units) in str(e.value)
        assert "Give force_scan_sampling [A], or call datacube.calibration.set_R_pixel_size" in str(e.value)
        assert not calls

    def test_k_pixel_and_semiangle_unknown(self, datacube, calls):
        with pytest.raises(
            ValueError,
            match=r"^semiangle_cutoff and force_reciprocal_sampling are both unknown\. Give semiangle_cutoff",
        ):
            datacube.airpi_reconstruct(ENERGY, force_scan_sampling=0.2)
        assert not calls

    def test_size_without_unit(self, datacube, calls):
        datacube.calibration.set_R_pixel_size(0.2)
        with pytest.raises(ValueError, match=r"R_pixel_size 0\.2 and R_pixel_units 'pixels', which is uncalibrated"):
            datacube.airpi_reconstruct(ENERGY, 20.0, force_reciprocal_sampling=0.25)

    @pytest.mark.parametrize(
        ("space", "units", "message"),
        [
            ("R", "furlong", r"^force_scan_sampling .* but 'furlong' is no known unit of length.*\. Give force_scan"),
            ("R", "mrad", r"^force_scan_sampling .* but 'mrad' is no known unit of length"),
            ("Q", "A", r"^force_reciprocal_sampling .* but 'A' is no known reciprocal unit or angle"),
        ],
    )
    def test_unknown_unit(self, calibrated, calls, space, units, message):
        calibrated.calibration[f"{space}_pixel_units"] = units
        with pytest.raises(ValueError, match=message):
            calibrated.airpi_reconstruct(ENERGY)
        assert not calls

    def test_angular_and_reciprocal_sampling(self, datacube, calls):
        with pytest.raises(ValueError, match="force_angular_sampling and force_reciprocal_sampling are both given"):
            datacube.airpi_reconstruct(ENERGY, force_angular_sampling=5, **GIVEN)
        assert not calls

    @pytest.mark.parametrize("energy", [300, -3e5, 0, np.inf, np.nan, "300 kV", None])
    def test_energy(self, calibrated, calls, energy):
        calibrated.calibration.set_Q_pixel_units("mrad")
        calibrated.calibration.set_convergence_semiangle_mrad(None)
        calibrated.calibration.set_probe_semiangle(4.5)
        with pytest.raises(ValueError, match=r"^energy is") as e:
            calibrated.airpi_reconstruct(energy)
        assert energy != 300 or "For 300 kV give energy=300e3" in str(e.value)
        assert not calls

    @pytest.mark.parametrize(
        ("argument", "value", "message"),
        [
            ("semiangle_cutoff", 0.02, r"^semiangle_cutoff is 0\.02 mrad.*For 0\.02 rad give semiangle_cutoff=20"),
            ("force_scan_sampling", 2e4, "^force_scan_sampling is 20000 A"),
            ("force_scan_sampling", -0.2, "^force_scan_sampling is"),
            ("force_reciprocal_sampling", 0, "^force_reciprocal_sampling is 0 1/A"),
            ("force_angular_sampling", 5000, r"^force_angular_sampling / wavelength is .* 1/A"),
            ("force_com_rotation", 1000, "^force_com_rotation is 1000 degrees"),
            ("defocus", np.nan, "^defocus is nan"),
        ],
    )
    def test_implausible_argument(self, calibrated, calls, argument, value, message):
        with pytest.raises(ValueError, match=message):
            calibrated.airpi_reconstruct(ENERGY, **{argument: value})
        assert not calls

    def test_implausible_origin(self, calibrated, calls):
        calibrated.calibration.set_qx0_mean(np.nan)
        with pytest.raises(ValueError, match=r"^calibration\.get_origin_mean\(\) is nan"):
            calibrated.airpi_reconstruct(ENERGY)

    def test_engine_failure_changes_nothing(self, calibrated, data, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("no CUDA")

        monkeypatch.setattr(engine, "reconstruct", fail)
        params = copy.deepcopy(calibrated.calibration._params)
        with pytest.raises(RuntimeError, match="no CUDA"):
            calibrated.airpi_reconstruct(ENERGY)
        assert list(calibrated.treekeys) == []
        assert_unchanged(calibrated, data, params)

    @pytest.mark.parametrize("taken", ["airpi_phase", "airpi_phase_confidence", "airpi_phase_error"])
    def test_name_of_something_else(self, calibrated, calls, taken):
        other = Array(np.zeros((2, 2)), name=taken)
        calibrated.attach(other)
        with pytest.raises(ValueError, match=rf"already has '{taken}'.*another name="):
            calibrated.airpi_reconstruct(ENERGY)
        assert not calls
        assert calibrated.tree(taken) is other
        calibrated.airpi_reconstruct(ENERGY, name="mine", verbose=False)
        assert set(calibrated.treekeys) == {taken, "mine", "mine_confidence"}

    def test_name_of_py4dstem_result(self, calibrated, calls):
        image = calibrated.get_virtual_image(mode="circle", geometry=((8, 9), 3), name="BF", verbose=False)
        with pytest.raises(ValueError, match="already has 'BF'"):
            calibrated.airpi_reconstruct(ENERGY, name="BF")
        assert calibrated.tree("BF") is image

    def test_name_with_slash(self, calibrated, calls):
        with pytest.raises(ValueError, match="name is 'a/b'"):
            calibrated.airpi_reconstruct(ENERGY, name="a/b")
        assert not calls


class TestEngineCall:
    def test_options(self, calibrated, calls):
        calibrated.airpi_reconstruct(ENERGY, model="m.onnx", device="cpu", oversample=2, verbose=False)
        assert calls[0].options == {
            "model": "m.onnx",
            "device": "cpu",
            "oversample": 2,
            "sum_neighbours": 1,
            "stride": 1,
            "strict": True,
            "show_progress": False,
        }
        calibrated.airpi_reconstruct(ENERGY, sum_neighbours=3, stride=2, strict=False, verbose=False)
        assert [calls[1].options[name] for name in ("sum_neighbours", "stride", "strict")] == [3, 2, False]

    @pytest.mark.parametrize("kind", ["ndarray", "memmap", "h5py"])
    def test_data_pass_through(self, data, calls, tmp_path, kind):
        with h5py.File(tmp_path / "data.h5", "w") as file:
            if kind == "h5py":
                data = file.create_dataset("data", data=data)
            elif kind == "memmap":
                stored = np.memmap(tmp_path / "data.raw", data.dtype, "w+", shape=data.shape)
                stored[:] = data
                data = stored
            py4DSTEM.DataCube(data).airpi_reconstruct(ENERGY, **GIVEN)
            assert calls[0].data is data

    def test_nothing_changes(self, calibrated, data, calls):
        params = copy.deepcopy(calibrated.calibration._params)
        targets = calibrated.calibration.targets
        calibrated.airpi_reconstruct(ENERGY, force_scan_sampling=0.3, force_com_rotation=10, verbose=False)
        assert_unchanged(calibrated, data, params)
        assert calibrated.calibration.targets == targets


class TestResult:
    def test_phase(self, calibrated, calls):
        phase = calibrated.airpi_reconstruct(ENERGY, verbose=False)
        assert type(phase) is Array
        assert phase is calibrated.tree("airpi_phase")
        assert phase.data.dtype == np.float32
        assert phase.units == "radians"
        assert np.allclose(phase.data, np.linspace(-1, 1, 13 * 16).reshape(13, 16))
        assert [len(dim) for dim in phase.dims] == [13, 16]
        assert np.allclose(phase.dims[0], 0.1 * np.arange(13))
        assert np.allclose(phase.dims[1], 0.2 * np.arange(16))
        assert tuple(phase.dim_units) == ("A", "A")
        assert tuple(phase.dim_names) == ("Rx", "Ry")

    def test_confidence(self, calibrated, calls):
        phase = calibrated.airpi_reconstruct(ENERGY, name="mine", verbose=False)
        confidence = calibrated.tree("mine_confidence")
        assert confidence.data.dtype == np.float32
        assert np.allclose(confidence.data, 0.5)
        assert all(np.array_equal(*dims) for dims in zip(confidence.dims, phase.dims, strict=True))

    def test_error(self, calibrated, calls, monkeypatch, tmp_path):
        """Of a model that judges its own; gone with the result that it belonged to."""
        answer, error = engine.reconstruct, np.full((13, 16), 0.2, np.float32)
        error[3, 4] = np.inf
        with monkeypatch.context() as patched:
            patched.setattr(engine, "reconstruct", lambda *a, **b: replace(answer(*a, **b), phase_error=error))
            phase = calibrated.airpi_reconstruct(ENERGY, name="mine", verbose=False)
        py4DSTEM.save(tmp_path / "scan.h5", calibrated, tree=True)
        read = py4DSTEM.read(tmp_path / "scan.h5", datapath="datacube_root/datacube", tree=True)
        for found in (calibrated.tree("mine_error"), read.tree("mine_error")):
            np.testing.assert_array_equal(found.data, error)
            assert found.units == "radians"
            assert found.metadata["gen_params"]["call"] == 1
            assert all(np.array_equal(*dims) for dims in zip(found.dims, phase.dims, strict=True))
        calibrated.airpi_reconstruct(ENERGY, name="mine", verbose=False)
        assert set(calibrated.treekeys) == {"mine", "mine_confidence"}

    def test_provenance(self, calibrated, calls):
        phase = calibrated.airpi_reconstruct(ENERGY, verbose=False)
        made = phase.metadata["gen_params"]
        assert made["_calling_method"] == "airpi_reconstruct"
        assert made["acquisition"]["scan_step"] == {"value": [0.2, 0.2], "unit": "A", "source": "calibration"}
        assert made["model"]["sha256"] == "0" * 64

    def test_attached_but_not_returned(self, calibrated, calls):
        assert calibrated.airpi_reconstruct(ENERGY, returncalc=False, verbose=False) is None
        assert set(calibrated.treekeys) == {"airpi_phase", "airpi_phase_confidence"}

    def test_earlier_result_is_replaced(self, calibrated, calls):
        calibrated.airpi_reconstruct(ENERGY, verbose=False)
        second = calibrated.airpi_reconstruct(ENERGY, verbose=False)
        assert calibrated.tree("airpi_phase") is second
        assert second.metadata["gen_params"]["call"] == 2
        assert calibrated.tree("airpi_phase_confidence").metadata["gen_params"]["call"] == 2

    @pytest.mark.parametrize("verbose", [True, False])
    def test_verbose(self, calibrated, calls, capsys, verbose):
        calibrated.airpi_reconstruct(ENERGY, verbose=verbose)
        assert calls[0].options["show_progress"] is verbose
        printed = capsys.readouterr().out
        assert ("scan_step: 0.2, 0.2 A (calibration)" in printed) is verbose
        assert bool(printed) is verbose


class TestSaveAndRead:
    @pytest.fixture
    def path(self, calibrated, calls, tmp_path):
        calibrated.airpi_reconstruct(ENERGY, verbose=False)
        py4DSTEM.save(tmp_path / "scan.h5", calibrated, tree=True)
        return tmp_path / "scan.h5"

    def test_whole(self, calibrated, path):
        read = py4DSTEM.read(path, datapath="datacube_root/datacube", tree=True)
        for name in ("airpi_phase", "airpi_phase_confidence"):
            before, after = calibrated.tree(name), read.tree(name)
            assert type(after) is Array
            assert after.data.dtype == np.float32
            assert np.array_equal(after.data, before.data)
            assert after.units == before.units
            assert all(np.array_equal(*dims) for dims in zip(after.dims, before.dims, strict=True))
            assert tuple(after.dim_units) == ("A", "A")
            assert tuple(after.dim_names) == ("Rx", "Ry")
            assert after.metadata["gen_params"]._params == before.metadata["gen_params"]._params

    def test_replaced_after_reading(self, path, calls):
        read = py4DSTEM.read(path, datapath="datacube_root/datacube", tree=True)
        phase = read.airpi_reconstruct(ENERGY, verbose=False)
        assert read.tree("airpi_phase") is phase

    @pytest.mark.parametrize("pixels", [3, 7, 50])
    def test_dims_of_any_length(self, calibrated, calls, monkeypatch, tmp_path, pixels):
        """np.arange(0, 3 * 0.1, 0.1), emdfile's way, has 4 elements."""
        result = Reconstruction(np.ones((3, pixels), np.complex64), (0.1, 0.1), {})
        monkeypatch.setattr(engine, "reconstruct", lambda *_, **__: result)
        calibrated.airpi_reconstruct(ENERGY, verbose=False)
        py4DSTEM.save(tmp_path / "scan.h5", calibrated, tree=True)
        read = py4DSTEM.read(tmp_path / "scan.h5", datapath="datacube_root/datacube", tree=True)
        assert np.array_equal(read.tree("airpi_phase").dims[1], 0.1 * np.arange(pixels))

    def test_without_plugin(self, path):
        code = f"""if True:
            import sys
            for name in [name for name in sys.modules if name.split(".")[0] == "airpi_py4d"]:
                del sys.modules[name]
            sys.modules["airpi_py4d"] = None  # import airpi_py4d raises ImportError
            import py4DSTEM
            phase = py4DSTEM.read({str(path)!r}, datapath="datacube_root/datacube", tree=True).tree("airpi_phase")
            assert type(phase).__name__ == "Array", type(phase)
            assert phase.data.shape == (13, 16) and phase.units == "radians"
            assert phase.metadata["gen_params"]["acquisition"]["scan_step"]["source"] == "calibration"
        """
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def spots(position):
    """A datacube whose pattern 0 has its centre of mass at `position`, the others at (7.5, 8.25)."""
    data = np.zeros((3, 4, 16, 18), np.float32)
    for index in np.ndindex(3, 4):
        row, column = position if index == (0, 0) else (7.5, 8.25)
        i, j = int(row), int(column)
        weights = np.outer([1 - row + i, row - i], [1 - column + j, column - j])
        data[(*index, slice(i, i + 2), slice(j, j + 2))] = weights
    datacube = py4DSTEM.DataCube(data)
    datacube.calibration.set_R_pixel_size(0.2)
    datacube.calibration.set_R_pixel_units("A")
    datacube.calibration.set_Q_pixel_size(0.25)
    datacube.calibration.set_Q_pixel_units("A^-1")
    return datacube


@pytest.mark.filterwarnings("ignore:.*outside of:UserWarning")
def test_with_real_engine(tmp_path):
    """An empty specimen: a disk in every pattern, no phase."""
    pytest.importorskip("onnxruntime")
    rows, columns = np.arange(32)[:, None] - 15.5, np.arange(34) - 17
    disk = (rows**2 + columns**2 <= 6**2) * np.uint16(100)
    datacube = py4DSTEM.DataCube(np.tile(disk, (5, 6, 1, 1)))
    phase = datacube.airpi_reconstruct(
        ENERGY,
        20,
        force_scan_sampling=0.2,
        force_angular_sampling=20 / 6,
        force_com_rotation=0,
        force_com_transpose=False,
        device="cpu",
        verbose=False,
    )
    oversample = phase.metadata["gen_params"]["oversample"]
    assert phase.shape == tuple(s * (n - 1) + 1 for s, n in zip(oversample, (5, 6), strict=True))
    assert abs(phase.data).max() < 0.1
    py4DSTEM.save(tmp_path / "scan.h5", datacube, tree=True)
    read = py4DSTEM.read(tmp_path / "scan.h5", datapath="datacube_root/datacube", tree=True).tree("airpi_phase")
    assert read.metadata["gen_params"]._params == phase.metadata["gen_params"]._params
