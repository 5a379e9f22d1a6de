"""One scan through the engine and through every host: the same image."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from two_part_models import write_two_parts

from airpi_py4d import Acquisition, calibrate, optics, reconstruct
from airpi_py4d import hyperspy as hyperspy_adapter
from airpi_py4d import py4dstem as py4dstem_adapter
from airpi_py4d.model import Model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`_get_block_pattern` has moved"  # pyxem 0.21 with dask 2026
)

SHAPE = (5, 7, 24, 20)
ENERGY, SEMIANGLE, STEP = 200e3, 21.0, 0.25
WAVELENGTH = optics.wavelength(ENERGY)
K_PIXEL = optics.aperture_radius(ENERGY, SEMIANGLE) / 6.3
CASES = {
    "angstrom": {"scan": (STEP, "A"), "detector": (K_PIXEL, "A^-1")},
    "turned": {"scan": (STEP, "A"), "detector": (K_PIXEL, "A^-1"), "rotation": 90.0, "transpose": True},
    "nm": {"scan": (STEP / 10, "nm"), "detector": (K_PIXEL * 10, "1/nm"), "center": (12.5, 9.0)},
    "mrad": {"scan": (STEP * 100, "pm"), "detector": (K_PIXEL * WAVELENGTH * 1e3, "mrad"), "rotation": -20.0},
}


@pytest.fixture(scope="module", params=["object patches", "stitched features"])
def model(request, tmp_path_factory):
    """The default model, and a random one of the kind that stitches features."""
    if request.param == "object patches":
        return Model(device="cpu")
    return Model(write_two_parts(tmp_path_factory.mktemp("model") / "two-parts.onnx"), "cpu")


@pytest.fixture(scope="module")
def data():
    """Random counts with a slope along rows and columns of the scan and of the detector."""
    rng = np.random.default_rng(1)
    rows, columns = np.ogrid[:24, :20]
    disk = (rows - 12) ** 2 + (columns - 9) ** 2 <= 6.3**2
    scan = 1 + 0.1 * np.arange(5)[:, None, None, None] + 0.03 * np.arange(7)[:, None, None]
    return rng.poisson(scan * (0.2 + (4 + 0.3 * rows + 0.1 * columns) * disk)).astype(np.uint16)


@pytest.fixture(scope="module", params=CASES)
def case(request, model, data):
    """Case with what the engine makes of it."""
    settings = {"rotation": 0.0, "transpose": False, "center": None, **CASES[request.param]}
    acquisition = calibrate(
        data,
        energy=ENERGY,
        semiangle=SEMIANGLE,
        scan_step=STEP,
        k_pixel=K_PIXEL,
        center=settings["center"],
        rotation=settings["rotation"],
        transpose=settings["transpose"],
        # the datacube's origin of every position
        descan=None if settings["center"] is None else np.zeros((*SHAPE[:2], 2)),
    )
    expected = reconstruct(data, acquisition, model=model)
    assert expected.phase.shape == (9, 13)
    return SimpleNamespace(**settings, expected=expected)


@pytest.fixture(scope="module")
def py4DSTEM():
    module = pytest.importorskip("py4DSTEM")
    py4dstem_adapter.attach(sys.modules["py4DSTEM.datacube.datacube"])
    return module


@pytest.fixture(scope="module")
def hs():
    module = pytest.importorskip("hyperspy.api")
    hyperspy_adapter.attach(pytest.importorskip("hyperspy._signals.signal2d"))
    return module


def assert_equal(case, phase, pixel_size):
    np.testing.assert_allclose(phase, case.expected.phase, rtol=1e-5, atol=1e-6)
    assert phase.dtype == np.float32
    assert (pixel_size, pixel_size) == pytest.approx(case.expected.pixel_size)


def datacube(py4DSTEM, case, data):
    cube = py4DSTEM.DataCube(data)
    cube.calibration.set_R_pixel_size(case.scan[0])
    cube.calibration.set_R_pixel_units(case.scan[1])
    size, units = case.detector
    if units == "1/nm":  # which py4DSTEM's calibration doesn't take
        size, units = size / 10, "A^-1"
    cube.calibration.set_Q_pixel_size(size)
    cube.calibration.set_Q_pixel_units(units)
    if case.center is not None:
        cube.calibration.set_origin(tuple(np.full(SHAPE[:2], c) for c in case.center))
    return cube


def py4dstem_image(cube, case, model):
    phase = cube.airpi_reconstruct(
        ENERGY,
        SEMIANGLE,
        force_com_rotation=case.rotation,
        force_com_transpose=case.transpose,
        model=model,
        verbose=False,
    )
    confidence = cube.tree("airpi_phase_confidence").data
    np.testing.assert_allclose(confidence, case.expected.confidence, rtol=1e-5, atol=1e-6)
    return phase.data, phase.dims[0][1]


def signal(cls, case, data):
    names = {"A^-1": "1/Å", "A": "Å"}
    axes = [
        {
            "name": name,
            "size": data.shape[i],
            "scale": scale,
            "units": names.get(units, units),
            "navigate": i < 2,
            "offset": 0.0 if i < 2 or case.center is None else -case.center[i - 2] * scale,
        }
        for i, (name, (scale, units)) in enumerate(zip("yxuv", [case.scan] * 2 + [case.detector] * 2, strict=True))
    ]
    s = cls(data, axes=axes)
    s.metadata.set_item("Acquisition_instrument.TEM.beam_energy", ENERGY / 1e3)
    s.metadata.set_item("Acquisition_instrument.TEM.convergence_angle", SEMIANGLE)
    return s


def hyperspy_image(s, case, model):
    image = s.airpi(rotation=case.rotation, flip=case.transpose, model=model, show_progressbar=False)
    assert image.axes_manager["x"].scale == image.axes_manager["y"].scale
    return image.data, image.axes_manager["x"].scale


def test_py4dstem(py4DSTEM, case, data, model):
    assert_equal(case, *py4dstem_image(datacube(py4DSTEM, case, data), case, model))


@pytest.mark.parametrize("case", ["turned"], indirect=True)
@pytest.mark.parametrize("source", ["memmap", "h5py", "dask"])
def test_py4dstem_sources(py4DSTEM, case, data, model, tmp_path, source):
    if source == "memmap":
        np.save(tmp_path / "scan.npy", data)
        assert_equal(
            case,
            *py4dstem_image(datacube(py4DSTEM, case, np.load(tmp_path / "scan.npy", mmap_mode="r")), case, model),
        )
    elif source == "h5py":
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "scan.h5", "w") as file:
            dataset = file.create_dataset("data", data=data, chunks=(2, 3, 24, 20))
            assert_equal(case, *py4dstem_image(datacube(py4DSTEM, case, dataset), case, model))
    else:
        da = pytest.importorskip("dask.array")
        lazy = da.from_array(data, chunks=(2, 3, 24, 20))
        assert_equal(case, *py4dstem_image(datacube(py4DSTEM, case, lazy), case, model))


def test_hyperspy(hs, case, data, model):
    assert_equal(case, *hyperspy_image(signal(hs.signals.Signal2D, case, data), case, model))


@pytest.mark.parametrize("case", ["turned", "nm"], indirect=True)
@pytest.mark.parametrize("chunks", [(1, 7, 24, 20), (2, 3, 24, 20), (5, 7, 7, 11), -1])
def test_hyperspy_lazy(hs, case, data, model, chunks):
    s = signal(hs.signals.Signal2D, case, data).as_lazy()
    s.data = s.data.rechunk(chunks)
    assert s._lazy
    assert_equal(case, *hyperspy_image(s, case, model))


@pytest.mark.parametrize("case", ["turned"], indirect=True)
def test_hyperspy_other_axis_order(hs, case, data, model):
    """Axes in whatever order: HyperSpy's own order of the array is what counts."""
    s = signal(hs.signals.Signal2D, case, data).transpose(navigation_axes=["v", "u"], signal_axes=["x", "y"])
    back = s.transpose(navigation_axes=["x", "y"], signal_axes=["v", "u"])
    assert_equal(case, *hyperspy_image(back, case, model))


@pytest.mark.parametrize("case", ["turned", "mrad"], indirect=True)
@pytest.mark.parametrize("lazy", [False, True])
def test_pyxem(hs, case, data, model, lazy):
    pyxem_signals = pytest.importorskip("pyxem.signals")
    s = signal(pyxem_signals.ElectronDiffraction2D, case, data)
    if lazy:
        s = s.as_lazy()
        s.data = s.data.rechunk((2, 4, 24, 20))
    assert ("Lazy" in type(s).__name__) is lazy
    assert_equal(case, *hyperspy_image(s, case, model))


def test_the_cases_differ(model, data):
    """What the adapters could get wrong shows in the image."""
    acquisition = {"energy": ENERGY, "semiangle": SEMIANGLE, "scan_step": STEP, "k_pixel": (K_PIXEL, K_PIXEL)}
    images = [
        reconstruct(data, Acquisition(**acquisition, **options), model=model).phase
        for options in ({}, {"rotation": 90}, {"transpose": True}, {"rotation": -90}, {"center": (12.5, 9)})
    ]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert np.abs(image - other).max() > 1e-4
