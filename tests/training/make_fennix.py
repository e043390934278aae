"""Write a randomly initialised model of FeNNol with ANI's features, run by a Python with FeNNol."""

import sys

import jax

jax.config.update("jax_enable_x64", True)
from fennol import FENNIX  # noqa: E402

ELEMENTS = ["H", "C", "N", "O"]
model = FENNIX(
    cutoff=5.2,
    rng_key=jax.random.PRNGKey(0),
    preprocessing={
        "angular_graph": {
            "module_name": "GRAPH_FILTER",
            "parent_graph": "graph",
            "cutoff": 3.5,
            "graph_key": "graph_angle",
        },
        "angles": {"module_name": "GRAPH_ANGULAR_EXTENSION", "graph_key": "graph_angle"},
    },
    modules={
        "features": {
            "module_name": "ANI_AEV",
            "species_order": ELEMENTS,
            "graph_angle_key": "graph_angle",
        },
        "energy": {
            "module_name": "CHEMICAL_NET",
            "species_order": ELEMENTS,
            "neurons": [16, 1],
            "input_key": "embedding",
        },
    },
    energy_terms=["energy"],
)
model.save(sys.argv[1])
