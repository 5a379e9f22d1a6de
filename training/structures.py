"""Random specimens for training: crystals, layers, nanoparticles, wedges, amorphous and disordered regions, atoms.

A specimen is a box of atoms, side x side laterally and `thickness` along the beam. Crystals are the AFLOW
prototypes that pymatgen ships and ASE's structure types, with elements substituted at random and the lattice scaled
by covalent radii, or those of a folder of CIF files as they are; the zone axis is one of the seven of the paper
(Table 1), the rotation about the beam random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.io import read
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray

ZONE_AXES = ((1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 1, 1))
NOBLE_GASES = {2, 10, 18, 36, 54, 86}
LIGHT_ELEMENTS = tuple(
    atomic_numbers[s] for s in ("Li", "Be", "B", "C", "N", "O", "F", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ti")
)
SECOND_PERIOD = range(3, 10)
#: Kinds of layers and their bonds over the sum of the covalent radii, which are those of single bonds. Double bonds of
#: flat honeycombs (graphene 0.93, BN 0.93, BeO 0.96, AlN 0.94; silicene 1.01) and bonds in MX2 (WS2 0.91, MoS2 0.93)
#: are shorter, ionic ones of square planes longer (LiF 1.09).
BONDS = {"honeycomb": (0.88, 1.08), "1H": (0.86, 1.06), "1T": (0.86, 1.06), "square": (0.92, 1.15)}
#: Specimens with exactly these elements are kept for tests, the demo and benchmarks: never trained on.
RESERVED_COMPOSITIONS = tuple(
    frozenset(atomic_numbers[s] for s in elements.split())
    for elements in ("C", "Mo S", "W S", "Sr Ti O", "Au", "Mg O", "Ga N", "La B", "Ga As")
)
MAXIMUM_ATOMS = 20000


@dataclass(frozen=True)
class Specimen:
    """Atoms in a box of side x side x thickness [A], the beam along z, and the kind that they were drawn as."""

    atoms: Atoms
    kind: str

    @property
    def thickness(self) -> float:
        """Height of the box along the beam [A]."""
        return float(self.atoms.cell[2, 2])


@cache
def crystal_prototypes() -> tuple[tuple[NDArray, NDArray, NDArray], ...]:
    """Cells (3, 3) [A], fractional positions (n, 3) and species (n,) of the AFLOW prototypes of at most 24 atoms."""
    from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

    prototypes = []
    for entry in AFLOW_PROTOTYPE_LIBRARY:
        structure = entry["snl"].structure
        if len(structure) <= 24 and structure.is_ordered:
            names = sorted({site.specie.symbol for site in structure})
            species = np.array([names.index(site.specie.symbol) for site in structure])
            prototypes.append((np.array(structure.lattice.matrix), np.array(structure.frac_coords), species))
    return tuple(prototypes)


def random_elements(rng: np.random.Generator, count: int, light: bool) -> NDArray[np.int64]:
    """Atomic numbers of `count` different elements: light ones only, or any up to uranium but the noble gases."""
    allowed = LIGHT_ELEMENTS if light else [z for z in range(3, 93) if z not in NOBLE_GASES]
    return rng.choice(allowed, size=count, replace=False)


def scaled_by_radii(atoms: Atoms, ratio: float) -> Atoms:
    """Scale the cell so that the closest pair is `ratio` times the sum of its covalent radii apart."""
    first, second, distance = neighbor_list("ijd", atoms, 4.5)
    if len(distance) == 0:
        first, second, distance = neighbor_list("ijd", atoms, 9.0)
    radii = covalent_radii[atoms.numbers]
    factor = ratio / (distance / (radii[first] + radii[second])).min()
    scaled = atoms.copy()
    scaled.set_cell(atoms.cell * factor, scale_atoms=True)
    return scaled


def random_crystal(rng: np.random.Generator, light: bool) -> Atoms:
    """One AFLOW prototype with substituted elements, scaled by radii."""
    prototypes = crystal_prototypes()
    cell, positions, species = prototypes[rng.integers(len(prototypes))]
    elements = random_elements(rng, species.max() + 1, light)
    atoms = Atoms(numbers=elements[species], scaled_positions=positions, cell=cell, pbc=True)
    return scaled_by_radii(atoms, rng.uniform(0.92, 1.15))


def rotation_to_z(direction: NDArray, angle: float) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) that turns `direction` to z and then rotates by `angle` [rad] about z."""
    unit = direction / np.linalg.norm(direction)
    helper = np.eye(3)[np.argmin(abs(unit))]
    x = np.cross(helper, unit)
    x /= np.linalg.norm(x)
    frame = np.stack([x, np.cross(unit, x), unit])
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ frame


