"""What a student file says of the run that made it."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openmm_mlffd.modelfile import StudentHeader
from openmm_mlffd.training.batches import StructureSource
from openmm_mlffd.training.config import ModelConfig, TrainConfig
from openmm_mlffd.training.hdf5 import Dataset


def architecture_of(model: ModelConfig) -> dict[str, Any]:
    """Architecture as in a student's header; plain PaiNN where nothing else is asked for."""
    names = ("n_channels", "n_interactions", "n_basis", "norm_softening")
    sizes = {k: getattr(model, k) for k in names}
    tail = model.tail_cutoff is not None
    if model.filters == "sine" and not (model.pair_filters or model.charges or tail):
        return {"kind": "painn", **sizes}
    return {
        "kind": "painn-variant",
        **sizes,
        "filters": model.filters,
        "pair_filters": model.pair_filters,
        "charges": model.charges,
        "tail": tail,
        "message_cutoff": model.cutoff,
    }


def student_header(
    config: TrainConfig, datasets: Sequence[Dataset], source: StructureSource
) -> StudentHeader:
    """Header of a run's student, as far as it is known before training."""
    model = config.model
    return StudentHeader(
        name=config.name,
        architecture=architecture_of(model),
        elements=list(model.elements),
        references=[0.0] * len(model.elements),
        cutoff=model.tail_cutoff or model.cutoff,
        teacher="; ".join(sorted({d.teacher for d in datasets})),
        dataset={
            "files": [d.path.name for d in datasets],
            "train_structures": len(source),
            "train_atoms": int(source.n_atoms.sum()),
            "split": [
                {k: v for k, v in d.attributes.items() if k.startswith("split")} for d in datasets
            ],
        },
        licence=config.licence,
    )


def rounded(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Errors by subset to three decimals; None where they are not known."""
    return {
        name: {k: round(v, 3) if math.isfinite(v) else None for k, v in row.items()}
        for name, row in table.items()
    }


def portable(config: TrainConfig) -> dict[str, Any]:
    """The configuration without folders of the machine."""
    values = asdict(config)
    values["data"]["files"] = [Path(f).name for f in config.data.files]
    values["data"]["hessians"] = [Path(f).name for f in config.data.hessians]
    if config.initial is not None:
        values["initial"] = Path(config.initial).name
    del values["output"]
    return values


def all_seen(dataset: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The training set of both runs together, where one is a part of the other."""
    same = all(dataset[name] == earlier.get(name) for name in ("files", "split"))
    return earlier if same and earlier["train_atoms"] > dataset["train_atoms"] else dataset
