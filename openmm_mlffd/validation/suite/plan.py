"""How much is measured: the levels of a validation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SECTIONS = ("forces", "nve", "ensembles", "stability", "teacher", "robustness", "speed")
"""Names of the sections, in the order of the report."""

WATER, PEPTIDE, DRUG = "water box", "alanine dipeptide", "oseltamivir"
PEPTIDE_IN_WATER = "alanine dipeptide in water"


@dataclass(frozen=True, kw_only=True)
class ForcePlan:
    """Force analysis of a data set."""

    max_structures: int | None
    """Take a random part of this size; None for all."""

    max_reference: int = 2000
    """Training structures that distances are measured to."""

    n_worst: int = 10
    """Structures written out and drawn."""


@dataclass(frozen=True, kw_only=True)
class NVERun:
    """Constant-energy runs of one system."""

    system: str
    """Name of the system."""

    picoseconds: float
    """Length of each run [ps]."""

    timesteps: tuple[float, ...] = (0.25, 0.5, 1.0)
    """[fs]; three of them are two halvings."""

    precision: str = "double"
    """Of the network."""

    copies: tuple[int, int, int] = (1, 1, 1)
    """The box, repeated so often along each of its vectors."""

    minutes: float | None = None
    """Wall time of each run at most; None for that of the plan."""

    judged: bool = True
    """Whether its numbers have to pass; others are only reported."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        n = self.copies[0] * self.copies[1] * self.copies[2]
        return f"{self.system}{f' × {n}' if n > 1 else ''}, {self.precision}"


@dataclass(frozen=True, kw_only=True)
class EnsembleRun:
    """Langevin dynamics of one system."""

    system: str
    """Name of the system."""

    picoseconds: float
    """Length [ps]."""

    frame: float
    """Between frames [ps]."""

    pressure: float | None = None
    """[bar]; None for constant volume."""

    copies: tuple[int, int, int] = (1, 1, 1)
    """The box, repeated so often along each of its vectors."""

    timestep: float = 0.5
    """[fs]."""

    temperature: float = 300.0
    """[K]."""

    seed: int = 1
    """Of velocities and noise."""

    minimization: int = 200
    """Iterations at most."""

    charge: int | None = None
    """Total charge of one copy [e]; None for what the file says, or else zero."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        n = self.copies[0] * self.copies[1] * self.copies[2]
        ensemble = "NVT" if self.pressure is None else "NPT"
        return f"{self.system}{f' × {n}' if n > 1 else ''}, {ensemble} {self.temperature:g} K"


@dataclass(frozen=True, kw_only=True)
class StabilityPlan:
    """Long runs of molecules and boxes that no training saw."""

    picoseconds: float
    """Length of the molecules' runs [ps]."""

    box_picoseconds: float
    """Length of the boxes' runs [ps]."""

    molecules: tuple[str, ...] | None = None
    """Names or files; None for all that come with the suite."""

    temperatures: tuple[float, ...] = (300.0, 500.0)
    """Each molecule runs at each of these [K]."""

    boxes: tuple[str, ...] | None = None
    """Names or files; None for all that come with the suite."""

    more_boxes: tuple[str, ...] = (WATER, PEPTIDE_IN_WATER)
    """Those of other sections that are run here, too, if `boxes` is None."""

    charges: Mapping[str, int] = field(default_factory=dict)
    """Total charge [e] of systems whose files do not say it, by name."""

    box_temperature: float = 300.0
    """[K]."""

    timestep: float = 0.5
    """[fs]."""


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """Comparison with a teacher."""

    molecules: tuple[str, ...] | None
    """Molecules whose geometries and vibrations are compared; None for all."""

    torsions: tuple[str, ...] | None
    """Molecules whose torsions are scanned; None for all."""

    scan_step: float
    """[degrees]."""

    dimers: tuple[str, ...] | None
    """None for all."""

    peptide: EnsembleRun
    """Run by both."""

    water: EnsembleRun | None
    """Run by both, the teacher as long as its time allows."""


@dataclass(frozen=True, kw_only=True)
class RobustnessPlan:
    """Structures that no training set holds."""

    distorted: int
    """Distorted and clashing structures whose forces are evaluated."""

    minimizations: int
    """So many of them are minimised."""

    hot_picoseconds: float
    """Length of the runs at 1,000 K [ps]."""

    hot_molecules: tuple[str, ...] | None
    """Molecules that are heated; None for all."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a validation does."""

    level: str
    forces: ForcePlan
    nve: tuple[NVERun, ...]
    ensembles: tuple[EnsembleRun, ...]
    teacher: TeacherPlan
    robustness: RobustnessPlan
    stability: StabilityPlan
    smoothness: tuple[str, ...] = field(default=("N-methylacetamide",))
    """Molecules at which forces are compared with differences of energies."""

    run_minutes: float = math.inf
    """Wall time of each simulation at most [min]; it is then as long as it is."""

    speed_steps: int = 100
    """Steps that are timed."""


