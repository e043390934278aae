"""What the report draws of constant-energy runs."""

import numpy as np

from openmm_mlffd.validation.conservation import WINDOW, EnergyTrace
from openmm_mlffd.validation.suite.nve_section import _thinned


def test_long_traces_are_thinned_but_for_their_begin():
    time = 0.005 * np.arange(20_001)
    trace = EnergyTrace(
        timestep=0.5, time=time, potential=np.sin(time), kinetic=-np.sin(time), shadow=0 * time,
        n_atoms=10, n_dof=27, end=None, seconds_per_step=1e-3,
    )  # fmt: skip
    thin = _thinned(trace, most=100)
    assert 100 <= len(thin.time) < 200
    assert (thin.time <= WINDOW).sum() == (time <= WINDOW).sum() == 41
    np.testing.assert_array_equal(thin.potential, np.sin(thin.time))
    assert thin.time[-1] > 0.98 * time[-1]
