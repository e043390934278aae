import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.kernels import reference, training_kernels
from openmm_mlffd.kernels.training_ops import edge_plan

N_INTERVALS = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4}


def make_inputs(
    n_atoms=7, n_channels=4, *, first=False, degree=3, real=torch.float64, n_edges=40, seed=0
):
    """Random features, table, geometry and edges, of which some are beyond the table's ends."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(real)

    ends = torch.randint(0, n_atoms, (2, n_edges), generator=generator)
    geometry = random(n_edges, 4)
    place = torch.rand(n_edges, generator=generator, dtype=torch.float64)
    geometry[:, 3] = ((N_INTERVALS + 2) * place - 1).to(real)
    edge_index = torch.stack([ends[0].sort()[0], ends[1]])
    return (
        random(n_atoms, 2 if first else 5, n_channels),
        random(N_INTERVALS + degree, 2 if first else 3, n_channels),
        geometry,
        edge_index,
        edge_plan(edge_index, geometry[:, 3], n_atoms, N_INTERVALS),
        degree,
    )


def in_float64(*tensors):
    return [t.double() for t in tensors]


def weights_like(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


def derivatives(function, *inputs, weigh=weights_like):
    """Value, first derivatives, and second ones of their sum with random weights."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = function(*leaves)
    first = torch.autograd.grad(value, leaves, *weigh([value]), create_graph=True)
    total = sum((f * w.to(f)).sum() for f, w in zip(first, weigh(first, 2), strict=True))
    second = torch.autograd.grad(total, leaves)
    return [value, *first, *second]


