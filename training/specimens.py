"""Specimens for tests, benchmarks and the choice of models; `training.benchmark.cases` says which are reported.

Those that take a `side` [A] fill a box of that side around the scan; the others are one period of a crystal, and a scan
over them may be longer than their cell.
"""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, graphene, make_supercell, mx2
from ase.geometry import get_distances
from ase.spacegroup import crystal

from training.structures import cut_slab, rotation_to_z

Z = np.array([0.0, 0.0, 1.0])


def _sheet(layer: Atoms, angle: float, side: float, height: float) -> Atoms:
    """A layer of `height` [A] that fills side x side [A], rotated by `angle` [degrees]."""
    cell = layer.cell[:].copy()
    cell[2] = [0, 0, height + 1]
    flat = Atoms(layer.numbers, layer.positions - [0, 0, layer.positions[:, 2].min()], cell=cell, pbc=True)
    sheet = cut_slab(flat, rotation_to_z(Z, np.deg2rad(angle)), height + 0.5, side, np.zeros(3))
    if sheet is None:
        raise ValueError(f"a sheet of {side} A takes too many atoms")
    return sheet


def _bilayer(layer: Atoms, angles: tuple[float, float], side: float, height: float, spacing: float) -> Atoms:
    stack = Atoms(cell=[side, side, spacing + height + 1.0], pbc=True)
    for n, angle in enumerate(angles):
        sheet = _sheet(layer, angle, side, height)
        sheet.positions[:, 2] += 0.5 + n * spacing
        stack.extend(sheet)
    return stack


def twisted_graphene(side: float) -> Atoms:
    """Bilayer of graphene, twisted by 12 degrees."""
    return _bilayer(graphene(vacuum=1.0), (4.0, 16.0), side, 0.2, 3.35)


def twisted_mos2(side: float) -> Atoms:
    """Bilayer of MoS2, twisted by 9 degrees."""
    return _bilayer(mx2("MoS2", a=3.16, thickness=3.17), (10.0, 19.0), side, 3.2, 6.15)


def ws2_with_vacancies(side: float) -> Atoms:
    """Monolayer of WS2, 6 % of its atoms missing (seed 5)."""
    sheet = _sheet(mx2("WS2", a=3.18, thickness=3.14), 23.0, side, 3.2)
    sheet.positions[:, 2] += 0.5
    sheet.set_cell([side, side, 4.2])
    return sheet[np.random.default_rng(5).uniform(size=len(sheet)) > 0.06]


def perovskite(elements: str, a: float) -> Atoms:
    """Unit cell of a cubic perovskite such as SrTiO3, of lattice parameter `a` [A]; `elements` like "Sr Ti O"."""
    sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
    return crystal(elements.split(), sites, spacegroup=221, cellpar=[a] * 3 + [90] * 3)


def strontium_titanate(side: float) -> Atoms:
    """SrTiO3 [001], two unit cells thick, rotated by 14 degrees."""
    return _slab(perovskite("Sr Ti O", 3.905), (0, 0, 1), 14.0, 7.81, side)


def gallium_arsenide(side: float) -> Atoms:
    """GaAs [110], 12 A thick, rotated by 33 degrees."""
    cell = crystal(("Ga", "As"), [(0, 0, 0), (0.25, 0.25, 0.25)], spacegroup=216, cellpar=[5.653] * 3 + [90] * 3)
    return _slab(cell, (1, 1, 0), 33.0, 12.0, side)


def _slab(cell: Atoms, axis: tuple[int, int, int], angle: float, thickness: float, side: float) -> Atoms:
    rotation = rotation_to_z(np.array(axis) @ cell.cell[:], np.deg2rad(angle))
    slab = cut_slab(cell, rotation, thickness, side, np.array([0.1, 0.2, 0.05]))
    if slab is None:
        raise ValueError(f"a slab of {side} A takes too many atoms")
    return slab


def _honeycomb(symbols: str, a: float) -> Atoms:
    """Unit cell of a flat honeycomb of two elements, of lattice parameter `a` [A]."""
    places = [(0, 0, 0.5), (1 / 3, 2 / 3, 0.5)]
    return Atoms(symbols, scaled_positions=places, cell=[a, a, 2.0, 90, 90, 120], pbc=True)


