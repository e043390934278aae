"""Recipes of `mlffd generate`: one YAML file, one typed object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmm_mlffd.training.config import ConfigError, check_keys, read_settings, typed

METHODS = ("md", "modes", "rattle", "student", "torn", "none")
FORCE_FIELDS = ("mmff94", "auto")
CAPS = ("ace-nme", "ace-nh2", "zwitterion", "neutral")
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How configurations are made from a structure."""

    method: str = "md"
    """"md" or "modes" with the force field, "student" for dynamics with a student, "rattle" for
    random displacements alone, "torn" for molecules with bonds that are far too long or short,
    "none" for the structure itself."""

    force_field: str = "mmff94"
    """"mmff94", which has no parameters for many inorganic molecules, or "auto": UFF for those."""

    conformers: int = 1
    """Conformers of a molecule; each is sampled at one temperature."""

    frames: int = 4
    """Configurations of each."""

    temperatures: list[float] = field(default_factory=lambda: [300.0, 500.0, 700.0, 1000.0])
    """One of these [K] is drawn for each conformer."""

    equilibration: int = 100
    """Steps of dynamics before the first configuration."""

    interval: int = 60
    """Steps of dynamics between configurations."""

    timestep: float = 1.0
    """[fs]."""

    rattle: list[float] = field(default_factory=lambda: [0.0])
    """Random displacements on top [Å]; one of these widths is drawn for each configuration."""

    max_force: float = 30.0
    """Configurations with a larger force [eV/Å] in the force field are left out."""

    student: str | None = None
    """Bundled name or file of the student; None for the default."""

    torn: list[int] = field(default_factory=lambda: [1, 1, 2, 3])
    """Numbers of bonds that are torn or squeezed, of "torn"; one is drawn for each
    configuration."""

    lengths: list[float] = field(default_factory=lambda: [0.55, 3.0])
    """Range of their new lengths, over the old ones; equally often in each factor."""

    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Range of a factor on all distances, of "torn"."""

    turned: list[int] = field(default_factory=lambda: [0])
    """Numbers of bonds outside of rings about which a side is turned by any angle, of "torn"; one
    is drawn for each configuration."""


@dataclass(frozen=True, kw_only=True)
class PeptideConfig:
    """Random peptides of the 20 amino acids, or given ones."""

    lengths: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Numbers of residues to draw from."""

    count: int = 100
    """How many are drawn."""

    sequences: list[str] = field(default_factory=list)
    """One-letter sequences that are taken instead of random ones."""

    with_any: str = ""
    """Random ones have at least one of these letters; any do if there is none."""

    caps: list[str] = field(default_factory=lambda: ["ace-nme"])
    """Ends to draw from: "ace-nme", "ace-nh2", "zwitterion" or "neutral"."""

    variants: float = 0.3
    """Fraction of titratable side chains in a protonation state that is not that of pH 7."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where molecules come from: a file, files of an installed package, or peptides."""

    file: str | None = None
    """SMILES list (.smi), table (.csv, also .csv.gz), or SDF, whose coordinates are not used.
    Relative to the recipe, or a pattern within the package."""

    package: str | None = None
    """Python package that holds the file."""

    column: str = "smiles"
    """Column of a table."""

    peptides: PeptideConfig | None = None
    """Peptides instead of a file."""


@dataclass(frozen=True, kw_only=True)
class MoleculesConfig:
    """Single molecules."""

    sources: list[SourceConfig]
    """Where they come from."""

    count: int | None = None
    """How many are drawn; None for all."""

    min_atoms: int = 3
    """Fewest atoms, hydrogens included."""

    max_atoms: int = 100
    """Most atoms, hydrogens included."""

    charged: float = 0.0
    """Fraction of those with an amine or an acid that are given as an ion."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How they are sampled."""


@dataclass(frozen=True, kw_only=True)
class ClustersConfig(MoleculesConfig):
    """Molecules and waters that touch: dimers, water clusters, droplets with a solute."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Where the molecules come from; none for pure water."""

    count: int = 100
    """How many clusters."""

    molecules: list[int] = field(default_factory=lambda: [2])
    """Numbers of molecules to draw from."""

    waters: list[int] = field(default_factory=lambda: [0])
    """Numbers of waters to draw from."""

    gap: list[float] = field(default_factory=lambda: [0.8, 2.2])
    """Range of the distance at contact [Å], beyond the sum of the covalent radii."""


@dataclass(frozen=True, kw_only=True)
class BoxesConfig(MoleculesConfig):
    """Periodic boxes of water, with a solute or without."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Where the solutes come from; none for pure water."""

    count: int = 10
    """How many boxes."""

    edges: list[float] = field(default_factory=lambda: [12.0, 18.0])
    """Range of the length of the box vectors [Å]."""

    padding: float = 3.0
    """Water around a solute at least [Å], on each side."""

    triclinic: float = 0.2
    """Fraction of boxes that are skewed."""

    densities: list[float] = field(default_factory=lambda: [0.95, 1.05])
    """Range of the density, relative to that of the water model."""


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Structures of files, as they are or sampled around."""

    files: list[str]
    """SDF, PDB, and whatever ASE reads (XYZ, ASE databases …), relative to the recipe."""

    hydrogens: str = "refuse"
    """"refuse" structures without their hydrogens, or "add" them; other atoms never move."""

    charge: int = 0
    """Total charge [e] of structures of which the file does not say it."""

    count: int | None = None
    """How many are drawn; None for all."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(method="none"))
    """How they are sampled; force fields need bonds, which SDF and PDB have."""


