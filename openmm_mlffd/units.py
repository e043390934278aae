"""Every physical constant and unit conversion of the project, once. Imports nothing.

Inside the project lengths are in Å, energies in eV, masses in amu. Values are CODATA 2018
(https://physics.nist.gov/cuu/Constants), the set that follows from the 2019 SI.
"""

from typing import Final

ELEMENTARY_CHARGE: Final = 1.602176634e-19
"""Elementary charge [C], exact."""

AVOGADRO: Final = 6.02214076e23
"""Avogadro constant [1/mol], exact."""

BOLTZMANN: Final = 1.380649e-23 / ELEMENTARY_CHARGE
"""Boltzmann constant [eV/K], exact."""

KJ_PER_MOL_PER_EV: Final = ELEMENTARY_CHARGE * AVOGADRO / 1000.0
"""Energy of 1 eV per particle [kJ/mol], exact."""

ANGSTROM_PER_NM: Final = 10.0
"""Length of 1 nm [Å], exact."""

KJ_PER_MOL_NM_PER_EV_ANGSTROM: Final = KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM
"""Force of 1 eV/Å [kJ/mol/nm], exact."""

BOHR: Final = 0.529177210903
"""Bohr radius [Å]."""

HARTREE: Final = 27.211386245988
"""Hartree energy [eV]."""

COULOMB: Final = HARTREE * BOHR
"""Coulomb energy of two elementary charges 1 Å apart [eV]."""

KJ_PER_KCAL: Final = 4.184
"""Thermochemical kilocalorie [kJ], exact."""

BAR_PER_EV_PER_CUBIC_ANGSTROM: Final = ELEMENTARY_CHARGE * 1e30 / 1e5
"""Pressure of 1 eV/Å^3 [bar], exact."""

FEMTOSECONDS_PER_TIME_UNIT: Final = (1e-3 / AVOGADRO / ELEMENTARY_CHARGE) ** 0.5 * 1e5
"""The time unit that goes with Å, eV and amu, Å·sqrt(amu/eV) [fs]."""

SPEED_OF_LIGHT: Final = 299792458.0
"""Speed of light [m/s], exact."""

WAVENUMBER: Final = (
    1e15 / FEMTOSECONDS_PER_TIME_UNIT / (2 * 3.141592653589793 * SPEED_OF_LIGHT * 100)
)
"""Wavenumber of an angular frequency of 1 per time unit, sqrt(eV/amu)/Å [1/cm]."""
