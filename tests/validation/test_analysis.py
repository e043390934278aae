from pathlib import Path

import mdtraj
import numpy as np
import pytest

from openmm_mlffd.units import AVOGADRO
from openmm_mlffd.validation import analysis
from openmm_mlffd.validation.structures import read_structure

EXAMPLES = Path(__file__).parents[2] / "examples" / "structures"


def gas(n_frames=40, n_molecules=100, length=2.0, *, hydrogens=False, seed=0):
    """Molecules O or OH at random places in a cubic box [nm], bonds 0.1 nm long."""
    rng = np.random.default_rng(seed)
    topology = mdtraj.Topology()
    chain = topology.add_chain()
    for _ in range(n_molecules):
        residue = topology.add_residue("GAS", chain)
        oxygen = topology.add_atom("O", mdtraj.element.oxygen, residue)
        if hydrogens:
            hydrogen = topology.add_atom("H", mdtraj.element.hydrogen, residue)
            topology.add_bond(oxygen, hydrogen)
    places = rng.uniform(0, length, (n_frames, n_molecules, 3))
    if hydrogens:
        directions = rng.normal(size=places.shape)
        directions *= 0.1 / np.linalg.norm(directions, axis=2, keepdims=True)
        places = np.stack([places, places + directions], axis=2).reshape(n_frames, -1, 3)
    trajectory = mdtraj.Trajectory(places, topology)
    trajectory.unitcell_vectors = np.tile(length * np.eye(3), (n_frames, 1, 1))
    return trajectory


@pytest.mark.parametrize("pair", [("O", "O"), ("O", "H"), ("H", "H")])
def test_g_of_an_ideal_gas_is_one(pair):
    rdf = analysis.radial_distribution(gas(hydrogens=True), *pair, bin_width=1.0)
    assert rdf.r[-1] == pytest.approx(9.5)
    np.testing.assert_allclose(rdf.g[2:], 1, atol=0.05)


@pytest.mark.parametrize(
    ("g", "peak"),
    [
        ([0, 0.2, 1.4, 1.2, 0.1, 1.6, 1.0], (1.25, 1.4)),  # O–H of water: the second one is higher
        ([0, 1.2, 2.8, 1.1], (1.25, 2.8)),
        ([0, 0.5, 0.2], (0.75, 0.5)),
    ],
)
def test_first_peak_is_not_a_higher_one_beyond(g, peak):
    r = 0.25 + 0.5 * np.arange(len(g))
    assert analysis.RadialDistribution(r=r, g=np.array(g, float)).peak == pytest.approx(peak)


def test_g_of_a_lattice_peaks_at_its_spacing():
    lattice = gas(n_frames=1, n_molecules=64)
    lattice.xyz[0] = 0.5 * np.indices((4, 4, 4)).reshape(3, -1).T
    rdf = analysis.radial_distribution(lattice, "O", "O", r_max=6.0, bin_width=0.2)
    assert rdf.peak[0] == pytest.approx(5.0, abs=0.11)
    # six neighbors in the shell, against the mean density
    shell = 4 / 3 * np.pi * ((rdf.peak[0] + 0.1) ** 3 - (rdf.peak[0] - 0.1) ** 3)
    assert rdf.peak[1] == pytest.approx(6 / (63 / 20.0**3 * shell), rel=0.01)


def test_g_beyond_half_the_box_is_refused():
    with pytest.raises(ValueError, match=r"at most half the box, 10\.00 Å, got 11\.0 Å"):
        analysis.radial_distribution(gas(2), "O", "O", r_max=11.0)


def test_g_needs_a_box_and_pairs():
    frames = gas(2)
    with pytest.raises(ValueError, match="no pairs of O and S"):
        analysis.radial_distribution(frames, "O", "S")
    frames.unitcell_vectors = None
    with pytest.raises(ValueError, match="periodic box"):
        analysis.radial_distribution(frames, "O", "O")
    with pytest.raises(ValueError, match="periodic box"):
        analysis.density(frames)


def test_density_is_mass_over_volume():
    frames = gas(2, n_molecules=100, length=2.0)
    expected = 100 * 15.999 / AVOGADRO / 1000 / 8e-27  # g/mol to kg, nm^3 to m^3
    np.testing.assert_allclose(analysis.density(frames), expected, rtol=1e-3)


def test_dihedrals_are_those_of_the_definition():
    topology, positions = read_structure(EXAMPLES / "alanine-dipeptide.pdb")
    frame = analysis.make_frame(positions, topology)
    names = {f"{a.residue.name}-{a.name}": a.index for a in topology.atoms()}

    def angle(*atoms):
        a, b, c, d = (frame.xyz[0, names[n]].astype(float) for n in atoms)
        first, second = np.cross(b - a, c - b), np.cross(c - b, d - c)
        axis = (c - b) / np.linalg.norm(c - b)
        return np.degrees(np.arctan2(np.cross(first, second) @ axis, first @ second))

    result = analysis.backbone_dihedrals(frame)
    assert result.phi.shape == result.psi.shape == (1, 1)
    phi = angle("ACE-C", "ALA-N", "ALA-CA", "ALA-C")
    psi = angle("ALA-N", "ALA-CA", "ALA-C", "NME-N")
    assert result.phi.item() == pytest.approx(phi, abs=0.01)
    assert result.psi.item() == pytest.approx(psi, abs=0.01)
    assert abs(phi) > 10
    assert abs(psi) > 10


def test_dihedrals_need_a_peptide():
    with pytest.raises(ValueError, match="no residue has both"):
        analysis.backbone_dihedrals(gas(2))


def test_the_longest_bond_is_found():
    frames = gas(5, hydrogens=True)
    frames.xyz[3, 11] = frames.xyz[3, 10] + [0.0, 0.0, 0.17]
    longest = analysis.longest_bond(frames, frames[0])
    assert longest.ratio == pytest.approx(1.7, abs=1e-3)
    assert longest.frame == 3
    assert longest.atoms == "GAS5-O-GAS5-H"


def test_a_bond_across_the_box_is_not_long():
    frames = gas(5, hydrogens=True)
    reference = frames[0]
    frames.xyz[2, 0] += [2.0, 0.0, -2.0]  # an image of the atom
    assert analysis.longest_bond(frames, reference).ratio == pytest.approx(1, abs=1e-3)


def test_a_position_that_is_no_number_counts_as_a_long_bond():
    frames = gas(5, hydrogens=True)
    frames.xyz[3, 11] = np.nan
    ratio = analysis.longest_bond(frames, frames[0]).ratio
    assert not ratio <= 1.5


def test_a_topology_without_bonds_has_no_longest():
    with pytest.raises(ValueError, match="no bonds"):
        analysis.longest_bond(gas(2), gas(1))


def test_trajectories_come_back_from_dcd(tmp_path):
    from openmm.app import DCDFile

    topology, positions = read_structure(EXAMPLES / "water-64.pdb")
    with (tmp_path / "water.dcd").open("wb") as file:
        dcd = DCDFile(file, topology, 0.001)
        for _ in range(3):
            dcd.writeModel(positions, periodicBoxVectors=topology.getPeriodicBoxVectors())
    trajectory = analysis.load_trajectory(tmp_path / "water.dcd", topology)
    assert trajectory.n_frames == 3
    expected = analysis.make_frame(positions, topology)
    np.testing.assert_allclose(trajectory.xyz[2], expected.xyz[0], atol=1e-5)
    np.testing.assert_allclose(
        analysis.density(trajectory), analysis.density(expected)[0], rtol=1e-4
    )
