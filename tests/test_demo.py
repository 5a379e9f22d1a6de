"""The shipped scan in py4DSTEM and HyperSpy, the baselines, and the demo as users run it."""

import subprocess
import sys

import numpy as np
import py4DSTEM
import pytest

from airpi_py4d import Acquisition, __main__
from airpi_py4d.demo import MARGIN, demo_path, dpc_phase, ssb_phase

INNER = (slice(MARGIN, -MARGIN),) * 2
ACQUISITION = Acquisition(80e3, 25.0, 0.25, (0.05, 0.05), center=(31, 31))


def correlation(image, truth):
    return np.corrcoef(np.ravel(image), np.ravel(truth))[0, 1]


@pytest.fixture(scope="module")
def datacube():
    return py4DSTEM.read(str(demo_path()))


@pytest.fixture(scope="module")
def truth(datacube):
    return datacube.tree("phase_truth").data


def test_file_in_py4dstem(datacube, truth):
    assert demo_path().stat().st_size < 3e6
    assert datacube.data.dtype == np.uint8
    assert datacube.shape == (56, 64, 63, 63)
    calibration = datacube.calibration
    assert (calibration.get_R_pixel_size(), calibration.get_R_pixel_units()) == (0.25, "A")
    assert (calibration.get_Q_pixel_size(), calibration.get_Q_pixel_units()) == (0.05, "A^-1")
    assert calibration.get_convergence_semiangle_mrad() == 25.0
    assert truth.shape == (56, 64)
    simulation = datacube.metadata["simulation"]
    assert simulation["energy_eV"] == 80e3
    assert "Simulated" in simulation["provenance"]
    electrons = simulation["dose_electrons_per_A2"] * 0.25**2
    assert 0.9 * electrons < datacube.data.sum((2, 3)).mean() < electrons


@pytest.mark.parametrize("lazy", [False, True])
def test_file_in_hyperspy(datacube, lazy):
    hs = pytest.importorskip("hyperspy.api")
    signal = hs.load(demo_path(), file_format="HSPY", lazy=lazy)
    assert isinstance(signal, hs.signals.Signal2D)
    np.testing.assert_array_equal(np.asarray(signal.data), datacube.data)
    navigation, detector = signal.axes_manager.navigation_axes, signal.axes_manager.signal_axes
    assert [(axis.name, axis.scale, axis.units, axis.size) for axis in navigation] == [
        ("x", 0.25, "\u00c5", 64),
        ("y", 0.25, "\u00c5", 56),
    ]
    assert [(axis.name, axis.scale, axis.units) for axis in detector] == [
        ("kx", 0.05, "1/\u00c5"),
        ("ky", 0.05, "1/\u00c5"),
    ]
    assert all(abs(axis.offset + 31 * 0.05) < 1e-9 for axis in detector)
    microscope = signal.metadata.Acquisition_instrument.TEM
    assert (microscope.beam_energy, microscope.convergence_angle) == (80.0, 25.0)
    if lazy:
        signal.close_file()


def test_dpc(datacube, truth):
    before = datacube.data.copy()
    assert correlation(dpc_phase(datacube.data, ACQUISITION)[INNER], truth[INNER]) > 0.7
    np.testing.assert_array_equal(datacube.data, before)


def test_ssb_on_the_monolayer(datacube, truth):
    """The second layer, up to 1.7 rad, is no weak phase object."""
    monolayer = (slice(MARGIN, 34), slice(MARGIN, 34))
    assert correlation(ssb_phase(datacube.data, ACQUISITION)[monolayer], truth[monolayer]) > 0.7


def test_dpc_and_ssb_use_rotation_and_transposition(datacube):
    part = datacube.data[:16, :20]
    turned = np.rot90(part, axes=(2, 3)).swapaxes(2, 3)  # undone by the transposition, then the rotation
    acquisition = Acquisition(80e3, 25.0, 0.25, (0.05, 0.05), center=(31, 31), rotation=-90.0, transpose=True)
    np.testing.assert_allclose(dpc_phase(turned, acquisition), dpc_phase(part, ACQUISITION), atol=1e-3)
    np.testing.assert_allclose(ssb_phase(turned, acquisition), ssb_phase(part, ACQUISITION), atol=1e-3)


def test_baselines_refuse_pixels_that_are_not_square(datacube):
    acquisition = Acquisition(80e3, 25.0, 0.25, (0.05, 0.06))
    with pytest.raises(ValueError, match="k_pixel"):
        dpc_phase(datacube.data, acquisition)


def test_demo(tmp_path, truth):
    (tmp_path / "airpi_demo.h5").write_text("from an earlier run")
    (tmp_path / "mine.h5").write_text("of the user")
    command = [sys.executable, "-m", "airpi_py4d", "demo", "--output", tmp_path, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("semiangle: 25 mrad", "CPUExecutionProvider", "AIRPI", "DPC", "SSB"))
    assert "Warning" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["airpi_demo.h5", "airpi_demo.png", "mine.h5"]
    assert (tmp_path / "mine.h5").read_text() == "of the user"
    assert (tmp_path / "airpi_demo.png").read_bytes().startswith(b"\x89PNG")
    results = py4DSTEM.read(str(tmp_path / "airpi_demo.h5"))
    np.testing.assert_array_equal(results.tree("phase_truth").data, truth)
    airpi = results.tree("airpi_phase")
    assert airpi.units == "radians"
    assert airpi.metadata["gen_params"]["acquisition"]["k_pixel"]["value"] == [0.05, 0.05]
    assert results.tree("airpi_phase_confidence").data.shape == airpi.data.shape
    error = results.tree("airpi_phase_error")
    assert error.units == "radians"
    assert 0.01 < np.median(error.data) < 0.3
    assert correlation(results.tree("dpc_phase").data[INNER], truth[INNER]) > 0.7
    assert results.tree("ssb_phase").data.shape == truth.shape


def test_demo_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"airpi_py4d\[demo\]"):
        __main__.main(["demo", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_demo_refuses_an_unknown_device(tmp_path):
    with pytest.raises(SystemExit, match="device is 'gpu'"):
        __main__.main(["demo", "--output", str(tmp_path), "--device", "gpu"])