Subset = MoleculesConfig | ClustersConfig | BoxesConfig | FilesConfig
KINDS: dict[str, type] = {
    "molecules": MoleculesConfig,
    "clusters": ClustersConfig,
    "boxes": BoxesConfig,
    "files": FilesConfig,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides which structures are made."""

    name: str = "structures"
    """Name of the recipe, noted in the file."""

    seed: int = 0
    """Of all choices."""

    elements: list[str] = field(default_factory=lambda: ["H", "C", "N", "O", "F", "P", "S", "Cl"])
    """Structures with other elements are left out."""

    exclude: list[str] = field(default_factory=list)
    """Files of InChIKeys, whole or their first block, or SMILES, one a line, relative to the
    recipe: molecules of the same skeleton, in whatever protonation state, are left out."""

    shard_size: int = 100
    """Systems per shard: what can be lost when the process is ended."""

    libraries: dict[str, Any] = field(default_factory=dict)
    """Lists of sources under names, for `${libraries.NAME}` below."""

    subsets: dict[str, Any] = field(default_factory=dict)
    """Settings of each subset by its name, with its `kind`; see `KINDS`."""


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A recipe with its subsets typed."""

    recipe: Recipe
    """The settings."""

    subsets: Mapping[str, Subset]
    """Typed subsets by name."""

    folder: Path
    """Of the recipe: where relative file names start."""

    settings: dict[str, Any]
    """The file's settings, as they were read."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe and apply overrides, written key=value.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a setting is unknown (with a suggestion), missing, of the
        wrong type or without sense.
    """
    path = Path(path)
    settings = read_settings(path, overrides)
    return parse_recipe(settings, path.parent, str(path))


def parse_recipe(settings: dict[str, Any], folder: Path, where: str = "recipe") -> LoadedRecipe:
    """A recipe from its settings; errors as `load_recipe`."""
    check_keys(settings, Recipe, where)
    recipe = typed(Recipe, settings, where)
    if not recipe.subsets:
        raise ConfigError(f"{where}: has no subsets; kinds are {', '.join(KINDS)}")
    subsets: dict[str, Subset] = {}
    for name, values in recipe.subsets.items():
        place = f"{where}: subsets.{name}"
        if not isinstance(values, dict) or values.get("kind") not in KINDS:
            raise ConfigError(f"{place}: needs a `kind`, one of {', '.join(KINDS)}")
        kind = KINDS[values["kind"]]
        rest = {k: v for k, v in values.items() if k != "kind"}
        check_keys(rest, kind, place)
        subsets[name] = typed(kind, rest, place)
        _check(subsets[name], place)
    return LoadedRecipe(recipe=recipe, subsets=subsets, folder=folder, settings=settings)


def _check(subset: Subset, place: str) -> None:
    if subset.sampling.method not in METHODS:
        raise ConfigError(
            f"{place}: sampling.method must be one of {', '.join(METHODS)}, "
            f"got {subset.sampling.method!r}"
        )
    if subset.sampling.force_field not in FORCE_FIELDS:
        raise ConfigError(
            f"{place}: sampling.force_field must be one of {', '.join(FORCE_FIELDS)}, "
            f"got {subset.sampling.force_field!r}"
        )
    if not subset.sampling.temperatures or min(subset.sampling.temperatures) <= 0:
        raise ConfigError(f"{place}: sampling.temperatures must be positive")
    if isinstance(subset, BoxesConfig) and subset.sampling.force_field != "mmff94":
        raise ConfigError(f"{place}: boxes are sampled with sampling.force_field: mmff94")
    if isinstance(subset, BoxesConfig) and subset.sampling.method != "md":
        raise ConfigError(
            f"{place}: boxes are sampled by md, not by sampling.method: {subset.sampling.method}"
        )
    for name in ("lengths", "scale"):
        _check_range(f"{place}: sampling.{name}", getattr(subset.sampling, name))
    for name in ("torn", "turned"):
        values = getattr(subset.sampling, name)
        if not values or min(values) < 0:
            raise ConfigError(f"{place}: sampling.{name} must be numbers from 0")
    if isinstance(subset, FilesConfig):
        if subset.hydrogens not in ("refuse", "add"):
            raise ConfigError(f"{place}: hydrogens must be refuse or add, got {subset.hydrogens!r}")
        return
    for source in subset.sources:
        if (source.file is None) == (source.peptides is None):
            raise ConfigError(f"{place}: a source has either a file or peptides")
        strange = set(source.peptides.caps) - set(CAPS) if source.peptides else set()
        if strange:
            raise ConfigError(f"{place}: caps must be of {', '.join(CAPS)}, got {strange.pop()!r}")
        letters = source.peptides.with_any if source.peptides else ""
        if set(letters) - set(AMINO_ACIDS):
            raise ConfigError(f"{place}: with_any must be letters of amino acids, got {letters!r}")
        if letters and source.peptides and source.peptides.sequences:
            raise ConfigError(f"{place}: with_any is for random peptides, but sequences are given")
    if not isinstance(subset, BoxesConfig | ClustersConfig) and not subset.sources:
        raise ConfigError(f"{place}: needs sources of molecules")
    if isinstance(subset, ClustersConfig) and not subset.sources and max(subset.molecules) > 0:
        raise ConfigError(f"{place}: needs sources, or molecules: [0]")
    for name in ("edges", "densities", "gap"):
        _check_range(f"{place}: {name}", getattr(subset, name, [1.0, 1.0]))


def _check_range(what: str, values: Sequence[float]) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ConfigError(f"{what} must be two positive numbers, the smaller first")
