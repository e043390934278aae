"""What the energies along a constant-energy run say. Arithmetic only: no engine."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.units import BOLTZMANN

HALVING_RATIO = (3.0, 5.0)
"""Energy fluctuations must fall by a factor in this range when the time step is halved."""

DRIFT_OVER_KINETIC_STD = 0.01
"""The drift over a short run must be below this fraction of the spread of the kinetic energy."""

SLOPE_KT = 0.01
"""The drift of a long run must be below this [kT/ns per degree of freedom] …"""

SLOPE_ERRORS = 1.0
"""… or above it by no more than so many of its standard errors."""

SLOPE_KT_DURATION = 50.0
"""Shorter runs [ps] do not resolve a slope of `SLOPE_KT`."""

BLOCKS = 20
"""The error of a slope is that of the means of so many blocks."""

WINDOW = 0.2
"""Time steps are compared over this time [ps] from the start, while their trajectories agree."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A measured number and the range that it should lie in."""

    name: str
    """What was measured."""

    value: float
    """The number."""

    unit: str
    """Its unit; empty if it has none."""

    high: float
    """Largest value that passes."""

    low: float = 0.0
    """Smallest value that passes."""

    @property
    def passed(self) -> bool:
        """Whether the value is in the range; NaN is not."""
        return self.low <= self.value <= self.high


@dataclass(frozen=True, kw_only=True)
class EnergyTrace:
    """Energies along a constant-energy run."""

    timestep: float
    """[fs]."""

    time: NDArray[np.float64]
    """[ps], shape (n_samples,); starts at 0."""

    potential: NDArray[np.float64]
    """Potential energy [eV], shape (n_samples,)."""

    kinetic: NDArray[np.float64]
    """Kinetic energy at the same times [eV], shape (n_samples,)."""

    shadow: NDArray[np.float64]
    """Shadow energy one step before these times [eV], shape (n_samples,); NaN where not known.

    Velocity Verlet does not conserve the total energy E = V + K but, up to the fourth power of
    the time step h, E + h²/12 d²V/dt² + h²/24 Σ F²/m. Drift shows in it as in E, without the
    ripple. The second derivative is that of three steps. It is not known in the first three steps
    nor with constraints.

    References
    ----------
    Engle, Skeel, Drees 2005, J. Comput. Phys. 206, 432, doi:10.1016/j.jcp.2004.12.009.
    """

    n_atoms: int
    """Particles with a mass."""

    n_dof: int
    """Degrees of freedom."""

    end: NDArray[np.float64]
    """Positions at the end of the run [nm], shape (n_particles, 3)."""

    seconds_per_step: float
    """Wall time of a step, sampling included [s]."""

    @property
    def total(self) -> NDArray[np.float64]:
        """Total energy [eV], shape (n_samples,)."""
        return self.potential + self.kinetic

    @property
    def temperature(self) -> NDArray[np.float64]:
        """Of the kinetic energy [K], shape (n_samples,)."""
        return temperature(self.kinetic, self.n_dof)


@dataclass(frozen=True, kw_only=True)
class Conservation:
    """How well one run conserves its energy."""

    timestep: float
    """[fs]."""

    duration: float
    """[ps]."""

    slope: float
    """Drift by linear regression, of the shadow energy where it is known [meV/atom/ns]."""

    slope_error: float
    """Its standard error, from blocks [meV/atom/ns]."""

    slope_kt: float
    """The same drift [kT/ns per degree of freedom], kT at the temperature asked for."""

    slope_kt_error: float
    """Its standard error [kT/ns per degree of freedom]."""

    drift_over_kinetic_std: float
    """Size of the drift over the whole run / standard deviation of the kinetic energy."""

    total_slope: float
    """Slope of the total energy itself [meV/atom/ns]."""

    total_slope_error: float
    """Its standard error, from blocks [meV/atom/ns]; the ripple makes it large in short runs."""

    rms: float
    """Standard deviation of the total energy [meV/atom]."""

    mean_temperature: float
    """Of the kinetic energy [K]."""

    seconds_per_step: float
    """Wall time of a step [s]."""


def temperature(kinetic: NDArray[np.float64], n_dof: int) -> NDArray[np.float64]:
    """Temperature [K] of kinetic energies [eV] of so many degrees of freedom."""
    return 2 * kinetic / (n_dof * BOLTZMANN)


