from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_mlffd.modelfile import make_potential
from openmm_mlffd.training.batches import StructureSource, make_batch
from openmm_mlffd.training.config import TrainConfig
from openmm_mlffd.training.distributed import Processes
from openmm_mlffd.training.hdf5 import Dataset, SplitRule, take
from openmm_mlffd.training.loss import TERMS, loss_terms
from openmm_mlffd.training.resident import (
    ResidentStructures,
    estimated_gb,
    padded_index,
    plan,
    share,
)
from openmm_mlffd.training.resident_step import ResidentData
from openmm_mlffd.training.step import TrainingStep, predict
from openmm_mlffd.training.targets import BatchTotals, count_totals, training_batch

CPU = torch.device("cpu")
VARIANT = {
    "kind": "painn-variant",
    "n_channels": 16,
    "n_interactions": 2,
    "n_basis": 8,
    "filters": "spline",
    "pair_filters": True,
    "charges": True,
    "tail": True,
    "message_cutoff": 3.0,
}


@pytest.fixture
def source(make_structures, write_dataset):
    path = write_dataset(make_structures(40, seed=3), split=SplitRule(val=0.0, test=0.1))
    return StructureSource([Dataset(path)], "train")


@pytest.fixture
def potential(make_student):
    return make_student(elements=["H", "C", "O"], references=[-13.0, -1029.0, -2043.0])


@pytest.fixture
def variant(make_header):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        header = make_header(
            elements=["H", "C", "O"],
            references=[-13.0, -1029.0, -2043.0],
            cutoff=5.0,
            energy_scale=2.0,
        )
        return make_potential(replace(header, architecture=VARIANT)).double()


def direct(source, potential, rows):
    """The batch as the host makes it, without anything resident."""
    return make_batch(take(source.memory, rows), potential, CPU)


@pytest.mark.parametrize("kind", ["potential", "variant"])
def test_prediction_without_repulsion_is_what_the_potential_gives(source, kind, request):
    student = request.getfixturevalue(kind).eval()
    batch = direct(source, student, np.arange(12))
    expected = student(batch.graph)
    labels = training_batch(batch, student)
    found = predict(student.network, labels, student.energy_scale)
    # energy and virial have the label's share taken out, forces have the repulsion added
    energy = found.energy - labels.energy + batch.energy
    virial = found.virial - labels.virial + batch.virial
    known = batch.virial.isfinite()
    assert expected.forces.abs().max() > 0.1
    np.testing.assert_allclose(energy.detach(), expected.energy, atol=1e-8)
    np.testing.assert_allclose(found.forces.detach(), expected.forces, atol=1e-9)
    np.testing.assert_allclose(virial.detach()[known], expected.virial[known], atol=1e-9)


@pytest.mark.parametrize("kind", ["potential", "variant"])
def test_resident_batch_is_the_batch_that_the_host_makes(source, kind, request):
    student = request.getfixturevalue(kind)
    rows = np.array([5, 0, 31, 17, 8])
    resident = ResidentStructures(source, student, CPU)
    size = resident.capacity([rows], padded=False)
    found = resident.batch(torch.from_numpy(rows), size)
    expected = training_batch(direct(source, student, rows), student)
    for name in expected._fields:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        if name in ("edge_index", "vectors", "core", "near"):
            continue  # edges of an atom may come in another order
        np.testing.assert_allclose(a, b, atol=1e-9, err_msg=name)
    for edges in (found, expected):
        assert len(edges.vectors) > 50
    order = [
        np.lexsort((*b.vectors.T.numpy().round(6), *b.edge_index.numpy()))
        for b in (found, expected)
    ]
    np.testing.assert_allclose(
        found.vectors.numpy()[order[0]], expected.vectors.numpy()[order[1]], atol=1e-9
    )
    assert (found.edge_index.numpy()[:, order[0]] == expected.edge_index.numpy()[:, order[1]]).all()


@pytest.mark.parametrize("kind", ["potential", "variant"])
def test_padding_changes_neither_loss_nor_gradient(source, kind, request):
    student = request.getfixturevalue(kind).train()
    config = TrainConfig(data=None).loss
    config = replace(config, stress=0.3, angle=0.1, charges=0.4)
    resident = ResidentStructures(source, student, CPU)
    rows, others = np.array([3, 9, 30]), np.arange(14)
    exact = resident.batch(torch.from_numpy(rows), resident.capacity([rows], padded=False))
    size = resident.capacity([rows, others], padded=True)
    padded = resident.batch(torch.from_numpy(padded_index(rows, size.structures)), size)
    assert padded.vectors.shape[0] > exact.vectors.shape[0] + 64
    assert padded.real.sum() == exact.real.sum() < len(padded.real)
    results = []
    for batch in (exact, padded):
        terms = loss_terms(predict(student.network, batch, student.energy_scale), batch, config)
        total = sum(terms.values())
        gradient = torch.autograd.grad(total, list(student.network.parameters()), allow_unused=True)
        results.append((terms, gradient))
    for name, term in results[0][0].items():
        assert term.item() == pytest.approx(results[1][0][name].item(), rel=1e-10), name
        assert term.item() != 0 or name == "charges"
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-9 * float(a.abs().max()) + 1e-14)


