"""The gate on generated code complains of what is worse than accepted, and of nothing else."""

import json
from collections import Counter

import pytest

pytest.importorskip("triton")
from benchmarks import codegen
from benchmarks.codegen_gate import ACCEPTED, _sweeps, cases, complaints, table

GOOD = {
    "target": "sm_90", "kernel": "loss", "registers": 92, "spill_bytes": 0, "instructions": 7000,
    "pass_1_slots": 21.9, "pass_1_narrow": 0, "pass_1_unpacked": 0,
    "pass_2_slots": 15.1, "pass_2_narrow": 0, "pass_2_unpacked": 0,
}  # fmt: skip
PAIR = {
    "target": "sm_90", "kernel": "sampler", "registers": 122, "spill_bytes": 0, "instructions": 5352,
    "sweeps": 6, "sweeps_slots": 165.5, "sweeps_unpacked": 0,
}  # fmt: skip


def test_what_is_accepted_is_every_case_and_without_complaint() -> None:
    accepted = json.loads(ACCEPTED.read_text())
    assert [(case["target"], case["kernel"]) for case in accepted] == cases()
    assert [line for case in accepted for line in complaints(case, case)] == []
    assert len(table(accepted).splitlines()) == len(accepted) + 1
    loss = {case["target"]: case for case in accepted if case["kernel"] == "loss"}
    assert all(case["spill_bytes"] == 0 for case in loss.values())
    assert loss["sm_90"]["pass_1_slots"] + loss["sm_90"]["pass_2_slots"] <= 41  # the design study's prototypes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 8}, "local memory"),
        ({"parting_waits": 2}, "2 waits that the lanes of a warp may leave one by one"),
        ({"registers": 128}, "128 registers, accepted 92"),
        ({"pass_1_slots": 23.0}, "23.0 slots per entry in pass_1"),
        ({"pass_2_narrow": 3}, "3 narrow instructions in pass_2"),
        ({"pass_2_unpacked": 8}, "8 unpacked instructions in pass_2"),
    ],
    ids=str,
)
def test_what_is_worse_fails(change: dict[str, float], message: str) -> None:
    assert any(message in line for line in complaints({**GOOD, **change}, GOOD))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sweeps": 5, "sweeps_slots": 140.0}, "5 loops load 16 bytes at a time, accepted 6"),
        ({"sweeps_slots": 168.0}, "168.0 slots per entry in all loops, accepted 165.5"),
        ({"sweeps_unpacked": 16}, "16 unpacked instructions in its loops"),
    ],
    ids=str,
)
def test_loops_that_read_two_models_and_got_worse_fail(change: dict[str, float], message: str) -> None:
    assert complaints(PAIR, PAIR) == []
    assert any(message in line for line in complaints({**PAIR, **change}, PAIR))


def test_sweeps_are_the_loops_that_load_both_models_and_nothing_else() -> None:
    kinds = [{"LDG.E.128": 2}, {"LDG.E.128": 2, "STG.E": 1}, {"LDG.E.128": 1}, {"LDG.E.128": 2, "F2F.BF16.F32": 4}]
    loops = [codegen.Loop(80, Counter(of)) for of in kinds]
    found = _sweeps(codegen.Machine(100, 0, 0, loops, loops[0]))
    assert found == {"sweeps": 2, "sweeps_slots": 20.0, "sweeps_unpacked": 4}


def test_a_spill_cannot_be_accepted() -> None:
    for change in ({"spill_bytes": 8}, {"vector_spills": 1}):
        assert any("local memory" in line for line in complaints({**GOOD, **change}, {**GOOD, **change}))


def test_a_main_loop_that_lost_its_wide_loads_fails() -> None:
    lost = {key: value for key, value in GOOD.items() if not key.startswith("pass_2")}
    assert any("no 16-byte loads any more" in line for line in complaints(lost, GOOD))
    assert any("not in" in line for line in complaints(GOOD, None))


def test_loops_are_read_from_the_code() -> None:
    lines = [
        (0, "MOV R1, R2"),
        (16, "LDG.E.128 R4, [R2]"),
        (32, "@!P0 FADD R1, R1, R4"),
        (48, "@P0 BRA 0x10"),
        (64, "EXIT"),
    ]
    (loop,) = codegen._loops(lines)
    assert (loop.instructions, loop.count("LDG.E.128"), loop.count("FADD")) == (3, 1, 1)
