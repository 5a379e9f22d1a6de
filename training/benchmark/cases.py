"""The scans of the benchmark: specimen, beam, step, doses, and what each is for.

The crystals of CASES are never trained on (`training.structures.RESERVED_COMPOSITIONS`); single atoms of every element
are. The specimens of VALIDATION and WEAK_VALIDATION are others: they are there to choose between models, and never
reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from ase import Atoms

from training import specimens

NOISE_FREE = float("inf")
#: Electrons / A^2, from the expected counts down.
DOSES = (NOISE_FREE, 1e6, 1e5, 1e4, 1e3, 500.0)
#: Of Poisson noise and of the frozen phonons.
SEED = 1
#: What a case is for, in the order of the report.
PARTS = ("dose", "super-resolution", "step", "z-contrast", "thickness", "repetition", "dreaming")
#: Positions along each axis of the scans that the others are measured by.
POSITIONS = 56
#: Scan positions at each edge that comparisons leave out, unless their step is large.
MARGIN = 5


@dataclass(frozen=True)
class Case:
    """One scan.

    Attributes
    ----------
    name : str
    build : callable
        Atoms around a scan, from the side of their box [A]; of a period of a crystal if `periodic`, from nothing.
    energy, semiangle, step : float
        [eV], [mrad], [A]
    parts : tuple of str
        Of PARTS.
    shape : (int, int)
        Scan rows and columns.
    doses : tuple of float
        [electrons / A^2], infinite for the expected counts.
    periodic : bool
        The box is a period of the specimen, so the scan may be longer than it.
    """

    name: str
    build: Callable[..., Atoms]
    energy: float
    semiangle: float
    step: float
    parts: tuple[str, ...] = ()
    shape: tuple[int, int] = (POSITIONS, POSITIONS)
    doses: tuple[float, ...] = DOSES
    periodic: bool = False

    @property
    def margin(self) -> int:
        """Scan positions at each edge that comparisons leave out: MARGIN, or as many as 2 A take, but two at least."""
        return min(MARGIN, max(2, int(np.ceil(2.0 / self.step))))

    def scaled(self, positions: int) -> tuple[int, int]:
        """Its scan's shape where a scan of POSITIONS x POSITIONS is cut down to `positions` x `positions`."""
        rows, columns = (max(2 * self.margin + 4, round(n * positions / POSITIONS)) for n in self.shape)
        return min(rows, self.shape[0]), min(columns, self.shape[1])


_DREAMING_BEAM = (80e3, 30.0, 0.25)
_TWO_DOSES = (NOISE_FREE, 1e4)
_MGO_DOSES = (NOISE_FREE, 500.0)
_DREAMING_DOSES = (NOISE_FREE, 1e3)
#: Scans over MgO [A: positions]: the larger the step the fewer.
_MGO_STEPS = {0.1: 48, 0.2: 48, 0.4: 40, 0.8: 32, 1.6: 24}
_SINGLE_ATOMS = (
    "Li O P Sc Fe As Zr Cd Nd",
    "B Al Cl Ti Cu Rb Mo Sn W",
    "C Si Ca Mn Ge Y Ag Ba Au",
)

