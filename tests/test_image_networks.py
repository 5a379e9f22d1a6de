"""Whole scans and networks in two parts: simulation, first-order features, stitching, loss, training."""

import os
import subprocess
import sys

import abtem
import keras
import numpy as np
import pytest
import scipy.ndimage
from ase import Atoms

from airpi_py4d import optics
from training import average, dataset, features, fit, grow, image_networks, scan_batches, scans
from training.config import read_config
from training.losses import PhaseImageError
from training.recipes import recipe
from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, OBJECT, WINDOW
from training.structures import Specimen

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
STILL = {"slice_thickness": 2.0, "phonon_configurations": 1, "phonon_deviation": 0.0}
ENCODER = {"fine_channels": 4, "coarse_channels": 8, "blocks": 1, "head": 16, "features": 2}
IMAGE = {"channels": [8, 8, 8], "blocks": [1, 1, 1]}
PLACES = np.array([[0.41, 0.46, 0.2], [0.52, 0.55, 0.6], [0.45, 0.60, 0.9], [0.58, 0.47, 0.4]])


def scanned(symbols, places, step, height=4.0, defocus=15.0):
    """Patterns and phase of a few atoms, and the illumination; 2 x 2 positions would do, there are more."""
    at = scans.Illumination(200e3, 22.0, defocus, 1e4, step)
    side = at.grid * at.pixel_size
    atoms = Atoms(symbols, positions=places * [side, side, height], cell=[side, side, height], pbc=True)
    patterns, phase = scans.simulate_scan(Specimen(atoms, "test"), at, np.random.default_rng(0), STILL)
    return patterns, phase, at, atoms


