"""Kinds of specimen, sources of crystals, data sets on the detector's grid and their manifest."""

import hashlib
import json

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from ase.symbols import symbols2numbers

from training import dataset, structures
from training.config import read_config
from training.structures import random_specimen

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def specimens():
    return read_config("training/configs/paper_data.toml")["specimens"]


def drawn(specimens, count, seed=0, side=20.0, **changes):
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        specimen = random_specimen(rng, side, specimens | changes)
        if specimen is not None:
            found.append(specimen)
    return found


def test_every_kind_is_drawn_with_its_share_and_fits_its_box(specimens):
    found = drawn(specimens, 300)
    kinds = [specimen.kind for specimen in found]
    assert set(kinds) == set(specimens["shares"])
    for kind, share in specimens["shares"].items():
        # some draws are refused, of some kinds more than of others
        assert kinds.count(kind) / 300 == pytest.approx(share, abs=0.1)
    for specimen in found:
        z = specimen.atoms.positions[:, 2]
        assert z.min() >= 0
        assert z.max() <= specimen.thickness


def test_an_unknown_kind_is_refused(specimens):
    with pytest.raises(ValueError, match="shares has the kind 'quasicrystal'"):
        random_specimen(np.random.default_rng(0), 20.0, specimens | {"shares": {"quasicrystal": 1.0}})


def test_layers_of_the_second_period_are_honeycombs_mostly_and_no_graphene(specimens):
    undamaged = {"vacancies": 0.0, "substitutions": 0.0, "adatoms": 0.0, "disorder": 0.0}
    found = drawn(specimens, 60, shares={"second_period_layers": 1.0}, **undamaged)
    elements = [set(specimen.atoms.numbers.tolist()) for specimen in found]
    assert {6} not in elements  # graphene is reserved
    of_ligands = [numbers - {8, 16, 34, 52} for numbers in elements]  # of MX2 the ligand may be another
    assert set().union(*of_ligands) <= set(range(3, 10))
    assert len(set().union(*elements) & set(range(3, 10))) == 7
    honeycombs = 0
    for specimen in found:
        distances = specimen.atoms.get_all_distances(mic=True)
        neighbours = np.sort(distances, axis=1)[:, 1:5]
        honeycombs += np.median(neighbours[:, 3] / neighbours[:, 0]) > 1.4  # three neighbours, the fourth much further
    assert 24 <= honeycombs <= 54


def test_layers_are_drawn_with_the_bonds_of_real_ones():
    """Bonds [A] of known materials lie within the range of their kind, and what is drawn reaches both of its ends."""
    real = {
        "honeycomb": {"CC": 1.42, "BN": 1.446, "BeO": 1.55, "AlN": 1.80, "SiSi": 2.28},
        "1H": {"MoS": 2.41, "WSe": 2.53},
        "1T": {"TiS": 2.43, "PtSe": 2.53},
        "square": {"LiF": 2.01, "NaCl": 2.82},
    }
    rng = np.random.default_rng(3)
    for kind, materials in real.items():
        low, high = structures.BONDS[kind]
        for elements, bond in materials.items():
            first, second = symbols2numbers(elements)
            radii = covalent_radii[first] + covalent_radii[second]
            assert low < bond / radii < high, (kind, elements)
    shares = []
    for _ in range(300):
        layer, _ = structures.random_layer(rng, light=True, second_period=True)
        layer.pbc = (True, True, False)
        if len(layer) == 2 and layer.cell.angles()[2] == pytest.approx(120) and np.ptp(layer.positions[:, 2]) < 0.01:
            radii = covalent_radii[layer.numbers].sum()
            shares.append(neighbor_list("d", layer, 1.2 * radii).min() / radii)
    assert len(shares) > 50
    shortest, longest = structures.BONDS["honeycomb"]
    assert shortest <= min(shares) < 0.9 < 1.05 < max(shares) <= longest


def test_nanoparticles_leave_vacuum_and_wedges_have_a_slope(specimens):
    particles = drawn(specimens, 12, shares={"nanoparticle": 1.0})
    # less than a full slab: somewhere no atom within 2 A along the beam but for a film
    filled = []
    for specimen in particles:
        upper = specimen.atoms[specimen.atoms.positions[:, 2] < 0.4 * specimen.thickness]
        squares = np.floor(upper.positions[:, :2] / 4).astype(int)
        filled.append(len(np.unique(squares, axis=0)) / 25)
    assert min(filled) < 0.5
    slopes = []
    for specimen in drawn(specimens, 12, shares={"wedge": 1.0}, thickness=[20.0, 30.0], thin_share=0.0):
        x, y, z = specimen.atoms.positions.T
        fit = np.linalg.lstsq(np.c_[x, y, np.ones_like(x)], z, rcond=None)[0]
        slopes.append(np.hypot(*fit[:2]))
    assert np.median(slopes) > 0.1