def _monolayer(layer: Atoms, angle: float, side: float, missing: float = 0.0, seed: int = 0) -> Atoms:
    """A flat layer rotated by `angle` [degrees], a share of its atoms missing."""
    sheet = _sheet(layer, angle, side, 0.2)
    sheet.positions[:, 2] += 0.9
    sheet.set_cell([side, side, 2.0])
    return sheet[np.random.default_rng(seed).uniform(size=len(sheet)) > missing]


def twisted_boron_nitride(side: float) -> Atoms:
    """Bilayer of hexagonal BN, twisted by 21 degrees."""
    return _bilayer(_honeycomb("BN", 2.5), (7.0, 28.0), side, 0.2, 3.33)


def rutile(side: float) -> Atoms:
    """TiO2 rutile [001], 9 A thick, rotated by 20 degrees."""
    cell = crystal(
        ("Ti", "O"), [(0, 0, 0), (0.3053, 0.3053, 0)], spacegroup=136, cellpar=[4.594, 4.594, 2.959, 90, 90, 90]
    )
    return _slab(cell, (0, 0, 1), 20.0, 8.9, side)


def turned_period(cell: Atoms, turn: tuple[int, int], layers: int) -> Atoms:
    """A tetragonal crystal along [001], `layers` unit cells thick, turned in a box that repeats it without a seam.

    The box is square, its side sqrt(n^2 + m^2) a for `turn` (n, m), and the crystal is turned by arctan(m / n) in it.
    """
    n, m = turn
    period = make_supercell(cell, [[n, m, 0], [-m, n, 0], [0, 0, layers]])
    period.rotate(-np.degrees(np.arctan2(m, n)), "z", rotate_cell=True)
    side, thickness = np.hypot(n, m) * cell.cell[0, 0], layers * cell.cell[2, 2]
    planes = cell.cell[2, 2] * np.unique(cell.get_scaled_positions()[:, 2].round(6))
    period.positions[:, 2] += (cell.cell[2, 2] - planes.max()) / 2
    period.set_cell([side, side, thickness])
    period.wrap()
    return period


def magnesium_oxide() -> Atoms:
    """MgO [001], two unit cells (8.4 A) thick, turned by 21.8 degrees; one period of 22.7 A."""
    return turned_period(bulk("MgO", "rocksalt", a=4.212, cubic=True), (5, 2), 2)


def strontium_titanate_period(layers: int) -> Atoms:
    """SrTiO3 [001], `layers` unit cells of 3.905 A thick, turned by 14 degrees; one period of 16.1 A."""
    return turned_period(perovskite("Sr Ti O", 3.905), (4, 1), layers)


def metal_wedge(symbol: str, a: float, turn: tuple[int, int], layers: int) -> Atoms:
    """A fcc metal [001] turned in its period, its exit face a slope along the columns of the scan, vacuum before it.

    From a quarter of the box on, the thickness grows linearly to `layers` unit cells at 0.9 of the box.
    """
    slab = turned_period(bulk(symbol, "fcc", a=a, cubic=True), turn, layers)
    _, side, thickness = slab.cell.lengths()
    slope = np.clip((slab.positions[:, 1] / side - 0.25) / 0.65, 0, 1)
    return slab[slab.positions[:, 2] < slope * thickness]


def gold_wedge() -> Atoms:
    """Au [001] of 0 to 41 A with vacuum beside it, turned by 9.5 degrees; one period of 24.8 A."""
    return metal_wedge("Au", 4.078, (6, 1), 10)


def platinum_wedge() -> Atoms:
    """Pt [001] of 0 to 31 A with vacuum beside it, turned by 11.3 degrees; one period of 20 A."""
    return metal_wedge("Pt", 3.924, (5, 1), 8)


#: From one single atom to the next [A].
ATOM_SPACING = 5.0


def atoms_apart(symbols: str) -> Atoms:
    """Nine single atoms in a square of 3 x 3, ATOM_SPACING apart: one period of 15 A, 2 A thick."""
    places = (np.arange(3) + 0.5) * ATOM_SPACING
    positions = [(row, column, 1.0) for row in places for column in places]
    side = 3 * ATOM_SPACING
    return Atoms(symbols.split(), positions=positions, cell=[side, side, 2.0], pbc=True)


