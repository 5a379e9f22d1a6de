"""Batches and training of exit-wave networks: counts, labels, symmetries, schedule, resuming, export."""

import csv

import keras
import numpy as np
import pytest
from ase import Atoms

from training import dataset, exit_wave_batches, fit, recipes, supercell
from training.config import read_config
from training.exit_wave_batches import ExitWaveBatches, correlation, labelled_wave, real_space
from training.structures import Specimen

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
STILL = {"slice_thickness": 2.0, "phonon_configurations": 1, "phonon_deviation": 0.0}
ILLUMINATION = supercell.Illumination(200e3, 22.0, 15.0, 1e4, 0.23, 12.4, astigmatism=8.0, astigmatism_angle=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    config = read_config("training/configs/small_paper_data.toml")
    config["scans_per_shard"] = 2
    config["simulation"]["phonon_configurations"] = 1
    config["specimens"]["shares"] = {"single_atoms": 0.5, "layers": 0.5}
    config["scan"]["bright_field_ratio_range"] = [0.35, 0.45]
    dataset.generate(config, folder, shards=5, workers=1)
    return folder


@pytest.fixture(scope="module")
def shards(data):
    return dataset.load_shards(data, [0, 1, 2])


def simulated(positions, height=4.0):
    side = ILLUMINATION.side
    atoms = Atoms("MoSSiCu", positions=positions * [side, side, height], cell=[side, side, height], pbc=True)
    atoms.wrap()
    specimen = Specimen(atoms, "test")
    scan = supercell.simulate_detector_scan(specimen, ILLUMINATION, np.random.default_rng(0), STILL)
    return scan, np.array(supercell.parameters(specimen, ILLUMINATION, scan))


POSITIONS = np.array([[0.41, 0.46, 0.2], [0.52, 0.55, 0.6], [0.45, 0.60, 0.9], [0.58, 0.47, 0.4]])


@pytest.mark.parametrize("operation", range(8))
def test_symmetries_are_those_of_the_physics(operation):
    # mirror or transpose specimen and astigmatism: the scan is the mirrored or transposed scan
    moved, angle = POSITIONS.copy(), ILLUMINATION.astigmatism_angle
    if operation & 1:
        moved[:, 1], angle = 1 - moved[:, 1], -angle
    if operation & 2:
        moved[:, 0], angle = 1 - moved[:, 0], np.pi - angle
    if operation & 4:
        moved[:, :2], angle = moved[:, 1::-1], np.pi / 2 - angle
    original, _ = simulated(POSITIONS)
    turned = supercell.Illumination(200e3, 22.0, 15.0, 1e4, 0.23, 12.4, astigmatism=8.0, astigmatism_angle=angle)
    side = turned.side
    atoms = Atoms("MoSSiCu", positions=moved * [side, side, 4.0], cell=[side, side, 4.0], pbc=True)
    expected = supercell.simulate_detector_scan(Specimen(atoms, "test"), turned, np.random.default_rng(0), STILL)
    wave, probe = original.exit_wave[1, 1], ILLUMINATION.probe()
    both = np.stack([wave.real, wave.imag, probe.real, probe.imag], -1)
    patterns, both = exit_wave_batches.symmetry(original.patterns[1:4, 1:4], both, operation)
    inner = slice(1, None)  # pixel 0 of an even grid has no mirror image
    scale = expected.patterns.max()
    np.testing.assert_allclose(
        patterns[..., inner, inner], expected.patterns[1:4, 1:4, inner, inner], atol=2e-3 * scale
    )
    waves = [both[..., 0] + 1j * both[..., 1], both[..., 2] + 1j * both[..., 3]]
    for ours, theirs in zip(waves, [expected.exit_wave[1, 1], turned.probe()], strict=True):
        difference = np.linalg.norm((ours - theirs)[inner, inner])
        assert difference < 5e-3


def test_labels_agree_on_a_thin_specimen_and_the_midplane_is_empty_in_vacuum():
    scan, row = simulated(POSITIONS, height=0.4)
    waves = {
        label: labelled_wave(label, row, scan.exit_wave[1, 1], scan.phase[1, 1]) for label in exit_wave_batches.LABELS
    }
    probe = ILLUMINATION.probe()
    strength = np.linalg.norm(waves["exit_wave"] - probe)
    assert strength > 0.03
    for wave in waves.values():
        assert np.linalg.norm(wave - waves["exit_wave_midplane"]) < 0.5 * strength
    k = ILLUMINATION.detector_frequencies()
    fresnel = np.exp(-1j * np.pi * 0.02508 * 30.0 * (k[:, None] ** 2 + k[None] ** 2))
    row[-3:] = 30.0, 15.0, 30.0
    empty = labelled_wave("exit_wave_midplane", row, probe * fresnel, None)
    assert np.linalg.norm(empty - probe) < 2e-3
    assert np.linalg.norm(probe * fresnel - probe) > 0.1
    with pytest.raises(ValueError, match="label is 'phase', expected one of"):
        labelled_wave("phase", row, probe, None)


def test_batches_hold_poisson_counts_and_empty_specimens(shards):
    for dose in (20.0, 3e4):
        counted = ExitWaveBatches(shards, 24, "exit_wave", 1, augment=False, dose=dose)[0][0]["patterns"]
        expected = ExitWaveBatches(shards, 24, "exit_wave", 1, augment=False, dose=float("inf"))[0][0]["patterns"]
        expected = expected * (dose / 1e9)
        assert (counted == np.rint(counted)).all()
        assert counted.sum() == pytest.approx(expected.sum(), rel=4 / np.sqrt(expected.sum()))
        bright = expected > 0.02 * dose / 500
        deviation = ((counted - expected)[bright] ** 2 / expected[bright]).mean()
        assert deviation == pytest.approx(1, rel=0.1)
    empty = total = 0
    for epoch in range(12):
        _, target = ExitWaveBatches(shards, 54, "exit_wave", 2, epoch)[0]
        empty += (np.abs(target[..., :2] - target[..., 2:]).max((1, 2, 3)) == 0).sum()
        total += len(target)
    assert 0.01 < empty / total < 0.06


def test_batches_repeat_and_use_every_kernel_once(shards):
    first, again = (ExitWaveBatches(shards, 6, "exit_wave", 3, epoch=4)[2] for _ in range(2))
    for name in first[0]:
        np.testing.assert_array_equal(first[0][name], again[0][name])
    other = ExitWaveBatches(shards, 6, "exit_wave", 3, epoch=5)[2]
    assert (other[0]["patterns"] != first[0]["patterns"]).any()
    batches = ExitWaveBatches(shards, 6, "exit_wave", 3, augment=False)
    assert len(batches) == 9
    seen = np.concatenate([batches[n][1][..., 0] for n in range(9)])
    assert len(np.unique(seen.reshape(54, -1), axis=0)) == 54
    with pytest.raises(ValueError, match="batch_size is 100, but the data set has 54 samples"):
        ExitWaveBatches(shards, 100, "exit_wave", 3)


def test_correlation_is_pearsons(shards):
    _, target = ExitWaveBatches(shards, 12, "exit_wave", 1, augment=False)[0]
    wave = target[..., 0] + 1j * target[..., 1]
    perfect = np.stack([np.abs(wave), np.angle(wave)], -1)
    assert correlation(target, perfect) == pytest.approx(1, abs=1e-4)
    incident = real_space(target[..., 2] + 1j * target[..., 3])
    turned = exit_wave_batches.reciprocal_space(incident * (real_space(wave) / incident).conj())
    assert correlation(target, np.stack([np.abs(turned), np.angle(turned)], -1)) == pytest.approx(-1, abs=0.01)


TINY = {
    "seed": 5,
    "label": "exit_wave",
    "batch_size": 6,
    "batches_per_epoch": 4,  # of two groups of shards
    "epochs": 3,
    "learning_rate": 2e-3,
    "patience": 1,
    "validation_shards": 1,
    "validate_every": 2,
    "validation_samples": 6,
    "validation_doses": [0.0, 100.0],
    "shards_in_memory": 3,
    "workers": 2,
    "network": {"kind": "unet", "filters": 2, "levels": 2, "blocks": 1},
    "second_phase": {"epochs": 2, "object_phase": 10.0},
}


def curve(run):
    with open(run / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stop", [2, 3])
def test_stopping_and_resuming_gives_the_same_curve(data, tmp_path, monkeypatch, stop):
    fit.fit(TINY, data, tmp_path / "whole")
    saved, calls = fit.save_atomically, []

    def stopping(*arguments):
        saved(*arguments)
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_atomically", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(TINY, data, tmp_path / "stopped")
    monkeypatch.setattr(fit, "save_atomically", saved)
    fit.fit(TINY, data, tmp_path / "stopped")
    whole, stopped = curve(tmp_path / "whole"), curve(tmp_path / "stopped")
    assert [row["epoch"] for row in whole] == list("01234")
    assert len(stopped) == 5
    for one, other in zip(whole, stopped, strict=True):
        for name, value in one.items():
            assert (value == other[name] == "") or float(value) == pytest.approx(float(other[name]), rel=1e-3)
    assert whole[1]["xc at no noise"] != ""
    assert whole[0]["xc at no noise"] == ""
    states = [fit.read_state(tmp_path / run / "checkpoint.keras") for run in ("whole", "stopped")]
    assert states[0]["epoch"] == states[1]["epoch"] == 5
    assert states[0]["rate"] == states[1]["rate"]
    assert states[0]["best"] == pytest.approx(states[1]["best"], rel=1e-3)


def test_the_rate_is_halved_on_a_plateau_and_the_second_phase_counts_anew():
    recipe = recipes.recipe(TINY | {"epochs": 10, "patience": 3})
    losses, state, rates = [5.0, 4.0, 4.1, 4.2, 4.3, 3.0, 3.1, 3.2, 3.3, 3.4, 9.0, 8.0], {}, []
    for epoch, loss in enumerate(losses):
        rates.append(recipe.learning_rate(epoch, state))
        better = state.get("best") is None or loss < state["best"]
        state |= {"best": loss, "waited": 0} if better else {"waited": state["waited"] + 1}
    assert rates == [2e-3] * 5 + [1e-3] * 4 + [5e-4] * 3
    assert state["best"] == 8.0
    compiled = []
    recipe.compile(type("Model", (), {"compile": lambda self, _, loss: compiled.append(loss)})(), 9, "optimizer")
    recipe.compile(type("Model", (), {"compile": lambda self, _, loss: compiled.append(loss)})(), 10, "optimizer")
    assert [loss.weights["object_phase"] for loss in compiled] == [1.0, 10.0]
    assert [loss.weights["phase_k"] for loss in compiled] == [3.0, 3.0]


def test_the_published_training_is_configured():
    config = read_config("training/configs/paper_unet.toml")
    recipe = recipes.recipe(config)
    assert recipe.epochs == 60
    assert (config["batch_size"], config["learning_rate"], config["patience"]) == (256, 5e-4, 3)
    assert recipe.weights == {
        "intensity_k": 1,
        "phase_k": 3,
        "intensity_r": 1,
        "phase_r": 1,
        "object_phase": 1,
        "object_correlation": 1,
    }
    assert recipe.second == {"object_phase": 10}


def test_unknown_networks_and_terms_are_refused():
    with pytest.raises(ValueError, match="kind of \\[network\\] is 'resnet'"):
        recipes.recipe(TINY | {"network": {"kind": "resnet"}})
    with pytest.raises(ValueError, match=r"\[second_phase\] has \['epoch'\]"):
        recipes.recipe(TINY | {"second_phase": {"epochs": 1, "epoch": 2}})


@pytest.mark.parametrize("kind", ["unet", "complex_unet"])
def test_mixed_precision_trains_with_float32_waves(data, tmp_path, kind):
    network = TINY["network"] | {"kind": kind}
    config = TINY | {"precision": "mixed_float16", "epochs": 1, "second_phase": {"epochs": 0}, "network": network}
    try:
        fit.fit(config | {"tensorboard": True}, data, tmp_path)
    finally:
        keras.config.set_dtype_policy("float32")
    model = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    kinds = {layer.name: layer.compute_dtype for layer in model.layers}
    assert kinds["exit_wave"] == kinds["change"] == "float32"
    assert list(kinds.values()).count("float16") > 10
    assert np.isfinite(float(curve(tmp_path)[0]["validation loss"]))
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_an_exported_network_gives_the_labelled_object_and_runs_in_the_engine(
    data, shards, tmp_path, monkeypatch, precision
):
    from airpi_py4d import Acquisition, optics, reconstruct
    from export import unet as export_unet

    text = [f"{name} = {value!r}" for name, value in TINY.items() if not isinstance(value, dict)]
    text += ["[network]", *(f"{name} = {value!r}" for name, value in TINY["network"].items())]
    (tmp_path / "config.toml").write_text("\n".join(text))
    keras.utils.set_random_seed(1)
    network = recipes.recipe(TINY).network()
    rng = np.random.default_rng(1)
    network.set_weights([w + rng.normal(0, 0.02, w.shape) if w.ndim else np.array(0.05) for w in network.get_weights()])
    keras.config.set_dtype_policy(precision)
    try:
        trained = recipes.recipe(TINY).network()
    finally:
        keras.config.set_dtype_policy("float32")
    trained.set_weights(network.get_weights())
    trained.save(tmp_path / "model.keras")
    names = [str(tmp_path / "model.keras"), str(tmp_path / "config.toml"), str(data), str(tmp_path / "mine.onnx")]
    monkeypatch.setattr("sys.argv", ["export.unet", *names, "--name", "mine", "--version", "1"])
    export_unet.main()
    # the graph's own probe and object are those of the batches
    import onnxruntime

    inputs = export_unet.contract_inputs(shards, 12, "exit_wave")
    patches = onnxruntime.InferenceSession(tmp_path / "mine.onnx").run(None, inputs)[0]
    found = patches[..., 0] + 1j * patches[..., 1]
    batch, target = ExitWaveBatches(shards, 12, "exit_wave", 0, augment=False)[0]
    prediction = network.predict(batch, verbose=0)
    wave = real_space(prediction[..., 0] * np.exp(1j * prediction[..., 1]))
    incident = real_space(target[..., 2] + 1j * target[..., 3])
    strong = np.abs(incident) ** 2 > (np.abs(incident) ** 2).max((1, 2), keepdims=True) / 10
    assert np.abs(found - 1)[strong].max() > 0.02
    np.testing.assert_allclose(found[strong], (wave / incident)[strong], atol=5e-3)
    k_pixel = optics.aperture_radius(200e3, 20.0) / 12
    counts = rng.poisson(0.5 * (np.hypot(*np.ogrid[-32:32, -32:32]) <= 12), (4, 3, 64, 64))
    acquisition = Acquisition(200e3, 20.0, 0.25, (k_pixel, k_pixel))
    result = reconstruct(counts, acquisition, model=tmp_path / "mine.onnx", device="cpu")
    assert result.provenance["model"]["name"] == "mine"
    assert np.isfinite(result.phase).all()


def test_statistics_curves_and_throughput(data, tmp_path):
    from training import curves, statistics, throughput

    values, shares = statistics.distributions(data)
    assert shares.pop("skipped") >= 0
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) <= {"single_atoms", "layers"}
    ratio = values["bright-field / collection angle"]
    assert len(ratio) == 10
    assert ((ratio >= 0.35) & (ratio <= 0.45)).all()
    statistics.plot(values, shares, tmp_path / "statistics.png")
    lines = ["epoch,loss,validation loss,xc at no noise", "0,3,2.5,", "1,2,2,0.5"]
    (tmp_path / "history.csv").write_text("\n".join(lines))
    curves.plot(tmp_path / "history.csv", tmp_path / "curves.png")
    for name in ("statistics.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 5000
    recipe = recipes.recipe(TINY)
    measured = throughput.rates(recipe, recipe.load(data, [0, 1, 2]), TINY["batch_size"], rounds=2)
    assert measured.shape == (2, 2)
    assert (measured > 0).all()
