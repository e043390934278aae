"""Numbers from trajectories: dihedrals, radial distribution, density, bond lengths."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.units import ANGSTROM_PER_NM

try:
    import mdtraj
except ImportError as error:
    raise ImportError(
        "MDTraj is needed to analyse trajectories: pip install openmm-mlffd[analysis]"
    ) from error


@dataclass(frozen=True, kw_only=True)
class Dihedrals:
    """Backbone dihedral angles along a trajectory."""

    phi: NDArray[np.float64]
    """[degrees], from -180 to 180, shape (n_frames, n_residues)."""

    psi: NDArray[np.float64]
    """[degrees], from -180 to 180, shape (n_frames, n_residues)."""


@dataclass(frozen=True, kw_only=True)
class RadialDistribution:
    """A radial distribution function."""

    r: NDArray[np.float64]
    """Distance, at the middle of each bin [Å], shape (n_bins,)."""

    g: NDArray[np.float64]
    """Density of pairs relative to that of an ideal gas, shape (n_bins,)."""

    @property
    def peak(self) -> tuple[float, float]:
        """Distance [Å] and height of the first peak: the first distances at which g is above 1.

        If it is nowhere, the highest bin.
        """
        above = np.concatenate([self.g > 1.0, [False]])
        start = int(above.argmax()) if above.any() else 0
        stop = start + int((~above[start:]).argmax()) if above.any() else len(self.g)
        highest = start + int(self.g[start:stop].argmax())
        return float(self.r[highest]), float(self.g[highest])


@dataclass(frozen=True, kw_only=True)
class BondStretch:
    """The bond that was longest compared with a reference."""

    ratio: float
    """Its length over the length in the reference."""

    frame: int
    """Index of the frame."""

    atoms: str
    """Its atoms, as residue and name."""


def load_trajectory(path: str | Path, topology: Any) -> mdtraj.Trajectory:
    """A trajectory file of an OpenMM Topology.

    Parameters
    ----------
    path
        Any format that MDTraj reads without a topology of its own, such as `.dcd`.
    topology
        OpenMM's Topology of the simulation.
    """
    return mdtraj.load(str(path), top=mdtraj.Topology.from_openmm(topology))


def make_frame(positions: Any, topology: Any) -> mdtraj.Trajectory:
    """One frame from OpenMM positions and Topology, for instance a reference for `longest_bond`.

    Parameters
    ----------
    positions
        [nm], shape ``(n_atoms, 3)``, or a Quantity.
    topology
        OpenMM's Topology.
    """
    from openmm import unit

    if unit.is_quantity(positions):
        positions = positions.value_in_unit(unit.nanometer)
    frame = mdtraj.Trajectory(np.asarray(positions, float), mdtraj.Topology.from_openmm(topology))
    box = topology.getPeriodicBoxVectors()
    if box is not None:
        frame.unitcell_vectors = np.array(box.value_in_unit(unit.nanometer))[None]
    return frame


def make_trajectory(
    positions: NDArray[np.floating[Any]],
    topology: Any,
    *,
    cell: NDArray[np.float64] | None = None,
    time: NDArray[np.float64] | None = None,
) -> mdtraj.Trajectory:
    """Frames from arrays.

    Parameters
    ----------
    positions
        [Å], shape ``(n_frames, n_atoms, 3)``.
    topology
        OpenMM's Topology.
    cell
        Box vectors as rows [Å], shape ``(n_frames, 3, 3)``; None for no box.
    time
        [ps], shape ``(n_frames,)``.
    """
    frames = mdtraj.Trajectory(
        np.asarray(positions, np.float32) / np.float32(ANGSTROM_PER_NM),
        mdtraj.Topology.from_openmm(topology),
        time=time,
    )
    if cell is not None:
        frames.unitcell_vectors = (cell / ANGSTROM_PER_NM).astype(np.float32)
    return frames


def backbone_dihedrals(trajectory: mdtraj.Trajectory) -> Dihedrals:
    """Phi and psi of every residue that has both.

    Raises
    ------
    ValueError
        If no residue has both, as in anything but a peptide with names of the PDB.
    """
    phi_atoms, phi = mdtraj.compute_phi(trajectory)
    psi_atoms, psi = mdtraj.compute_psi(trajectory)
    # phi is C N CA C, psi is N CA C N: a residue is known by its CA
    phi_columns = {int(atoms[2]): column for column, atoms in enumerate(phi_atoms)}
    psi_columns = {int(atoms[1]): column for column, atoms in enumerate(psi_atoms)}
    both = sorted(phi_columns.keys() & psi_columns.keys())
    if not both:
        raise ValueError(
            "no residue has both phi and psi; they need peptide atoms named as in a PDB"
        )
    return Dihedrals(
        phi=np.degrees(phi[:, [phi_columns[a] for a in both]].astype(float)),
        psi=np.degrees(psi[:, [psi_columns[a] for a in both]].astype(float)),
    )


def radial_distribution(
    trajectory: mdtraj.Trajectory,
    first: str,
    second: str,
    *,
    r_max: float | None = None,
    bin_width: float = 0.1,
) -> RadialDistribution:
    """Radial distribution function between two elements, without pairs in the same residue.

    Parameters
    ----------
    trajectory
        Periodic frames.
    first, second
        Symbols of the elements, which may be the same.
    r_max
        Largest distance [Å]; at most half the shortest box height, which is the default.
    bin_width
        [Å].

    Raises
    ------
    ValueError
        If there is no box, no such pair, or ``r_max`` is more than the box allows.
    """
    if trajectory.unitcell_vectors is None:
        raise ValueError("a radial distribution needs frames with a periodic box")
    allowed = _half_height(trajectory.unitcell_vectors) * ANGSTROM_PER_NM
    if r_max is None:
        r_max = allowed
    if r_max > allowed:
        raise ValueError(f"r_max must be at most half the box, {allowed:.2f} Å, got {r_max} Å")
    atoms = list(trajectory.topology.atoms)
    chosen = [np.array([a.index for a in atoms if a.element.symbol == s]) for s in (first, second)]
    pairs = trajectory.topology.select_pairs(*chosen)
    residue = np.array([atom.residue.index for atom in atoms])
    pairs = pairs[residue[pairs[:, 0]] != residue[pairs[:, 1]]] if len(pairs) else pairs
    if len(pairs) == 0:
        raise ValueError(f"there are no pairs of {first} and {second} in different residues")
    n_bins = max(1, round(r_max / bin_width))
    r, g = mdtraj.compute_rdf(
        trajectory, pairs, r_range=(0.0, r_max / ANGSTROM_PER_NM), n_bins=n_bins
    )
    return RadialDistribution(r=r.astype(float) * ANGSTROM_PER_NM, g=g.astype(float))


def density(trajectory: mdtraj.Trajectory) -> NDArray[np.float64]:
    """Mass density of each frame [kg/m^3], shape ``(n_frames,)``.

    Raises
    ------
    ValueError
        If there is no box.
    """
    if trajectory.unitcell_vectors is None:
        raise ValueError("a density needs frames with a periodic box")
    return np.asarray(mdtraj.density(trajectory), float)


def longest_bond(trajectory: mdtraj.Trajectory, reference: mdtraj.Trajectory) -> BondStretch:
    """The bond that is stretched most, over all frames.

    Parameters
    ----------
    trajectory
        Frames to look at; their topology must have bonds.
    reference
        One frame with the normal lengths, such as a minimised structure.

    Returns
    -------
    BondStretch
        A ratio above about 1.5 is a broken bond. NaN if a position is not finite.

    Raises
    ------
    ValueError
        If the topology has no bonds.
    """
    bonds = list(trajectory.topology.bonds)
    if not bonds:
        raise ValueError("the topology has no bonds")
    pairs = np.array([[a.index, b.index] for a, b in bonds])
    normal = mdtraj.compute_distances(reference, pairs)[0]
    ratio = mdtraj.compute_distances(trajectory, pairs) / normal
    frame, bond = np.unravel_index(int(np.argmax(ratio)), ratio.shape)  # NaN counts as largest
    return BondStretch(
        ratio=float(ratio[frame, bond]),
        frame=int(frame),
        atoms=f"{bonds[bond][0]}-{bonds[bond][1]}",
    )


def _half_height(vectors: NDArray[np.float32]) -> float:
    """Half the shortest distance between faces of the boxes, in the unit of the vectors."""
    return float(0.5 / np.linalg.norm(np.linalg.inv(vectors.astype(float)), axis=1).max())
