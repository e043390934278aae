import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.kernels import message_ops, reference
from openmm_mlffd.kernels.neighbor_ops import neighbor_rows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4, torch.float16: 2e-4}


def make_inputs(
    n_atoms=7, n_channels=8, *, first=False, degree=3, stored=torch.float64, capacity=12, seed=0
):
    """Random features and filters on the neighbors of random atoms, some beyond the cutoff."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    real = torch.float32 if stored == torch.float16 else stored
    positions = 1.5 * random(n_atoms, 3)
    zeros = torch.zeros(n_atoms, dtype=torch.int32)
    neighbors, _, reverse, counts = neighbor_rows(
        positions, torch.zeros(1, 3, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.bool),
        zeros, torch.tensor([0, n_atoms], dtype=torch.int32), 4.0, capacity, False,
    )  # fmt: skip
    assert counts.numel() == 0 or int(counts.max()) <= capacity
    there = torch.arange(capacity) < counts[:, None]
    sender = torch.where(there, neighbors, 0).long()
    vectors = positions[sender] - positions[:, None]
    distances = vectors.norm(dim=-1)
    geometry = torch.zeros(n_atoms, capacity, 4, dtype=torch.float64)
    geometry[..., :3] = vectors / distances.clamp(min=0.1)[..., None]
    geometry[..., 3] = torch.where(distances < 3.0, distances * 2.0, -1.0)  # six intervals
    n_rows = 3 if first else n_atoms
    rows = (torch.arange(n_atoms) % n_rows if n_rows else zeros).to(torch.int32)
    features = random(n_rows, 2 if first else 5, n_channels)
    table = random(6 + degree, 2 if first else 3, n_channels)
    return [
        features.to(stored), rows, table.to(stored), geometry.to(real),
        torch.where(there, neighbors, 0), reverse, counts, degree,
    ]  # fmt: skip


def by_reference(inputs, *leaves):
    features, rows, table, geometry, neighbors, _, counts, degree = inputs
    if leaves:
        features, table, geometry = leaves
    return reference.message(features, rows, table, geometry, neighbors, counts, degree)


def in_float64(inputs):
    return [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs
    ]


CASES = [
    {},
    {"first": True},
    {"n_channels": 5},
    {"n_channels": 1, "first": True},
    {"n_channels": 128, "n_atoms": 11, "capacity": 14},
    {"degree": 5},
    {"degree": 7, "n_channels": 16},
    {"stored": torch.float32, "n_channels": 32},
    {"stored": torch.float16, "n_channels": 32},
    {"stored": torch.float16, "first": True},
    {"n_atoms": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("n_parts", [1, 3])
def test_messages_are_those_of_the_reference(case, n_parts):
    inputs = make_inputs(**case)
    found = torch.ops.mlffd.message(*inputs, n_parts)
    expected = by_reference(in_float64(inputs))
    assert found.dtype == inputs[3].dtype
    assert expected.abs().max() > 0.1 or case == {"n_atoms": 1}
    assert (found - expected).abs().max() < TOLERANCE[inputs[0].dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("n_parts", [1, 3])
def test_gradients_are_those_of_the_reference(case, n_parts):
    inputs = make_inputs(**case)
    features, rows, table, geometry, neighbors, reverse, counts, degree = inputs
    weights = torch.randn(
        len(counts), 4, features.shape[2], generator=torch.Generator().manual_seed(5)
    ).to(features.dtype)
    exact = in_float64(inputs)
    leaves = [exact[k].requires_grad_() for k in (0, 2, 3)]
    by_features, _, by_geometry = torch.autograd.grad(
        by_reference(exact, *leaves), leaves, weights.double()
    )
    by_slot = torch.zeros_like(geometry)
    by_rows = torch.empty(len(counts), *features.shape[1:], dtype=geometry.dtype)
    gathered = weights[:, 0].contiguous(), weights[:, 1:].contiguous()
    torch.ops.mlffd.message_backward_(
        *gathered, features, rows, table, geometry, neighbors, counts, by_slot, by_rows, degree,
        n_parts,
    )  # fmt: skip
    if features.shape[1] == 2:
        by_rows = torch.zeros_like(by_features).index_add(0, rows, by_rows.double())
    tolerance = TOLERANCE[features.dtype]
    assert (by_rows - by_features).abs().max() < tolerance
    there = (torch.arange(neighbors.shape[1]) < counts[:, None]) & (geometry[..., 3] >= 0)
    i, s = there.nonzero(as_tuple=True)
    mirrored = by_slot[neighbors[i, s].long(), reverse[i, s].long()]
    assert (mirrored - by_geometry[i, s]).abs().max() < 5 * tolerance if len(i) else True
    # without the features, and added to what is there
    again = by_slot.clone()
    none = geometry.new_empty((0, *features.shape[1:]))
    torch.ops.mlffd.message_backward_(
        *gathered, features, rows, table, geometry, neighbors, counts, again, none, degree
    )
    assert (again - 2 * by_slot).abs().max() < 10 * tolerance


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("degree", [3, 5])
def test_first_and_second_derivatives(first, degree):
    inputs = make_inputs(4, 2, first=first, degree=degree, capacity=4)
    features, rows, table, geometry, *rest = inputs
    neighbors, reverse = rest[0], rest[1]
    beyond = geometry[..., 3:] < 0  # stays beyond under small changes
    mirror = torch.where(reverse < 0, 0, neighbors * neighbors.shape[1] + reverse).long()
    upper = (neighbors > torch.arange(4)[:, None])[..., None]
    sign = torch.tensor([-1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (features, table, geometry)]

    def cubes(x, t, g):
        # both directions of an edge change together
        g = torch.where(upper, g, g.flatten(0, 1)[mirror] * sign)
        return (torch.ops.mlffd.message(x, rows, t, torch.where(beyond, -1.0, g), *rest) ** 3).sum()

    assert torch.autograd.gradcheck(cubes, leaves)
    assert torch.autograd.gradgradcheck(cubes, leaves)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_messages_are_added_to_the_state(case):
    inputs = make_inputs(**case)
    features, rows, geometry = inputs[0], inputs[1], inputs[3]
    first, rounded = features.shape[1] == 2, features.dtype == torch.float16
    n, c = len(rows), features.shape[2]
    generator = torch.Generator().manual_seed(2)
    q, mu, embedding = (
        torch.randn(*shape, generator=generator).to(geometry)
        for shape in ((n, 2 * c), (n, 3, c), (features.shape[0], c))
    )
    before = q.clone(), mu.clone()
    torch.ops.mlffd.message_(*inputs[:5], inputs[6], embedding, q, mu, inputs[7])
    sums = torch.ops.mlffd.message(*inputs)
    of_before = (embedding[rows.long()], 0.0) if first else (before[0][:, :c], before[1])
    tolerance = 5e-3 if rounded else TOLERANCE[features.dtype]
    assert (q[:, :c] - (of_before[0] + sums[:, 0])).abs().max() < tolerance
    assert (mu - (of_before[1] + sums[:, 1:])).abs().max() < tolerance
    assert torch.equal(q[:, c:], before[0][:, c:])
    if rounded:
        assert (mu.view(torch.int32) & 0x1FFF).eq(0).all()


def test_some_atoms_are_as_among_all():
    inputs = make_inputs()
    features, rows, table, geometry, neighbors, _, counts, degree = inputs
    weights = torch.randn(7, 4, 8, dtype=torch.float64)
    gathered = weights[:, 0].contiguous(), weights[:, 1:].contiguous()
    found = []
    for parts in ([slice(0, 7)], [slice(0, 3), slice(3, 7)]):
        by_slot, by_features = torch.zeros_like(geometry), torch.zeros_like(features)
        for p in parts:
            torch.ops.mlffd.message_backward_(
                *gathered, features[p], rows[p], table, geometry[p], neighbors[p], counts[p],
                by_slot[p], by_features[p], degree,
            )  # fmt: skip
        found.append((by_slot, by_features))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_depends_on_the_run():
    inputs = make_inputs(n_atoms=11, n_channels=32, stored=torch.float32, capacity=14)
    runs = [torch.ops.mlffd.message(*inputs) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_operators_pass_opcheck():
    inputs = make_inputs(5, 4)
    for k in (0, 2, 3):
        inputs[k].requires_grad_()
    torch.library.opcheck(torch.ops.mlffd.message.default, tuple(inputs))
    gradient = torch.randn(5, 4, 4, dtype=torch.float64, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mlffd.message_backward.default, (gradient, *inputs), test_utils=tests
    )


def test_operator_can_be_scripted_and_compiled():
    class Block(torch.nn.Module):
        def forward(self, x, rows, table, geometry, neighbors, reverse, counts):
            # type: (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) -> Tensor
            return torch.ops.mlffd.message(x, rows, table, geometry, neighbors, reverse, counts, 3)

    inputs = make_inputs(6, 8)[:-1]
    expected = torch.ops.mlffd.message(*inputs, 3)
    assert torch.equal(torch.jit.script(Block())(*inputs), expected)
    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), expected)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t.float(), "float32 with a geometry of torch.float64 are not supported"),
        (2, lambda t: t[:, :2].contiguous(), "table must have the shape"),
        (3, lambda t: t.transpose(0, 1).contiguous(), "geometry must have the shape"),
        (4, lambda t: t.long(), "neighbors must be torch.int32"),
        (7, lambda _: 4, "degree 3, 5 or 7"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(index, wrong, message):
    inputs = make_inputs()
    inputs[index] = wrong(inputs[index])
    with pytest.raises((TypeError, ValueError), match=message):
        message_ops.message(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("n_parts", [1, 8])
def test_gpu_gives_what_the_cpu_gives(case, n_parts):
    inputs = make_inputs(**case)
    moved = [t.to("cuda") if isinstance(t, torch.Tensor) else t for t in inputs]
    tolerance = TOLERANCE[inputs[0].dtype]
    found = torch.ops.mlffd.message(*moved, n_parts)
    assert (found.cpu() - torch.ops.mlffd.message(*inputs, 1)).abs().max() < tolerance
    assert torch.equal(torch.ops.mlffd.message(*moved, n_parts), found)
    results = []
    for features, rows, table, geometry, neighbors, _, counts, degree in (inputs, moved):
        weights = torch.randn(
            len(counts), 4, features.shape[2], generator=torch.Generator().manual_seed(5)
        ).to(features)
        by_slot = torch.zeros_like(geometry)
        by_features = geometry.new_empty((len(counts), *features.shape[1:]))
        torch.ops.mlffd.message_backward_(
            weights[:, 0].contiguous(), weights[:, 1:].contiguous(), features, rows, table,
            geometry, neighbors, counts, by_slot, by_features, degree, n_parts,
        )  # fmt: skip
        results.append((by_features.cpu(), by_slot.cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert (on_gpu - on_cpu).abs().max() < 5 * tolerance
