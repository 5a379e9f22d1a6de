"""Projected potentials against abTEM's own, and the code that arrays on a GPU take."""

import types

import abtem
import numpy as np
import pytest

from training import potentials, supercell
from training.config import read_config
from training.structures import random_specimen
from training.transforms import transforms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SIMULATION = {"slice_thickness": 2.5, "phonon_configurations": 2, "phonon_deviation": 0.08}
SIDE, GRID = 14.0, 160


def numpys_twin():
    """A module with NumPy's functions that isn't NumPy, in place of CuPy."""
    twin = types.ModuleType("twin")
    twin.__dict__.update(vars(np))
    return twin


def specimens(*kinds):
    config = read_config("training/configs/small_paper_data.toml")["specimens"]
    for seed, kind in enumerate(kinds):
        rng = np.random.default_rng(seed)
        drawn = None
        while drawn is None:
            drawn = random_specimen(rng, SIDE, config | {"shares": {kind: 1.0}})
        yield drawn


def test_slices_are_abtems():
    for specimen in specimens("crystal", "layers", "nanoparticle", "single_atoms"):
        found, thickness = potentials.potential_slices(specimen, GRID, np.random.default_rng(1), SIMULATION)
        rng = np.random.default_rng(1)
        for ours in found:
            atoms = specimen.atoms.copy()
            atoms.positions += rng.normal(0, SIMULATION["phonon_deviation"], atoms.positions.shape)
            atoms.positions[:, 2] = np.clip(atoms.positions[:, 2], 0, specimen.thickness - 1e-3)
            atoms.wrap()
            expected = abtem.Potential(
                atoms, gpts=GRID, slice_thickness=thickness, projection="infinite", parametrization="lobato"
            ).build(lazy=False)
            assert ours.shape == expected.shape
            assert ours.dtype == np.float32
            assert np.linalg.norm(ours - expected.array) < 1e-4 * np.linalg.norm(expected.array)


def test_transforms_are_the_fourier_transform():
    rng = np.random.default_rng(2)
    for module in (np, numpys_twin()):
        waves, forward, backward = transforms((2, 48, 48), module)
        start = (rng.normal(size=waves.shape) + 1j * rng.normal(size=waves.shape)).astype(np.complex64)
        waves[:] = start
        forward()
        np.testing.assert_allclose(waves, np.fft.fft2(start), atol=1e-3)
        backward()
        np.testing.assert_allclose(waves, start * 48**2, rtol=1e-4, atol=2e-2)


def test_arrays_of_another_module_give_the_same_scan(monkeypatch):
    # all waves at once, transforms that are not FFTW's
    (specimen,) = specimens("nanoparticle")
    illumination = supercell.Illumination(200e3, 20.0, 30.0, 1e4, 0.3, 10.0, source_size=0.2)
    specimen.atoms.set_cell([illumination.side, illumination.side, specimen.thickness], scale_atoms=True)
    scans = [supercell.simulate_detector_scan(specimen, illumination, np.random.default_rng(3), SIMULATION)]
    other = numpys_twin()
    for module in (potentials, supercell):
        monkeypatch.setattr(module, "get_array_module", lambda _: other)
    scans.append(supercell.simulate_detector_scan(specimen, illumination, np.random.default_rng(3), SIMULATION))
    for name in ("patterns", "exit_wave", "phase"):
        one, two = (getattr(scan, name) for scan in scans)
        assert np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one)