def make_plan(level: str) -> Plan:
    """The plan of a level.

    Parameters
    ----------
    level
        ``tiny`` (seconds, for tests of the suite itself; its numbers mean nothing), ``smoke``
        (a CPU, under five minutes) or ``full`` (a GPU, under thirty).

    Raises
    ------
    ValueError
        If there is no such level.
    """
    makers = {"tiny": _tiny, "smoke": _smoke, "full": _full}
    if level not in makers:
        raise ValueError(f"level must be one of {', '.join(makers)}, got {level!r}")
    return makers[level]()


def _tiny() -> Plan:
    return Plan(
        level="tiny",
        forces=ForcePlan(max_structures=None, max_reference=40, n_worst=2),
        nve=(NVERun(system="methanol", picoseconds=0.05, timesteps=(0.25, 0.5)),),
        ensembles=(EnsembleRun(system="methanol", picoseconds=0.2, frame=0.005),),
        teacher=TeacherPlan(
            molecules=("water",),
            torsions=(),
            scan_step=60.0,
            dimers=("water–water",),
            peptide=EnsembleRun(system="methanol", picoseconds=0.05, frame=0.0015),
            water=None,
        ),
        robustness=RobustnessPlan(
            distorted=60, minimizations=3, hot_picoseconds=0.02, hot_molecules=("methanol",)
        ),
        stability=StabilityPlan(
            picoseconds=0.05,
            box_picoseconds=0.0,
            molecules=("methanol",),
            boxes=(),
        ),
        smoothness=("methanol",),
        speed_steps=5,
    )


def _smoke() -> Plan:
    peptide = EnsembleRun(system=PEPTIDE, picoseconds=1.25, frame=0.005, timestep=1.0)
    return Plan(
        level="smoke",
        forces=ForcePlan(max_structures=300, max_reference=1000, n_worst=5),
        nve=(
            NVERun(system=PEPTIDE, picoseconds=0.6),
            NVERun(system=PEPTIDE, picoseconds=0.3, timesteps=(0.5,), precision="single"),
        ),
        ensembles=(
            peptide,
            EnsembleRun(
                system=WATER, picoseconds=0.05, frame=0.005, pressure=1.0, timestep=1.0,
                minimization=10,
            ),
        ),
        teacher=TeacherPlan(
            molecules=("water", "methanol", "formaldehyde", "chloromethane"),
            torsions=("glycol",),
            scan_step=30.0,
            dimers=("water–water", "amide–water"),
            peptide=peptide,
            water=None,
        ),
        robustness=RobustnessPlan(
            distorted=600, minimizations=12, hot_picoseconds=0.2,
            hot_molecules=("methanol", "chloromethane", "dimethyl sulfoxide"),
        ),
        stability=StabilityPlan(
            picoseconds=0.3, box_picoseconds=0.0, temperatures=(500.0,), boxes=(),
            molecules=("caffeine", "dimethyl fosfomycin", "ciprofloxacin"),
        ),
    )  # fmt: skip


def _full() -> Plan:
    peptide = EnsembleRun(system=PEPTIDE, picoseconds=200.0, frame=0.05)
    water = EnsembleRun(system=WATER, picoseconds=200.0, frame=0.1, pressure=1.0, copies=(2, 2, 1))
    return Plan(
        level="full",
        run_minutes=2.0,
        forces=ForcePlan(max_structures=None, max_reference=4000),
        smoothness=("N-methylacetamide", "trimethyl phosphate"),
        nve=(
            NVERun(
                system=DRUG, picoseconds=1000.0, timesteps=(0.5,), precision="single", minutes=6.0
            ),
            NVERun(system=DRUG, picoseconds=4.0),
            NVERun(system=PEPTIDE, picoseconds=4.0),
            NVERun(system=PEPTIDE, picoseconds=50.0, precision="single"),
            NVERun(
                system=PEPTIDE, picoseconds=4.0, timesteps=(0.5,), precision="mixed", judged=False
            ),
            NVERun(
                system=WATER, picoseconds=1.0, timesteps=(0.5, 1.0), precision="single",
                copies=(4, 2, 2), judged=False,
            ),
        ),
        ensembles=(
            peptide,
            water,
            EnsembleRun(system=PEPTIDE_IN_WATER, picoseconds=200.0, frame=0.1, pressure=1.0),
        ),
        teacher=TeacherPlan(
            molecules=None,
            torsions=None,
            scan_step=15.0,
            dimers=None,
            peptide=peptide,
            water=water,
        ),
        robustness=RobustnessPlan(
            distorted=5000, minimizations=150, hot_picoseconds=1.0, hot_molecules=None
        ),
        stability=StabilityPlan(picoseconds=100.0, box_picoseconds=50.0),
    )  # fmt: skip