def test_patterns_and_phase_are_abtems():
    # a step that isn't a whole number of the potential's pixels; abTEM simulates each position in a box of its own,
    # of the size of the window, with the same atoms
    patterns, phase, at, atoms = scanned("MoSSiCu", PLACES, 0.27)
    assert (at.step_pixels % 1) > 0.1
    side = WINDOW * at.pixel_size
    probe = abtem.Probe(energy=200e3, semiangle_cutoff=22.0, defocus=15.0, Cs=1e4, soft=False)
    frequency = np.fft.fftfreq(WINDOW, at.pixel_size)
    within = frequency[:, None] ** 2 + frequency[None] ** 2 <= (scans.BAND * at.k0) ** 2
    for row, column in ((0, 0), (3, 11), (15, 7)):
        corner = (np.rint(at.places[[row, column]]) - WINDOW // 2) * at.pixel_size
        box = atoms.copy()
        box.positions[:, :2] -= corner
        box.set_cell([side, side, atoms.cell[2, 2]])
        box.wrap()
        potential = abtem.Potential(
            box, gpts=(WINDOW, WINDOW), slice_thickness=2.0, projection="infinite", parametrization="lobato"
        ).build(lazy=False)
        probe.grid.match(potential)
        place = at.places[[row, column]] * at.pixel_size - corner
        scan = abtem.CustomScan([tuple(place)])
        far = np.abs(np.fft.fft2(np.asarray(probe.multislice(potential, scan=scan, lazy=False).array))) ** 2
        far /= (np.abs(np.fft.fft2(np.asarray(probe.build(scan=scan, lazy=False).array))) ** 2).sum()
        edge = (WINDOW - DETECTOR) // 2
        expected = np.fft.fftshift(far.reshape(WINDOW, WINDOW))[edge:-edge, edge:-edge]
        assert np.linalg.norm(patterns[row, column] - expected) < 1e-3 * np.linalg.norm(expected)
        projected = optics.interaction_parameter(200e3) * potential.array.sum(0, dtype=np.float64)
        coefficients = np.fft.fft2(projected) * within / WINDOW**2
        left, right = (np.exp(2j * np.pi * frequency * value) for value in place)
        found = phase[row * at.oversample, column * at.oversample]
        assert found == pytest.approx((left @ coefficients @ right).real, abs=2e-3)  # [rad]; tails beyond the box


def test_displacements_are_drawn_from_their_range(monkeypatch):
    at = scans.Illumination(200e3, 22.0, 0.0, 0.0, 0.27)
    side, drawn = at.grid * at.pixel_size, []
    atoms = Atoms("Mo", positions=[[side / 2, side / 2, 2.0]], cell=[side, side, 4.0], pbc=True)
    slices_of = scans.potential_slices

    def noted(specimen, grid, rng, config):
        drawn.append(config["phonon_deviation"])
        return slices_of(specimen, grid, rng, config)

    monkeypatch.setattr(scans, "potential_slices", noted)
    config = {"slice_thickness": 2.0, "phonon_choices": [16], "phonon_deviations": [0.05, 0.11]}
    rng = np.random.default_rng(1)
    peaks = [scans.simulate_scan(Specimen(atoms, "test"), at, rng, config)[1].max() for _ in range(8)]
    assert min(drawn) >= 0.05
    assert max(drawn) <= 0.11
    assert np.ptp(drawn) > 0.02
    assert np.corrcoef(drawn, peaks)[0, 1] < -0.7  # the further an atom moves, the flatter is its phase


def test_whole_pixel_positions_are_the_training_simulators():
    from training import simulation

    patterns, _, at, atoms = scanned("MoSSiCu", PLACES, 3 * BRIGHT_FIELD_RADIUS / WINDOW)
    assert float(at.step_pixels) == 3
    slices, thickness = simulation.potential_slices(Specimen(atoms, "test"), at.grid, np.random.default_rng(0), STILL)
    beam = simulation.Beam(200e3, 22.0, 15.0, 1e4, 3)
    places = np.rint(at.places).astype(int)
    if not np.allclose(places, at.places):  # half a pixel off for an even number of positions
        at = type("Shifted", (scans.Illumination,), {"places": property(lambda self: places)})(
            at.energy, at.semiangle, at.defocus, at.spherical_aberration, at.relative_step
        )
        patterns = scans.intensities(slices, thickness, at)
    pairs = np.stack(np.meshgrid(places, places, indexing="ij"), -1).reshape(-1, 2)[:40]
    expected, _ = simulation.multislice(slices, thickness, beam, pairs)
    found = patterns.reshape(-1, DETECTOR, DETECTOR)[:40]
    error = np.linalg.norm(found - simulation.crop_detector(expected)) / np.linalg.norm(found)
    assert error < 1e-5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scan_data", {16, 24}),
        ("strong_scan_data", {16, 24}),
        ("large_step_scan_data", {16}),
        ("large_scan_data", {64}),
        ("layer_scan_data", {64}),
    ],
)
def test_the_configuration_decides_the_positions(name, expected):
    config = read_config(f"training/configs/{name}.toml")
    rng = np.random.default_rng(0)
    drawn = [scans.random_scan_illumination(rng, config) for _ in range(30)]
    assert {at.positions for at in drawn} == expected
    for at in drawn:
        assert len(at.places) == at.positions
        # the windows of the outermost positions lie in the potential
        assert at.places[0] + 1 >= WINDOW // 2
        assert at.places[-1] + WINDOW // 2 <= at.grid + 1


