"""4D-STEM files of every common kind, opened by their loaders: the image of the same array in memory."""

import functools
import gc
import struct
from types import SimpleNamespace
from xml.etree.ElementTree import ParseError

import h5py
import hdf5plugin
import hyperspy.api as hs
import numpy as np
import py4DSTEM
import pytest
from format_writers import write_arina, write_dm4, write_empad, write_mib, write_velox

from airpi_py4d import Acquisition, optics, reconstruct
from airpi_py4d.model import Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`_get_block_pattern` has moved"),  # pyxem 0.21 with dask 2026
    pytest.mark.filterwarnings("ignore:The NestedDirectoryStore is deprecated:FutureWarning"),  # .zspy with zarr 2
]

ENERGY, SEMIANGLE = 300e3, 20.0
GRID, RADIUS = 48, 9.1  # [px] of the simulated patterns and of their bright-field disk
K_PIXEL = optics.aperture_radius(ENERGY, SEMIANGLE) / RADIUS
STEP = 2 / (GRID * K_PIXEL)  # [A], two pixels of the simulation
SCAN = (5, 4)
ATOMS = ((2.0, 1.0, 0.5), (6.0, 5.0, 0.3), (3.0, 6.5, 0.4))  # row, column [px], phase [rad]
LAZY = pytest.mark.parametrize("lazy", [False, True])
HYPERSPY_KNOWS_NOTHING = {
    "beam_energy": ENERGY / 1e3,
    "convergence_angle": SEMIANGLE,
    "scan_step": STEP,
    "k_step": K_PIXEL,
}
PY4DSTEM_KNOWS_NOTHING = {"force_scan_sampling": STEP, "force_reciprocal_sampling": K_PIXEL}


@functools.cache
def intensities():
    """Diffraction patterns of a weak phase object, shape (5, 4, 48, 48), sum 1 each, the axis at (24, 24)."""
    n = np.arange(GRID) - GRID // 2
    aperture = np.hypot(n[:, None], n) <= RADIUS
    probe = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(aperture), norm="ortho"))
    patterns = np.empty((*SCAN, GRID, GRID))
    for i, j in np.ndindex(SCAN):
        rows, columns = (n + 2 * i)[:, None], n + 2 * j
        phase = sum(a * np.exp(-((rows - r) ** 2 + (columns - c) ** 2) / 8) for r, c, a in ATOMS)
        exit_wave = np.fft.fft2(np.fft.ifftshift(probe * np.exp(1j * phase)), norm="ortho")
        patterns[i, j] = np.fft.fftshift(np.abs(exit_wave) ** 2) / aperture.sum()
    return patterns


