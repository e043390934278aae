"""Peptides as SMILES, with their ends and protonation states."""

from collections.abc import Iterator

import numpy as np

from openmm_mlffd.training.generation.molecules import Molecule
from openmm_mlffd.training.generation.recipe import PeptideConfig

# residue N ... C(=O); L amino acids, as at pH 7 (histidine with its hydrogen at epsilon)
RESIDUES = {
    "A": "N[C@@H](C)C(=O)",
    "R": "N[C@@H](CCCNC(N)=[NH2+])C(=O)",
    "N": "N[C@@H](CC(N)=O)C(=O)",
    "D": "N[C@@H](CC(=O)[O-])C(=O)",
    "C": "N[C@@H](CS)C(=O)",
    "Q": "N[C@@H](CCC(N)=O)C(=O)",
    "E": "N[C@@H](CCC(=O)[O-])C(=O)",
    "G": "NCC(=O)",
    "H": "N[C@@H](Cc1c[nH]cn1)C(=O)",
    "I": "N[C@@H]([C@@H](C)CC)C(=O)",
    "L": "N[C@@H](CC(C)C)C(=O)",
    "K": "N[C@@H](CCCC[NH3+])C(=O)",
    "M": "N[C@@H](CCSC)C(=O)",
    "F": "N[C@@H](Cc1ccccc1)C(=O)",
    "P": "N1CCC[C@H]1C(=O)",
    "S": "N[C@@H](CO)C(=O)",
    "T": "N[C@@H]([C@@H](C)O)C(=O)",
    "W": "N[C@@H](Cc1c[nH]c2ccccc12)C(=O)",
    "Y": "N[C@@H](Cc1ccc(O)cc1)C(=O)",
    "V": "N[C@@H](C(C)C)C(=O)",
}
"""Residues by their one-letter codes, in their usual protonation state."""

VARIANTS = {
    "R": ["N[C@@H](CCCNC(N)=N)C(=O)"],
    "D": ["N[C@@H](CC(=O)O)C(=O)"],
    "C": ["N[C@@H](C[S-])C(=O)"],
    "E": ["N[C@@H](CCC(=O)O)C(=O)"],
    "H": ["N[C@@H](Cc1cnc[nH]1)C(=O)", "N[C@@H](Cc1c[nH]c[nH+]1)C(=O)"],
    "K": ["N[C@@H](CCCCN)C(=O)"],
    "Y": ["N[C@@H](Cc1ccc([O-])cc1)C(=O)"],
}
"""Their other protonation states."""

_ENDS = {
    "ace-nme": ("CC(=O)", "NC"),
    "ace-nh2": ("CC(=O)", "N"),
    "zwitterion": ("", "[O-]"),
    "neutral": ("", "O"),
}
_CHARGED_START = {"N[": "[NH3+][", "NC": "[NH3+]C", "N1": "[NH2+]1"}


def peptide_smiles(
    sequence: str, caps: str = "ace-nme", *, states: dict[int, str] | None = None
) -> str:
    """SMILES of a peptide.

    Parameters
    ----------
    sequence
        One-letter codes.
    caps
        Its ends: "ace-nme" (acetyl and methyl amide), "ace-nh2", "zwitterion", "neutral".
    states
        SMILES of residues in another protonation state, by their place.

    Raises
    ------
    ValueError
        If a letter is no amino acid, or the ends are unknown.
    """
    strange = sorted(set(sequence) - set(RESIDUES))
    if strange or not sequence:
        raise ValueError(f"{sequence!r} holds {', '.join(strange) or 'no letter'}, no amino acid")
    if caps not in _ENDS:
        raise ValueError(f"the ends of a peptide are of {', '.join(_ENDS)}, got {caps!r}")
    residues = [(states or {}).get(i, RESIDUES[letter]) for i, letter in enumerate(sequence)]
    start, end = _ENDS[caps]
    if caps == "zwitterion":
        residues[0] = _CHARGED_START[residues[0][:2]] + residues[0][2:]
    return start + "".join(residues) + end


def smiles_of_group(group: str) -> str:
    """SMILES of a group of structures: that of "peptide SEQUENCE ENDS", else the group itself."""
    match group.split():
        case ["peptide", sequence, caps] if set(sequence) <= set(RESIDUES) and caps in _ENDS:
            return peptide_smiles(sequence, caps)
    return group


def draw_peptides(config: PeptideConfig, rng: np.random.Generator) -> Iterator[Molecule]:
    """Peptides of a configuration; the group of a peptide is its sequence and its ends."""
    letters = sorted(RESIDUES)
    sequences = list(config.sequences)
    if not sequences:
        while len(sequences) < config.count:
            length = int(rng.choice(config.lengths))
            sequence = "".join(rng.choice(letters, length).tolist())
            if not config.with_any or set(sequence) & set(config.with_any):
                sequences.append(sequence)
    for sequence in sequences:
        caps = str(rng.choice(config.caps))
        states = {
            i: str(rng.choice(VARIANTS[letter]))
            for i, letter in enumerate(sequence)
            if letter in VARIANTS and rng.random() < config.variants
        }
        smiles = peptide_smiles(sequence, caps, states=states)
        yield Molecule(smiles, f"peptide {sequence} {caps}")
