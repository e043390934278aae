import numpy as np
import pytest
import torch

from openmm_mlffd.graph import build_graph
from openmm_mlffd.painn import NORM_SOFTENING, PaiNN
from openmm_mlffd.potential import edge_vectors
from openmm_mlffd.radial import SOFTENING

CUTOFF = 4.0


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def mlp(weights, name, x):
    hidden = linear(weights, f"{name}.0", x)
    return linear(weights, f"{name}.2", hidden / (1 + np.exp(-hidden)))


def painn_by_hand(network, species, vectors, edge_index):
    """Figure 2 of arXiv 2102.03150 in numpy, edge by edge."""
    w = {k: v.detach().numpy() for k, v in network.state_dict().items()}
    n_basis, channels = network.basis.n_basis, network.n_channels
    n = np.arange(1, n_basis + 1)
    s = w["embedding.weight"][species]
    v = np.zeros((len(species), 3, channels))
    for block in range(len(network.interactions)):
        phi = mlp(w, f"interactions.{block}.context", s)
        ds, dv = np.zeros_like(s), np.zeros_like(v)
        for (i, j), edge in zip(edge_index.T, vectors, strict=True):
            r = np.sqrt(edge @ edge + SOFTENING**2)
            x = r / CUTOFF
            wave = np.sqrt(2 / CUTOFF) * np.sin(n * np.pi * x) / r
            wave = wave * (1 - 28 * x**6 + 48 * x**7 - 21 * x**8)
            messages = np.split(
                linear(w, f"interactions.{block}.filter", wave) * phi[j], phi.shape[1] // channels
            )
            ds[i] += messages[0]
            dv[i] += messages[1] * (edge / r)[:, None]
            if block:
                dv[i] += messages[2] * v[j]
        s, v = s + ds, v + dv
        uv = v @ w[f"mixings.{block}.project.weight"].T
        u, vv = uv[..., :channels], uv[..., channels:]
        norm = np.sqrt((vv**2).sum(1) + NORM_SOFTENING)
        a = mlp(w, f"mixings.{block}.context", np.concatenate([s, norm], 1))
        a_ss, a_sv, a_vv = np.split(a, 3, axis=1)
        s = s + a_ss + a_sv * (u * vv).sum(1)
        v = v + a_vv[:, None, :] * u
    return mlp(w, "readout", s)[:, 0]


def make_network(n_interactions=2):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = PaiNN(
            4, n_channels=8, n_interactions=n_interactions, n_basis=6, cutoff=CUTOFF
        ).double()
    return network.requires_grad_(False)


@pytest.mark.parametrize("n_interactions", [1, 2, 3])
def test_energies_are_those_of_the_paper(ethanol, n_interactions):
    network = make_network(n_interactions)
    species = torch.tensor(ethanol.numbers) % 4
    graph = build_graph(torch.tensor(ethanol.positions), species, cutoff=CUTOFF)
    vectors = edge_vectors(graph)
    found = network(species, vectors, graph.edge_index).numpy()
    expected = painn_by_hand(network, species.numpy(), vectors.numpy(), graph.edge_index.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.std() > 0.01


def test_an_atom_feels_others_as_far_as_the_messages_reach():
    network = make_network(n_interactions=2)
    chain = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([3.0, 0.1, 0.2])
    species = torch.zeros(5, dtype=torch.int64)

    def energies(species):
        graph = build_graph(chain, species, cutoff=CUTOFF)
        return network(species, edge_vectors(graph), graph.edge_index)

    changed = species.clone()
    changed[0] = 1
    difference = (energies(changed) - energies(species)).abs()
    assert (difference[:3] > 1e-6).all()
    assert difference[3:].eq(0).all()


def test_network_tells_angles_apart():
    # two shapes with the same distances from the middle atom and beyond the cutoff of the others
    network = make_network(n_interactions=1)
    species = torch.zeros(3, dtype=torch.int64)
    edge_index = torch.tensor([[0, 0], [1, 2]])
    straight = torch.tensor([[3.0, 0, 0], [-3.0, 0, 0]], dtype=torch.float64)
    bent = torch.tensor([[3.0, 0, 0], [0, 3.0, 0]], dtype=torch.float64)
    a, b = (network(species, v, edge_index)[0] for v in (straight, bent))
    assert abs(a - b) > 1e-6