def counts(shape=(40, 32), center=(21, 14), electrons=1e5, dtype=np.uint16):
    """Poisson counts on a detector, zero beyond the simulated patterns."""
    data = np.zeros((*SCAN, *shape))
    rows, columns = (np.arange(size) - axis + GRID // 2 for size, axis in zip(shape, center, strict=True))
    inside = np.ix_((rows >= 0) & (rows < GRID), (columns >= 0) & (columns < GRID))
    part = intensities()[:, :, rows[(rows >= 0) & (rows < GRID)]][..., columns[(columns >= 0) & (columns < GRID)]]
    data[(..., *inside)] = np.random.default_rng(3).poisson(electrons * part)
    assert data.max() <= (np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else np.inf)
    return data.astype(dtype)


@pytest.fixture(scope="module")
def model():
    return Model(device="cpu")


def core(data, model, center=(21, 14)):
    """Phase of an array in memory by the engine alone."""
    acquisition = Acquisition(ENERGY, SEMIANGLE, STEP, (K_PIXEL, K_PIXEL), center=center)
    return reconstruct(np.array(data, np.float64), acquisition, model=model).phase


def assert_same_image(phase, expected):
    assert phase.shape == expected.shape
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(phase, expected, rtol=0, atol=1e-5)


def by_hyperspy(signal, model, center=(21, 14), **given):
    return signal.airpi(center=center, rotation=0.0, flip=False, model=model, show_progressbar=False, **given).data


def by_py4dstem(datacube, model, center=(21, 14), **given):
    datacube.calibration.set_origin(tuple(np.full(SCAN, float(c)) for c in center))
    return datacube.airpi_reconstruct(
        ENERGY,
        SEMIANGLE,
        force_com_rotation=0.0,
        force_com_transpose=False,
        model=model,
        verbose=False,
        **given,
    ).data


def load(path, **options):
    """``hs.load`` without pyxem's classes, whose import takes long."""
    return hs.load(str(path), signal_type="", **options)


def signal(data, detector=(K_PIXEL, "1/Å"), center=(21, 14)):
    """A calibrated signal to be saved by HyperSpy."""
    names = ("y", "x", "ky", "kx")
    scales = [(STEP / 10, "nm")] * 2 + [detector] * 2
    offsets = (0.0, 0.0, -center[0] * detector[0], -center[1] * detector[0])
    axes = [
        {"name": name, "size": size, "scale": scale, "units": units, "offset": offset, "navigate": i < 2}
        for i, (name, size, (scale, units), offset) in enumerate(zip(names, data.shape, scales, offsets, strict=True))
    ]
    s = hs.signals.Signal2D(data, axes=axes)
    s.metadata.set_item("Acquisition_instrument.TEM.beam_energy", ENERGY / 1e3)
    s.metadata.set_item("Acquisition_instrument.TEM.convergence_angle", SEMIANGLE)
    return s


def truncate(path, fraction):
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])


def test_swapped_or_mirrored_axes_show(model):
    """What a loader could get wrong shows in the image."""
    data = counts()
    expected = core(data, model)
    swapped = data.swapaxes(0, 1)
    assert core(swapped, model).shape == expected.shape[::-1]
    images = [
        core(swapped, model).T,
        core(data.reshape(4, 5, 40, 32), model).T,
        core(data.swapaxes(2, 3), model, (14, 21)),
        core(data[::-1], model),
        core(data[:, ::-1], model),
        core(data[:, :, ::-1], model, (18, 14)),
        core(data[..., ::-1], model, (21, 17)),
        core(data, model, (20, 14)),
        core(data.byteswap(), model),
    ]
    for i, image in enumerate(images):
        assert np.abs(image - expected).max() > 1e-2, i


