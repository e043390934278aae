"""Times of the messages for training and of their derivatives, and what tables of filters cost.

    python tests/benchmarks/fused_messages.py --atoms 4000 --neighbors 22 --channels 128

On a GPU if there is one. Prints for each operator its time, and the features and gradients that it
gathers for each edge over that time; then the time of the same in plain torch. Of the bundled
student on 12 sample structures follow the relative deviation of a training step's gradient and
the RMS deviation of forces from those of the plain step in float64, for splines of several
intervals and degrees.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openmm_mlffd import fused
from openmm_mlffd.kernels import reference
from openmm_mlffd.kernels.training_ops import edge_plan
from openmm_mlffd.modelfile import load_student
from openmm_mlffd.training.batches import StructureSource, make_batch
from openmm_mlffd.training.config import LossConfig, TrainConfig
from openmm_mlffd.training.hdf5 import Dataset, take
from openmm_mlffd.training.loss import TERMS
from openmm_mlffd.training.step import LossGradient, predict
from openmm_mlffd.training.targets import count_totals, training_batch

SAMPLE = Path(__file__).parents[1] / "data" / "sample.h5"
TABLES = [(32, 5), (64, 5), (128, 5), (128, 3), (256, 3), (512, 3)]
N_INTERVALS, DEGREE = 128, 5


def seconds(work: Callable[[], object], device: torch.device, repeat: int = 30) -> float:
    """Median time of a call, after three to warm up."""
    times = []
    for _ in range(3 + repeat):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[3:]))


def inputs(n_atoms: int, n_neighbors: int, n_channels: int, device: torch.device) -> dict:
    """Random atoms in boxes of 20, with about so many neighbors each, both ways."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(n_atoms) // max(20, 2 * n_neighbors)
    i = torch.arange(n_atoms).repeat_interleave(n_neighbors // 2)
    j = (i // max(20, 2 * n_neighbors)) * max(20, 2 * n_neighbors)
    size = torch.bincount(group)[group[i]]
    j = j + (torch.rand(len(i), generator=generator) * size).long()
    edges = torch.cat([torch.stack([i, j]), torch.stack([j, i])], 1)
    edges = edges[:, edges[0].argsort(stable=True)].to(device)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    geometry = random(edges.shape[1], 4)
    place = torch.rand(edges.shape[1], generator=generator).to(device) ** (1 / 3)
    geometry[:, 3] = 0.999 * N_INTERVALS * place
    return {
        "edge_index": edges,
        "geometry": geometry,
        "d_geometry": random(edges.shape[1], 4),
        "features": random(n_atoms, 5, n_channels),
        "d_features": random(n_atoms, 5, n_channels),
        "table": random(N_INTERVALS + DEGREE, 3, n_channels),
        "gradient": random(n_atoms, 4, n_channels),
        "plan": edge_plan(edges, geometry[:, 3], n_atoms, N_INTERVALS),
    }


def time_operators(n_atoms: int, n_neighbors: int, n_channels: int, device: torch.device) -> None:
    """Print a table of times."""
    a = inputs(n_atoms, n_neighbors, n_channels, device)
    ops, n_edges = torch.ops.mlffd, a["geometry"].shape[0]
    x, dx, t, u, du, g, plan = (
        a[k]
        for k in ("features", "d_features", "table", "geometry", "d_geometry", "gradient", "plan")
    )
    c = 4 * n_channels  # bytes of a row of channels
    cases = {
        "edge_plan": (lambda: edge_plan(a["edge_index"], u[:, 3], n_atoms, N_INTERVALS), 0),
        "edge_message": (lambda: ops.edge_message(x, t, u, plan, DEGREE), 5),
        "edge_message_backward": (lambda: ops.edge_message_backward(g, x, t, u, plan, DEGREE), 4),
        "  without geometry": (
            lambda: ops.edge_message_backward(g, x, t, u, plan, DEGREE, False), 4,
        ),
        "edge_message_table": (
            lambda: ops.edge_message_table(g, x, u, plan, DEGREE, N_INTERVALS), 9,
        ),
        "edge_message_tangent": (
            lambda: ops.edge_message_tangent(x, dx, t, u, du, plan, DEGREE), 10,
        ),
        "edge_message_second": (
            lambda: ops.edge_message_second(g, x, dx, t, u, du, plan, DEGREE), 4,
        ),
        "  without the geometry": (
            lambda: ops.edge_message_second(g, x, dx, t, u, du, plan, DEGREE, False), 4,
        ),
        "edge_message_second_table": (
            lambda: ops.edge_message_second_table(g, x, dx, u, du, plan, DEGREE, N_INTERVALS), 14,
        ),
    }  # fmt: skip
    print(f"{n_atoms} atoms, {n_edges} edges, {n_channels} channels, float32, {device}")
    for name, (work, rows) in cases.items():
        s = seconds(work, device)
        print(f"{name:28s} {1e6 * s:9.0f} us {rows * c * n_edges / s / 1e9:7.0f} GB/s")
    plain = seconds(lambda: _plain(a, False), device)
    print(f"{'value and first, plain torch':28s} {1e6 * plain:9.0f} us")
    plain = seconds(lambda: _plain(a, True), device, 10)
    print(f"{'with second ones, plain':28s} {1e6 * plain:9.0f} us")


def _plain(a: dict, second: bool) -> None:
    """Messages and their derivatives by autograd, with a filter of each edge from 20 waves."""
    n_channels = a["features"].shape[2]
    weight = torch.ones(3 * n_channels, 20, device=a["table"].device, requires_grad=True)
    place = a["geometry"][:, 3].detach().requires_grad_()
    waves = torch.sin(place[:, None] * torch.arange(1, 21, device=place.device) / N_INTERVALS)
    features = a["features"].detach().requires_grad_()
    directions = a["geometry"][:, :3].detach().requires_grad_()
    scalars, vectors = reference.message_sum(
        features[:, :2].flatten(1), features[:, 2:], waves @ weight.T, directions, a["edge_index"]
    )
    value = (a["gradient"][:, 0] * scalars).sum() + (a["gradient"][:, 1:] * vectors).sum()
    first = torch.autograd.grad(value, (features, directions, place), create_graph=second)
    if second:
        total = (a["d_features"] * first[0]).sum() + (a["d_geometry"][:, :3] * first[1]).sum()
        total = total + (a["d_geometry"][:, 3] * first[2]).sum()
        torch.autograd.grad(total, (features, weight))


def compare_tables(device: torch.device) -> None:
    """Print how far gradient and forces are from the plain ones in float64."""
    potential = load_student("default", device=device).train()
    potential.requires_grad_(True)
    source = StructureSource([Dataset(SAMPLE)], "all")
    structures = take(source.memory, np.arange(12))
    config = TrainConfig(data=None, loss=LossConfig(forces_delta=0.02))  # type: ignore[arg-type]
    truth = []
    print("intervals, degree, precision: deviation of the gradient, of forces [eV/A]")
    for real in (torch.float64, torch.float32):
        potential.network.to(real)
        batch = training_batch(make_batch(structures, potential, device), potential)
        batch = type(batch)(*[t.to(real) if t.is_floating_point() else t for t in batch])
        weights = list(potential.network.parameters())
        ones = torch.ones(len(TERMS), dtype=real, device=device)
        arguments = (weights, list(batch), count_totals(batch, 0.3).to(real), ones)
        for table in [None, *TABLES]:
            network = potential.network
            if table is not None:
                fused._WAVES = table
                network = fused.FusedNetwork(potential)
            gradients = LossGradient(potential, config, network)(*arguments)[1]
            gradient = torch.cat([x.flatten().double() for x in gradients])
            forces = predict(network, batch, potential.energy_scale).forces.detach().double()
            truth = truth or [gradient, forces]
            deviation = float((gradient - truth[0]).norm() / truth[0].norm())
            rms = float((forces - truth[1]).square().mean().sqrt())
            name = "plain" if table is None else f"{table[0]}, {table[1]}"
            print(f"{name:8s} {real!s:14s} {deviation:.1e} {rms:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atoms", type=int, default=4000)
    parser.add_argument("--neighbors", type=int, default=22)
    parser.add_argument("--channels", type=int, default=128)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    time_operators(options.atoms, options.neighbors, options.channels, device)
    compare_tables(device)


if __name__ == "__main__":
    main()