def cut_slab(crystal: Atoms, rotation: NDArray, thickness: float, side: float, offset: NDArray) -> Atoms | None:
    """Fill the box side x side x thickness [A] with the rotated crystal, None if that takes too many atoms."""
    cell = crystal.cell[:] @ rotation.T
    positions = crystal.positions @ rotation.T + offset @ cell
    corners = np.array([[x, y, z] for x in (0, side) for y in (0, side) for z in (0, thickness)])
    corners = corners @ np.linalg.inv(cell)
    low = np.floor(corners.min(0)).astype(int) - 2
    high = np.ceil(corners.max(0)).astype(int) + 2
    if np.prod(high - low, dtype=float) * len(crystal) > 25 * MAXIMUM_ATOMS:
        return None
    grid = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), -1).reshape(-1, 1, 3) @ cell
    positions = (grid + positions).reshape(-1, 3)
    numbers = np.tile(crystal.numbers, len(grid))
    inside = ((positions >= 0) & (positions < [side, side, thickness])).all(1)
    return Atoms(numbers=numbers[inside], positions=positions[inside], cell=[side, side, thickness], pbc=True)


#: ASE's structure types of `ase.build.bulk` and the number of their elements.
STRUCTURE_TYPES = dict.fromkeys(("sc", "fcc", "bcc", "diamond", "hcp"), 1) | dict.fromkeys(
    ("zincblende", "rocksalt", "cesiumchloride"), 2
)


def random_structure_type(rng: np.random.Generator, light: bool) -> Atoms:
    """One of ASE's structure types with random elements, scaled by radii."""
    kind = str(rng.choice(list(STRUCTURE_TYPES)))
    formula = "".join(chemical_symbols[z] for z in random_elements(rng, STRUCTURE_TYPES[kind], light))
    ratio = 1.633 if kind == "hcp" else None
    return scaled_by_radii(bulk(formula, kind, a=4.0, covera=ratio), rng.uniform(0.92, 1.15))


@cache
def cif_files(folder: str) -> tuple[Path, ...]:
    """The CIF files below a folder, sorted.

    Raises
    ------
    ValueError
        If there are none.
    """
    files = tuple(sorted(Path(folder).rglob("*.cif")))
    if not files:
        raise ValueError(f"cif_folder is {folder!r}, which holds no .cif file; give the folder of a download.")
    return files


def cif_crystal(rng: np.random.Generator, folder: str) -> Atoms | None:
    """One of the folder's structures as it is; None if it can't be read or has atoms closer than half their radii."""
    path = cif_files(folder)[rng.integers(len(cif_files(folder)))]
    try:
        (crystal,) = read(path, index=slice(1), format="cif")
    except Exception:  # ASE raises a class of its own for every kind of broken file; the caller counts
        return None
    if not len(crystal) or crystal.cell.volume < 1e-3 or (crystal.numbers < 1).any():
        return None
    first, second, distance = neighbor_list("ijd", crystal, 3.0)
    radii = covalent_radii[crystal.numbers]
    return None if (distance < 0.5 * (radii[first] + radii[second])).any() else crystal


def configured_crystal(rng: np.random.Generator, light: bool, config: dict) -> Atoms | None:
    """A crystal of the sources that the configuration names, None if it can't be used.

    `cif_folder`: all from there, with its elements; else `ase_share` of ASE's structure types, the rest AFLOW's.
    """
    if "cif_folder" in config:
        return cif_crystal(rng, config["cif_folder"])
    if "ase_share" in config and rng.uniform() < config["ase_share"]:
        return random_structure_type(rng, light)
    return random_crystal(rng, light)