class TestMib:
    """Merlin (Quantum Detectors): HyperSpy mirrors the detector's rows, py4DSTEM doesn't."""

    @LAZY
    @pytest.mark.parametrize(("bits", "electrons"), [(6, 5e3), (12, 1e5), (24, 5e6)])
    def test_hyperspy(self, tmp_path, model, bits, electrons, lazy):
        data = counts(electrons=electrons, dtype=np.uint32)
        write_mib(tmp_path / "scan.mib", data, bits)
        s = load(tmp_path / "scan.mib", lazy=lazy)
        assert s.data.dtype.itemsize == {6: 1, 12: 2, 24: 4}[bits]
        expected = core(data[:, :, ::-1], model, (18, 14))
        assert_same_image(by_hyperspy(s, model, (18, 14), **HYPERSPY_KNOWS_NOTHING), expected)

    @pytest.mark.parametrize(
        ("bits", "electrons", "mem"), [(6, 5e3, "RAM"), (12, 1e5, "RAM"), (12, 1e5, "MEMMAP"), (24, 5e6, "RAM")]
    )
    def test_py4dstem(self, tmp_path, model, bits, electrons, mem):
        center = (120, 135)
        data = counts((256, 256), center, electrons, np.uint32)
        write_mib(tmp_path / "scan.mib", data, bits)
        cube = py4DSTEM.import_file(str(tmp_path / "scan.mib"), mem=mem)
        assert cube.data.dtype == {6: np.uint8, 12: ">u2", 24: ">u4"}[bits]
        assert_same_image(by_py4dstem(cube, model, center, **PY4DSTEM_KNOWS_NOTHING), core(data, model, center))

    def test_without_header_file(self, tmp_path, model):
        data = counts((256, 256), (120, 135))
        write_mib(tmp_path / "scan.mib", data, 12, header_file=False)
        with pytest.raises(ValueError, match="reshape"):
            py4DSTEM.import_file(str(tmp_path / "scan.mib"))
        cube = py4DSTEM.import_file(str(tmp_path / "scan.mib"), scan=SCAN)
        assert np.array_equal(cube.data, data)
        with pytest.raises(ValueError, match="two navigation and two signal axes"):
            load(tmp_path / "scan.mib").airpi(**HYPERSPY_KNOWS_NOTHING)
        s = load(tmp_path / "scan.mib", navigation_shape=SCAN[::-1])
        expected = core(data[:, :, ::-1], model, (135, 135))
        assert_same_image(by_hyperspy(s, model, (135, 135), **HYPERSPY_KNOWS_NOTHING), expected)

    def test_pyxem(self, tmp_path, model):
        """What ``hs.load`` makes of it where pyxem is installed."""
        data = counts()
        write_mib(tmp_path / "scan.mib", data, 12)
        s = hs.load(str(tmp_path / "scan.mib"), lazy=True)
        assert type(s).__name__ == "LazyElectronDiffraction2D"
        expected = core(data[:, :, ::-1], model, (18, 14))
        assert_same_image(by_hyperspy(s, model, (18, 14), **HYPERSPY_KNOWS_NOTHING), expected)

    @LAZY
    def test_cut_off(self, tmp_path, model, lazy):
        """HyperSpy reads the rows that are complete, py4DSTEM nothing."""
        data = counts((256, 256), (120, 135))
        write_mib(tmp_path / "scan.mib", data, 12)
        truncate(tmp_path / "scan.mib", 0.675)
        s = load(tmp_path / "scan.mib", lazy=lazy)
        assert s.data.shape == (3, 4, 256, 256)
        expected = core(data[:3, :, ::-1], model, (135, 135))
        assert_same_image(by_hyperspy(s, model, (135, 135), **HYPERSPY_KNOWS_NOTHING), expected)
        with pytest.raises(ValueError, match="reshape"):
            py4DSTEM.import_file(str(tmp_path / "scan.mib"))

    def test_stack_in_py4dstem(self, tmp_path):
        write_mib(tmp_path / "scan.mib", counts((256, 256), (120, 135)), 12)
        stack = py4DSTEM.import_file(str(tmp_path / "scan.mib"), reshape=False)
        with pytest.raises(ValueError, match="20 x 1 scan positions"):
            stack.airpi_reconstruct(ENERGY, SEMIANGLE, verbose=False, **PY4DSTEM_KNOWS_NOTHING)


