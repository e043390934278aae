import numpy as np
import pytest

from openmm_mlffd.validation import analysis
from openmm_mlffd.validation.suite.shape import (
    amide_torsions,
    shape_numbers,
    tetrahedral,
    torsion_angles,
    water_distances,
)
from openmm_mlffd.validation.suite.static import turn
from openmm_mlffd.validation.suite.systems import load_system

NO_BOX = np.zeros((1, 3, 3))


@pytest.fixture(scope="module")
def peptide():
    return load_system("alanine dipeptide")


def test_a_molecule_that_was_only_moved_has_its_shape(peptide):
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    found = shape_numbers(peptide, (peptide.positions @ rotation + 5.0)[None], NO_BOX)
    assert found["longest_bond"] == pytest.approx(1.0)
    assert found["largest_rmsd"] == pytest.approx(0.0, abs=1e-6)
    assert found["largest_omega"] == pytest.approx(0.0, abs=1e-6)
    assert found["inverted_centers"] == 0


def test_a_mirrored_molecule_has_every_center_inverted(peptide):
    found = shape_numbers(peptide, (peptide.positions * [1, 1, -1])[None], NO_BOX)
    assert found["inverted_centers"] == len(tetrahedral(peptide)) == 4  # three methyls and Cα


def test_an_amide_that_turned_is_told_by_how_far(peptide):
    amides = amide_torsions(peptide)
    assert len(amides) == 2
    before = torsion_angles(peptide.positions[None], amides)[0]
    assert abs(before) == pytest.approx(180.0, abs=15.0)
    turned = turn(peptide, peptide.positions, tuple(amides[0]), before[0] + 70.0)
    found = shape_numbers(peptide, turned[None], NO_BOX)
    assert found["largest_omega"] == pytest.approx(70.0, abs=1e-6)
    assert found["largest_rmsd"] > 0.3


def test_distances_of_water_are_those_of_mdtraj():
    system = load_system("water box")
    rng = np.random.default_rng(0)
    frames = system.positions + rng.normal(scale=0.1, size=(3, *system.positions.shape))
    cells = system.cell * np.array([1.0, 1.01, 0.99])[:, None, None]
    trajectory = analysis.make_trajectory(frames, system.topology, cell=cells)
    for name, (r, g) in water_distances(system, frames, cells).items():
        expected = analysis.radial_distribution(
            trajectory, "O", name[-1], r_max=float(r[-1] + 0.025), bin_width=0.05
        )
        np.testing.assert_allclose(r, expected.r, atol=1e-3)
        near = r < 5.5
        np.testing.assert_allclose(g[near], expected.g[near], rtol=0.1, atol=0.1)