def crystal_slab(rng: np.random.Generator, side: float, thickness: float, light: bool, config: dict) -> Atoms | None:
    """A random crystal along one of the paper's zone axes, rotated at random."""
    crystal = configured_crystal(rng, light, config)
    if crystal is None:
        return None
    axis = np.array(ZONE_AXES[rng.integers(len(ZONE_AXES))]) @ crystal.cell[:]
    return cut_slab(crystal, rotation_to_z(axis, rng.uniform(0, 2 * np.pi)), thickness, side, rng.uniform(size=3))


def nanoparticle(rng: np.random.Generator, side: float, thickness: float, light: bool, config: dict) -> Atoms | None:
    """A crystal within an ellipsoid, half the time on a thin amorphous film of another material.

    The ellipsoid is `thickness` high and 0.3 to 1.2 of `side` wide, its centre within a third of `side` of the middle.
    """
    film_height = min(float(rng.choice([0.0, rng.uniform(3, 8)])), thickness / 2)
    height = thickness - film_height
    slab = crystal_slab(rng, side, height, light, config)
    if slab is None:
        return None
    middle = np.array([*(side / 2 + rng.uniform(-1, 1, 2) * side / 3), height / 2])
    radii = np.array([*(rng.uniform(0.3, 1.2, 2) * side / 2), height / 2])
    atoms = slab[(((slab.positions - middle) / radii) ** 2).sum(1) < 1]
    atoms.set_cell([side, side, thickness])
    if film_height:
        film = amorphous(rng, side, film_height, True)
        film.positions[:, 2] += height
        atoms.extend(film)
    return atoms


def wedge(rng: np.random.Generator, side: float, thickness: float, light: bool, config: dict) -> Atoms | None:
    """A crystal whose exit face is tilted: from nothing, or a part of `thickness`, up to `thickness` across the box."""
    slab = crystal_slab(rng, side, thickness, light, config)
    if slab is None:
        return None
    angle, start = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6)
    across = (slab.positions[:, :2] / side - 0.5) @ [np.cos(angle), np.sin(angle)]
    return slab[slab.positions[:, 2] < thickness * np.clip(start + (1 - start) * (across + 0.5), 0, 1)]


def disordered(rng: np.random.Generator, side: float, thickness: float, light: bool, config: dict) -> Atoms | None:
    """A crystal with displacements of 0.3 to 1.5 A (root mean square), half the time in one region only."""
    slab = crystal_slab(rng, side, thickness, light, config)
    if slab is None:
        return None
    angle = rng.uniform(0, 2 * np.pi)
    moved = np.ones(len(slab), bool)
    if rng.uniform() < 0.5:
        moved = (slab.positions[:, :2] - side / 2) @ [np.cos(angle), np.sin(angle)] < rng.uniform(-3, 3)
    slab.positions += moved[:, None] * rng.normal(0, rng.uniform(0.3, 1.5), slab.positions.shape)
    slab.positions[:, 2] = np.clip(slab.positions[:, 2], 0, thickness - 1e-3)
    return slab


