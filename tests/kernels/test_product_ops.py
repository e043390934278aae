import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.kernels import ops as registered
from openmm_mlffd.kernels import product_ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ops = registered and torch.ops.mlffd


@pytest.fixture(params=[(1, 4, 3), (8, 128, 5), (51, 256, 128), (13, 384, 64), (0, 4, 2)], ids=str)
def sizes(request):
    return request.param


def make(sizes, device):
    n_rows, n_in, n_out = sizes
    generator = torch.Generator().manual_seed(n_rows)
    return [
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((n_rows, n_in), (n_out, n_in), (n_out,), (n_rows, n_out), (n_rows, n_out))
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_products_are_those_of_torch(sizes, device):
    x, weight, _, _, out = make(sizes, device)
    expected = x.double() @ weight.double().t()
    before = out.clone()
    ops.few_product_(x, weight, out, True)
    assert torch.allclose(out.double(), before + expected, atol=1e-4)
    ops.few_product_(x, weight, out, False)
    assert torch.allclose(out.double(), expected, atol=1e-4)
    # with gaps between rows
    wide = torch.zeros(len(x), 2 * x.shape[1], device=device)
    wide[:, : x.shape[1]] = x
    target = torch.zeros(len(x), 3 + out.shape[1], device=device)
    ops.few_product_(wide[:, : x.shape[1]], weight, target[:, : out.shape[1]], False)
    assert torch.equal(target[:, : out.shape[1]], out)
    assert target[:, out.shape[1] :].eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduced", [False, True])
def test_silu_after_a_product_is_that_of_its_own_operator(sizes, device, reduced):
    x, weight, bias, hidden, out = make(sizes, device)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if reduced else {"rtol": 1e-4, "atol": 1e-4}
    ops.few_silu_(x, weight, bias, hidden, out, reduced)
    assert torch.allclose(hidden, x @ weight.t(), atol=1e-4)
    expected = torch.empty_like(out)
    ops.node_silu_(hidden, bias, expected, reduced)
    assert torch.allclose(out, expected, **tolerance)
    ops.few_silu_backward_(x, weight, bias, hidden, out, reduced)
    expected = x @ weight.t()
    ops.node_silu_backward_(hidden, bias, expected, reduced)
    assert torch.allclose(out, expected, **tolerance)
    if reduced:
        assert (out.view(torch.int32) & 0x1FFF).eq(0).all()


def test_what_the_kernel_cannot_read_is_refused():
    x, weight, _, _, out = make((8, 128, 5), "cpu")
    with pytest.raises(ValueError, match="weight must have the shape"):
        product_ops.few_product_(x[:, :64], weight, out, False)
    with pytest.raises(ValueError, match="multiples of four"):
        product_ops.few_product_(x[:, :6], weight[:, :6].contiguous(), out, False)
    with pytest.raises(TypeError, match="x must be torch"):
        product_ops.few_product_(x.double(), weight, out, False)
