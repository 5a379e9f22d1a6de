"""Simulation on the detector's own grid, against abTEM's own scan of the whole supercell."""

import abtem
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, graphene, mx2

from airpi_py4d import optics
from training import phonons, simulation, supercell
from training.config import read_config
from training.structures import Specimen, cut_slab, rotation_to_z

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
STILL = {"slice_thickness": 2.5, "phonon_configurations": 1, "phonon_deviation": 0.0}
FOCUSED = supercell.Illumination(300e3, 20.0, 0.0, 0.0, 0.21, 12.0)


def layer(atoms, height):
    cell = atoms.cell[:].copy()
    cell[2] = [0, 0, height + 1]
    atoms = atoms.copy()
    atoms.positions[:, 2] -= atoms.positions[:, 2].min()
    atoms.set_cell(cell)
    return atoms


#: Name: (crystal, thickness [A], illumination): thin and 30 A, light and heavy, fine, coarse and defocused detectors.
CASES = {
    "graphene": (layer(graphene(vacuum=1.0), 0.5), 1.5, supercell.Illumination(80e3, 25.0, 0.0, 0.0, 0.3, 8.0)),
    "WSe2": (layer(mx2("WSe2", a=3.32, thickness=3.34), 3.4), 4.4, FOCUSED),
    "silicon 30 A": (
        bulk("Si", cubic=True),
        30.0,
        supercell.Illumination(200e3, 22.0, optics.scherzer_defocus(200e3, 1e4), 1e4, 0.25, 18.0),
    ),
    "gold 30 A": (
        bulk("Au", cubic=True),
        30.0,
        supercell.Illumination(300e3, 18.0, 30.0, 1e4, 0.4, 11.0, astigmatism=15.0, astigmatism_angle=0.4),
    ),
}


def slab(name):
    crystal, thickness, illumination = CASES[name]
    atoms = cut_slab(crystal, rotation_to_z(np.array([0, 0, 1.0]), 0.3), thickness, illumination.side, np.zeros(3))
    return Specimen(atoms, name), illumination


@pytest.mark.parametrize("name", CASES)
def test_patterns_and_exit_waves_are_those_of_abtems_scan(name):
    specimen, illumination = slab(name)
    ours = supercell.simulate_detector_scan(specimen, illumination, np.random.default_rng(0), STILL)
    slices = max(1, round(specimen.thickness / STILL["slice_thickness"]))
    potential = abtem.Potential(
        specimen.atoms,
        gpts=illumination.grid,
        slice_thickness=specimen.thickness / slices,
        projection="infinite",
        parametrization="lobato",
    )
    probe = abtem.Probe(
        energy=illumination.energy,
        semiangle_cutoff=illumination.semiangle,
        defocus=illumination.defocus,
        Cs=illumination.spherical_aberration,
        C12=illumination.astigmatism,
        phi12=illumination.astigmatism_angle,
        soft=False,
    )
    probe.grid.match(potential)
    first = illumination.side / 2 - 2 * illumination.scan_step
    steps = first + illumination.scan_step * np.arange(5)
    # GridScan leaves its end point out
    scan = abtem.GridScan(start=(first,) * 2, end=(first + 5 * illumination.scan_step,) * 2, gpts=5)
    measured = probe.scan(potential, scan=scan, detectors=abtem.PixelatedDetector(max_angle=None), lazy=False).array
    assert measured.shape[:2] == (5, 5)
    repeats, middle = illumination.repeats, measured.shape[-1] // 2
    reach = repeats * 32
    expected = np.zeros((5, 5, 64, 64))
    # a detector pixel is `repeats` k samples wide; samples on the border of two count half in each
    weights = np.ones(repeats) if repeats % 2 else np.r_[0.5, np.ones(repeats - 1), 0.5]
    width = len(weights) // 2
    for row, vertical in enumerate(weights):
        for column, horizontal in enumerate(weights):
            rows = slice(middle - reach + row - width, middle + reach + row - width, repeats)
            columns = slice(middle - reach + column - width, middle + reach + column - width, repeats)
            expected += vertical * horizontal * measured[..., rows, columns]
    assert np.linalg.norm(ours.patterns - expected) < 1e-4 * np.linalg.norm(expected)

    positions = [(row, column) for row in steps[1:4] for column in steps[1:4]]
    waves = np.fft.fft2(probe.multislice(potential, scan=abtem.CustomScan(positions), lazy=False).array)
    k = np.fft.fftfreq(illumination.grid, illumination.side / illumination.grid)
    index = repeats * (np.arange(64) - 32)
    found = ours.exit_wave.reshape(9, 64, 64)
    norm = np.sqrt((np.abs(np.fft.fft2(probe.build(lazy=False).array)[np.ix_(index, index)]) ** 2).sum())
    for wave, (row, column), own in zip(waves, positions, found, strict=True):
        centred = wave * np.exp(2j * np.pi * (k[:, None] * row + k[None] * column))
        centred = centred[np.ix_(index, index)] / norm
        assert np.linalg.norm(own - centred) < 1e-4 * np.linalg.norm(centred)


