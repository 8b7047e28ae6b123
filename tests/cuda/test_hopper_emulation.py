"""Hopper's instructions over their emulation: small kernels that are right, and faults that are
planted (tests/emulation/hopper_checks.cpp)."""

import subprocess

import pytest
from support.backends import build_emulation

pytestmark = pytest.mark.emulated

RIGHT = [
    *(f"{unit}_{cols}" for unit in ("half", "bfloat") for cols in (64, 96, 128, 256)),
    "half_registers",
    "half_128_registers",
    "bfloat_registers",
    "stores_then_products",
    "two_sums_at_once",
    "boxes_at_edges",
    "multicast",
    "stores",
    "as_cute_has_it",
    "hand_over",
    "barriers",
    "registers",
]

# What the emulation says, or the value that came out wrong.
FAULTS = {
    "wrong_phase": "a product reads bytes 0 to 8191 of shared memory, to which a box is being",
    "full_at_once": "more arrivals than expected at the barrier at byte 49152",
    "released_too_early": (
        "a box is copied to bytes 0 to 8191 of rank 0, "
        "which a product reads that warpgroup 0 has not waited for"
    ),
    "boxes_forgotten": (
        "no thread can go on\n"
        "  rank 0, threads 129 to 255: ended\n"
        "  rank 0, threads 0 to 127: wait for phase 0 of the barrier at byte 49152, where "
        "0 of 1 arrivals and 16384 bytes of phase 0 have not come\n"
        "  rank 0, thread 128: wait for phase 0 of the barrier at byte 49168, where "
        "128 of 128 arrivals and 0 bytes of phase 0 have not come\n"
    ),
    "wrong_stride": "wrong: a sum is ",
    "wrong_leading": "wrong: a sum is ",
    "not_aligned": "an operand does not begin at a multiple of 1024 bytes, but at byte 8704",
    "sums_read_early": "wrong: a sum is nan",
    "sums_written": "sums were written while products were under way",
    "no_begin": "begin_products is missing before a product",
    "no_wait": "a thread ends before it has waited for its products",
    "threads_differ": "threads of a warpgroup differ in their product",
    "unpublished": "a product reads shared memory that nobody has written for it",
    "stored_too_early": "which was written without publish_stores, or before the reader",
    "copies_to_an_ended_block": "the barrier at byte 0 is of rank 1, which has ended",
    "box_unpublished": "a store of a box reads byte 1024 of shared memory, which was written",
    "box_stored_too_early": "publish_stores, or before the reader was waited for",
    "box_overwritten": (
        "a box is copied to bytes 1024 to 3071 of rank 0, "
        "which a store reads that has not been waited for"
    ),
    "box_not_waited_for": "a thread ends before it has waited for its stores",
    "box_not_committed": "a thread ends before it has committed its stores",
    "barrier_not_known": "the barrier at byte 0 is used before barrier_init_done",
    "no_barrier": "there is no barrier at byte 0 of rank",
    "too_few_arrivals": (
        "rank 0, threads 0 to 31: wait for phase 0 of the barrier at byte 0, where "
        "1 of 65 arrivals and 0 bytes of phase 0 have not come"
    ),
    "barrier_not_aligned": "a barrier is not aligned to 8 bytes",
    "part_of_a_warp": "a part of a warp comes to barrier 1",
    "too_few_threads": "threads 0 to 63: wait for barrier 1, to which 64 of 96 threads have come",
    "too_many_registers": "wait for 240 registers",
}


def check(case: str, schedule: int) -> subprocess.CompletedProcess:
    program = build_emulation("hopper_checks")
    return subprocess.run([program, case, str(schedule)], capture_output=True, text=True)


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right(case):
    for schedule in range(4):
        done = check(case, schedule)
        assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", ""), schedule


@pytest.mark.parametrize("case", FAULTS)
def test_planted_faults_are_found(case):
    for schedule in (0, 1):
        done = check(case, schedule)
        assert done.returncode != 0, schedule
        assert FAULTS[case] in done.stdout + done.stderr, schedule
