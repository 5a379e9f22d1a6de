"""The benchmark: what it measures of made images, its cases, and one of them from end to end."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from training.benchmark import cases, metrics, scans
from training.benchmark.__main__ import main
from training.structures import RESERVED_COMPOSITIONS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def bumps(places, shape, pixel_size, width=0.25, height=1.0):
    """Gaussians of a width [A] at places [A]."""
    rows, columns = (np.arange(n) * pixel_size for n in shape)
    squared = [(rows[:, None] - r) ** 2 + (columns - c) ** 2 for r, c in places]
    return height * sum(np.exp(-one / (2 * width**2)) for one in squared)


def test_ring_correlation_is_one_with_itself_and_none_with_noise():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(60, 72))
    frequencies, itself = metrics.fourier_ring_correlation(image, image, 0.1)
    np.testing.assert_allclose(itself, 1)
    assert frequencies[0] == pytest.approx(1 / 6.0)
    assert 4.5 < frequencies[-1] <= 5.0
    np.testing.assert_allclose(metrics.fourier_ring_correlation(3 * image + 7, image, 0.1)[1], 1, atol=1e-9)
    np.testing.assert_allclose(metrics.fourier_ring_correlation(-image, image, 0.1)[1], -1)
    noise = metrics.fourier_ring_correlation(rng.normal(size=(60, 72)), image, 0.1)[1]
    assert abs(noise[5:]).max() < 0.35
    assert metrics.resolved_frequency(frequencies, itself) == frequencies[-1]
    assert metrics.resolved_frequency(frequencies, np.zeros(len(frequencies))) == 0


def test_resolved_frequency_is_interpolated():
    assert metrics.resolved_frequency(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.75, 0.25])) == pytest.approx(2.5)


def test_power_beyond_counts_only_what_agrees():
    rng = np.random.default_rng(1)
    truth, noise = rng.normal(size=(2, 64, 64))
    same = metrics.power_beyond(0.5 * truth, truth, 0.1, 2.0, 4.0)
    assert same["correlation"] == pytest.approx(1)
    assert same["power"] == pytest.approx(0.25)
    assert metrics.power_beyond(noise, truth, 0.1, 2.0, 4.0)["power"] < 0.02
    assert metrics.power_beyond(-truth, truth, 0.1, 2.0, 4.0) == pytest.approx({"correlation": -1, "power": 0})
    flat = metrics.power_beyond(np.zeros_like(truth), truth, 0.1, 2.0, 4.0)
    assert flat == {"correlation": 0, "power": 0}


def test_pairs_are_resolved_down_to_the_width_of_the_atoms():
    distances = np.arange(0.4, 1.5, 0.1)
    places = np.array([[2 + 3 * n, 3 + end * d] for n, d in enumerate(distances) for end in (0, 1)])
    image = bumps(places, (360, 80), 0.1, width=0.2)
    found, parted = metrics.resolved_pairs(image, places, 0.1, 1.5)
    np.testing.assert_allclose(np.sort(found), distances)
    # two Gaussians of standard deviation s have a dip of a tenth where they are about 2.5 s apart
    assert metrics.closest_resolved(found, parted) == pytest.approx(0.5, abs=0.11)
    blurred = bumps(places, (360, 80), 0.1, width=0.4)
    assert metrics.closest_resolved(*metrics.resolved_pairs(blurred, places, 0.1, 1.5)) == pytest.approx(1.0, abs=0.11)
    assert np.isnan(metrics.closest_resolved(found, np.zeros(len(found), bool)))


def test_pairs_with_an_atom_between_do_not_count():
    places = np.array([[2.0, 2.0], [2.0, 2.6], [2.0, 3.2]])
    found, _ = metrics.resolved_pairs(bumps(places, (50, 60), 0.1), places, 0.1, 1.5)
    np.testing.assert_allclose(found, 0.6)


def test_false_peaks_are_those_without_an_atom():
    atoms = np.array([[3.0, 3.0], [5.0, 8.0], [7.0, 4.0], [30.0, 2.0]])
    dreamt = np.array([[2.0, 7.0], [8.0, 8.0]])
    image = bumps([*atoms[:2], *dreamt], (51, 51), 0.2)
    found = metrics.false_peaks(image, atoms, 0.5, 0.2)
    assert found["found"] == pytest.approx(2 / 3)
    open_area = 100 - 3 * np.pi * metrics.REACH**2
    assert found["false"] == pytest.approx(100 * 2 / open_area, rel=0.01)
    assert metrics.false_peaks(image, atoms, 1.5, 0.2) == pytest.approx({"false": 0, "found": 0})
    everywhere = metrics.false_peaks(image, np.empty((0, 2)), 0.5, 0.2)
    assert everywhere["false"] == pytest.approx(4)
    assert np.isnan(everywhere["found"])


def test_the_profile_of_a_wedge_goes_beyond_pi():
    slope = np.clip(np.linspace(-2, 8, 200), 0, None)
    lattice = np.sin(np.arange(200) * 2 * np.pi / 8)
    profile = metrics.smooth_profile(np.tile(slope * (1 + lattice), (10, 1)), 10)
    np.testing.assert_allclose(profile[20:-20], slope[20:-20], atol=0.25)
    assert profile.max() > 6


def test_phases_of_atoms():
    image = bumps([[4.0, 4.0], [4.0, 12.0]], (81, 161), 0.1, width=0.4) + 5
    image[:, 80:] = 5 + 2 * (image[:, 80:] - 5)
    background = np.zeros(image.shape, bool)
    background[:10] = True
    phases = metrics.atom_phases(image, np.array([[40, 40], [40, 120]]), background)
    np.testing.assert_allclose(phases["peak"], [1, 2], atol=1e-6)
    assert (phases["peak"] > phases["3x3"]).all()
    assert (phases["3x3"] > phases["5x5"]).all()
    assert metrics.rank_and_slope(np.array([1.0, 2, 4]), np.array([2.0, 4, 8])) == pytest.approx((1, 0.5))


def test_columns_are_found_through_their_atoms():
    places = np.array([[1.0, 1.0, 0], [3.0, 3.0, 1], [1.1, 1.0, 5], [1.2, 1.1, 9]])
    assert [group.tolist() for group in metrics.columns_of(places)] == [[0, 2, 3], [1]]


def test_scores_without_a_truth():
    found = metrics.scores(np.ones((3, 4)), np.zeros((3, 4)))
    assert found["mean"] == 1
    assert np.isnan(found["xc"])


def compositions(case):
    return frozenset(scans.specimen(case, (12, 12)).numbers.tolist())


def test_no_reported_crystal_is_trained_on_and_validation_has_others():
    reported = set()
    for case in cases.CASES:
        if "z-contrast" not in case.parts and case.name != "vacuum":
            assert compositions(case) in RESERVED_COMPOSITIONS, case.name
            reported.add(compositions(case))
    for case in cases.VALIDATION + cases.WEAK_VALIDATION:
        assert compositions(case) not in reported, case.name
    names = [case.name for case in cases.CASES + cases.VALIDATION + cases.WEAK_VALIDATION]
    assert len(set(names)) == len(names)


def test_every_part_has_cases_and_every_case_a_part():
    for part in cases.PARTS:
        assert cases.selected((part,))
    assert cases.selected(cases.PARTS) == cases.CASES
    assert all(set(case.parts) <= set(cases.PARTS) for case in cases.CASES)


@pytest.mark.parametrize(
    "case",
    [case for case in cases.CASES + cases.VALIDATION + cases.WEAK_VALIDATION if case.periodic],
    ids=lambda c: c.name,
)
def test_periods_have_no_seam(case):
    atoms = case.build()
    atoms.pbc = [True, True, False]
    distances = atoms.get_all_distances(mic=True) if len(atoms) < 600 else np.full((1, 1), np.inf)
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > 1.3
    assert np.ptp(np.diag(atoms.cell)[:2]) < 1e-6
    assert atoms.positions[:, 2].min() >= 0
    assert atoms.positions[:, 2].max() < atoms.cell[2, 2]


def test_margin_shrinks_with_large_steps():
    case = cases.CASES[0]
    assert [replace(case, step=step).margin for step in (0.1, 0.4, 0.8, 1.6)] == [5, 5, 3, 2]
    assert case.scaled(28) == (28, 28)
    assert case.scaled(1000) == case.shape


def test_one_case_from_end_to_end(tmp_path, monkeypatch, capsys):
    from training.benchmark import __main__, methods

    names = ("graphene with vacancies", "vacuum")
    few = tuple(replace(case, shape=(18, 18)) for case in cases.CASES if case.name in names)
    monkeypatch.setattr(__main__, "selected", lambda parts: few)
    monkeypatch.setattr(methods, "ITERATIONS", 2)
    arguments = [str(tmp_path), "--only", "dreaming", "--jobs", "1", "--untold"]
    main(arguments)
    report = (tmp_path / "benchmark.md").read_text()
    assert report in capsys.readouterr().out
    for needed in ("SHA-256", "--only dreaming", "Not dreaming", "Distance to the oracle"):
        assert needed in report
    assert str(tmp_path) not in report
    assert 0 < (tmp_path / "dreaming.png").stat().st_size < 300_000

    def table():
        with open(tmp_path / "benchmark.csv", newline="") as file:
            return {(row["specimen"], row["dose"], row["method"]): row for row in csv.DictReader(file)}

    rows = table()
    for method in ("AIRPI", "AIRPI, aberrations not given", "SSB", "DPC", "ptychography", "oracle, mid-plane"):
        assert -1 <= float(rows[names[0], "inf", method]["xc"]) <= 1
    assert float(rows[names[0], "inf", "oracle, mid-plane"]["xc"]) > 0.98
    assert rows["vacuum", "1000.0", "SSB"]["xc"] == ""
    assert float(rows["vacuum", "1000.0", "AIRPI"]["false peaks in 100 A^2"]) >= 0

    # nothing is simulated or reconstructed by the slow methods twice
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.np[yz]")}
    assert len(before) == 2 + 2 * 2 * 3
    monkeypatch.setattr(scans, "simulate_reference", None)
    main([*arguments, "--seed", "2", "--without-ptychography"])
    assert "Poisson counts, seed 2" in " ".join((tmp_path / "benchmark.md").read_text().split())
    for method in ("AIRPI", "SSB"):
        assert table()[names[0], "1000.0", method]["xc"] != rows[names[0], "1000.0", method]["xc"]
    monkeypatch.setattr(methods, "ssb_phase", None)
    main(arguments)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    for method in ("AIRPI", "SSB"):
        of_noisy = names[0], "1000.0", method
        assert float(table()[of_noisy]["xc"]) == pytest.approx(float(rows[of_noisy]["xc"]), abs=1e-6)


def test_processes_keep_the_order():
    assert list(scans.in_processes(abs, [-3, 1, -2], 2)) == [3, 1, 2]


def test_unknown_part(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--only", "dose,colour"])
    assert "colour" in capsys.readouterr().err