def test_an_empty_cell_gives_the_probe_and_the_beam():
    illumination = supercell.Illumination(200e3, 20.0, 50.0, 1e4, 0.3, 7.0, astigmatism=20.0)
    nothing = [np.zeros((1, illumination.grid, illumination.grid), np.float32)]
    positions = np.array([[1.0, 2.0], [3.3, 0.1]])
    intensity, wave = supercell.multislice(nothing, 1e-9, illumination, positions)
    np.testing.assert_allclose(intensity.sum((1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(supercell.on_detector(intensity, illumination.repeats).sum((1, 2)), 1, rtol=1e-3)
    sampled = supercell.at_detector(wave, illumination.repeats)
    sampled /= np.sqrt((np.abs(sampled) ** 2).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(sampled, np.broadcast_to(illumination.probe(), sampled.shape), atol=1e-5)


def test_the_published_probe_is_that_of_optics():
    illumination = supercell.Illumination(200e3, 20.0, 50.0, 1e4, 0.3, 11.5)
    pixel = illumination.side / illumination.repeats / 64
    probe = optics.probe(64, pixel, 200e3, 20.0, 50.0, 1e4)
    expected = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(probe), norm="ortho"))
    np.testing.assert_allclose(illumination.probe(), expected, atol=1e-6)


def test_the_phase_of_a_thin_specimen_is_its_exit_waves():
    specimen, illumination = slab("graphene")
    scan = supercell.simulate_detector_scan(specimen, illumination, np.random.default_rng(0), STILL)
    transform = {"axes": (-2, -1), "norm": "ortho"}
    centre = scan.exit_wave[1, 1]
    wave = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(centre), **transform))
    probe = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(illumination.probe()), **transform))
    near = np.abs(probe) ** 2 > (np.abs(probe) ** 2).max() / 10
    angle = np.angle(wave / probe)[near]
    assert np.corrcoef(angle, scan.phase[1, 1][near])[0, 1] > 0.95


def test_partial_coherence_blurs_patterns_and_not_the_label():
    specimen, _ = slab("WSe2")
    config = STILL | {"phonon_configurations": 24}
    coherent = supercell.simulate_detector_scan(specimen, FOCUSED, np.random.default_rng(0), config)
    partial = supercell.Illumination(300e3, 20.0, 0.0, 0.0, 0.21, 12.0, source_size=0.25)
    blurred = supercell.simulate_detector_scan(specimen, partial, np.random.default_rng(0), config)
    np.testing.assert_allclose(blurred.exit_wave, coherent.exit_wave, atol=1e-5)
    difference = np.linalg.norm(blurred.patterns - coherent.patterns) / np.linalg.norm(coherent.patterns)
    assert 0.02 < difference < 0.6
    assert blurred.patterns[2, 2].std() < coherent.patterns[2, 2].std()
    np.testing.assert_allclose(blurred.patterns.sum((2, 3)), coherent.patterns.sum((2, 3)), rtol=0.02)


def test_the_cell_holds_detector_and_probe():
    config = read_config("training/configs/paper_data.toml")
    rng = np.random.default_rng(0)
    for _ in range(200):
        illumination = supercell.random_detector_illumination(rng, config)
        k0 = optics.aperture_radius(illumination.energy, illumination.semiangle)
        assert 3.2 <= illumination.bright_field_radius <= 30.4
        assert 5.0 <= illumination.semiangle <= 30.0
        assert illumination.side * k0 >= supercell.SMALLEST_SIDE - 1e-9
        assert illumination.grid / 3 >= 32 * illumination.repeats
        assert 0.1 * 0.609 <= illumination.scan_step * k0 <= 0.9 * 0.611


def test_patterns_of_window_and_supercell_agree_where_the_windows_edge_is_far():
    # the other simulator, on its own grid, for a small specimen in vacuum: what its window leaves out is nothing
    beam = simulation.Beam(200e3, 22.0, 10.0, 1e4, step_pixels=3)
    side = beam.grid * beam.pixel_size
    rng = np.random.default_rng(3)
    offsets = rng.uniform(-1, 1, (5, 2)) + 0.0
    positions = np.c_[offsets + beam.grid // 2 * beam.pixel_size, rng.uniform(0.2, 1.8, 5)]
    window = simulation.simulate_scan(
        Specimen(Atoms("CSiSMoC", positions=positions, cell=[side, side, 2.0], pbc=True), "test"), beam, rng, STILL
    )
    illumination = supercell.Illumination(200e3, 22.0, 10.0, 1e4, beam.scan_step, 12.0)
    positions[:, :2] = offsets + illumination.side / 2
    cell = [illumination.side, illumination.side, 2.0]
    whole = supercell.simulate_detector_scan(
        Specimen(Atoms("CSiSMoC", positions=positions, cell=cell, pbc=True), "test"), illumination, rng, STILL
    )
    difference = np.linalg.norm(whole.patterns - window.patterns) / np.linalg.norm(whole.patterns)
    assert difference < 0.02


def test_errors_of_few_phonon_configurations_fall_with_their_root():
    rng = np.random.default_rng(4)
    draws = 5 + rng.normal(size=(30, 4000))
    errors = phonons.relative_errors(draws, np.full(4000, 5.0))
    np.testing.assert_allclose(errors, 0.2 / np.sqrt(phonons.COUNTS), rtol=0.05)
