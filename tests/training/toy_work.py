"""Work for other processes; what a number does to the one that works at it."""

import os
import signal


def double(number):
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise ArithmeticError("seven")
    return 2 * number