def slope_with_error(
    x: NDArray[np.float64], y: NDArray[np.float64], n_blocks: int = BLOCKS
) -> tuple[float, float]:
    """Slope of a series by linear regression, and its standard error.

    Parameters
    ----------
    x, y
        The series, shape ``(n,)``, in the order of ``x``, which is evenly spaced.
    n_blocks
        Number of blocks whose means the error is taken from.

    Raises
    ------
    ValueError
        If there are fewer than two samples per block.

    Notes
    -----
    What is left of block means without the line is taken for the sum of a random walk and of noise
    without memory, their shares by restricted maximum likelihood. Scatter about the line alone
    makes the error of the slope of a random walk, as which energies wander, two to three times
    too small: a line follows a walk.
    """
    if len(x) < 2 * n_blocks:
        raise ValueError(f"at least {2 * n_blocks} samples are needed for a slope, got {len(x)}")
    slope = float(np.polynomial.Polynomial.fit(x, y, 1).convert().coef[1])
    x_means, y_means = (
        np.array([part.mean() for part in np.array_split(values, n_blocks)]) for values in (x, y)
    )
    return slope, _slope_error(x_means - x_means.mean(), y_means - y_means.mean())


def _slope_error(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Of block means, in which a random walk and white noise are mixed; x has the mean 0."""
    n = len(x)
    weights = x / (x @ x)
    design = np.column_stack([np.ones(n), x])
    if np.ptp(y - weights @ y * x) <= 1e-12 * np.ptp(y):
        return 0.0
    index = np.arange(n)
    walk = np.minimum.outer(index, index) + 0.5  # covariance of the means of blocks of a walk
    walk[index, index] = index + 1 / 3
    best, variance = -math.inf, math.nan
    for share in (0.0, *np.geomspace(1e-4, 1.0, 25)):
        covariance = (1 - share) * np.eye(n) + share * walk
        root = np.linalg.cholesky(covariance)
        q, r = np.linalg.qr(np.linalg.solve(root, design))
        white = np.linalg.solve(root, y)
        rest = white - q @ (q.T @ white)
        scale = float(rest @ rest) / (n - 2)
        determinants = np.log(np.diag(root)).sum() + np.log(np.abs(np.diag(r))).sum()
        likelihood = -0.5 * (n - 2) * math.log(scale) - float(determinants)
        if likelihood > best:
            best, variance = likelihood, scale * float(weights @ covariance @ weights)
    return math.sqrt(variance)


def conservation(trace: EnergyTrace, temperature: float = 300.0) -> Conservation:
    """How well a run conserves its energy.

    Parameters
    ----------
    trace
        The run.
    temperature
        Of the kT in kT/ns/dof [K].
    """
    known = np.isfinite(trace.shadow)
    total = slope_with_error(trace.time, trace.total)  # eV/ps
    slope, error = (
        slope_with_error(trace.time[known], trace.shadow[known]) if known.any() else total
    )
    duration = float(trace.time[-1] - trace.time[0])
    per_atom = 1e6 / trace.n_atoms  # eV/ps to meV/ns
    per_dof = 1e3 / (trace.n_dof * BOLTZMANN * temperature)  # eV/ps to kT/ns
    return Conservation(
        timestep=trace.timestep,
        duration=duration,
        slope=slope * per_atom,
        slope_error=error * per_atom,
        slope_kt=slope * per_dof,
        slope_kt_error=error * per_dof,
        drift_over_kinetic_std=abs(slope) * duration / float(trace.kinetic.std()),
        total_slope=total[0] * per_atom,
        total_slope_error=total[1] * per_atom,
        rms=1e3 * float(trace.total.std()) / trace.n_atoms,
        mean_temperature=float(trace.temperature.mean()),
        seconds_per_step=trace.seconds_per_step,
    )


def halving_ratio(fine: EnergyTrace, coarse: EnergyTrace, window: float = WINDOW) -> float:
    """By what factor the fluctuation of the energy falls when the time step is halved.

    4 if forces are the gradient of the energy, since velocity Verlet conserves the energy up to
    a term in the square of the time step; 1 if they are not, 2 for a first-order scheme. If the
    time steps are not as 1 : 2, the ratio is that of the power law through the two.

    Parameters
    ----------
    fine, coarse
        Runs from the same start with a smaller and a larger time step.
    window
        Compare only so much from the start [ps]: as long as both follow one trajectory the ratio
        is 4 within 5 %, while over picoseconds it scatters between 2.5 and 5.5, because the
        amplitudes of fast vibrations then differ between the runs.

    Raises
    ------
    ValueError
        If a run has fewer than ten samples in the window.
    """
    rms = []
    for trace in (fine, coarse):
        total = trace.total[trace.time <= window * (1 + 1e-9)]
        if len(total) < 10:
            raise ValueError(
                f"at least 10 samples are needed in the first {window} ps, got {len(total)}"
            )
        rms.append(total.std())
    order = math.log(rms[1] / rms[0]) / math.log(coarse.timestep / fine.timestep)
    return 2.0**order
