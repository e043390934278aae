"""What a command took: time and memory."""

import sys
import time


class Watch:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def report(self, structures: int, starting: float = 0.0) -> str:
        """Rate and largest memory of this process and of the largest that it started.

        Parameters
        ----------
        structures
            How many were made since.
        starting
            Part of the time in which none could be made [s]; the rate is also given without it.
        """
        seconds = time.perf_counter() - self._start
        text = f"{structures} structures in {seconds:.1f} s ({structures / seconds:.1f} per second"
        if 0.0 < starting < seconds:
            rate = structures / (seconds - starting)
            text += f"; {rate:.1f} after the {starting:.1f} s of starting"
        text += ")"
        try:
            import resource
        except ImportError:  # not on Windows
            return text
        unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes elsewhere
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
        return f"{text}; largest memory {own:.2f} GB, of another process {others:.2f} GB"