def test_damages_do_what_they_say(specimens):
    base = structures.Atoms("C20", positions=np.random.default_rng(0).uniform(1, 9, (20, 3)), cell=[10, 10, 10])
    none = dict.fromkeys(("edge", "vacancies", "disorder", "substitutions", "adatoms"), 0.0)
    rng = np.random.default_rng(1)
    assert structures.damaged(rng, base, False, none) == base
    replaced = structures.damaged(np.random.default_rng(2), base, False, none | {"substitutions": 1.0})
    assert 0 < (replaced.numbers != base.numbers).sum() < 20
    for seed in range(8):
        grown = structures.damaged(np.random.default_rng(seed), base, False, none | {"adatoms": 1.0})
        added = grown[20:]
        assert len(added) > 0
        height = grown.positions[:20, 2]
        outside = (added.positions[:, 2] < height.min() - 1) | (added.positions[:, 2] > height.max() + 1)
        assert outside.all()
        assert grown.positions[:, 2].min() >= 0
        assert grown.positions[:, 2].max() <= grown.cell[2, 2]


def test_crystals_come_from_a_folder_of_cif_files(specimens, tmp_path):
    ase.io.write(tmp_path / "silver.cif", bulk("Ag", cubic=True))
    close = bulk("Fe", cubic=True)
    close.set_cell(close.cell * 0.3, scale_atoms=True)
    ase.io.write(tmp_path / "unphysical.cif", close)
    (tmp_path / "broken.cif").write_text("data_nothing\n")
    rng = np.random.default_rng(0)
    found = [structures.cif_crystal(rng, str(tmp_path)) for _ in range(30)]
    formulas = {crystal and str(crystal.symbols) for crystal in found}
    assert formulas == {None, "Ag4"}
    config = specimens | {"cif_folder": str(tmp_path), "shares": {"crystal": 1.0}, "substitutions": 0.0, "adatoms": 0.0}
    for specimen in drawn(config, 3):
        assert set(specimen.atoms.numbers) == {47}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"which holds no \.cif file"):
        structures.cif_crystal(rng, str(tmp_path / "empty"))


def test_structure_types_of_ase_have_physical_distances():
    rng = np.random.default_rng(0)
    for light in (True, False):
        for _ in range(20):
            crystal = structures.random_structure_type(rng, light)
            first, second, distance = structures.neighbor_list("ijd", crystal, 6.0)
            radii = structures.covalent_radii[crystal.numbers]
            assert 0.9 < (distance / (radii[first] + radii[second])).min() < 1.2


def test_a_shard_on_the_detectors_grid_and_its_manifest(tmp_path):
    config = read_config("training/configs/small_paper_data.toml")
    config["scans_per_shard"] = 2
    config["simulation"]["phonon_configurations"] = 1
    config["specimens"]["shares"] = {"single_atoms": 1.0}
    config["scan"]["bright_field_ratio_range"] = [0.35, 0.45]
    dataset.generate(config, tmp_path, shards=2, workers=1)
    shard = dataset.load_shards(tmp_path, [0, 1])
    assert shard["amplitudes"].shape == (4, 5, 5, 64, 64)
    assert shard["exit_wave"].shape == shard["phase"].shape == (4, 3, 3, 64, 64)
    names = dataset.parameter_names(config)
    assert shard["parameters"].shape == (4, len(names))
    radius = shard["parameters"][:, names.index("bright_field_radius")]
    assert ((radius > 11) & (radius < 15)).all()
    total = (shard["amplitudes"].astype(float) ** 2).sum((3, 4))
    np.testing.assert_allclose(total, 1, atol=0.06)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == 2 * 2 * 9
    for number in range(2):
        path = dataset.shard_path(tmp_path, number)
        assert manifest["shards"][path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    # a resumed run completes it
    dataset.shard_path(tmp_path, 1).unlink()
    (tmp_path / "manifest.json").unlink()
    dataset.generate(config, tmp_path, shards=2, workers=1)
    assert json.loads((tmp_path / "manifest.json").read_text())["samples"] == manifest["samples"]
    with pytest.raises(ValueError, match="the aperture grid is simulated on the 'cpu' alone"):
        dataset.make_shard(read_config("training/configs/first_data.toml"), 0, "gpu")