def _film(symbols: str, seed: int) -> Atoms:
    """Random places in 4 A, 0.1 atoms / A^3, no two closer than 1.35 A, with the elements in turn; 22 A a period."""
    rng, box = np.random.default_rng(seed), np.array([22.0, 22.0, 4.0])
    places = np.empty((0, 3))
    cell = np.diag([*box[:2], 10 * box[2]])
    while len(places) < round(0.1 * box.prod()):
        one = rng.uniform(size=(1, 3)) * box
        if not len(places) or get_distances(one, places, cell=cell, pbc=True)[1].min() > 1.35:
            places = np.vstack([places, one])
    elements = symbols.split()
    return Atoms([elements[n % len(elements)] for n in range(len(places))], positions=places, cell=box, pbc=True)


def amorphous_carbon() -> Atoms:
    """A film of 2 g / cm^3 and 4 A (seed 6); one period of 22 A."""
    return _film("C", 6)


def amorphous_boron_oxide() -> Atoms:
    """A film of B2O3, 4 A (seed 10), denser than it is in nature; one period of 22 A."""
    return _film("B O B O O", 10)


def graphene_with_vacancies(side: float) -> Atoms:
    """Monolayer of graphene, 6 % of its atoms missing (seed 7)."""
    return _monolayer(graphene(vacuum=1.0), 9.0, side, 0.06, 7)


def vacuum(side: float) -> Atoms:
    """No atoms."""
    return Atoms(cell=[side, side, 2.0], pbc=True)


def beryllium_oxide(side: float) -> Atoms:
    """Monolayer of BeO, 8 % of its atoms missing (seed 8)."""
    return _monolayer(_honeycomb("BeO", 2.68), 17.0, side, 0.08, 8)


def twisted_beryllium_oxide(side: float) -> Atoms:
    """Bilayer of BeO, twisted by 12 degrees."""
    return _bilayer(_honeycomb("BeO", 2.68), (11.0, 23.0), side, 0.2, 3.1)


def boron_nitride(side: float) -> Atoms:
    """Monolayer of hexagonal BN, 6 % of its atoms missing (seed 9)."""
    return _monolayer(_honeycomb("BN", 2.5), 25.0, side, 0.06, 9)


def aluminium_nitride(side: float) -> Atoms:
    """Monolayer of AlN, flat."""
    return _monolayer(_honeycomb("AlN", 3.13), 5.0, side)


def silicene(side: float) -> Atoms:
    """Monolayer of silicon, flat."""
    return _monolayer(_honeycomb("Si2", 3.87), 21.0, side)


def lithium_fluoride(side: float) -> Atoms:
    """A (001) plane of LiF, 4 % of its atoms missing (seed 11)."""
    layer = Atoms("LiF", scaled_positions=[(0, 0, 0.5), (0.5, 0.5, 0.5)], cell=[2.84, 2.84, 2.0], pbc=True)
    return _monolayer(layer, 12.0, side, 0.04, 11)


def lead_telluride() -> Atoms:
    """PbTe [001], two unit cells (12.9 A) thick, turned by 18.4 degrees; one period of 20.4 A."""
    return turned_period(bulk("PbTe", "rocksalt", a=6.462, cubic=True), (3, 1), 2)


def sodium_chloride() -> Atoms:
    """NaCl [001], two unit cells (11.3 A) thick, turned by 14 degrees; one period of 23.3 A."""
    return turned_period(bulk("NaCl", "rocksalt", a=5.64, cubic=True), (4, 1), 2)


def barium_titanate() -> Atoms:
    """BaTiO3 [001], ten unit cells (40 A) thick, turned by 11.3 degrees; one period of 20.4 A."""
    return turned_period(perovskite("Ba Ti O", 4.01), (5, 1), 10)


def silicon(side: float) -> Atoms:
    """Si [110], 23 A thick, rotated by 27 degrees."""
    return _slab(bulk("Si", "diamond", a=5.431, cubic=True), (1, 1, 0), 27.0, 23.0, side)