CASES = [
    {},
    {"first": True},
    {"degree": 5, "first": True, "n_channels": 5},
    {"degree": 7, "n_channels": 1},
    {"n_channels": 128, "degree": 5, "n_edges": 300},
    {"n_channels": 32, "degree": 5, "real": torch.float32, "n_edges": 200},
    {"n_channels": 32, "degree": 3, "real": torch.float32, "first": True},
    {"n_atoms": 1, "n_edges": 3},
    {"n_edges": 0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_derivatives_are_those_of_the_reference(case):
    features, table, geometry, edge_index, plan, degree = make_inputs(**case)
    found = derivatives(
        lambda x, t, g: torch.ops.mlffd.edge_message(x, t, g, plan, degree),
        features,
        table,
        geometry,
    )
    expected = derivatives(
        lambda x, t, g: reference.edge_message(x, t, g, edge_index, degree),
        *in_float64(features, table, geometry),
    )
    tolerance = TOLERANCE[geometry.dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == geometry.dtype
        scale = max(1.0, float(b.detach().abs().max()) if b.numel() else 1.0)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("first", "degree"), [(False, 5), (True, 3)])
def test_derivatives_are_those_of_finite_differences(first, degree):
    features, table, geometry, _, plan, _ = make_inputs(
        n_atoms=4, n_channels=2, n_edges=9, first=first, degree=degree
    )

    def function(x, t, g):
        return torch.ops.mlffd.edge_message(x, t, g, plan, degree)

    leaves = [t.requires_grad_() for t in (features, table, geometry)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_third_derivatives_are_those_of_finite_differences():
    features, table, geometry, _, plan, degree = make_inputs(
        n_atoms=3, n_channels=1, n_edges=6, degree=5
    )
    gradient = torch.randn(3, 4, 1, dtype=torch.float64)
    ops, changes = torch.ops.mlffd, weights_like([features, geometry])
    leaves = [t.requires_grad_() for t in (gradient, features, changes[0], table, geometry)]
    leaves.append(changes[1].requires_grad_())
    assert torch.autograd.gradcheck(
        lambda g, x, dx, t, u, du: ops.edge_message_tangent(x, dx, t, u, du, plan, degree), leaves
    )
    assert torch.autograd.gradcheck(
        lambda g, x, dx, t, u, du: ops.edge_message_second(g, x, dx, t, u, du, plan, degree), leaves
    )
    assert torch.autograd.gradcheck(
        lambda g, x, dx, t, u, du: ops.edge_message_second_table(
            g, x, dx, u, du, plan, degree, N_INTERVALS
        ),
        leaves,
    )


def test_edges_are_walked_by_receiver_by_sender_and_by_interval():
    _, _, geometry, edge_index, plan, _ = make_inputs()
    n, e, place = 7, 40, geometry[:, 3]
    present = (place >= 0) & (place < N_INTERVALS)
    assert 0 < present.sum() < e
    rows, sent, bins, receiver, sender, outgoing, by_knot = plan.split(
        [n + 1, n + 1, N_INTERVALS + 1, e, e, e, e]
    )
    assert torch.equal(torch.stack([receiver, sender]).long(), edge_index)
    for atom in range(n):
        walked = set(range(int(rows[atom]), int(rows[atom + 1])))
        own = (edge_index[0] == atom) & present
        assert set(own.nonzero()[:, 0].tolist()) <= walked
        assert all(edge_index[0, k] == atom for k in walked)
        mine = ((edge_index[1] == atom) & present).nonzero()[:, 0]
        assert torch.equal(outgoing[sent[atom] : sent[atom + 1]].long(), mine)
    for k in range(N_INTERVALS):
        mine = (present & (place.long() == k)).nonzero()[:, 0]
        assert torch.equal(by_knot[bins[k] : bins[k + 1]].long(), mine)


def test_row_of_padding_is_not_walked():
    edge_index = torch.tensor([[0, 1, 2, 2, 2], [1, 0, 2, 2, 2]])
    place = torch.tensor([1.0, 1.0, 9.0, 9.0, 9.0])
    plan = edge_plan(edge_index, place, 3, N_INTERVALS)
    assert plan[:4].tolist() == [0, 1, 2, 2]


def test_sums_are_the_same_at_each_launch_with_more_edges_than_a_chunk():
    n_edges = 5 * training_kernels.CHUNK + 3
    features, table, geometry, _, plan, degree = make_inputs(
        n_channels=16, real=torch.float32, n_edges=n_edges
    )
    found = [
        derivatives(
            lambda x, t, g: torch.ops.mlffd.edge_message(x, t, g, plan, degree),
            features,
            table,
            geometry,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_geometry_can_be_left_out():
    features, table, geometry, _, plan, degree = make_inputs()
    gradient, d_features, d_geometry = weights_like(
        [features.new_empty(7, 4, 4), features, geometry]
    )
    ops = torch.ops.mlffd
    for operator, arguments in [
        (ops.edge_message_backward, (gradient, features, table, geometry, plan, degree)),
        (
            ops.edge_message_second,
            (gradient, features, d_features, table, geometry, d_geometry, plan, degree),
        ),
    ]:
        whole, part = operator(*arguments), operator(*arguments, False)
        assert torch.equal(part[0], whole[0])
        assert part[1].shape == (0, 4)
        assert whole[1].abs().max() > 0


@pytest.mark.parametrize("name", [
    "edge_message", "edge_message_backward", "edge_message_table", "edge_message_tangent",
    "edge_message_second", "edge_message_second_table",
])  # fmt: skip
def test_operators_keep_torchs_rules(name):
    features, table, geometry, _, plan, degree = make_inputs(n_atoms=4, n_edges=12)
    gradient, d_features, d_geometry = weights_like(
        [features.new_empty(4, 4, 4), features, geometry]
    )
    arguments = {
        "edge_message": (features, table, geometry, plan, degree),
        "edge_message_backward": (gradient, features, table, geometry, plan, degree),
        "edge_message_table": (gradient, features, geometry, plan, degree, N_INTERVALS),
        "edge_message_tangent": (features, d_features, table, geometry, d_geometry, plan, degree),
        "edge_message_second": (
            gradient, features, d_features, table, geometry, d_geometry, plan, degree,
        ),
        "edge_message_second_table": (
            gradient, features, d_features, geometry, d_geometry, plan, degree, N_INTERVALS,
        ),
    }[name]  # fmt: skip
    arguments = [
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    torch.library.opcheck(
        getattr(torch.ops.mlffd, name).default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_messages_work_in_torchscript():
    features, table, geometry, edge_index, plan, degree = make_inputs()

    @torch.jit.script
    def scripted(x, t, g, plan, degree: int):
        return torch.ops.mlffd.edge_message(x, t, g, plan, degree)

    expected = reference.edge_message(features, table, geometry, edge_index, degree)
    torch.testing.assert_close(scripted(features, table, geometry, plan, degree), expected)


def test_messages_and_first_derivatives_are_compiled_without_a_break():
    features, table, geometry, edge_index, _, degree = make_inputs()

    def loss(message, x, t, g):
        return (message(x, t, g) ** 2).sum()

    def fused(x, t, g):
        plan = edge_plan(edge_index, g[:, 3], 7, N_INTERVALS)
        return torch.ops.mlffd.edge_message(x, t, g, plan, degree)

    def plain(x, t, g):
        return reference.edge_message(x, t, g, edge_index, degree)

    compiled = torch.compile(lambda *x: loss(fused, *x), backend="aot_eager", fullgraph=True)
    leaves = [t.requires_grad_() for t in (features, table, geometry)]
    found = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(loss(plain, *leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_wrong_inputs_are_refused():
    features, table, geometry, _, plan, degree = make_inputs()
    message = torch.ops.mlffd.edge_message
    with pytest.raises(TypeError, match=r"features must be torch\.float64"):
        message(features.float(), table, geometry, plan, degree)
    with pytest.raises(ValueError, match="plan must have the shape"):
        message(features, table, geometry, plan[1:], degree)
    with pytest.raises(ValueError, match="degree 3, 5 or 7"):
        message(features, table, geometry, plan, 4)
    with pytest.raises(ValueError, match="2 or 5 parts"):
        message(features[:, :3], table, geometry, plan, degree)
    with pytest.raises(TypeError, match="float32 or float64"):
        message(features, table, geometry.half(), plan, degree)


@pytest.mark.gpu
@pytest.mark.parametrize("real", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_channels", [5, 96, 128, 256])
def test_derivatives_on_a_gpu_in_a_graph_are_those_of_the_reference(real, n_channels):
    features, table, geometry, edge_index, _, degree = make_inputs(
        n_channels=n_channels, real=real, degree=5, n_edges=1000, n_atoms=50
    )
    here = [t.cuda() for t in (features, table, geometry, edge_index)]
    weights = {}

    def weigh(tensors, seed=1):  # nothing may come from the host while a graph is recorded
        if seed not in weights:
            weights[seed] = weights_like(tensors, seed)
        return weights[seed]

    def work():
        plan = edge_plan(here[3], here[2][:, 3], 50, N_INTERVALS)
        return derivatives(
            lambda x, t, g: torch.ops.mlffd.edge_message(x, t, g, plan, degree),
            *here[:3],
            weigh=weigh,
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    graph.replay()
    torch.cuda.synchronize()
    expected = derivatives(
        lambda x, t, g: reference.edge_message(x, t, g, edge_index, degree),
        *in_float64(features, table, geometry),
    )
    for a, b in zip(found, expected, strict=True):
        atol = TOLERANCE[real] * float(b.detach().abs().max())
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=atol)