class TestFirstOrder:
    def test_is_the_gradient(self):
        # derivative of sum_k dI(k) c(k) by the phase at every pixel, by finite differences of exp(i phi)
        rng = np.random.default_rng(1)
        chi = -1.1, 0.4
        k = (np.arange(DETECTOR) - DETECTOR // 2) / BRIGHT_FIELD_RADIUS
        squared = k[:, None] ** 2 + k[None] ** 2
        disk = squared <= 1
        wave = disk * np.exp(-1j * (chi[0] * squared + chi[1] * squared**2))
        probe = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(wave)))
        counts = rng.poisson(5.0, (DETECTOR, DETECTOR)) * disk
        change = disk * (counts / counts[disk].mean() - 1)
        geometry = np.array([[0.2, *chi]], np.float32)
        layer = image_networks.FirstOrder()
        found = np.asarray(layer(counts[None].astype(np.float32), geometry))[0]

        def intensity(row, column, factor):
            changed = probe.copy()
            changed[row, column] *= factor
            return np.abs(np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(changed)))) ** 2

        middle, small = DETECTOR // 2 - OBJECT // 2, 1e-5
        scale = 12 * DETECTOR**2 / disk.sum() ** 2
        for pixel in ((8, 8), (6, 11), (9, 5)):
            place = pixel[0] + middle, pixel[1] + middle
            by_phase = intensity(*place, np.exp(1j * small)) - intensity(*place, np.exp(-1j * small))
            by_log_amplitude = intensity(*place, np.exp(small)) - intensity(*place, np.exp(-small))
            expected = [scale * (d / (2 * small) * change).sum() for d in (by_phase, by_log_amplitude)]
            np.testing.assert_allclose(found[:, pixel[0], pixel[1]], expected, rtol=2e-3)

    def test_stitched_a_weak_phase_comes_out_positive(self):
        patterns, phase, at, _ = scanned("CCCC", PLACES, 0.2, height=2.0)
        chi = [
            float(optics.aberration_phase(at.k0**2, at.energy, **one))
            for one in ({"defocus": at.defocus}, {"spherical_aberration": at.spherical_aberration})
        ]
        geometry = np.array([[at.relative_step, *chi]], np.float32)
        counts = 1e6 * patterns[None]
        flat = counts.reshape(-1, DETECTOR, DETECTOR)
        patches = image_networks.FirstOrder()(flat, np.repeat(geometry, len(flat), 0))
        features, window = image_networks.stitching_matrices(at.positions, at.oversample, at.relative_step)
        inputs = {"features_matrix": features[None], "window_matrix": window[None]}
        network = image_networks.StitchedNetwork(ENCODER, IMAGE)
        image = np.asarray(network.stitched(counts, patches, inputs, geometry[:, :1]))[0]
        pixels = len(phase)
        assert np.corrcoef(image[0, :pixels, :pixels].ravel(), phase.ravel())[0, 1] > 0.8
        level, coverage = image[2:, pixels // 2, pixels // 2]
        assert level == pytest.approx(6 / 7, abs=1e-3)
        assert coverage == pytest.approx(1, abs=0.01)


class TestLinearEstimates:
    def test_the_centre_of_mass_of_a_dense_scan_is_stitched(self):
        # every pattern one electron at k = (6, -3) px, k0 = 12 px
        counts = np.zeros((1, 24, 24, DETECTOR, DETECTOR), np.float32)
        counts[..., DETECTOR // 2 + 6, DETECTOR // 2 - 3] = 1
        features, window = image_networks.stitching_matrices(24, 1, 0.15)
        inputs = {"features_matrix": features[None], "window_matrix": window[None]}
        patches = image_networks.CentreOfMass()(counts.reshape(-1, DETECTOR, DETECTOR))
        network = image_networks.StitchedNetwork(ENCODER, IMAGE)
        image = np.asarray(network.stitched(counts, patches, inputs, np.full((1, 1), 0.15, np.float32)))
        middle = image[0, :2, 11:13, 11:13]
        np.testing.assert_allclose(middle, np.array([0.5, -0.25])[:, None, None] * np.ones((2, 2)), rtol=0.06)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_integrated_the_gradient_is_the_phase(self, axis):
        # two small Gaussians of opposite sign: a strong phase that has no mean
        pixel, r = 0.15, np.arange(48) - 24
        bumps = [np.exp(-((r - 2 * sign) ** 2) / 8) for sign in (1, -1)]
        across = np.exp(-(r**2) / 8)
        phase = 2.0 * np.outer(bumps[0] - bumps[1], across)
        phase = phase.T if axis else phase
        gradient = np.stack(np.gradient(phase, pixel), -1) / (2 * np.pi)
        x = np.concatenate([gradient, np.zeros((48, 48, 2)), np.ones((48, 48, 2))], -1)[None].astype(np.float32)
        geometry = np.array([[pixel, pixel, 0, 0]], np.float32)
        found = np.asarray(image_networks.IntegratedCentreOfMass()(x, geometry))[0, ..., 0]
        assert np.corrcoef(found.ravel(), phase.ravel())[0, 1] > 0.97
        assert np.polyfit(phase.ravel(), found.ravel(), 1)[0] == pytest.approx(1, abs=0.2)

    def test_sharpened_frequencies_are_multiplied(self):
        pixel, q = 0.1, 1.25  # [1 / k0], [k0]
        wave = np.cos(2 * np.pi * q * pixel * np.arange(48))
        x = np.repeat(wave[None, :, None, None], 48, 2).astype(np.float32)
        found = np.asarray(image_networks.Sharpened()(x, np.array([[pixel, pixel, 0, 0]], np.float32)))[0, 10:38, 10:38]
        ratios = [(found[..., n] * found[..., 0]).sum() / (found[..., 0] ** 2).sum() for n in (1, 2)]
        assert ratios == pytest.approx([(q / 2) ** 2, (q / 2) ** 4], rel=0.15)


class TestSymmetries:
    @pytest.mark.parametrize("operation", range(1, 8))
    def test_are_those_of_the_physics(self, operation):
        moved = PLACES.copy()
        if operation & 1:
            moved[:, 1] = 1 - moved[:, 1]
        if operation & 2:
            moved[:, 0] = 1 - moved[:, 0]
        if operation & 4:
            moved[:, :2] = moved[:, 1::-1]
        # places of the scan are symmetric about the middle of the pixels 0 ... grid, not of the box
        patterns, phase, at, _ = scanned("MoSSiCu", PLACES, 0.6)
        shift = (at.places.mean() - at.grid / 2) / at.grid
        moved = moved + [2 * shift, 2 * shift, 0] * _mirrored(operation)
        expected_patterns, expected_phase, _, _ = scanned("MoSSiCu", moved, 0.6)
        found_patterns, found_phase = scan_batches.mirrored(patterns, phase, operation)
        inner = np.s_[:, :, 1:, 1:]
        assert np.abs(found_patterns[inner] - expected_patterns[inner]).max() < 2e-3 * expected_patterns.max()
        assert np.abs(found_phase - expected_phase).max() < 1e-2 * abs(expected_phase).max()


def _mirrored(operation):
    """Which axes of the scanned specimen are mirrored, after the swap."""
    rows, columns = bool(operation & 2), bool(operation & 1)
    return np.array([columns, rows, 0] if operation & 4 else [rows, columns, 0], float)


def loss_in_numpy(true, prediction, floor, of_correlation, of_one_electron):
    phase, deviation, coverage = np.moveaxis(prediction.astype(np.float64), -1, 0)
    noise, true, weight = of_one_electron * true[:, 0, 0, 1], true[..., 0].astype(np.float64), np.minimum(coverage, 1)
    losses = []
    for t, p, s, w, n in zip(true, phase, deviation, weight, noise, strict=True):
        error = p - t
        offset, level = np.average(error, weights=w), np.average(t, weights=w)
        variance = np.average((t - level) ** 2, weights=w)
        loss = np.sqrt((np.average((error - offset) ** 2, weights=w) + n) / (variance + floor + n) + 1e-4)
        loss += 0.5 * np.sqrt((offset**2 + n) / (variance + level**2 + 2.5e-3 + n) + 1e-4)
        (of_p, both), (_, of_t) = np.cov(p.ravel(), t.ravel(), aweights=w.ravel(), ddof=0)
        loss += of_correlation * (1 - both / np.sqrt((of_p + 1e-8) * (of_t + 1e-8)))
        for axis in (0, 1):
            weights = np.delete(w, 0, axis)
            above = np.average(np.diff(error, axis=axis) ** 2, weights=weights)
            below = np.average(np.diff(t, axis=axis) ** 2, weights=weights)
            loss += 0.25 * np.sqrt((above + 2 * n) / (below + floor + 2 * n) + 1e-4)
        curvatures = [scipy.ndimage.laplace(x)[1:-1, 1:-1] ** 2 for x in (error, t)]
        above, below = (np.average(x, weights=w[1:-1, 1:-1]) for x in curvatures)
        loss += 0.25 * np.sqrt((above + 20 * n) / (below + floor + 20 * n) + 1e-4)
        likelihood = np.average(s**2 * (0.5 * error**2 / s**2 + np.log(s)), weights=w)
        losses.append(loss + 0.1 * likelihood / (variance + floor + n))
    return np.mean(losses)


@pytest.mark.parametrize(
    ("chosen", "weights"), [({}, (1, 4)), ({"correlation_weight": 2.0, "noise_of_one_electron": 8.0}, (2, 8))]
)
def test_loss_is_its_equation(chosen, weights):
    rng = np.random.default_rng(2)
    true = rng.normal(0.3, 0.2, (3, 12, 8, 1)).astype(np.float32)
    phase, coverage = true + rng.normal(0.1, 0.1, true.shape), rng.uniform(0, 1.2, true.shape)
    prediction = np.concatenate([phase, rng.uniform(0.05, 0.3, true.shape), coverage], -1).astype(np.float32)
    target = np.concatenate(
        [true, np.zeros_like(true) + np.array([0, 1e-2, 1e-1], np.float32)[:, None, None, None]], -1
    )
    loss = recipe(read_config("training/configs/fast_model.toml") | {"strength_floor": 2e-4} | chosen).loss()
    assert float(loss(target, prediction)) == pytest.approx(loss_in_numpy(target, prediction, 2e-4, *weights), rel=1e-4)
    assert float(PhaseImageError.from_config(loss.get_config())(target, prediction)) == float(loss(target, prediction))


def test_a_teacher_adds_its_equation_to_the_loss():
    rng = np.random.default_rng(3)
    true, teacher = rng.normal(0.3, 0.2, (2, 3, 12, 8)).astype(np.float32)
    phase, deviation, coverage = rng.uniform(0.1, 1.0, (3, 3, 12, 8)).astype(np.float32)
    target = np.stack([true, np.full_like(true, 0.01), teacher], -1)
    prediction = np.stack([phase, deviation, coverage], -1)
    added = []
    for p, q, w in zip(*(x.astype(np.float64) for x in (phase, teacher, coverage)), strict=True):
        relative = np.average((p - q) ** 2, weights=w) / (np.average(q**2, weights=w) + 1e-5)
        (of_p, both), (_, of_q) = np.cov(p.ravel(), q.ravel(), aweights=w.ravel(), ddof=0)
        added.append(np.sqrt(relative + 1e-4) + 1 - both / np.sqrt((of_p + 1e-8) * (of_q + 1e-8)))
    loss = PhaseImageError(2e-4, teacher_weight=2.0)
    assert loss.get_config()["teacher_weight"] == 2.0
    alone = float(PhaseImageError(2e-4)(target[..., :2], prediction))
    assert float(loss(target, prediction)) == pytest.approx(alone + 2 * np.mean(added), rel=1e-4)
    target[1, ..., 2] = 0  # has no teacher
    assert float(loss(target, prediction)) == pytest.approx(alone + 2 * (added[0] + added[2]) / 3, rel=1e-4)


def test_the_receptive_field_is_within_the_margin():
    network = image_networks.image_network(4, **IMAGE)
    rng = np.random.default_rng(0)
    network.set_weights([w + rng.normal(0, 0.3, w.shape).astype(np.float32) for w in network.get_weights()])
    margin = image_networks.receptive_margin(**IMAGE)
    image = rng.normal(size=(1, 6, 128, 96)).astype(np.float32)
    image[:, 4:] = 0.5
    changed = image.copy()
    changed[:, :, 64, 48] += 1
    geometry = np.array([[0.15, 0.2, 0, 0, 1]], np.float32)
    difference = np.abs(np.asarray(network([image, geometry])["phase"] - network([changed, geometry])["phase"]))[0, 0]
    seen = np.argwhere(difference > 0)
    assert 8 < np.abs(seen - [64, 48]).max() <= margin


def test_the_image_network_knows_how_long_an_angstrom_is():
    network = image_networks.image_network(4, **IMAGE)
    rng = np.random.default_rng(0)
    network.set_weights([w + rng.normal(0, 0.1, w.shape).astype(np.float32) for w in network.get_weights()])
    image = rng.normal(size=(1, 6, 16, 16)).astype(np.float32)
    one, same, other = (
        np.asarray(network([image, np.array([[0.15, 0.2, 0, 0, radius]], np.float32)])["phase"])
        for radius in (0.5, 0.5, 1.0)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01 * one.std()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    config = read_config("training/configs/scan_data.toml")
    config["scans_per_shard"] = 3
    config["simulation"]["phonon_choices"] = [1]
    config["specimens"]["shares"] = {"single_atoms": 0.5, "layers": 0.5}
    config["scan"]["step_range"] = [0.15, 0.8]
    dataset.generate(config, folder, shards=3, workers=1)
    return folder


CONFIGURATION = {
    "seed": 3,
    "strength_floor": 2e-4,
    "batches_per_epoch": 3,
    "epochs": 4,
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "validation_shards": 1,
    "validate_every": 2,
    "validation_doses": [0.0, 100.0],
    "network": {"kind": "stitched"},
    "encoder": ENCODER,
    "image": IMAGE,
}


def test_batches_are_reproducible_and_of_the_promised_shapes(data):
    loaded = scan_batches.Scans(data, [0, 1])
    batches = scan_batches.ScanBatches(loaded, 4, seed=5, epoch=1)
    for index in range(4):
        inputs, target = batches[index]
        again, _ = batches[index]
        n, positions = inputs["patterns"].shape[:2]
        pixels = target.shape[1]
        assert target.shape == (n, pixels, pixels, 2)
        assert pixels % 4 == 0
        assert inputs["features_matrix"].shape == (n, pixels, OBJECT * positions)
        assert all((inputs[name] == again[name]).all() for name in inputs)
        assert (inputs["patterns"] >= 0).all()


def test_the_configuration_chooses_the_doses(data):
    chosen = recipe(CONFIGURATION | {"dose_range": [100.0, 200.0]})
    batches = chosen.batches(chosen.load(data, [0, 1]), epoch=0)
    of_one_electron = np.concatenate([batches[n][1][:, 0, 0, 1] for n in range(12)])
    with_noise = of_one_electron[of_one_electron > 0]
    assert len(with_noise) > 12
    assert 1 / 200 <= with_noise.min() < with_noise.max() <= 1 / 100


def test_mapped_arrays_are_those_of_the_file(tmp_path):
    arrays = {
        "amplitudes_0": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        "of_columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "kinds": np.array(["wedge", "layers"]),
        "skipped": np.array(3),
        "none": np.zeros((0, 2)),
    }
    dataset.save_shard(tmp_path / "shard.npz", arrays)
    found = dataset.mapped(tmp_path / "shard.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert not found[name].flags.writeable
        assert not found[name].flags.owndata


def test_larger_scans_are_drawn_oftener_and_seen_in_parts(tmp_path):
    sides = (40, 8)
    arrays = {f"amplitudes_{n}": np.ones((side, side, 64, 64), np.float16) for n, side in enumerate(sides)}
    arrays |= {f"phase_{n}": np.zeros((side, side), np.float32) for n, side in enumerate(sides)}
    rows = np.array([[200e3, 20.0, 0.0, 1e4, 0.1, 3.0]] * 2)
    dataset.save_shard(dataset.shard_path(tmp_path, 0), arrays | {"parameters": rows})
    batches = scan_batches.ScanBatches(scan_batches.Scans(tmp_path, [0]), 0, seed=6)
    drawn = [batches.first_scan(2, np.random.default_rng(n)) for n in range(500)]
    assert drawn.count(1) == pytest.approx(500 * 8 / (8 + 40), abs=25)
    positions = {batches[n][0]["patterns"].shape[1] for n in (0, 1)}
    assert positions == {8, scan_batches.LARGEST_SCAN}


def test_a_resumed_training_goes_on_as_if_it_had_never_stopped(data, tmp_path, monkeypatch):
    fit.fit(CONFIGURATION, data, tmp_path / "whole")
    saved, calls = fit.save_atomically, []

    def stopping(*arguments):
        saved(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_atomically", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(CONFIGURATION, data, tmp_path / "stopped")
    monkeypatch.setattr(fit, "save_atomically", saved)
    fit.fit(CONFIGURATION, data, tmp_path / "stopped")
    whole, stopped = (
        keras.saving.load_model(tmp_path / run / "model.keras", compile=False) for run in ("whole", "stopped")
    )
    for one, other in zip(whole.get_weights(), stopped.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "stopped" / "history.csv").read_text().count("\n") == 3


def test_the_image_network_alone_is_trained_on_features_of_its_encoder(data, tmp_path):
    keras.utils.set_random_seed(6)
    network = image_networks.StitchedNetwork(ENCODER, IMAGE)
    network.save(tmp_path / "start.keras")
    arrays = features.make_features(network, data, 1, views=2, seed=0)
    scan = scan_batches.ScanBatches(scan_batches.Scans(data, [1]), 0, 1, 1, whole=True)[2]
    np.testing.assert_allclose(arrays["features_5"], network.feature_image(scan[0])[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(arrays["target_5"], scan[1][0, ..., 0])
    few = features.make_features(network, data, 1, views=2, seed=0, doses=(50.0, 100.0))["numbers"][:, 4]
    assert set(few[(few < 1 / 100) | (few > 1 / 50)]) <= {0}  # no noise
    assert np.count_nonzero(few) > len(few) / 2
    folder = tmp_path / "features"
    folder.mkdir()
    for number in range(3):
        np.savez(dataset.shard_path(folder, number), **features.make_features(network, data, number, views=2, seed=0))
    batches = features.FeatureBatches(features.Features(folder, [1]), 4, seed=1)
    scans = scan_batches.Scans(data, [1])
    k0 = [optics.aperture_radius(energy, angle) for energy, angle in scans.parameters[:, :2]]
    np.testing.assert_allclose(batches.features.numbers[:, 5], np.tile(k0, 2), rtol=1e-6)
    inputs, target = batches[3]
    assert inputs["features"].shape[2:] == target.shape[1:3]
    alone = float(PhaseImageError(2e-4)(scan[1], network({"features": arrays["features_5"][None], **scan[0]})))
    assert alone == pytest.approx(float(PhaseImageError(2e-4)(scan[1], network(scan[0]))), rel=1e-2)
    config = CONFIGURATION | {"network": {"kind": "stitched_image"}, "initial_model": str(tmp_path / "start.keras")}
    fit.fit(config | {"validation_doses": [60.0, 1e4]}, folder, tmp_path / "run")
    trained = keras.saving.load_model(tmp_path / "run" / "model.keras", compile=False)
    for one, other in zip(network.encoder.get_weights(), trained.encoder.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    moved = [
        np.abs(one - other).max()
        for one, other in zip(network.image.get_weights(), trained.image.get_weights(), strict=True)
    ]
    assert max(moved) > 1e-4
    with pytest.raises(
        ValueError, match=r"teacher_weight is set, but none .* make them with training.features --teacher"
    ):
        fit.fit(config | {"teacher_weight": 1.0}, folder, tmp_path / "other")


def test_a_teacher_is_the_mean_over_the_symmetries_and_the_network_learns_from_it(data, tmp_path):
    keras.utils.set_random_seed(6)
    network = image_networks.StitchedNetwork(ENCODER, IMAGE)
    rng = np.random.default_rng(1)
    network.set_weights([w + rng.normal(0, 0.05, w.shape).astype(np.float32) for w in network.get_weights()])
    scans = scan_batches.Scans(data, [1])
    inputs, _ = scan_batches.ScanBatches(scans, 0, 1, 0, whole=True)[0]
    pixels = len(scans.phases[0])
    mean = features.symmetric_phase(network, inputs, pixels)
    alone = np.asarray(network(inputs))[0, :pixels, :pixels, 0]
    assert abs(mean - alone).max() > 1e-3 * abs(alone).max()
    # whatever symmetry the scan is seen in, it is the same image, turned
    for operation in (1, 2, 4, 7):
        patterns, turned = scan_batches.mirrored(inputs["patterns"][0], mean, operation)
        seen = features.symmetric_phase(network, inputs | {"patterns": np.ascontiguousarray(patterns)[None]}, pixels)
        np.testing.assert_allclose(seen, turned, rtol=2e-3, atol=2e-4 * abs(mean).max())
    network.save(tmp_path / "start.keras")
    folder = tmp_path / "features"
    folder.mkdir()
    for number in range(3):
        arrays = features.make_features(network, data, number, views=1, seed=0, teacher=True)
        np.savez(dataset.shard_path(folder, number), **arrays)
    made = features.Features(folder, [1], teacher=True)
    np.testing.assert_allclose(made.teachers[0][:pixels, :pixels], mean, rtol=2e-3, atol=2e-4 * abs(mean).max())
    assert features.FeatureBatches(made, 2, seed=1)[1][1].shape[-1] == 3
    np.savez(dataset.shard_path(folder, 3), **{k: v for k, v in arrays.items() if not k.startswith("teacher")})
    both = features.Features(folder, [3, 1], teacher=True)
    count = len(arrays["numbers"])
    assert [len(both.teachers), len(both.images)] == [count + len(made.images)] * 2
    for n in range(count):
        np.testing.assert_array_equal(both.teachers[n], np.zeros_like(both.targets[n]))
    np.testing.assert_array_equal(both.teachers[count], made.teachers[0])
    config = CONFIGURATION | {"network": {"kind": "stitched_image"}, "initial_model": str(tmp_path / "start.keras")}
    config |= {"teacher_weight": 50.0, "validation_doses": [60.0], "epochs": 6, "batches_per_epoch": 5}

    def distance(model):
        found = features.Features(folder, [1, 2], teacher=True)
        errors = []
        for image, teacher, row in zip(found.images, found.teachers, found.numbers, strict=True):
            given = features.network_inputs(image[None], row[None])
            errors.append(np.mean((np.asarray(model(given))[0, ..., 0] - teacher)[teacher != 0] ** 2))
        return np.mean(errors)

    fit.fit(config, folder, tmp_path / "run")
    assert distance(keras.saving.load_model(tmp_path / "run" / "model.keras", compile=False)) < distance(network)


def test_the_mean_of_two_networks():
    first, second = (image_networks.StitchedNetwork(ENCODER, IMAGE) for _ in range(2))
    before = [model.get_weights() for model in (first, second)]
    for a, b, mean in zip(*before, average.averaged(first, second).get_weights(), strict=True):
        np.testing.assert_allclose(mean, (a + b) / 2, atol=1e-7)
    assert max(np.abs(a - b).max() for a, b in zip(*before, strict=True)) > 0.01
    other = image_networks.StitchedNetwork(ENCODER, IMAGE | {"channels": [8, 8, 12]})
    with pytest.raises(ValueError, match="different shapes"):
        average.averaged(first, other)


def test_more_blocks_leave_the_image_as_it_is():
    network = image_networks.StitchedNetwork(ENCODER, {"channels": [8, 12, 16], "blocks": [1, 2, 1]})
    rng = np.random.default_rng(8)
    network.set_weights([w + rng.normal(0, 0.05, w.shape).astype(np.float32) for w in network.get_weights()])
    patterns, geometry = rng.poisson(1.0, (2, 64, 64)), np.array([[0.2, 0.5, 0.0]] * 2)
    features_seen = rng.normal(size=(1, ENCODER["features"] + 6, 24, 32)).astype(np.float32)
    numbers = np.array([[0.1, 0.2, 0.5, 0.0, 1.2]], np.float32)
    larger = grow.grown(network, [2, 3, 1])
    np.testing.assert_array_equal(larger.encoder([patterns, geometry]), network.encoder([patterns, geometry]))
    image, same = (np.asarray(model.image([features_seen, numbers])["phase"]) for model in (network, larger))
    np.testing.assert_array_equal(image, same)
    assert np.ptp(image) > 0.01
    # a new block changes the image as soon as it is trained, one that was there before has its weights
    gain = larger.image.get_layer("block_0_down_1_gain")
    gain.set_weights([np.ones(8, np.float32)])
    assert np.abs(np.asarray(larger.image([features_seen, numbers])["phase"]) - image).max() > 1e-4
    with pytest.raises(ValueError, match=r"blocks is \[1, 1, 1\], expected at least"):
        grow.grown(network, [1, 1, 1])


JAX_LOSS = """
import sys, keras, numpy as np
from training import image_networks
from training.losses import PhaseImageError
assert keras.backend.backend() == "jax"
network = keras.saving.load_model(sys.argv[1], compile=False)
batch = dict(np.load(sys.argv[2]))
print(float(PhaseImageError(2e-4)(batch.pop("target"), network(batch))))
"""


def test_jax_gives_tensorflows_loss(data, tmp_path):
    network = image_networks.StitchedNetwork(ENCODER, IMAGE)
    rng = np.random.default_rng(4)
    network.set_weights([w + rng.normal(0, 0.05, w.shape).astype(np.float32) for w in network.get_weights()])
    network.save(tmp_path / "network.keras")
    inputs, target = scan_batches.ScanBatches(scan_batches.Scans(data, [0]), 2, seed=5)[1]
    np.savez(tmp_path / "batch.npz", target=target, **inputs)
    expected = float(PhaseImageError(2e-4)(target, network(inputs)))
    done = subprocess.run(
        [sys.executable, "-c", JAX_LOSS, str(tmp_path / "network.keras"), str(tmp_path / "batch.npz")],
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected > 0.1
    assert float(done.stdout) == pytest.approx(expected, rel=2e-3)