CASES = (
    Case("MoS2 twisted bilayer", specimens.twisted_mos2, 300e3, 20.0, 0.1, ("dose", "repetition")),
    Case("SrTiO3 [001] 8 A", specimens.strontium_titanate, 300e3, 20.0, 0.185, ("dose", "thickness", "repetition")),
    Case("WS2 with vacancies", specimens.ws2_with_vacancies, 60e3, 30.0, 0.3, ("dose", "dreaming")),
    Case("GaAs [110] 12 A", specimens.gallium_arsenide, 200e3, 22.0, 0.25, ("dose",)),
    Case(
        "graphene twisted bilayer",
        specimens.twisted_graphene,
        200e3,
        25.0,
        0.2,
        ("dose", "super-resolution", "repetition"),
    ),
    *(
        Case(
            f"MgO [001] step {step:g} A",
            specimens.magnesium_oxide,
            300e3,
            20.0,
            step,
            ("step",),
            (positions, positions),
            _MGO_DOSES,
            periodic=True,
        )
        for step, positions in _MGO_STEPS.items()
    ),
    *(
        Case(
            f"single atoms {number}",
            partial(specimens.atoms_apart, symbols),
            300e3,
            20.0,
            0.2,
            ("z-contrast",),
            (75, 75),
            _TWO_DOSES,
            periodic=True,
        )
        for number, symbols in enumerate(_SINGLE_ATOMS, 1)
    ),
    *(
        Case(
            f"SrTiO3 [001] {3.905 * layers:.0f} A",
            partial(specimens.strontium_titanate_period, layers),
            300e3,
            20.0,
            0.185,
            ("thickness",),
            (40, 40),
            _TWO_DOSES,
            periodic=True,
        )
        for layers in (1, 5, 10, 15, 20)
    ),
    Case("Au wedge", specimens.gold_wedge, 300e3, 20.0, 0.2, ("thickness",), (24, 96), _TWO_DOSES, periodic=True),
    Case(
        "graphene with vacancies",
        specimens.graphene_with_vacancies,
        *_DREAMING_BEAM,
        parts=("dreaming",),
        doses=_DREAMING_DOSES,
    ),
    Case(
        "amorphous carbon",
        specimens.amorphous_carbon,
        *_DREAMING_BEAM,
        parts=("dreaming",),
        doses=_DREAMING_DOSES,
        periodic=True,
    ),
    Case("vacuum", specimens.vacuum, *_DREAMING_BEAM, parts=("dreaming",), doses=_DREAMING_DOSES),
)

#: To choose between models with: light, heavy, thick and sparse, other beams and steps; never reported.
VALIDATION = (
    Case("BN twisted bilayer", specimens.twisted_boron_nitride, 80e3, 26.0, 0.25, shape=(40, 40)),
    Case("TiO2 [001] 9 A", specimens.rutile, 200e3, 21.0, 0.2, shape=(40, 40)),
    Case("BeO monolayer with vacancies", specimens.beryllium_oxide, 60e3, 28.0, 0.3, shape=(40, 40)),
    Case("PbTe [001] 13 A", specimens.lead_telluride, 300e3, 24.0, 0.15, shape=(40, 40), periodic=True),
    Case("Si [110] 23 A", specimens.silicon, 200e3, 18.0, 0.4, shape=(32, 32)),
    Case("NaCl [001] 11 A", specimens.sodium_chloride, 300e3, 22.0, 0.7, shape=(28, 28), periodic=True),
    Case("BaTiO3 [001] 40 A", specimens.barium_titanate, 300e3, 22.0, 0.2, shape=(36, 36), periodic=True),
    Case("Pt wedge", specimens.platinum_wedge, 200e3, 25.0, 0.22, shape=(20, 76), periodic=True),
    Case(
        "other single atoms",
        partial(specimens.atoms_apart, "N F Mg V Zn Br Pd I Hg"),
        120e3,
        28.0,
        0.25,
        shape=(60, 60),
        periodic=True,
    ),
)
#: Layers and a film as weak as graphene, where few electrons say least.
WEAK_VALIDATION = (
    Case("BN monolayer with vacancies", specimens.boron_nitride, 60e3, 30.0, 0.2, shape=(40, 40)),
    Case("BeO twisted bilayer", specimens.twisted_beryllium_oxide, 200e3, 25.0, 0.2, shape=(40, 40)),
    Case("AlN monolayer", specimens.aluminium_nitride, 120e3, 24.0, 0.25, shape=(40, 40)),
    Case("LiF monolayer with vacancies", specimens.lithium_fluoride, 300e3, 20.0, 0.25, shape=(40, 40)),
    Case("silicene", specimens.silicene, 80e3, 22.0, 0.3, shape=(40, 40)),
    Case("amorphous B2O3 4 A", specimens.amorphous_boron_oxide, 300e3, 22.0, 0.25, shape=(40, 40), periodic=True),
)


def selected(parts: tuple[str, ...]) -> tuple[Case, ...]:
    """The cases of some parts, each once."""
    return tuple(case for case in CASES if set(parts) & set(case.parts))