class TestEmpad:
    center = (60, 70)

    @pytest.fixture
    def data(self):
        data = counts((128, 128), self.center, dtype=np.float32)
        return data - np.float32(0.05) * (np.arange(128) % 2)  # no integers, some negative

    @LAZY
    @pytest.mark.parametrize("k_pixel", [K_PIXEL * 10, None], ids=["old", "1.2"])
    def test_hyperspy(self, tmp_path, model, data, lazy, k_pixel):
        write_empad(tmp_path / "scan_x4_y5.raw", data, step=STEP * 1e-10, k_pixel=k_pixel)
        options = {} if k_pixel else {"q_calibration": K_PIXEL * 10}
        s = load(tmp_path / "scan_x4_y5.xml", file_format="EMPAD", lazy=lazy, **options)
        given = {"beam_energy": ENERGY / 1e3, "convergence_angle": SEMIANGLE}
        assert_same_image(by_hyperspy(s, model, self.center, **given), core(data, model, self.center))

    @pytest.mark.parametrize("mem", ["RAM", "MEMMAP"])
    def test_py4dstem(self, tmp_path, model, data, mem):
        write_empad(tmp_path / "scan_x4_y5.raw", data, step=STEP * 1e-10, k_pixel=None)
        cube = py4DSTEM.import_file(tmp_path / "scan_x4_y5.raw", mem=mem, EMPAD_shape=(*SCAN, 130, 128))
        phase = by_py4dstem(cube, model, self.center, **PY4DSTEM_KNOWS_NOTHING)
        assert_same_image(phase, core(data, model, self.center))
        with pytest.raises(AssertionError, match="EMPAD_shape"):
            py4DSTEM.import_file(tmp_path / "scan_x4_y5.raw")

    def test_cut_off(self, tmp_path, data):
        write_empad(tmp_path / "scan_x4_y5.raw", data, step=STEP * 1e-10, k_pixel=K_PIXEL * 10)
        truncate(tmp_path / "scan_x4_y5.raw", 0.675)
        with pytest.raises(ValueError, match="reshape"):
            load(tmp_path / "scan_x4_y5.xml", file_format="EMPAD")
        with pytest.raises(ValueError, match="reshape"):
            py4DSTEM.import_file(tmp_path / "scan_x4_y5.raw", EMPAD_shape=(*SCAN, 130, 128))
        lazy = load(tmp_path / "scan_x4_y5.xml", file_format="EMPAD", lazy=True)
        with pytest.raises((ValueError, OSError)):
            by_hyperspy(lazy, None, beam_energy=ENERGY / 1e3, convergence_angle=SEMIANGLE)