def random_layer(rng: np.random.Generator, light: bool, second_period: bool) -> tuple[Atoms, float]:
    """One layer of a honeycomb, MX2 (1H or 1T) or square-planar kind in a cell with its thickness [A].

    Those of the second period (Li to F), most of them honeycombs, have the shortest bonds and weakest phases there are.
    """
    kinds = list(BONDS)
    if second_period:
        kind, (metal, ligand) = rng.choice(kinds, p=[0.7, 0.1, 0.1, 0.1]), rng.choice(SECOND_PERIOD, 2, replace=False)
    else:
        kind, (metal, ligand) = rng.choice(kinds), random_elements(rng, 2, light)
    if kind == "honeycomb" and rng.uniform() < 0.4:
        ligand = metal
    if kind in ("1H", "1T") and rng.uniform() < 0.6:
        ligand = rng.choice([8, 16, 34, 52])
    bond = (covalent_radii[metal] + covalent_radii[ligand]) * rng.uniform(*BONDS[kind])
    hexagonal = np.array([[1.0, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, 1]])
    if kind == "square":
        cell, buckling = np.diag([bond * 2**0.5, bond * 2**0.5, 1.0]), 0.0
        sites = [(metal, 0, 0, 0.0), (ligand, 0.5, 0.5, buckling)]
    elif kind == "honeycomb":
        buckling = rng.choice([0.0, rng.uniform(0, 0.5)])
        cell = hexagonal * np.array([[bond * 3**0.5], [bond * 3**0.5], [1.0]])
        sites = [(metal, 0, 0, 0.0), (ligand, 1 / 3, 2 / 3, buckling)]
    else:
        a = bond * rng.uniform(1.25, 1.4)
        half = np.sqrt(max(bond**2 - a**2 / 3, 0.4))
        cell = hexagonal * np.array([[a], [a], [1.0]])
        other = (1 / 3, 2 / 3) if kind == "1H" else (2 / 3, 1 / 3)
        sites = [(metal, 0, 0, half), (ligand, 1 / 3, 2 / 3, 2 * half), (ligand, *other, 0.0)]
    height = max(site[3] for site in sites)
    cell[2, 2] = height + 1.0
    scaled = [(u, v, z / cell[2, 2]) for _, u, v, z in sites]
    return Atoms(numbers=[site[0] for site in sites], scaled_positions=scaled, cell=cell, pbc=True), height


def layered(rng: np.random.Generator, side: float, light: bool, second_period: bool) -> Atoms | None:
    """One to three layers of the same kind, stacked with any twist, as in twisted bilayers."""
    layer, height = random_layer(rng, light, second_period)
    count = rng.choice([1, 2, 3], p=[0.45, 0.45, 0.1])
    spacing = height + rng.uniform(2.8, 3.8)
    angle = rng.uniform(0, 2 * np.pi)
    stack = Atoms(cell=[side, side, (count - 1) * spacing + height + 1.0], pbc=True)
    for n in range(count):
        offset = np.append(rng.uniform(size=2), 0.0)
        rotation = rotation_to_z(np.array([0, 0, 1.0]), angle)
        sheet = cut_slab(layer, rotation, height + 0.9, side, offset)
        if sheet is None:
            return None
        sheet.positions[:, 2] += n * spacing + 0.5
        stack.extend(sheet)
        angle += rng.choice([0.0, rng.uniform(0, np.pi / 3)])
    return stack


def amorphous(rng: np.random.Generator, side: float, thickness: float, light: bool) -> Atoms:
    """Atoms at random places, none closer than 0.85 of the sum of the radii, of one or two elements."""
    elements = random_elements(rng, int(rng.integers(1, 3)), light)
    radius = covalent_radii[elements].mean()
    tries = int(rng.uniform(0.3, 1.2) * side**2 * thickness / (4.5 * radius**3))
    tries = min(tries, 3000)
    atoms = Atoms(
        numbers=rng.choice(elements, size=tries),
        positions=rng.uniform(size=(tries, 3)) * [side, side, thickness],
        cell=[side, side, thickness],
        pbc=[True, True, False],
    )
    first, second = neighbor_list("ij", atoms, 2 * 0.85 * radius)
    keep = np.ones(tries, bool)
    for i, j in zip(first, second, strict=True):
        if i < j and keep[i]:
            keep[j] = False
    return atoms[keep]


def single_atoms(rng: np.random.Generator, side: float, light: bool) -> Atoms:
    """A few atoms alone in vacuum, on average one in 4 to 60 A^2."""
    count = max(1, rng.poisson(side**2 / rng.uniform(4, 60)))
    elements = random_elements(rng, int(rng.integers(1, 5)), light)
    positions = rng.uniform(size=(count, 3)) * [side, side, 1.0] + [0, 0, 0.5]
    return Atoms(numbers=rng.choice(elements, count), positions=positions, cell=[side, side, 2.0], pbc=True)


