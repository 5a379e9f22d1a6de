"""The training slice: structures, simulation, data set, batches, losses, fit and export, on small cases."""

import json

import abtem
import keras
import numpy as np
import onnx
import pytest
from ase import Atoms

from airpi_py4d import Acquisition, optics, reconstruct
from airpi_py4d.patterns import resampling_matrix
from export import to_onnx
from training import batches, dataset, fit, losses, networks, simulation, structures
from training.config import read_config
from training.structures import RESERVED_COMPOSITIONS, Specimen, random_specimen

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def config():
    loaded = read_config("training/configs/first_data.toml")
    loaded["scans_per_shard"] = 3
    loaded["simulation"]["phonon_configurations"] = 2
    return loaded


@pytest.fixture(scope="module")
def data(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        dataset.write_shard((config, folder, number))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_specimens_fill_their_box_and_are_never_reserved(config):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        specimen = random_specimen(rng, 18.0, config["specimens"])
        if specimen is None:
            continue
        kinds.add(specimen.kind)
        positions = specimen.atoms.positions
        assert (positions[:, 2] >= 0).all()
        assert (positions[:, 2] <= specimen.thickness).all()
        assert frozenset(specimen.atoms.numbers.tolist()) not in RESERVED_COMPOSITIONS
    assert kinds == {"crystal", "layers", "amorphous", "single_atoms"}


def test_every_reserved_composition_is_refused(config, monkeypatch):
    for reserved in RESERVED_COMPOSITIONS:
        atoms = Atoms(sorted(reserved), positions=np.ones((len(reserved), 3)), cell=[9, 9, 2], pbc=True)
        monkeypatch.setattr(structures, "single_atoms", lambda rng, side, light, atoms=atoms: atoms)
        only = config["specimens"] | {"shares": {"single_atoms": 1.0}}
        assert random_specimen(np.random.default_rng(1), 9.0, only) is None


def asymmetric_specimen(side):
    positions = np.array([[0.31, 0.42, 0.2], [0.52, 0.55, 0.6], [0.4, 0.63, 0.9], [0.66, 0.47, 0.4]])
    return Atoms("MoSSiCu", positions=positions * [side, side, 4.0], cell=[side, side, 4.0], pbc=True)


BEAM = simulation.Beam(200e3, 22.0, 15.0, 1e4, step_pixels=4)


def test_multislice_is_abtems():
    # a cell of just one window: then both simulate the same periodic problem
    atoms = asymmetric_specimen(BEAM.side)
    config = {"slice_thickness": 2.0, "phonon_configurations": 1, "phonon_deviation": 0.0}
    slices, thickness = simulation.potential_slices(
        Specimen(atoms, "test"), simulation.WINDOW, np.random.default_rng(0), config
    )
    positions = np.array([[64, 64], [60, 71], [50, 66]])
    intensity, wave = simulation.multislice(slices, thickness, BEAM, positions)
    potential = abtem.Potential(
        atoms, gpts=simulation.WINDOW, slice_thickness=2.0, projection="infinite", parametrization="lobato"
    )
    probe = abtem.Probe(
        energy=BEAM.energy,
        semiangle_cutoff=BEAM.semiangle,
        defocus=BEAM.defocus,
        Cs=BEAM.spherical_aberration,
        soft=False,
    )
    probe.grid.match(potential)
    scan = abtem.CustomScan(positions * BEAM.pixel_size)
    theirs = np.fft.fft2(probe.multislice(potential, scan=scan, lazy=False).array)
    theirs /= np.sqrt((np.abs(np.fft.fft2(probe.build(scan=scan, lazy=False).array)) ** 2).sum((1, 2), keepdims=True))
    expected = np.abs(theirs) ** 2
    assert np.linalg.norm(intensity - expected) < 0.01 * np.linalg.norm(expected)
    # ours has the probe in the middle of the window
    k = np.fft.fftfreq(simulation.WINDOW, BEAM.pixel_size)
    for n, (row, column) in enumerate((positions * BEAM.pixel_size).tolist()):
        centred = theirs[n] * np.exp(2j * np.pi * (k[:, None] * row + k[None] * column))
        overlap = np.vdot(wave[n], centred)
        assert abs(overlap - np.vdot(centred, centred)) < 0.01 * np.vdot(centred, centred).real


def test_midplane_label_is_one_in_vacuum_and_the_phase_on_a_thin_specimen():
    side = BEAM.grid * BEAM.pixel_size
    config = {"slice_thickness": 2.0, "phonon_configurations": 1, "phonon_deviation": 0.0}
    rng = np.random.default_rng(0)
    far = Atoms("C", positions=[[0, 0, 1.0]], cell=[side, side, 30.0], pbc=True)
    scan = simulation.simulate_scan(Specimen(far, "test"), BEAM, rng, config)
    np.testing.assert_allclose(scan.exit_wave_midplane, np.broadcast_to(scan.probe_midplane, (3, 3, 16, 16)), atol=2e-3)
    assert np.abs(scan.exit_wave - scan.probe).max() > 0.02  # the published label holds the propagation
    thin = asymmetric_specimen(side)
    scan = simulation.simulate_scan(Specimen(thin, "test"), BEAM, rng, config)
    weight = np.abs(scan.probe_midplane) ** 2
    near = weight > weight.max() / 10
    phase = np.angle(scan.exit_wave_midplane / scan.probe_midplane)[..., near]
    assert np.corrcoef(phase.ravel(), scan.phase[..., near].ravel())[0, 1] > 0.97


def test_batches_record_poisson_counts_on_the_detector():
    clean = np.full((1, 9, 64, 64), 1.0, np.float32)
    for mean in (0.01, 0.8, 12.0, 300.0):
        out = np.empty_like(clean)
        one = np.ones(1, np.int64)
        batches._record(clean, np.array([mean]), np.array([20]), np.zeros((1, 2)), np.ones(1), one, 0 * one, 5, out)
        seen = out[0, :, 13:52, 13:52]
        assert seen.mean() == pytest.approx(mean, rel=0.1 if mean < 0.1 else 0.02)
        assert seen.var() == pytest.approx(mean, rel=0.1 if mean < 0.1 else 0.05)
        assert (seen == np.rint(seen)).all()
        assert out.sum() == seen.sum()


@pytest.mark.parametrize(("pixel", "offset"), [(0.2, 0.1), (0.53, 0.2), (1.0, 0.4), (1.1, 0.7)])
def test_fine_pixels_keep_the_counts(pixel, offset):
    given = np.zeros((64, 64), np.float32)
    given[20, 30], given[40, 41] = 9, 4
    expected = given.copy()
    batches._spread_fine(expected, pixel, offset, False)
    assert expected.sum() == pytest.approx(13, rel=1e-5)
    assert expected[19:22, 29:32].sum() == pytest.approx(9, rel=1e-5)
    mean = np.zeros_like(given)
    for _ in range(2000):
        draw = given.copy()
        batches._spread_fine(draw, pixel, offset, True)
        mean += draw / 2000
    np.testing.assert_allclose(mean, expected, atol=0.12)


def test_fine_pixels_are_as_the_engine_resamples_them():
    # counts of a detector with pixels of 0.53 grid pixels: sum of roots, which knows how electrons are shared
    pixel, side, density = 0.53, 122, 0.14
    k0 = Acquisition(200e3, 20.0, 0.2, (1, 1)).aperture_radius
    detector = Acquisition(200e3, 20.0, 0.2, (k0 / 12 * pixel,) * 2, center=(side // 2, side // 2))
    resampling = resampling_matrix((side, side), detector, 64, k0 / 12, simulation.SMALLEST_PIXEL)
    rng = np.random.default_rng(0)

    def disk(n, size):
        k = (np.arange(n) - n // 2) * size
        return (k[:, None] ** 2 + k[None] ** 2 <= 12**2) * density * size**2

    roots = {"engine": 0.0, "training": 0.0, "on the grid": 0.0}
    for _ in range(200):
        roots["engine"] += np.sqrt(resampling @ rng.poisson(disk(side, pixel)).ravel()).sum() / 200
        counts = rng.poisson(disk(64, 1.0)).astype(np.float32)
        roots["on the grid"] += np.sqrt(counts).sum() / 200
        batches._spread_fine(counts, pixel, (32.5 - pixel / 2) % pixel, True)
        roots["training"] += np.sqrt(counts).sum() / 200
    assert roots["training"] == pytest.approx(roots["engine"], rel=0.05)
    assert roots["on the grid"] < 0.6 * roots["engine"]


@pytest.mark.parametrize(("pixel", "offset"), [(2, 0), (3, 2), (4, 1)])
def test_coarse_pixels_keep_the_counts_and_their_noise(pixel, offset):
    rows, columns = np.mgrid[:64, :64]
    smooth = 2.0 + np.cos(rows / 9) + np.sin(columns / 11)
    expected = smooth.copy()
    batches._count_coarse(expected, pixel, offset, False)
    inner = slice(6, -6)
    np.testing.assert_allclose(expected[inner, inner], smooth[inner, inner], atol=0.12)
    draws = np.stack([smooth] * 200)
    for draw in draws:
        batches._count_coarse(draw, pixel, offset, True)
    # a block of 24 x 24 px holds about as many electrons, with the variance of counting
    sums = draws[:, 20:44, 20:44].sum((1, 2))
    assert sums.mean() == pytest.approx(expected[20:44, 20:44].sum(), rel=0.01)
    assert sums.var() == pytest.approx(sums.mean(), rel=0.3)


@pytest.mark.parametrize("operation", range(8))
def test_symmetries_are_those_of_the_physics(operation):
    # the scan of a mirrored or transposed specimen is the mirrored or transposed scan
    config = {"slice_thickness": 2.0, "phonon_configurations": 1, "phonon_deviation": 0.0}
    side = BEAM.grid * BEAM.pixel_size
    middle = BEAM.grid // 2 * BEAM.pixel_size

    def shard(atoms):
        scan = simulation.simulate_scan(Specimen(atoms, "test"), BEAM, np.random.default_rng(0), config)
        arrays = {name: getattr(scan, name)[None] for name in ("exit_wave_midplane", "probe_midplane")}
        parameters = [[BEAM.energy, BEAM.semiangle, BEAM.defocus, BEAM.spherical_aberration, BEAM.scan_step, 4.0]]
        amplitudes = np.sqrt(scan.patterns)[None]
        return batches.Batches(
            arrays | {"amplitudes": amplitudes, "parameters": np.array(parameters)}, 1, 1, "exit_wave_midplane", 0
        )

    atoms = asymmetric_specimen(side)
    moved = atoms.copy()
    if operation & 1:
        moved.positions[:, 1] = 2 * middle - moved.positions[:, 1]
    if operation & 2:
        moved.positions[:, 0] = 2 * middle - moved.positions[:, 0]
    if operation & 4:
        moved.positions[:, :2] = moved.positions[:, 1::-1]
    moved.wrap()
    original, expected = shard(atoms), shard(moved)
    patterns, patches = batches.symmetry(
        original.shards["amplitudes"][0, 1:4, 1:4], original.target(0, 1, 1), operation
    )
    inner = slice(1, None)  # pixel 0 of an even grid has no mirror image
    np.testing.assert_allclose(
        patterns[..., inner, inner], expected.shards["amplitudes"][0, 1:4, 1:4][..., inner, inner], atol=2e-4
    )
    # the object patch times the probe is the exit wave; without the probe there is nothing to compare
    ours, theirs = patches[inner, inner], expected.target(0, 1, 1)[inner, inner]
    np.testing.assert_allclose(ours[..., 2], theirs[..., 2], atol=1e-5)
    np.testing.assert_allclose(
        ours[..., :2] * np.sqrt(ours[..., 2:]), theirs[..., :2] * np.sqrt(theirs[..., 2:]), atol=5e-4
    )


def test_loss_is_its_equation():
    rng = np.random.default_rng(4)
    incident = rng.normal(size=(6, 16, 16)) + 1j * rng.normal(size=(6, 16, 16))
    incident /= np.sqrt((np.abs(incident) ** 2).sum((1, 2), keepdims=True))
    o, predicted = (1 + 0.3 * (rng.normal(size=(6, 16, 16)) + 1j * rng.normal(size=(6, 16, 16))) for _ in range(2))
    target = np.stack([o.real - 1, o.imag, np.abs(incident) ** 2], -1)
    error, strength = losses.exit_wave_error(
        target.astype(np.float32), np.stack([predicted.real, predicted.imag], -1).astype(np.float32)
    )
    np.testing.assert_allclose(error, (np.abs(incident * predicted - incident * o) ** 2).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(strength, (np.abs(incident - incident * o) ** 2).sum((1, 2)), rtol=1e-5)


def test_stitched_loss_is_the_error_of_the_mean():
    # many draws of a biased, noisy prediction: the loss is bias^2 + variance / K
    rng = np.random.default_rng(5)
    draws, inverse = 4000, 0.25
    true = rng.normal(0, 0.2, (16, 16, 2))
    weight = rng.uniform(size=(16, 16))
    weight /= weight.sum()
    bias, deviation = rng.normal(0, 0.1, (16, 16, 2)), 0.3
    target = np.empty((2 * draws, 16, 16, 4), np.float32)
    target[..., :2], target[..., 2], target[..., 3] = true, weight, inverse
    patch = true + np.array([1.0, 0.0]) + bias + rng.normal(0, deviation, (2 * draws, 16, 16, 2))
    strength = np.sum(weight[..., None] * true**2)
    expected = np.sum(weight[..., None] * bias**2) + 2 * deviation**2 * inverse
    found = float(losses.StitchedExitWaveError(0.02)(target, patch.astype(np.float32)))
    assert found == pytest.approx(expected / (0.5 * strength + 0.02), rel=0.02)
    # K = 1 is the mean squared error of the single predictions
    target[..., 3] = 1
    plain = np.mean(np.sum(weight[..., None] * (patch - [1, 0] - true) ** 2, axis=(1, 2, 3)))
    found = float(losses.StitchedExitWaveError(0.02)(target, patch.astype(np.float32)))
    assert found == pytest.approx(plain / (0.5 * strength + 0.02), rel=1e-4)


def test_linear_phase_is_the_gradient_of_the_likelihood():
    # -d/dphi of the Poisson log likelihood by central differences through an FFT simulation of nine phase objects
    rng = np.random.default_rng(6)
    step, defocus_phase, spherical_phase = 0.5, 0.6, -0.3  # steps of half of 1/k0 are 64/24 grid pixels
    k = (np.arange(64) - 32) / 12
    squared = k[:, None] ** 2 + k[None] ** 2
    aperture = (squared <= 1) / np.sqrt((squared <= 1).sum())
    aberrations = np.exp(-1j * (defocus_phase * squared + spherical_phase * squared**2))

    def intensities(phase):
        result = []
        for row in (-1, 0, 1):
            for column in (-1, 0, 1):
                ramp = np.exp(-2j * np.pi * step * (k[:, None] * row + k[None] * column))
                wave = np.fft.ifft2(np.fft.ifftshift(aperture * aberrations * ramp)) * np.exp(1j * phase)
                result.append(np.abs(np.fft.fftshift(np.fft.fft2(wave))) ** 2)
        return np.stack(result)

    counts = rng.poisson(400 * intensities(np.fft.ifftshift(rng.normal(0, 0.2, (64, 64))))).astype(np.float32)
    layer = networks.LinearPhase()
    geometry = np.array([[step, defocus_phase, spherical_phase]], np.float32)
    found = np.asarray(layer(counts.reshape(1, 3, 3, 64, 64), geometry))[0]
    disk = squared <= 1
    empty = intensities(np.zeros((64, 64)))
    mean = counts[:, disk].mean()
    for row, column in ((8, 8), (6, 9), (11, 7)):
        bump = np.zeros((64, 64))
        bump[(row - 8) % 64, (column - 8) % 64] = 1e-3
        change = (intensities(bump) - intensities(-bump)) / 2e-3
        # sum over the disk of (n / mean - 1) dI / dphi; the patch is scaled so that P(0) = 1 without aberrations
        gradient = ((counts / mean - 1) * change)[:, disk].sum(1)
        scale = disk.sum() / 64**2
        np.testing.assert_allclose(found[row, column] * scale, gradient, atol=2e-3 * np.abs(gradient).max())
    assert np.allclose(empty[:, disk], 1 / disk.sum())


def test_shards_are_reproducible_and_resumable(config, data, tmp_path):
    again = dataset.make_shard(config, 1)
    with np.load(dataset.shard_path(data, 1)) as shard:
        for name in shard.files:
            np.testing.assert_array_equal(shard[name], again[name])
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept = dataset.shard_path(tmp_path, 0)
    kept.write_bytes(b"made before")
    dataset.generate(config, tmp_path, shards=2, workers=1)
    assert kept.read_bytes() == b"made before"
    assert sorted(path.name for path in tmp_path.glob("shard_*")) == ["shard_00000.npz", "shard_00001.npz"]
    with pytest.raises(ValueError, match="another configuration"):
        dataset.generate(config | {"seed": 0}, tmp_path, shards=2, workers=1)


TINY = {
    "seed": 3,
    "label": "exit_wave_midplane",
    "stitched": True,
    "strength_floor": 0.02,
    "batch_size": 4,
    "batches_per_epoch": 2,
    "epochs": 3,
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "validation_shards": 1,
    "validate_every": 1,
    "validation_samples": 4,
    "validation_doses": [0.0, 100.0],
    "network": {
        "kind": "window_encoder",
        "fine_channels": 4,
        "coarse_channels": 8,
        "fine_blocks": 1,
        "coarse_blocks": 1,
        "mixing": True,
        "head": 8,
    },
}


def test_a_stopped_run_resumes_where_it_was(data, tmp_path, monkeypatch):
    fit.fit(TINY, data, tmp_path / "whole")
    saved = fit.save_atomically
    calls = []

    def stop_after_two(*arguments):
        saved(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_atomically", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(TINY, data, tmp_path / "stopped")
    monkeypatch.setattr(fit, "save_atomically", saved)
    fit.fit(TINY, data, tmp_path / "stopped")
    models = [keras.saving.load_model(tmp_path / run / "model.keras", compile=False) for run in ("whole", "stopped")]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    histories = [(tmp_path / run / "history.csv").read_text().splitlines() for run in ("whole", "stopped")]
    assert len(histories[0]) == len(histories[1]) == 1 + TINY["epochs"]


def test_training_starts_from_the_shipped_weights(data, tmp_path):
    shipped = "training/weights/airpi-2.keras"
    config = TINY | {"initial_model": shipped, "epochs": 1, "learning_rate": 0.0}
    with pytest.raises(ValueError, match=r"initial_model is training/weights/airpi-2\.keras, whose"):
        fit.fit(config, data, tmp_path)
    network = read_config("training/configs/second_model_tuned.toml")["network"]
    fit.fit(config | {"network": network}, data, tmp_path)
    models = [keras.saving.load_model(path, compile=False) for path in (shipped, tmp_path / "model.keras")]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


GUIDED = {
    "fine_channels": 4,
    "coarse_channels": 8,
    "fine_blocks": 1,
    "coarse_blocks": 1,
    "head": 8,
    "object_channels": 4,
}


@pytest.mark.parametrize("kind", ["window_encoder", "linear_guided"])
def test_export_agrees_with_keras_and_runs_in_the_engine(data, tmp_path, kind):
    sizes = (
        GUIDED
        if kind == "linear_guided"
        else {name: TINY["network"][name] for name in TINY["network"] if name != "kind"}
    )
    model = networks.NETWORKS[kind](**sizes)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(0, 0.05, weight.shape) for weight in model.get_weights()])
    parameters = dataset.load_shards(data, [0, 1])["parameters"]
    graph = to_onnx.convert(model, to_onnx.metadata("tiny", "1", TINY, data, parameters))
    for size in (1, 5):
        inputs = {
            "patterns": rng.poisson(0.5, (size, 3, 3, 64, 64)).astype(np.float32),
            "geometry": rng.normal(size=(size, 3)).astype(np.float32),
        }
        assert to_onnx.parity(model, graph, inputs) < 1e-4
    onnx.save(graph, tmp_path / "tiny.onnx")
    k_pixel = optics.aperture_radius(200e3, 20.0) / 8
    acquisition = Acquisition(200e3, 20.0, 0.25, (k_pixel, k_pixel))
    counts = rng.poisson(2.0 * (np.hypot(*np.ogrid[-16:16, -20:20]) <= 8), (4, 3, 32, 40))
    result = reconstruct(counts, acquisition, model=tmp_path / "tiny.onnx", device="cpu")
    assert result.provenance["model"]["name"] == "tiny"
    assert np.isfinite(result.phase).all()
