import pytest
from ase import units as ase_units
from openmm import unit
from scipy import constants

from openmm_mlffd import units


def test_energies_and_lengths_are_codata():
    # scipy has CODATA 2022, a last digit or two away
    joule_per_ev = constants.elementary_charge
    assert pytest.approx(96.48533212, rel=1e-10) == units.KJ_PER_MOL_PER_EV
    assert joule_per_ev * constants.Avogadro / 1e3 == units.KJ_PER_MOL_PER_EV
    assert pytest.approx(constants.k / joule_per_ev, rel=1e-14) == units.BOLTZMANN
    assert pytest.approx(constants.value("Bohr radius") * 1e10, rel=1e-9) == units.BOHR
    hartree = constants.value("Hartree energy in eV")
    assert pytest.approx(hartree, rel=1e-11) == units.HARTREE


def test_coulomb_is_the_energy_of_two_charges_one_angstrom_apart():
    joule = constants.e**2 / (4 * constants.pi * constants.epsilon_0 * 1e-10)
    assert pytest.approx(joule / constants.e, rel=1e-9) == units.COULOMB


def test_conversions_are_those_of_openmm():
    kj_per_mol = (1.0 * unit.elementary_charge * unit.volt).in_units_of(unit.kilojoule)
    per_ev = kj_per_mol.value_in_unit(unit.kilojoule) * unit.AVOGADRO_CONSTANT_NA._value
    assert per_ev == pytest.approx(units.KJ_PER_MOL_PER_EV, rel=1e-9)
    assert (1.0 * unit.nanometer).value_in_unit(unit.angstrom) == units.ANGSTROM_PER_NM
    assert (1.0 * unit.kilocalorie).value_in_unit(unit.kilojoule) == units.KJ_PER_KCAL
    force = units.KJ_PER_MOL_PER_EV * units.ANGSTROM_PER_NM
    assert force == units.KJ_PER_MOL_NM_PER_EV_ANGSTROM


def test_time_and_pressure_are_those_of_ase():
    # ASE has CODATA 2014, hence the tolerance
    assert pytest.approx(1 / ase_units.fs, rel=1e-6) == units.FEMTOSECONDS_PER_TIME_UNIT
    bar = 1 / (ase_units.bar)
    assert pytest.approx(bar, rel=1e-6) == units.BAR_PER_EV_PER_CUBIC_ANGSTROM
