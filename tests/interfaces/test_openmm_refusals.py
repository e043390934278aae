"""What is refused when a potential or a System is made, and what the texts say."""

import pytest
from openmm import app
from openmmml import MLPotential


@pytest.fixture
def potential(student_file):
    return MLPotential("mlffd", modelPath=student_file, device="cpu")


def test_unknown_elements_are_named(potential, make_topology):
    topology = make_topology([6, 1, 1, 1, 53])
    with pytest.raises(ValueError, match=r"know I \(first: atom 4 \(I5 I of residue MOL 1\)\)"):
        potential.createSystem(topology)
    with pytest.raises(ValueError, match="trained for H, C, N, O"):
        potential.createSystem(topology)


def test_atoms_without_an_element_are_named(potential, make_topology):
    with pytest.raises(ValueError, match=r"atom 3 \(M4 of residue MOL 1\) has no element"):
        potential.createSystem(make_topology([8, 1, 1, 0]))


def test_an_empty_topology_is_refused(potential):
    with pytest.raises(ValueError, match="no atoms"):
        potential.createSystem(app.Topology())


def test_forgotten_hydrogens_are_refused_unless_that_is_meant(potential, make_topology, ethanol):
    bare = make_topology(ethanol.numbers[:3], ethanol.positions[:3])
    with pytest.raises(ValueError, match=r"addHydrogens\(.*PDBFixer.*AddHs\(mol, addCoords=True\)"):
        potential.createSystem(bare)
    assert potential.createSystem(bare, allowMissingHydrogens=True).getNumParticles() == 3


def test_charge_and_spin_are_refused(student_file, make_topology, ethanol):
    topology = make_topology(*ethanol)
    for keywords, text in [
        ({"charge": -1}, "charge=-1 .* has no charge to set"),
        ({"multiplicity": 2}, "multiplicity=2 .* closed shells"),
    ]:
        with pytest.raises(ValueError, match=text):
            MLPotential("mlffd", modelPath=student_file, **keywords)
        with pytest.raises(ValueError, match=text):
            MLPotential("mlffd", modelPath=student_file).createSystem(topology, **keywords)
    neutral = MLPotential("mlffd", modelPath=student_file, charge=0, multiplicity=1)
    neutral.createSystem(topology, charge=0.0, multiplicity=None)


def test_charged_groups_need_no_keyword(potential, make_topology, ethanol):
    topology = make_topology(*ethanol)
    next(topology.atoms()).formalCharge = 1
    potential.createSystem(topology)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("precison", "'precision'"),
        ("Device", "'device'"),
        ("total_charge", "'charge'"),
        ("allow_missing_hydrogens", "'allowMissingHydrogens'"),
    ],
)
def test_unknown_keywords_are_refused_with_a_suggestion(
    student_file, potential, make_topology, ethanol, wrong, hint
):
    with pytest.raises(TypeError, match=f"MLPotential: .*{wrong!r}; did you mean {hint}"):
        MLPotential("mlffd", modelPath=student_file, **{wrong: 1})
    with pytest.raises(TypeError, match=f"createSystem: .*{wrong!r}; did you mean {hint}"):
        potential.createSystem(make_topology(*ethanol), **{wrong: 1})


def test_keywords_in_the_wrong_place_are_refused(potential, make_topology, ethanol):
    topology = make_topology(*ethanol)
    with pytest.raises(TypeError, match="give modelPath to MLPotential"):
        potential.createSystem(topology, modelPath="x")
    with pytest.raises(TypeError, match="no keyword 'linkAtomDistances'"):
        potential.createSystem(topology, linkAtomDistances=[])


def test_values_that_cannot_be_met_are_refused(student_file, potential, make_topology, ethanol):
    topology = make_topology(*ethanol)
    for keywords in ({"precision": "half"}, {"device": "cuda:99"}):
        with pytest.raises(ValueError, match=r"single, mixed, double|there are cpu"):
            MLPotential("mlffd", modelPath=student_file, **keywords)
        with pytest.raises(ValueError, match=r"single, mixed, double|there are cpu"):
            potential.createSystem(topology, **keywords)


def test_createSystem_overrides_MLPotential(student_file, make_topology, ethanol, make_context):
    potential = MLPotential("mlffd", modelPath=student_file, precision="double", device="cpu")
    topology = make_topology(*ethanol)
    energies = [
        make_context(potential.createSystem(topology, **keywords), ethanol.positions)
        .getState(energy=True)
        .getPotentialEnergy()
        ._value
        for keywords in ({}, {"precision": "double"}, {"precision": None}, {"precision": "single"})
    ]
    assert energies[0] == energies[1] == energies[2] != energies[3]


def test_missing_students_are_refused(student_file, tmp_path):
    with pytest.raises(ValueError, match="no file"):
        MLPotential("mlffd", modelPath=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="nor a bundled student"):
        MLPotential("mlffd", model="no-such-student")
    with pytest.raises(ValueError, match="not both"):
        MLPotential("mlffd", model="default", modelPath=student_file)


def test_a_damaged_student_is_refused_when_the_system_is_made(
    make_student_file, make_topology, ethanol
):
    path = make_student_file()
    potential = MLPotential("mlffd", modelPath=path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or altered"):
        potential.createSystem(make_topology(*ethanol))
