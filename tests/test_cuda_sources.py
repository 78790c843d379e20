"""The CUDA sources compile for the GPUs, and their kernels are right when they run on the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import (
    batch_norm_residual,
    batch_norm_residual_reference,
    build,
    conv_stack,
    conv_stack_reference,
    mlp_stack,
    mlp_stack_paths,
    mlp_stack_paths_reference,
    mlp_stack_reference,
    path_accumulate,
    path_accumulate_reference,
    residual_add,
    residual_add_reference,
)

SOURCES = sorted(build.ROOT.glob("csrc/*/cuda.cu"))
SEEDS = [1, 2]  # besides 0, the order of the indices

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
needs_fibers = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def sources(op: str) -> list[Path]:
    return [build.ROOT / "csrc" / op / "cuda.cu", build.HERE / f"{op}.cpp"]


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_nvcc_compiles_it_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    log = build.run(["nvcc", *flags, "-cubin", str(source), "-o", str(tmp_path / "kernels.cubin")])
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert frames
    assert set(frames) == {("0", "0")}


ROOMS = {
    "residual_add": (residual_add, residual_add_reference),
    "batch_norm_residual": (batch_norm_residual, batch_norm_residual_reference),
    "mlp_stack": (mlp_stack, mlp_stack_reference),
    "mlp_stack_paths": (mlp_stack_paths, mlp_stack_paths_reference),
    "path_accumulate": (path_accumulate, path_accumulate_reference),
    "conv_stack": (conv_stack, conv_stack_reference),
}


@needs_fibers
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", ROOMS)
def test_results_are_right_and_the_same_in_every_order_of_the_threads(
    op: str, seed, record_property
) -> None:
    room, reference = ROOMS[op]
    library = build.library(sources(op), build.toolkit())
    in_order, shuffled = (room.Runner(str(library), s) for s in (0, seed))
    count = 0
    for case in reference.cases(seed):
        written = zip(in_order.run(case), shuffled.run(case), strict=True)
        assert all(a.tobytes() == b.tobytes() for a, b in written), f"{case} depends on the order"
        count += 1
    record_property("cases in two orders of threads", count)


def run_in_its_own_process(op: str, library: Path, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", f"cuda_on_cpu.{op}", str(library), "3"]
    done = subprocess.run(
        command, cwd=build.HERE.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_fibers
@pytest.mark.parametrize(
    ("route", "used"), [("layers", "40 cases on layers"), ("persistent", "32 cases on persistent")]
)
def test_the_kernels_of_a_stack_can_be_chosen(route: str, used: str) -> None:  # float64: layers
    library = build.library(sources("mlp_stack"), build.toolkit())
    environment = {**os.environ, "FASTRES_MLP_STACK": route}
    assert used in run_in_its_own_process("mlp_stack", library, environment)


@needs_fibers
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [16, 64, 200])
def test_scratch_for_a_segment_of_a_stack_serves_a_shorter_one(shared: bool, width: int) -> None:
    library = ctypes.CDLL(str(build.library(sources("mlp_stack"), build.toolkit())))
    needed = library.backward_scratch_bytes
    needed.restype = ctypes.c_int64
    shape = mlp_stack.Shape(1, width, 24, 40, 1, 0, shared, False)
    bytes_by_blocks = [needed(ctypes.byref(shape), ctypes.c_int64(b)) for b in range(41)]
    assert bytes_by_blocks == sorted(bytes_by_blocks)


@needs_fibers
@pytest.mark.parametrize("memory", ["shared", "rows global", "global"])
def test_the_rows_of_paths_are_tried_in(memory: str) -> None:
    library = build.library(sources("mlp_stack_paths"), build.toolkit())
    printed = run_in_its_own_process("mlp_stack_paths", library, {**os.environ})
    for precision in ("", ", tf32x3", ", tf32"):
        assert re.search(f"paths_kernel, {memory}{precision}(,|$)", printed, re.MULTILINE)


@needs_fibers
@pytest.mark.parametrize(("width", "blocks", "longest"), [(40, 60, 20), (256, 16, 16)])
def test_tf32x3_is_as_exact_as_float32(width: int, blocks: int, longest: int) -> None:
    library = build.library(sources("mlp_stack_paths"), build.toolkit())
    runner = mlp_stack_paths.Runner(str(library), 0)
    case = mlp_stack_paths_reference.Case(
        1, 2, width, 70, blocks, longest, "relu", "none", shared=False, power=0, lift=0,
        wants_kept=True, wants_tail=False, shift=0, spoilt=0, shared_bytes=227 << 10)  # fmt: skip

    def error(precision: int) -> float:
        """Return the largest relative error of a length."""
        tried = dataclasses.replace(case, precision=precision)
        inputs, x, cotangent = runner.inputs(tried)
        want = mlp_stack_paths_reference.reference(tried, inputs, x, cotangent).rows
        kept = runner.launch(tried, inputs, x, cotangent).kept
        norms = (np.linalg.norm(rows, axis=(1, 2)) for rows in (kept - want, want))
        return float(np.max(np.divide(*norms)))

    ieee, tf32x3, tf32 = map(error, range(3))
    assert tf32x3 < 2 * ieee < tf32 / 100


@needs_fibers
def test_no_other_kernels_of_a_stack_can_be_chosen() -> None:
    library = build.library(sources("mlp_stack"), build.toolkit())
    environment = {**os.environ, "FASTRES_MLP_STACK": "fast"}
    with pytest.raises(AssertionError, match="must be layers or persistent, got fast"):
        run_in_its_own_process("mlp_stack", library, environment)


@needs_fibers
@pytest.mark.parametrize("op", ROOMS)
def test_kernels_stay_within_their_memory(op: str, record_property) -> None:
    if build.sanitizer() is None:
        pytest.skip(f"{build.COMPILER} has no libasan.so")
    flags = [*build.SANITIZE, *build.OWN_TYPES]  # our own types: they are tried nowhere else
    library = build.library(sources(op), flags)
    printed = run_in_its_own_process(op, library, build.sanitizer_environment())
    counts = map(int, re.findall(r"^(\d+) cases", printed, re.MULTILINE))
    record_property("cases under address and undefined-behaviour sanitizers", sum(counts))


@needs_fibers
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("which", "found"),
    [
        (0, "misaligned: .*load16: address not a multiple of 16"),
        (1, "divergent_barrier: .*deadlock\n *32 threads at __syncthreads.*\n *32 threads at"),
        (2, "barrier_left_out: .*deadlock\n *32 threads at __syncthreads.*\n *32 threads exited"),
        (3, "absent_lane: .*__shfl_xor_sync: reads a lane that takes no part"),
        (4, "foreign_mask: .*__shfl_xor_sync: lane not in its own mask"),
        (5, "missing_barrier: wrong sum"),
        (6, "too_large: invalid launch configuration"),
        (7, "early_read: wrong sum"),
        (8, "part_of_a_warp: .*multiply_add: needs a whole warp"),
        (9, "not_shared: .*load_matrices: address not in shared memory"),
        (10, "too_much_shared: invalid launch configuration"),
        (11, "unwritten: wrong sum"),
        (12, "wrong_lane: wrong product"),
    ],
)
def test_the_fibers_find_the_fault(which: int, found: str, seed: int, record_property) -> None:
    library = ctypes.CDLL(str(build.library([build.HERE / "faults.cpp"], build.toolkit())))
    library.fault.restype = ctypes.c_char_p
    error = library.fault(which, ctypes.c_uint64(seed))
    assert error is not None
    assert re.search(found, error.decode())
    record_property("planted faults found", int(seed == 0))


@needs_fibers
def test_one_element_too_many_is_found_by_the_sanitizer(record_property) -> None:
    if build.sanitizer() is None:
        pytest.skip(f"{build.COMPILER} has no libasan.so")
    library = build.library([build.HERE / "faults.cpp"], [*build.SANITIZE, *build.OWN_TYPES])
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).fault(13, ctypes.c_uint64(0))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(library)],
        env=build.sanitizer_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(r"heap-buffer-overflow[\s\S]*WRITE of size 4[\s\S]*tail_kernel", done.stderr)
    record_property("planted faults found", 1)


@needs_fibers
def test_an_atomic_sum_of_floats_does_not_compile(record_property) -> None:
    with pytest.raises(RuntimeError, match=r"deleted function.*atomicAdd"):
        build.library([build.HERE / "faults.cpp"], ["-DFLOAT_ATOMIC", *build.toolkit()])
    record_property("planted faults found", 1)