def test_counts_of_structures_add_up_to_those_of_the_batch(source, potential):
    resident = ResidentStructures(source, potential, CPU)
    counts = resident.counts(0.9)
    for rows in (np.arange(7), np.array([12, 3])):
        batch = resident.batch(torch.from_numpy(rows), resident.capacity([rows], padded=False))
        assert counts[rows].sum(0).tolist() == count_totals(batch, 0.9).tolist()
    assert 0 < counts[:, 2].sum() < len(source)
    assert 0 < counts[:, 3].sum() < counts[:, 1].sum()


def test_plan_has_the_batches_of_the_source(source):
    parts = plan(source.n_atoms, 20, np.random.default_rng([0, 4]))
    batches = list(source.batches(20, rng=np.random.default_rng([0, 4])))
    assert len(parts) == len(batches) > 5
    for part, batch in zip(parts, batches, strict=True):
        assert (source.memory.energy[part] == batch.energy).all()


def test_shares_are_the_whole_batch_in_parts_of_like_size(source):
    batch = np.random.default_rng(0).permutation(len(source))
    for count in (1, 2, 3):
        parts = share(batch, source.n_atoms, count)
        assert np.concatenate(parts).tolist() == batch.tolist()
        sizes = [source.n_atoms[p].sum() for p in parts]
        assert max(sizes) - min(sizes) <= 2 * source.n_atoms.max()
    assert [len(p) for p in share(batch[:1], source.n_atoms, 3)].count(0) == 2


def test_losses_of_shares_add_up_to_that_of_the_batch(source, potential):
    config = TrainConfig(data=None).loss
    resident = ResidentStructures(source, potential, CPU)
    whole = np.arange(20)
    totals = BatchTotals(*torch.tensor(resident.counts(config.angle_threshold)[whole].sum(0)))

    def terms(rows):
        batch = resident.batch(torch.from_numpy(rows), resident.capacity([rows], padded=False))
        found = predict(potential.network, batch, potential.energy_scale)
        return loss_terms(found, batch, config, totals=totals)

    together = terms(whole)
    parts = [terms(part) for part in share(whole, source.n_atoms, 3)]
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(p[name].item() for p in parts), rel=1e-9)


def test_estimate_of_the_memory_is_near_the_truth(source, potential):
    truth = ResidentStructures(source, potential, CPU).n_bytes / 1e9
    assert estimated_gb(source, potential, CPU) == pytest.approx(truth, rel=0.4)


def test_hessian_rows_come_to_their_atoms(source, potential):
    n = int(source.n_atoms.sum())
    probe, curvature = np.full((n, 3), np.nan), np.full((n, 3), np.nan)
    first = int(source.n_atoms[:4].sum())
    atoms = slice(first, first + source.n_atoms[4])
    probe[atoms], curvature[atoms] = 2.0, np.arange(3.0)
    resident = ResidentStructures(source, potential, CPU, hessian=(probe, curvature))
    rows = np.array([6, 4])
    batch = resident.batch(torch.from_numpy(rows), resident.capacity([rows], padded=False))
    mine = batch.system == 1
    assert batch.probe[mine].eq(2).all()
    assert batch.probe[~mine].eq(0).all()
    assert batch.curvature[mine].isfinite().all()
    assert batch.curvature[~mine].isnan().all()
    assert resident.counts(0.3)[:, 5].sum() == source.n_atoms[4]


@pytest.mark.parametrize("kind", ["potential", "variant"])
def test_padded_steps_make_the_weights_of_plain_steps(source, kind, request):
    """What runs as a CUDA graph: fixed sizes, here operation by operation."""
    import copy

    config = TrainConfig(data=None, batch_atoms=25, epochs=1, compile="off")
    weights = []
    for padded in (False, True):
        student = copy.deepcopy(request.getfixturevalue(kind)).train()
        step = TrainingStep(student, copy.deepcopy(student), config)
        data = ResidentData(source, student, step, config, processes=Processes())
        data.step._wants_compile = padded  # pads; the traced step replaces the compiled one
        data.step._prepare = lambda: None
        for number in range(data.load_epoch(0)):
            step.set_controls(1e-3, 0.1, (0, number), [1.0] * len(TERMS))
            data.step.run(number)
        assert number > 3
        assert int(step.bad_steps) == 0
        weights.append([p.detach().clone() for p in student.parameters()])
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_steps_beyond_the_epochs_find_room(source, potential):
    """Padding is for the largest batch of the run; later epochs are shuffled otherwise."""
    config = TrainConfig(data=None, batch_atoms=60, epochs=1, fit_steps=400, compile="off")
    student = potential.train()
    data = ResidentData(
        source, student, TrainingStep(student, student, config), config, processes=Processes()
    )
    sizes, epoch, n_steps = [], 0, 0
    while n_steps < 400:
        n_steps += data.load_epoch(epoch)
        sizes.append(max(len(part) for part in data.step._parts))
        epoch += 1
    assert epoch > 10
    assert sizes[0] < max(sizes) < data.step.capacity.structures
