"""Sign, axes and scale of the phase: the shipped model on an asymmetric specimen that abTEM simulated."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from airpi_py4d import reconstruct
from airpi_py4d.model import Model
from training.benchmark.methods import oracle_phase
from training.reference import cross_correlation, simulate_reference

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def model():
    return Model(device="cpu")


@pytest.fixture(scope="module")
def scan():
    """10 x 14 positions over an L of unequal atoms; nothing in it is symmetric."""
    positions = [[6.6, 6.0, 1], [8.4, 6.2, 1], [8.3, 8.6, 1], [6.8, 9.6, 1], [9.3, 10.4, 1]]
    atoms = Atoms("MoSiSCuSe", positions=positions, cell=[15.0, 16.0, 2.0], pbc=True)
    return simulate_reference(atoms, 200e3, 22.0, 0.4, (10, 14), phonon_configurations=2, seed=3)


@pytest.fixture(scope="module")
def counts(scan):
    """Counts at 1e6 electrons / A^2 on a non-square detector, and the calibration."""
    cropped = scan.counts(1e6, seed=0)[:, :, 4:, 7:-3]
    row, column = scan.acquisition.center
    return cropped, replace(scan.acquisition, center=(row - 4, column - 7))


def test_phase_is_the_projected_potential(scan, counts, model):
    data, acquisition = counts
    result = reconstruct(data, acquisition, model=model)
    s, _ = result.provenance["oversample"]
    phase = result.phase[::s, ::s]
    assert phase.shape == scan.phase.shape
    assert cross_correlation(phase, scan.phase) > 0.9
    assert np.polyfit(scan.phase.ravel(), phase.ravel(), 1)[0] == pytest.approx(1, abs=0.35)
    # any other orientation of the image fits worse
    for wrong in (phase[::-1], phase[:, ::-1], phase[::-1, ::-1], -phase):
        assert cross_correlation(wrong, scan.phase) < 0.6


def turned_detector(data, center, quarter_turns, transpose):
    """What a detector records that is turned against the scan: new[d] = data[R S d] with integer steps.

    `Acquisition` says that the vector d = (row, column) on the detector is R S d on the scan.
    """
    angle = np.pi / 2 * quarter_turns
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).round().astype(int)
    if transpose:
        matrix = matrix[:, ::-1]
    places = np.indices(data.shape[2:]).reshape(2, -1) - np.array(center)[:, None].astype(int)
    onto = np.linalg.inv(matrix).round().astype(int) @ places
    first = onto.min(1, keepdims=True)
    shape = (onto - first).max(1) + 1
    turned = np.zeros((*data.shape[:2], *shape), data.dtype)
    turned[(slice(None), slice(None), *(onto - first))] = data.reshape(*data.shape[:2], -1)
    return turned, tuple(-first[:, 0])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_all_orientations_of_the_detector_give_the_same_image(counts, model, quarter_turns, transpose):
    data, acquisition = counts
    expected = reconstruct(data, acquisition, model=model)
    turned, center = turned_detector(data, acquisition.center, quarter_turns, transpose)
    calibration = replace(
        acquisition,
        center=center,
        rotation=90.0 * quarter_turns,
        transpose=transpose,
        k_pixel=acquisition.k_pixel[::-1] if (quarter_turns + transpose) % 2 else acquisition.k_pixel,
    )
    result = reconstruct(turned, calibration, model=model)
    assert np.linalg.norm(result.object - expected.object) < 0.02 * np.linalg.norm(expected.object - 1)


def test_vacuum_has_no_phase(counts, model):
    _, acquisition = counts
    calibration = replace(acquisition, center=(40.0, 40.0))
    rows, columns = np.ogrid[-40:41, -40:41]
    k = np.hypot(rows * acquisition.k_pixel[0], columns * acquisition.k_pixel[1])
    disk = k <= acquisition.aperture_radius
    data = np.random.default_rng(0).poisson(1e4 / disk.sum() * np.broadcast_to(disk, (6, 7, *disk.shape)))
    result = reconstruct(data, calibration, model=model)
    assert np.abs(result.phase).max() < 0.05
    assert result.confidence.min() > 0.99


def test_the_midplane_oracle_is_the_truth_and_beats_the_published_label(scan):
    # the true exit waves through the stitching; independent simulation, so this also checks the reference itself
    midplane = oracle_phase(scan.midplane_patches, scan.acquisition)
    published = oracle_phase(scan.exit_patches, scan.acquisition)
    assert cross_correlation(midplane, scan.phase) > 0.97
    assert cross_correlation(midplane, scan.phase) > cross_correlation(published, scan.phase)
    assert np.polyfit(scan.phase.ravel(), midplane.ravel(), 1)[0] == pytest.approx(1, abs=0.2)


def test_the_reference_averages_over_phonons():
    atoms = Atoms("CSi", positions=[[4.0, 4.4, 1], [5.1, 5.6, 1]], cell=[9.0, 10.0, 2.0], pbc=True)
    still = simulate_reference(atoms, 200e3, 25.0, 0.4, (3, 4), phonon_deviation=0.0)
    barely = simulate_reference(atoms, 200e3, 25.0, 0.4, (3, 4), phonon_configurations=3, phonon_deviation=1e-4)
    np.testing.assert_allclose(barely.patterns, still.patterns, atol=1e-5)
    np.testing.assert_allclose(barely.phase, still.phase, atol=1e-3)
    np.testing.assert_allclose(still.patterns.sum((2, 3)), 1, atol=0.01)
