import ase.data
import pytest

from openmm_mlffd.elements import COVALENT_RADII, MASSES, SYMBOLS, atomic_number, symbol


def test_symbols_are_those_of_ase():
    assert list(SYMBOLS) == ase.data.chemical_symbols


def test_radii_are_those_of_cordero():
    # ASE has the same table, with 0.2 Å for what is not in it
    assert COVALENT_RADII[1:] == pytest.approx(ase.data.covalent_radii[1 : len(COVALENT_RADII)])
    assert len(COVALENT_RADII) == atomic_number("Cm") + 1


def test_symbol_and_number_are_inverse():
    assert [atomic_number(symbol(z)) for z in range(1, 119)] == list(range(1, 119))


@pytest.mark.parametrize("name", ["X", "Xx", "h", ""])
def test_unknown_symbol_is_refused(name):
    with pytest.raises(ValueError, match=f"no chemical element has the symbol '{name}'"):
        atomic_number(name)


@pytest.mark.parametrize("number", [-1, 0, 119, 1000])
def test_number_of_no_element_is_shown_as_it_is(number):
    assert symbol(number) == f"Z={number}"


def test_masses_are_those_of_ase():
    assert MASSES[1:] == pytest.approx(ase.data.atomic_masses[1 : len(MASSES)], abs=1e-3)
    assert len(MASSES) == len(COVALENT_RADII)
