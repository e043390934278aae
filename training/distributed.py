"""Training by several processes, as `torchrun` starts them; one process needs nothing of this."""

import logging
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openmm_mlffd.training.config import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """The processes of a run, each with a device of its own.

    Every step's structures are divided among them and gradients are summed, so that the result
    is that of one process, but for rounding.

    Parameters
    ----------
    rank
        Number of this process.
    count
        Number of processes.
    local_rank
        Number of this process on its machine.

    Notes
    -----
    `close` must be called where there are several.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._owns_group = False
        if count > 1 and not dist.is_initialized():
            # sums on the GPU go through NCCL, those of the host through gloo
            on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
            self._owns_group = True

    @classmethod
    def from_environment(cls) -> "Processes":
        """The processes that `torchrun` describes by its variables, or one process without them.

        Raises
        ------
        ConfigError
            If only some of the variables are set.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise ConfigError(
                f"RANK is set, but not {', '.join(missing)}; start several processes with "
                "`torchrun --nproc-per-node N -m openmm_mlffd.cli train CONFIG`"
            )
        return cls(*(int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process; all of them must ask."""
        if self.count == 1:
            return flag
        votes = torch.tensor(float(flag))
        dist.all_reduce(votes)
        return bool(votes > 0)

    def of_first(self, value: Any) -> Any:
        """The first process's value, in all of them; of plain numbers and lists of them."""
        if self.count == 1:
            return value
        flat = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(flat, 0)
        return flat.tolist()

    def close(self) -> None:
        """Leave the group, if it was made here, once all are about to."""
        if self._owns_group:
            dist.barrier()
            dist.destroy_process_group()
            self._owns_group = False

    def end(self) -> None:
        """Close, and end this process if it is one of several: the last thing that it does.

        Threads of PyTorch may still be there when the interpreter takes itself apart; now and
        then that aborts it, and `torchrun` takes a run that is done for one that failed.
        """
        several = self._owns_group
        self.close()
        if several:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
