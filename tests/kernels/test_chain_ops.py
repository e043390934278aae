"""From one message to the next in one kernel: the same as in plain torch, forward and backward."""

import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("warp")

from openmm_mlffd.kernels import chain_kernels, chain_ops

ops = torch.ops.mlffd
C, WIDTH, SOFTENING = 8, 4, 0.01


@pytest.fixture(params=[1, 5, 11], ids=lambda m: f"{m} atoms")
def m(request):
    return request.param


@pytest.fixture(params=[132, 2], ids=["an atom at a time", "several at a time"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(chain_ops, "MOST_BLOCKS", request.param)


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(5)
    return lambda *shape: torch.randn(*shape, generator=generator)


def state(random, m):
    return random(m, 2 * C), random(m, 3, C)


def mixing(random, n_parts):
    """Projection, inner matrix and bias, outer matrix and bias, as a layer has them."""
    return [
        random(2 * C, C), random(C, 2 * C) / 3, random(C), random(n_parts * C, C) / 3,
        random(n_parts * C),
    ]  # fmt: skip


def mixed(q, mu, weights):
    """New state by plain torch; without vectors where there are two parts."""
    project, inner, inner_bias, outer, outer_bias = weights
    u, v = (mu @ project.T).split(C, dim=2)
    norm = torch.sqrt(v.square().sum(1) + SOFTENING)
    a = silu(torch.cat([q, norm], 1) @ inner.T + inner_bias) @ outer.T + outer_bias
    parts = a.split(C, dim=1)
    q = q + parts[0] + parts[1] * (u * v).sum(1)
    return q, (mu + parts[2][:, None] * u if len(parts) == 3 else mu)


def transposed(weights):
    return [w.T.contiguous() if w.dim() == 2 else w for w in weights]


def near(found, expected, tolerance=3e-5):
    assert found.shape == expected.shape
    expected = expected.detach()
    size = max(1.0, float(expected.abs().max()))
    assert (found.double() - expected).abs().max() < tolerance * size


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_way_there_and_back_is_that_of_plain_torch(random, m, blocks, stored):
    (q, mu), weights = state(random, m), mixing(random, 3)
    to = [random(C, C) / 3, random(C), random(3 * C, C) / 3, random(3 * C)]
    kept = [random(m, 3, 2 * C), random(m, C), random(m, 3 * C), random(m, C), random(m, C)]
    new_q, new_mu, features = random(m, 2 * C), random(m, 3, C), torch.empty(m, 5, C, dtype=stored)
    ops.chain_forward_(
        q, mu, [*transposed(weights), *transposed(to)], *kept, new_q, new_mu, features, SOFTENING
    )
    x, y = q[:, :C].double().requires_grad_(), mu.double().requires_grad_()
    scalars, vectors = mixed(x, y, [w.double() for w in weights])
    inner, inner_bias, outer, outer_bias = (w.double() for w in to)
    phi = silu(scalars @ inner.T + inner_bias) @ outer.T + outer_bias
    passed = torch.cat(
        [phi[:, :C, None], phi[:, C : 2 * C, None], (phi[:, None, 2 * C :] * vectors).mT], 2
    ).mT  # fmt: skip
    near(new_q[:, :C], scalars)
    near(new_mu, vectors)
    near(features, passed, 1e-3 if stored == torch.float16 else 3e-5)
    # back, from a gradient by the new state and by what was passed on
    by_features, old_q, old_mu = random(m, 5, C), random(m, C), random(m, 3, C)
    total = (scalars * old_q).sum() + (vectors * old_mu).sum() + (passed * by_features).sum()
    expected = torch.autograd.grad(total, [x, y])
    by_q = torch.empty(m, C)
    back = [w.contiguous() for w in [*weights, *to[:3]]]
    ops.chain_backward_(  # to the place of the vectors
        mu, back, *kept, by_features, old_q, old_mu, by_q, mu, SOFTENING
    )
    near(by_q, expected[0])
    near(mu, expected[1])


@pytest.mark.parametrize("bound", [0.0, 1.5])
def test_the_last_kernel_gives_energies_and_their_gradient(random, m, blocks, bound):
    (q, mu), weights = state(random, m), mixing(random, 2)
    readout = [random(WIDTH, C), random(WIDTH)]
    of_energy, scale = random(WIDTH + 1), 0.7
    x, y = q[:, :C].double().requires_grad_(), mu.double().requires_grad_()
    scalars, _ = mixed(x, y, [w.double() for w in weights])
    hidden = silu(scalars @ readout[0].double().T + readout[1])
    expected = scale * (hidden @ of_energy[:-1].double() + of_energy[-1])
    if bound:
        bent = bound + 0.5 * bound * torch.tanh((expected.abs() - bound) / (0.5 * bound))
        expected = torch.where(expected.abs() < bound, expected, expected.sign() * bent)
    gradient = torch.autograd.grad(expected.sum(), [x, y])
    energies, by_q = torch.empty(m, dtype=torch.float64), torch.empty(m, C)
    ops.chain_last_(
        q, mu, [*transposed(weights), *transposed(readout), of_energy],
        [readout[0], weights[3], weights[1], weights[0]], energies, by_q, mu, SOFTENING, scale,
        bound,
    )  # fmt: skip
    near(energies, expected.detach())
    near(by_q, gradient[0])
    near(mu, gradient[1])


def test_more_channels_than_a_block_has_room_for_are_refused(random):
    assert chain_kernels.most_atoms(128, 64) == 8
    assert chain_kernels.most_atoms(256, 128) == 4
    assert chain_kernels.most_atoms(2048, 64) == 0
    assert chain_kernels.most_atoms(6, 4) == 0
    assert chain_ops.most_chained(128, 64) == 8 * 132


def test_tensors_that_do_not_fit_are_refused(random):
    (q, mu), weights = state(random, 3), mixing(random, 2)
    rest = [torch.empty(3, dtype=torch.float64), torch.empty(3, C), mu, SOFTENING, 1.0, 0.0]
    readout = [random(C, WIDTH), random(WIDTH), random(WIDTH + 1)]
    back = [random(WIDTH, C), weights[3], weights[1], weights[0]]
    with pytest.raises(ValueError, match=r"weight 0 must have the shape \(8, 16\)"):
        ops.chain_last_(q, mu, [*weights, *readout], back, *rest)
    with pytest.raises(ValueError, match="8 weights are needed, got 7"):
        ops.chain_last_(q, mu, [*transposed(weights), *readout[:2]], back, *rest)
    with pytest.raises(TypeError, match=r"q must be torch\.float32, got torch\.float64"):
        ops.chain_last_(q.double(), mu, [*transposed(weights), *readout], back, *rest)