class TestDigitalMicrograph:
    @staticmethod
    def write(path, data, scan=(STEP / 10, "nm"), detector=(K_PIXEL * 10, "1/nm")):
        write_dm4(path, data, voltage=ENERGY, scan=scan, detector=detector, center=(21, 14))

    @LAZY
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
    def test_hyperspy(self, tmp_path, model, dtype, lazy):
        data = counts(electrons=1e4, dtype=dtype)
        self.write(tmp_path / "scan.dm4", data)
        s = load(tmp_path / "scan.dm4", lazy=lazy)
        assert s.data.dtype == dtype
        assert_same_image(by_hyperspy(s, model, None, convergence_angle=SEMIANGLE), core(data, model))

    @pytest.mark.parametrize("mem", ["RAM", "MEMMAP"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
    def test_py4dstem(self, tmp_path, model, dtype, mem):
        data = counts(electrons=1e4, dtype=dtype)
        self.write(tmp_path / "scan.dm4", data)
        cube = py4DSTEM.import_file(tmp_path / "scan.dm4", mem=mem)
        assert cube.data.dtype == dtype
        assert_same_image(by_py4dstem(cube, model), core(data, model))

    def test_angles(self, tmp_path, model):
        data = counts()
        self.write(tmp_path / "scan.dm4", data, detector=(SEMIANGLE / RADIUS, "mrad"))
        expected = core(data, model)
        s = load(tmp_path / "scan.dm4")
        assert_same_image(by_hyperspy(s, model, None, convergence_angle=SEMIANGLE), expected)
        assert_same_image(by_py4dstem(py4DSTEM.import_file(tmp_path / "scan.dm4"), model), expected)

    def test_scan_axes_last(self, tmp_path, model):
        """Scan axes fastest: refused, and right once it is transposed."""
        data = counts()
        self.write(
            tmp_path / "scan.dm4",
            np.ascontiguousarray(data.transpose(2, 3, 0, 1)),
            scan=(K_PIXEL * 10, "1/nm"),
            detector=(STEP / 10, "nm"),
        )
        s = load(tmp_path / "scan.dm4")
        with pytest.raises(ValueError, match="'1/nm' is no known unit of length"):
            s.airpi(convergence_angle=SEMIANGLE)
        assert_same_image(by_hyperspy(s.T, model, convergence_angle=SEMIANGLE), core(data, model))
        cube = py4DSTEM.import_file(tmp_path / "scan.dm4")
        with pytest.raises(ValueError, match="force_scan_sampling is unknown"):
            cube.airpi_reconstruct(ENERGY, SEMIANGLE, verbose=False)

    def test_stack(self, tmp_path):
        self.write(tmp_path / "stack.dm4", counts().reshape(20, 40, 32))
        with pytest.raises(ValueError, match="two navigation and two signal axes"):
            load(tmp_path / "stack.dm4").airpi(**HYPERSPY_KNOWS_NOTHING)
        assert not isinstance(py4DSTEM.import_file(tmp_path / "stack.dm4"), py4DSTEM.DataCube)

    def test_cut_off(self, tmp_path):
        self.write(tmp_path / "scan.dm4", counts())
        truncate(tmp_path / "scan.dm4", 0.5)
        for options in ({}, {"lazy": True}):
            with pytest.raises(struct.error, match="unpack requires a buffer"):
                load(tmp_path / "scan.dm4", **options)
        for mem in ("RAM", "MEMMAP"):
            with pytest.raises(IndexError):
                py4DSTEM.import_file(tmp_path / "scan.dm4", mem=mem)


class TestVelox:
    @LAZY
    def test_stack_of_frames(self, tmp_path, model, lazy):
        """The loader gives frames: refused until they are folded into a scan."""
        data = counts()
        write_velox(tmp_path / "scan.emd", data, voltage=ENERGY, k_pixel=K_PIXEL * 1e10)
        stack = load(tmp_path / "scan.emd", lazy=lazy)
        assert stack.data.shape == (20, 40, 32)
        with pytest.raises(ValueError, match="two navigation and two signal axes"):
            stack.airpi(convergence_angle=SEMIANGLE, scan_step=STEP)
        s = type(stack)(stack.data.reshape(*SCAN, *stack.data.shape[1:]), metadata=stack.metadata.as_dictionary())
        for axis, old in zip(s.axes_manager.signal_axes, stack.axes_manager.signal_axes, strict=True):
            axis.scale, axis.units = old.scale, old.units
        phase = by_hyperspy(s, model, convergence_angle=SEMIANGLE, scan_step=STEP)
        assert_same_image(phase, core(data, model))

    def test_py4dstem_has_no_reader(self, tmp_path):
        write_velox(tmp_path / "scan.emd", counts(), voltage=ENERGY, k_pixel=K_PIXEL * 1e10)
        with pytest.raises(Exception, match="not supported"):
            py4DSTEM.read(tmp_path / "scan.emd")


class TestHdf5:
    @LAZY
    @pytest.mark.parametrize("extension", ["hspy", "zspy"])
    def test_hyperspys_own(self, tmp_path, model, extension, lazy):
        data = counts()
        signal(data).save(str(tmp_path / f"scan.{extension}"))
        s = load(tmp_path / f"scan.{extension}", lazy=lazy)
        assert_same_image(by_hyperspy(s, model, None), core(data, model))

    @LAZY
    def test_nexus(self, tmp_path, model, lazy):
        data = counts()
        signal(data).save(str(tmp_path / "scan.nxs"))
        s = load(tmp_path / "scan.nxs", lazy=lazy, nxdata_only=True)
        assert_same_image(by_hyperspy(s, model, None), core(data, model))

    @LAZY
    def test_ncem_emd(self, tmp_path, model, lazy):
        """The loader takes every axis for a signal axis."""
        data = counts()
        signal(data).save(str(tmp_path / "scan.emd"))
        s = load(tmp_path / "scan.emd", lazy=lazy)
        assert s.axes_manager.navigation_dimension == 0
        given = {"beam_energy": ENERGY / 1e3, "convergence_angle": SEMIANGLE}
        assert_same_image(by_hyperspy(s.transpose(signal_axes=2), model, None, **given), core(data, model))

    def test_py4dstems_own(self, tmp_path, model):
        """EMD 1.0, by both hosts."""
        data = counts()
        cube = py4DSTEM.DataCube(data)
        cube.calibration.set_R_pixel_size(STEP)
        cube.calibration.set_R_pixel_units("A")
        cube.calibration.set_Q_pixel_size(K_PIXEL)
        cube.calibration.set_Q_pixel_units("A^-1")
        py4DSTEM.save(str(tmp_path / "scan.h5"), cube, mode="o")
        expected = core(data, model)
        assert_same_image(by_py4dstem(py4DSTEM.read(tmp_path / "scan.h5"), model), expected)
        given = {"beam_energy": ENERGY / 1e3, "convergence_angle": SEMIANGLE}
        for lazy in (False, True):
            s = load(tmp_path / "scan.h5", file_format="EMD", lazy=lazy).transpose(signal_axes=2)
            assert_same_image(by_hyperspy(s, model, **given), expected)

    def test_plain(self, tmp_path, model):
        """An open data set, compressed, goes to the engine as it is."""
        data = counts()
        acquisition = Acquisition(ENERGY, SEMIANGLE, STEP, (K_PIXEL, K_PIXEL), center=(21, 14))
        with h5py.File(tmp_path / "scan.h5", "w") as file:
            options = hdf5plugin.Bitshuffle(cname="lz4")
            dataset = file.create_dataset("data", data=data, chunks=(2, 3, 40, 32), **options)
            assert_same_image(reconstruct(dataset, acquisition, model=model).phase, core(data, model))

    @LAZY
    @pytest.mark.parametrize("extension", ["hspy", "nxs", "emd"])
    def test_cut_off(self, tmp_path, extension, lazy):
        path = tmp_path / f"scan.{extension}"
        signal(counts()).save(str(path))
        truncate(path, 0.6)
        with pytest.raises(OSError, match="truncated file"):
            load(path, lazy=lazy)


class TestArina:
    """Dectris, bitshuffle-LZ4, square detectors only; the loaders must be told the scan's rows."""

    center = (21, 19)

    @pytest.fixture(params=[np.uint16, np.uint32])
    def file(self, request, tmp_path):
        data = counts((40, 40), self.center, dtype=request.param)
        write_arina(tmp_path / "scan_master.h5", data, pixel_size=STEP / 10, frames_per_file=8)
        return SimpleNamespace(path=tmp_path / "scan_master.h5", data=data)

    def test_hyperspy(self, file, model):
        s = load(file.path, file_format="Arina", navigation_shape=SCAN).transpose(signal_axes=2)
        given = {"beam_energy": ENERGY / 1e3, "convergence_angle": SEMIANGLE, "k_step": K_PIXEL}
        assert_same_image(by_hyperspy(s, model, self.center, **given), core(file.data, model, self.center))
        with pytest.raises(NotImplementedError, match="Lazy"):
            load(file.path, file_format="Arina", lazy=True)

    def test_py4dstem(self, file, model):
        cube = py4DSTEM.import_file(str(file.path), scan_width=SCAN[0])
        phase = by_py4dstem(cube, model, self.center, force_reciprocal_sampling=K_PIXEL)
        assert_same_image(phase, core(file.data, model, self.center))

    def test_what_the_loaders_dont_say(self, file):
        """The scan's shape is guessed if it isn't given; a Path loses the scan's step."""
        assert py4DSTEM.import_file(str(file.path)).data.shape[:2] == SCAN[::-1]
        cube = py4DSTEM.import_file(file.path, scan_width=SCAN[0])
        with pytest.raises(ValueError, match="force_scan_sampling is unknown"):
            cube.airpi_reconstruct(ENERGY, SEMIANGLE, force_reciprocal_sampling=K_PIXEL, verbose=False)

    def test_detector_must_be_square(self, tmp_path):
        path = tmp_path / "scan_master.h5"
        write_arina(path, counts(), pixel_size=STEP / 10, frames_per_file=8)
        with pytest.raises(ValueError, match="could not broadcast"):
            load(path, file_format="Arina", navigation_shape=SCAN)
        with pytest.raises(ValueError, match="could not broadcast"):
            py4DSTEM.import_file(str(path), scan_width=SCAN[0])

    def test_part_missing(self, file):
        next(file.path.parent.glob("*_data_000002.h5")).unlink()
        with pytest.raises(KeyError):
            load(file.path, file_format="Arina", navigation_shape=SCAN)
        with pytest.raises(KeyError):
            py4DSTEM.import_file(str(file.path), scan_width=SCAN[0])

    def test_part_cut_off(self, file):
        truncate(next(file.path.parent.glob("*_data_000002.h5")), 0.6)
        with pytest.raises(KeyError):
            load(file.path, file_format="Arina", navigation_shape=SCAN)
        with pytest.raises(KeyError):
            py4DSTEM.import_file(str(file.path), scan_width=SCAN[0])


class TestBlockfile:
    """NanoMEGAS: 8 bits, square detectors, the size of a detector pixel in cm."""

    center = (21, 19)

    def write(self, path):
        data = counts((40, 40), self.center, 5e3, np.uint8)
        s = signal(data, detector=(0.01, "cm"), center=(0, 0))
        s.original_metadata.add_dictionary({"blockfile_header": {"Beam_energy": int(ENERGY), "Note": ""}})
        s.save(str(path))
        return data

    @LAZY
    def test_hyperspy(self, tmp_path, model, lazy):
        data = self.write(tmp_path / "scan.blo")
        s = load(tmp_path / "scan.blo", lazy=lazy)
        phase = by_hyperspy(s, model, self.center, convergence_angle=SEMIANGLE, k_step=K_PIXEL)
        assert_same_image(phase, core(data, model, self.center))

    def test_cut_off(self, tmp_path):
        self.write(tmp_path / "scan.blo")
        truncate(tmp_path / "scan.blo", 0.675)
        with pytest.warns(UserWarning, match="zero padding"):
            load(tmp_path / "scan.blo")
        lazy = load(tmp_path / "scan.blo", lazy=True)
        with pytest.raises((ValueError, OSError)):
            by_hyperspy(lazy, None, self.center, convergence_angle=SEMIANGLE, k_step=K_PIXEL)


def test_missing_chunk_of_zspy(tmp_path, model):
    """Zarr fills a missing chunk with zeros and doesn't say so: we do."""
    path = tmp_path / "scan.zspy"
    signal(counts()).save(str(path), chunks=(1, 4, 40, 32))
    next(chunk for chunk in path.rglob("data/3/0/0/0")).unlink()
    with pytest.warns(UserWarning, match="empty|dead|missing|zero|no electrons"):
        by_hyperspy(load(path, lazy=True), model, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # .blo: the loader leaves it open
@pytest.mark.parametrize(
    ("name", "error", "options"),
    [
        ("scan.mib", IndexError, {}),
        ("scan.xml", ParseError, {"file_format": "EMPAD"}),
        ("scan.dm4", struct.error, {}),
        ("scan.emd", OSError, {}),
        ("scan.hspy", OSError, {}),
        ("scan.nxs", OSError, {}),
        ("scan_master.h5", OSError, {"file_format": "Arina"}),
        ("scan.blo", IndexError, {}),
    ],
)
def test_empty_file_in_hyperspy(tmp_path, name, error, options):
    (tmp_path / name).touch()
    with pytest.raises(error):
        load(tmp_path / name, **options)
    gc.collect()


@pytest.mark.parametrize(
    ("name", "error", "options"),
    [
        ("scan.mib", IndexError, {}),
        ("scan.raw", ValueError, {"EMPAD_shape": (*SCAN, 130, 128)}),
        ("scan.dm4", IndexError, {}),
        ("scan_master.h5", OSError, {"filetype": "arina"}),
    ],
)
def test_empty_file_in_py4dstem(tmp_path, name, error, options):
    (tmp_path / name).touch()
    with pytest.raises(error):
        py4DSTEM.import_file(str(tmp_path / name), **options)


def test_empty_file_in_py4dstem_read(tmp_path):
    (tmp_path / "scan.h5").touch()
    with pytest.raises(Exception, match="is not an HDF5 file"):
        py4DSTEM.read(tmp_path / "scan.h5")
