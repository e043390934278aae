"""Every kernel compiles for a GPU where there is none; ``-m slow`` for all of them."""

import struct

import pytest
import torch

pytest.importorskip("warp")

import warp as wp

from openmm_mlffd.kernels import (
    chain_kernels,
    edge_kernels,
    message_kernels,
    neighbor_kernels,
    node_kernels,
    training_kernels,
)

REGISTERS = 65536
"""Of a multiprocessor: a block that needs more cannot be launched."""

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16


def message_variants(first):
    return [
        message_kernels.Variant(128, first, *rest)
        for rest in [(5, SINGLE, SINGLE), (3, SINGLE, HALF), (7, DOUBLE, DOUBLE)]
    ]


def kernels_for_training():
    """With and without tangents, and derivatives by the geometry."""
    for first, degree, real in [(False, 5, SINGLE), (True, 5, SINGLE), (False, 3, DOUBLE)]:
        variant = training_kernels.Variant(128, first, degree, real)
        for tangent in (False, True):
            for what in ("forward", "backward", "table"):
                yield training_kernels.training_kernel(what, variant, tangent=tangent)
            yield training_kernels.training_kernel(
                "backward", variant, tangent=tangent, geometry=True
            )
        for what in ("collect", "overlap"):
            yield training_kernels.training_kernel(what, variant)


def every_kernel():
    """One kernel of each module of a student with 128 channels, by name."""
    found = [
        neighbor_kernels.fill_rows,
        edge_kernels.sum_terms,
        edge_kernels.largest_move,
    ]
    for real in (SINGLE, DOUBLE):
        found += [edge_kernels.geometry_kernel(real), edge_kernels.forces_kernel(real)]
    for real, reduced in [(SINGLE, False), (SINGLE, True), (DOUBLE, False)]:
        found.append(node_kernels.node_kernels(node_kernels.Variant(128, real, reduced))["mix"])
        found.append(node_kernels.readout_kernel(real, reduced))
    for stored, atoms in [(SINGLE, 1), (SINGLE, 8), (HALF, 4)]:
        variant = chain_kernels.Variant(128, 64, stored, atoms)
        found += [chain_kernels.chain_kernel(variant, n) for n in ("forward", "backward", "last")]
    for split in (0, 256, 512):
        for first in (False, True):
            for variant in message_variants(first):
                if split and not variant.split_block(split // variant.lanes):
                    continue
                found.append(message_kernels.forward_kernel(variant, split))
                if not first:
                    found.append(message_kernels.backward_kernel(variant, True, split))
    found += [message_kernels.backward_kernel(v, False, 0) for v in message_variants(True)]
    found += kernels_for_training()
    odd = message_kernels.Variant(96, False, 5, SINGLE, SINGLE)  # three channels of a lane
    found += [
        message_kernels.forward_kernel(odd, 0), message_kernels.backward_kernel(odd, True, 256)
    ]  # fmt: skip
    small = message_kernels.Variant(64, False, 7, DOUBLE, DOUBLE)  # has room for 512 threads
    found += [
        message_kernels.forward_kernel(small, 512),
        message_kernels.backward_kernel(small, True, 512),
    ]
    found.append(
        training_kernels.training_kernel("forward", training_kernels.Variant(96, False, 5, SINGLE))
    )
    return {kernel.module.name: kernel for kernel in found}


KERNELS = every_kernel()
QUICK = {
    "mlffd_message_backward_later_c64_p7_f64_s64_split512",
    "mlffd_chain_last_c128_w64_s32_r1",
    "mlffd_neighbors",
    "mlffd_largest_move",
    "mlffd_node_c128_f32_reduced",
    "mlffd_training_backward_later_c128_p5_f32_tangent_geometry",
    "mlffd_training_table_later_c128_p5_f32_tangent",
}


def registers_of(cubin):
    """Registers of a thread of each kernel: in ELF's section .nv.info, entries of kind 0x2f."""
    (first,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, first + i * size) for i in range(count)]
    found = []
    for name, _, _, _, start, length in sections:
        at = sections[names][4] + name
        if cubin[at : cubin.index(b"\0", at)] != b".nv.info":
            continue
        at, end = start, start + length
        while at < end:
            form, kind, n_bytes = struct.unpack_from("<BBH", cubin, at)
            if (form, kind) == (4, 0x2F):
                found.append(struct.unpack_from("<II", cubin, at + 4)[1])
            at += 4 + (n_bytes if form == 4 else 0)
    return found


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(KERNELS)]
)
def test_kernels_compile_to_machine_code_of_a_gpu(name, tmp_path):
    wp.compile_aot_module(KERNELS[name].module, arch=90, module_dir=tmp_path, use_ptx=False)
    (cubin,) = tmp_path.glob("*.cubin")
    content = cubin.read_bytes()
    assert content[1:4] == b"ELF"
    registers = registers_of(content)
    assert registers
    threads = getattr(KERNELS[name], "mlffd_block", message_kernels.BLOCK)
    assert 8 <= max(registers) <= min(255, REGISTERS // threads)
