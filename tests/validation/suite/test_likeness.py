import numpy as np
import pytest

from openmm_mlffd.units import BOLTZMANN
from openmm_mlffd.validation.suite.likeness import (
    Feature,
    compare_maps,
    compare_radial,
    free_energy_map,
    geometry_features,
)
from openmm_mlffd.validation.suite.plan import PEPTIDE, WATER
from openmm_mlffd.validation.suite.systems import load_system


def rattled(system, n, scale, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(scale=scale, size=(n, *system.positions.shape))
    return (system.positions + noise).astype(np.float32)


def test_a_trajectory_is_like_itself_and_unlike_a_hotter_one():
    system = load_system(PEPTIDE)
    a, b = rattled(system, 300, 0.03, 0), rattled(system, 300, 0.03, 1)
    hot = rattled(system, 300, 0.09, 2)
    for feature in geometry_features(system, a, b):
        found = feature.numbers()
        assert found["js"] < 1.5 * found["js_noise"], feature.name
    far = {f.name: f.numbers() for f in geometry_features(system, a, hot)}
    assert set(far) == {
        "bond lengths", "angles", "torsions", "radius of gyration",
        "RMSD from the start, heavy atoms",
    }  # fmt: skip
    for name in ("bond lengths", "angles"):
        assert far[name]["js"] > 2 * far[name]["js_noise"], name
    assert far["RMSD from the start, heavy atoms"]["mae"] > 0.05


def test_a_bond_that_is_longer_shows_in_the_means():
    system = load_system("methanol")
    a = rattled(system, 60, 0.01, 0)
    longer = a.copy()
    longer[:, 1] += 0.06 * (a[:, 1] - a[:, 0]) / np.linalg.norm(a[:, 1] - a[:, 0], axis=1)[:, None]
    found = geometry_features(system, longer, a)[0].numbers()
    assert found["mae"] > 0.01
    assert found["mae"] > 5 * found["mae_error"]


def test_angles_are_binned_over_the_whole_circle():
    rng = np.random.default_rng(0)
    values = rng.uniform(-180, 180, (200, 1))
    feature = Feature("torsions", "degrees", values, values, periodic=True)
    assert feature.edges[0] == -180
    assert feature.edges[-1] == 180
    assert feature.numbers()["js"] == 0.0
    assert "mae" not in feature.numbers()


def test_free_energy_is_that_of_the_populations():
    dihedrals = np.array([[-80.0, 80.0]] * 100 + [[60.0, -60.0]] * 10)
    free = free_energy_map(dihedrals, 300.0)
    known = np.sort(free[np.isfinite(free)])
    np.testing.assert_allclose(known, [0.0, BOLTZMANN * 300 * np.log(10)])


def test_differences_of_free_energies_are_found():
    rng = np.random.default_rng(0)

    def wells(share, n=4000):
        first = rng.random(n) < share
        return np.where(first[:, None], [-82.5, 82.5], [67.5, -67.5]).astype(float)

    kt = 1e3 * BOLTZMANN * 300
    alike = compare_maps(wells(0.5), wells(0.5), 300.0)
    other = compare_maps(wells(0.8), wells(0.5), 300.0)
    assert alike["mae"] < 3
    assert alike["shared"] == 1.0
    # ln 4 between the wells, half of it on either side of the mean
    assert other["mae"] == pytest.approx(kt * np.log(4) / 2, rel=0.1)
    assert other["mae"] > 5 * other["mae_error"]


def test_the_same_liquid_has_the_same_structure():
    from openmm_mlffd.validation.suite.ensembles import analysis

    system = load_system(WATER)

    def frames(scale, seed):
        cells = np.tile(system.cell, (10, 1, 1))
        return analysis.make_trajectory(
            rattled(system, 10, scale, seed), system.topology, cell=cells
        )

    alike = compare_radial(frames(0.05, 0), frames(0.05, 1))
    other = compare_radial(frames(0.05, 0), frames(0.4, 1))
    for pair in ("O–O", "O–H"):
        assert alike[pair]["mae"] < 0.1
        assert other[pair]["mae"] > 2 * alike[pair]["mae"]
    assert alike["O–O"]["peak_student"][0] == pytest.approx(2.8, abs=0.15)
