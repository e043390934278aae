import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.kernels import node_ops, reference

ops = torch.ops.mlffd
SIZES = [(7, 8), (3, 5), (1, 128), (0, 4)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SOFTENING = 0.01


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


@pytest.fixture
def random(dtype):
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def same(found, expected):
    assert found.shape == expected.shape
    if found.numel():
        assert (found.double() - expected).abs().max() < TOLERANCE[found.dtype]


def leaves(*tensors):
    return [t.double().clone().requires_grad_() for t in tensors]


def test_norms_go_beside_the_scalars(random, size):
    m, c = size
    uv, q = random(m, 3, 2 * c), random(m, 2 * c)
    before = q.clone()
    ops.node_norms_(uv, q, SOFTENING, False)
    same(q[:, c:], reference.node_norms(uv.double(), SOFTENING))
    assert torch.equal(q[:, :c], before[:, :c])


def test_silu_and_its_derivative(random, size):
    m, c = size
    hidden, bias, gradient = 3 * random(m, c), random(c), random(m, c)
    out = torch.empty_like(hidden)
    ops.node_silu_(hidden, bias, out, False)
    (x,) = leaves(hidden)
    expected = torch.nn.functional.silu(x + bias.double())
    same(out, expected)
    (by_x,) = torch.autograd.grad(expected, x, gradient.double())
    ops.node_silu_backward_(hidden, bias, gradient, False)
    same(gradient, by_x)


@pytest.mark.parametrize("last", [False, True])
def test_mixing_and_its_derivatives(random, size, last):
    m, c = size
    n_parts = 2 if last else 3
    uv, a, bias = random(m, 3, 2 * c), random(m, n_parts * c), random(n_parts * c)
    q, mu, new_q, new_mu = random(m, 2 * c), random(m, 3, c), random(m, 2 * c), random(m, 3, c)
    ops.node_mix_(uv, a, bias, q, mu, new_q, new_mu, False)
    x = leaves(uv, a, q[:, :c], mu)
    scalars, vectors = reference.node_mix(x[0], x[1], bias.double(), x[2], None if last else x[3])
    same(new_q[:, :c], scalars)
    if not last:
        same(new_mu, vectors)
    # backward: with what comes through the inputs of the perceptron, scalars and norms
    by_q, by_mu, by_input = random(m, c), random(m, 3, c), random(m, 2 * c)
    total = (scalars * by_q.double()).sum()
    if not last:
        total = total + (vectors * by_mu.double()).sum()
    inputs = torch.cat([x[2], reference.node_norms(x[0], SOFTENING)], dim=1)
    through = (inputs * by_input.double()).sum()
    by_uv, by_old_q = torch.autograd.grad(total + through, [x[0], x[2]], retain_graph=True)
    (expected_by_a,) = torch.autograd.grad(total, x[1])
    by_a = torch.empty_like(a)
    ops.node_mix_backward_(uv, by_q, by_mu, by_a, False)
    same(by_a, expected_by_a)
    ops.node_project_backward_(a, bias, by_input, by_mu, by_q, uv, SOFTENING, False)
    same(uv, by_uv)
    same(by_q, by_old_q)


@pytest.mark.parametrize("in_place", [False, True])
def test_features_and_their_derivatives(random, size, in_place):
    m, c = size
    uv, a, a_bias, mu = random(m, 3, 2 * c), random(m, 3 * c), random(3 * c), random(m, 3, c)
    bias, features, scale = random(3 * c), random(m, 5, c), random(m, c)
    phi = features.view(m, 5 * c)[:, : 3 * c] if in_place else random(m, 3 * c)
    x = leaves(phi, mu + (a[:, 2 * c :] + a_bias[2 * c :]).unsqueeze(1) * uv[:, :, :c])
    ops.node_features_(phi, bias, x[1].detach().to(phi), features, scale)
    expected = reference.node_features(x[0], bias.double(), x[1])
    same(features, expected)
    same(scale, x[0][:, 2 * c :] + bias[2 * c :].double())
    by_features, old_q, old_mu = random(m, 5, c), random(m, c), random(m, 3, c)
    by_phi, by_vectors = torch.autograd.grad(expected, x, by_features.double())
    by_q, by_mu = (old_q, old_mu) if in_place else (random(m, c), random(m, 3, c))
    expected_q, expected_mu = old_q.double(), old_mu.double() + by_vectors
    ops.node_features_backward_(
        uv, a, a_bias, mu, scale, by_features, old_q, old_mu, by_q, by_mu, False
    )
    same(by_features.view(m, 5 * c)[:, : 3 * c], by_phi)
    same(by_q, expected_q)
    same(by_mu, expected_mu)


@pytest.mark.parametrize("bound", [0.0, 0.7])
def test_readout_and_its_derivative(random, dtype, bound):
    hidden, bias, weight = random(50, 9), random(9), random(10)
    energies = torch.empty(50, dtype=torch.float64)
    (x,) = leaves(hidden)
    expected = reference.node_readout(x, bias.double(), weight.double(), 2.5, bound)
    (by_hidden,) = torch.autograd.grad(expected.sum(), x)
    ops.node_readout_(hidden, bias, weight, energies, 2.5, bound, False)
    assert (energies - expected).abs().max() < 10 * TOLERANCE[dtype]
    same(hidden, by_hidden)
    if bound:
        assert 0 < (expected.abs() < bound).sum() < 50


def test_reduced_products_lose_nothing_more_of_what_was_rounded_for_them():
    generator = torch.Generator().manual_seed(1)
    hidden, bias = torch.randn(40, 32, generator=generator), torch.zeros(32)
    exact, rounded = torch.empty_like(hidden), torch.empty_like(hidden)
    ops.node_silu_(hidden, bias, exact, False)
    ops.node_silu_(hidden, bias, rounded, True)
    assert ((rounded - exact) / exact).abs().max() <= 2**-11
    assert (rounded.view(torch.int32) & 0x1FFF).eq(0).all()
    weight = node_ops._cut(torch.randn(32, 6, generator=generator))
    out = torch.empty(40, 6)
    ops.product_(rounded, weight, out, False)
    assert torch.equal(out, rounded @ weight)
    ops.product_(rounded, weight, out, True)
    assert (out - 2 * (rounded @ weight)).abs().max() < 1e-5
    # what was not rounded is cut
    ops.product_(exact, weight, out, False)
    assert (out - exact @ weight).abs().max() > 1e-4


def test_half_precision_is_that_of_torch():
    q, mu = torch.randn(5, 6), torch.randn(5, 3, 6)
    half_q, half_mu = torch.empty(5, 6, dtype=torch.half), torch.empty(5, 3, 6, dtype=torch.half)
    ops.node_halves_(q, mu, half_q, half_mu)
    assert torch.equal(half_q, q.half())
    assert torch.equal(half_mu, mu.half())


def test_operators_pass_opcheck():
    uv, q = torch.randn(4, 3, 10), torch.randn(4, 10)
    torch.library.opcheck(ops.node_norms_.default, (uv, q, SOFTENING, False))
    by_q, by_a = torch.randn(4, 5), torch.randn(4, 15)
    torch.library.opcheck(
        ops.node_mix_backward_.default, (uv, by_q, torch.randn(4, 3, 5), by_a, False)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(4, 9)}, "q must have the shape"),
        ({"q": torch.zeros(4, 10).double()}, "q must be torch.float32"),
        ({"uv": torch.zeros(10, 3, 4).transpose(0, 2)}, "uv must be contiguous"),
        ({"uv": torch.zeros(4, 3, 10).half(), "q": torch.zeros(4, 10).half()}, "only float32 and"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(wrong, message):
    given = {"uv": torch.zeros(4, 3, 10), "q": torch.zeros(4, 10)} | wrong
    with pytest.raises((TypeError, ValueError), match=message):
        node_ops.node_norms_(given["uv"], given["q"], SOFTENING, False)


@pytest.mark.gpu
def test_gpu_multiplies_with_tensor_cores_only_where_it_is_asked_to():
    x = node_ops._cut(torch.randn(300, 128))
    weight = node_ops._cut(torch.randn(128, 256))
    exact = (x.double() @ weight.double()).float()
    before = torch.backends.cuda.matmul.allow_tf32
    out = torch.empty(300, 256, device="cuda")
    ops.product_(x.cuda(), weight.cuda(), out, False)
    # nothing is lost of inputs that fit, whatever is done with those that do not
    assert (out.cpu() - exact).abs().max() < 1e-4
    assert torch.backends.cuda.matmul.allow_tf32 == before
    finer = torch.randn(300, 128, device="cuda")
    ops.product_(finer, weight.cuda(), out, False)
    assert (out - finer @ weight.cuda()).abs().max() > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("reduced", [False, True])
def test_gpu_gives_what_the_cpu_gives(reduced):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    m, c = 37, 24
    given = {
        "node_norms_": [random(m, 3, 2 * c), random(m, 2 * c), SOFTENING, reduced],
        "node_silu_": [random(m, c), random(c), random(m, c), reduced],
        "node_silu_backward_": [random(m, c), random(c), random(m, c), reduced],
        "node_readout_": [
            random(m, 40), random(40), random(41), random(m).double(), 2.0, 0.7, reduced
        ],
        "node_mix_backward_": [
            random(m, 3, 2 * c), random(m, c), random(m, 3, c), random(m, 3 * c), reduced
        ],
    }  # fmt: skip
    for name, arguments in given.items():
        there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(ops, name)(*arguments)
        getattr(ops, name)(*there)
        for on_cpu, on_gpu in zip(arguments, there, strict=True):
            if isinstance(on_cpu, torch.Tensor):
                largest = on_cpu.abs().max()
                close = 1e-3 if reduced else 1e-6  # one bit more or less of those that are left
                assert (on_gpu.cpu() - on_cpu).abs().max() <= 2 * close * largest, name
