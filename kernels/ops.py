"""Importing this module registers every operator `torch.ops.mlffd.*`."""

from openmm_mlffd.kernels import (  # noqa: F401
    chain_ops,
    edge_ops,
    message_ops,
    neighbor_ops,
    node_ops,
    training_ops,
)
from openmm_mlffd.kernels.library import LIBRARY

# Compiled students name it where it is never called. What they need is then said by the error of
# processes in which it is not registered: "Unknown builtin op: mlffd::import_..._first".
LIBRARY.define("import_openmm_mlffd_kernels_ops_first(bool value) -> bool")
LIBRARY.impl(
    "import_openmm_mlffd_kernels_ops_first", lambda value: value, "CompositeExplicitAutograd"
)