def with_adatoms(rng: np.random.Generator, atoms: Atoms, light: bool) -> Atoms:
    """One atom of one element in 6 to 60 A^2 on the entrance or the exit face; the box grows by up to 3 A."""
    side, low, high = atoms.cell[0, 0], atoms.positions[:, 2].min(), atoms.positions[:, 2].max()
    count = max(1, rng.poisson(side**2 / rng.uniform(6, 60)))
    distance, above = rng.uniform(1.5, 2.5), rng.uniform() < 0.5
    positions = rng.uniform(size=(count, 3)) * [side, side, 0] + [0, 0, low - distance if above else high + distance]
    grown = atoms.copy()
    grown.extend(Atoms(numbers=np.full(count, random_elements(rng, 1, light)[0]), positions=positions))
    shift = max(0.0, distance - low + 0.2) if above else 0.0
    grown.positions[:, 2] += shift
    height = max(atoms.cell[2, 2] + shift, grown.positions[:, 2].max() + 0.2)
    grown.set_cell([side, side, height])
    return grown


def damaged(rng: np.random.Generator, atoms: Atoms, light: bool, config: dict) -> Atoms:
    """With the configured probabilities: vacuum beyond a straight edge, vacancies, random displacements,
    substituted atoms, adatoms."""
    side = atoms.cell[0, 0]
    if rng.uniform() < config["edge"]:
        angle = rng.uniform(0, 2 * np.pi)
        centred = atoms.positions[:, :2] - side / 2
        atoms = atoms[centred @ [np.cos(angle), np.sin(angle)] < rng.uniform(-3, 3)]
    if rng.uniform() < config["vacancies"]:
        atoms = atoms[rng.uniform(size=len(atoms)) > rng.uniform(0.01, 0.9) ** 2]
    if rng.uniform() < config["disorder"]:
        atoms = atoms.copy()
        atoms.positions += rng.normal(0, rng.uniform(0, 0.8), atoms.positions.shape)
        atoms.positions[:, 2] = np.clip(atoms.positions[:, 2], 0, atoms.cell[2, 2] - 1e-3)
    if "substitutions" in config and rng.uniform() < config["substitutions"]:
        atoms = atoms.copy()
        replaced = rng.uniform(size=len(atoms)) < rng.uniform(0.01, 0.3)
        atoms.numbers[replaced] = random_elements(rng, 1, light)[0]
    if "adatoms" in config and len(atoms) and rng.uniform() < config["adatoms"]:
        atoms = with_adatoms(rng, atoms, light)
    return atoms


LAYERS = ("layers", "second_period_layers")
CRYSTALLINE = {"crystal": crystal_slab, "nanoparticle": nanoparticle, "wedge": wedge, "disordered": disordered}


def random_specimen(rng: np.random.Generator, side: float, config: dict) -> Specimen | None:
    """Draw one specimen, or None where the draw is empty, too large or reserved (the caller counts and draws again).

    Parameters
    ----------
    rng : numpy.random.Generator
    side : float
        Lateral side of the box [A].
    config : dict
        Section `specimens` of the data set's configuration: shares of the kinds and of the damages.
    """
    shares = config["shares"]
    kind = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    light = bool(rng.uniform() < config["light_share"])
    low, high = config["thin_thickness"] if rng.uniform() < config["thin_share"] else config["thickness"]
    thickness = float(rng.uniform(low, high))
    if kind in CRYSTALLINE:
        atoms = CRYSTALLINE[kind](rng, side, thickness, light, config)
    elif kind in LAYERS:
        atoms = layered(rng, side, light, second_period=kind == "second_period_layers")
    elif kind == "amorphous":
        atoms = amorphous(rng, side, thickness, light)
    elif kind == "single_atoms":
        atoms = single_atoms(rng, side, light)
    else:
        known = [*CRYSTALLINE, *LAYERS, "amorphous", "single_atoms"]
        raise ValueError(f"shares has the kind {kind!r}; known are {', '.join(known)}.")
    if atoms is None or len(atoms) > MAXIMUM_ATOMS:
        return None
    if kind == "crystal" or kind in LAYERS:
        atoms = damaged(rng, atoms, light, config)
    if len(atoms) == 0 or frozenset(atoms.numbers.tolist()) in RESERVED_COMPOSITIONS:
        return None
    return Specimen(atoms, kind)
