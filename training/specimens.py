"""Named specimens for tests, benchmarks and the choice of models.

None of the compositions of BENCHMARK is ever trained on (`training.structures.RESERVED_COMPOSITIONS`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.build import graphene, mx2
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


def strontium_titanate(side: float) -> Atoms:
    """SrTiO3 [001], two unit cells thick, rotated by 14 degrees."""
    sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
    cell = crystal(("Sr", "Ti", "O"), sites, spacegroup=221, cellpar=[3.905] * 3 + [90] * 3)
    return _slab(cell, (0, 0, 1), 14.0, 7.81, side)


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


def twisted_boron_nitride(side: float) -> Atoms:
    """Bilayer of hexagonal BN, twisted by 21 degrees."""
    layer = Atoms(
        "BN", scaled_positions=[(0, 0, 0.5), (1 / 3, 2 / 3, 0.5)], cell=[2.5, 2.5, 2.0, 90, 90, 120], pbc=True
    )
    return _bilayer(layer, (7.0, 28.0), side, 0.2, 3.33)


def rutile(side: float) -> Atoms:
    """TiO2 rutile [001], 9 A thick, rotated by 20 degrees."""
    cell = crystal(
        ("Ti", "O"), [(0, 0, 0), (0.3053, 0.3053, 0)], spacegroup=136, cellpar=[4.594, 4.594, 2.959, 90, 90, 90]
    )
    return _slab(cell, (0, 0, 1), 20.0, 8.9, side)


#: Name: (atoms in a box of a given side [A], energy [eV], semi-angle [mrad], scan step [A])
BENCHMARK: dict[str, tuple[Callable[[float], Atoms], float, float, float]] = {
    "MoS2 twisted bilayer": (twisted_mos2, 300e3, 20.0, 0.1),
    "SrTiO3 [001] 8 A": (strontium_titanate, 300e3, 20.0, 0.185),
    "WS2 with vacancies": (ws2_with_vacancies, 60e3, 30.0, 0.3),
    "GaAs [110] 12 A": (gallium_arsenide, 200e3, 22.0, 0.25),
    "graphene twisted bilayer": (twisted_graphene, 200e3, 25.0, 0.2),
}

#: To choose between models with: like BENCHMARK, and never reported.
VALIDATION: dict[str, tuple[Callable[[float], Atoms], float, float, float]] = {
    "BN twisted bilayer": (twisted_boron_nitride, 80e3, 26.0, 0.25),
    "TiO2 [001] 9 A": (rutile, 200e3, 21.0, 0.2),
}
