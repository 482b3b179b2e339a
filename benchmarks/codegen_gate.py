"""A gate on what the Triton kernels compile to: `python -m benchmarks.codegen_gate [--accept]`.

Every kernel is compiled here, without a GPU, for each architecture with its default options, and for sm_90 with all
others. The gate fails where anything spills, where a main loop has narrow loads or stores or unpacked conversions (of
the divergence and the sampler, "loops" are all that read both models), and where registers or the instructions of a
main loop exceed what `codegen_gate.json` accepts. `--accept` writes that file anew: its difference says what a change
costs.
"""

import argparse
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.codegen import TARGETS, Loop, Machine, compiled, machine
from deepalign.kernels.launch import ALL_REGISTERS, SHARED_REGISTERS

ACCEPTED = Path(__file__).parent / "codegen_gate.json"
LOSS_TENSORS = ("s_ptr", "a_ptr", "b_ptr", "g_ptr")
REGISTER_SLACK, SLOT_SLACK = 8, 0.25  # what another patch release of the compiler may change
# Constants of the loss's kernel by default: 16-bit rows of 128256 entries, 4 programs each, k = 100.
LOSS = {
    "FIRST": True, "SECOND": True, "S": 4, "BLOCK": 2048, "TILES": 16, "LANES": 64, "CAPACITY": 104, "ALIGN": 1,
    "DISTILL": True, "GRADIENT": True, "TEACHER_STUDENT": False, "FROM_STUDENT": False, "CENTERED": False,
    "GIVEN": False,
}  # fmt: skip
EIGHT: dict[str, Any] = {"S": 8, "TILES": 8}  # programs, where each must list what all list together otherwise
LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "odd rows": {"ALIGN": 2},
    "rows anywhere": {"ALIGN": 0},
    "float16": {"dtype": "fp16"},
    "float32": {"dtype": "fp32"},
    "forward only": {"GRADIENT": False},
    "teacher_student": {"TEACHER_STUDENT": True},
    "favored from student": {"FROM_STUDENT": True},
    "given": {"GIVEN": True, "CAPACITY": 25},
    "centered, pass 1": {"CENTERED": True, "SECOND": False, "GRADIENT": False, "LANES": 256, "CAPACITY": 256, **EIGHT},
    "centered, pass 2": {"CENTERED": True, "FIRST": False, **EIGHT},
    "base favored tokens": {"DISTILL": False, "GRADIENT": False},
}

SAMPLER_OPTIONS = ("top_p alone", "no filter", "greedy")


def cases() -> list[tuple[str, str]]:
    """(target, name of the kernel and its options)."""
    by_default = [
        (target, name) for target in TARGETS for name in ("loss", "loss, end of a row", "divergence", "sampler")
    ]
    others = [("sm_90", f"loss, {option}") for option in LOSS_OPTIONS]
    return [*by_default, *others, *(("sm_90", f"sampler, {option}") for option in SAMPLER_OPTIONS)]


def binary_of(target: str, name: str) -> Any:
    """Compile one case."""
    warps = 4 if target == "gfx942" else 8
    if name == "loss, end of a row":
        return _end_of_a_row(target)
    if name.startswith("loss"):
        changes = dict(LOSS_OPTIONS.get(name.removeprefix("loss, "), {}))
        dtype = changes.pop("dtype", "bf16")
        return _loss(target, dtype, {**LOSS, **changes}, warps)
    if name == "divergence":
        return _divergence(target, warps)
    return _sampler(target, name, warps)


def _options(target: str, registers: int) -> dict[str, Any]:
    """As `at_most_registers`, for a target that is not here."""
    return {"enable_fp_fusion": True} | ({} if target.startswith("gfx") else {"maxnreg": registers})


def _loss(target: str, dtype: str, constants: dict[str, Any], warps: int) -> Any:
    from deepalign.kernels.completion_loss.triton_rows import rows_kernel

    whole = ":16" if constants["ALIGN"] == 1 else ""
    types = dict.fromkeys(LOSS_TENSORS, f"*{dtype}:16")
    types |= dict.fromkeys(("wd_ptr", "wc_ptr", "value_ptr", "raise_ptr"), "*fp32:16")
    types |= {"given_ptr": "*i64:16", "words_ptr": "*i64:16", "ticket_ptr": "*i64"}
    types |= dict.fromkeys(("index_ptr", "found_ptr", "count_ptr"), "*i32:16")
    types |= dict.fromkeys(("stride_s", "stride_a", "stride_b", "stride_g", "lead", "vocab", "width"), f"i32{whole}")
    types |= {"k": "i32", "K": "i32", "mix": "fp32", "scale": "fp32", "tau": "fp32"}
    most = SHARED_REGISTERS if constants["SECOND"] else ALL_REGISTERS
    return compiled(rows_kernel, types, constants, target, num_warps=warps, **_options(target, most))


def _end_of_a_row(target: str) -> Any:
    from deepalign.kernels.completion_loss.triton_select import select_kernel

    flags = ("STATISTICS", "FIX", "S", "CAPACITY", "DISTILL", "TEACHER_STUDENT", "FROM_STUDENT", "CENTERED", "GIVEN")
    constants = dict(zip((*flags, "DISTINCT"), (True, True, 4, 104, True, *[False] * 5), strict=True))
    types = {name: _kind(name) for name in select_kernel.arg_names if name not in constants}
    return compiled(select_kernel, types, constants, target, num_warps=1, **_options(target, ALL_REGISTERS))


def _divergence(target: str, warps: int) -> Any:
    from deepalign.kernels.position_divergence.triton import divergence_kernel

    constants = {"BLOCK": 2048, "TILES": 64, "LANES": 8, "CAPACITY": 256, "LISTED": False, "ALIGN": 1}
    types = {name: _kind(name) for name in divergence_kernel.arg_names if name not in constants}
    return compiled(divergence_kernel, types, constants, target, num_warps=warps, **_options(target, SHARED_REGISTERS))


def _sampler(target: str, name: str, warps: int) -> Any:
    from deepalign.kernels.contrastive_sample.triton import lanes_at_once, sample_kernel

    few, greedy = name == "sampler", "greedy" in name
    split = 1 if target.startswith("gfx") else 16  # one row of 128256 entries, k = 50; on AMD rows are not split
    tiles = -(-128256 // (2048 * split))
    constants = {
        "FIRST": True, "SECOND": True, "S": split, "KIND": 2, "FEW": few, "GREEDY": greedy, "TOP_K": few,
        "TOP_P": "greedy" not in name and "no filter" not in name, "MIN_P": False,
        "LISTS": few or "top_p" in name, "WEIGHS": "top_p" in name or "no filter" in name, "WAITS": split > 1,
        "BLOCK": 2048,
        "TILES": 1 << (tiles - 1).bit_length(), "LANES": lanes_at_once(2048, tiles),
        "CAPACITY": 64 if few else 4096 // split if "top_p" in name else 1,
    }  # fmt: skip
    types = {argument: _kind(argument) for argument in sample_kernel.arg_names if argument not in constants}
    return compiled(sample_kernel, types, constants, target, num_warps=warps, **_options(target, ALL_REGISTERS))


INT64_POINTERS = {
    *("given_ptr", "listed_ptr", "words_ptr", "done_ptr", "out_count_ptr", "out_index_ptr", "token_ptr"),
    *("in_top_ptr", "a_top_ptr", "b_top_ptr"),
}


def _kind(name: str) -> str:
    """The type of an argument of the smaller kernels, which name theirs alike."""
    if name in ("a_ptr", "b_ptr", "g_ptr"):
        return "*bf16:16"
    if name in ("index_ptr", "found_ptr", "count_ptr", "first_ptr"):
        return "*i32:16"
    if name in INT64_POINTERS:
        return "*i64:16"
    if name == "uniforms_ptr":
        return "*fp64:16"
    if name.endswith("_ptr"):
        return "*fp32:16"
    if name.startswith("stride") or name in ("vocab", "lead", "share"):
        return "i32:16"
    return "i32" if name in ("K", "n", "top_k", "wanted") else "fp32"


def facts(case: tuple[str, str]) -> dict[str, Any]:
    """What the gate knows of a case."""
    target, name = case
    binary = binary_of(target, name)
    found: dict[str, Any] = {"target": target, "kernel": name}
    if target == "gfx942":
        return found | _amd_facts(binary.asm["amdgcn"])
    made = machine(binary)
    found |= {"registers": made.registers, "spill_bytes": made.stack, "instructions": made.whole.instructions}
    found["parting_waits"] = parting_waits(binary.asm["ptx"])
    width = 4 if name.endswith("float32") else 8  # entries of a 16-byte access
    if name.startswith(("divergence", "sampler")):
        return found | _sweeps(made)
    return found | (_main_loops(made, width) if name != "loss, end of a row" else {})


def _amd_facts(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert match, f"no {key} in the assembly"
        return int(match[1])

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": number("private_segment_fixed_size"),
        "vector_spills": number("vgpr_spill_count"),
        "wide_loads": len(re.findall("global_load_dwordx4", assembly)),
        "wide_stores": len(re.findall("global_store_dwordx4", assembly)),
        "instructions": len(re.findall(r"^\t[a-z]", assembly, re.MULTILINE)),
    }


def _main_loops(made: Machine, width: int) -> dict[str, Any]:
    """The loop with the most exponentials per load is pass 1, the cheapest with a store of 16 bytes pass 2."""
    wide = [loop for loop in made.loops if loop.count("LDG.E.128") >= 2]
    entries = lambda loop: width * loop.count("LDG.E.128") / 3  # noqa: E731  (three tensors)
    first = [loop for loop in wide if loop.count("MUFU.EX2") >= 2 * entries(loop) and not loop.count("FSEL", "STG")]
    second = [loop for loop in wide if loop.count("STG.E.128") and not loop.count("FSEL", "SEL", "STG.E.U16")]
    found: dict[str, Any] = {}
    for key, loops in (("pass_1", first), ("pass_2", second)):
        if loops:
            loop = min(loops, key=lambda loop: loop.instructions)
            found |= {
                f"{key}_slots": round(loop.instructions / entries(loop), 2),
                f"{key}_narrow": loop.count("LDG", "STG", "LDL", "STL") - loop.count("LDG.E.128", "STG.E.128"),
                f"{key}_unpacked": _unpacked(loop),
            }
    return found


def _sweeps(made: Machine) -> dict[str, Any]:
    """Of the kernels that read two models: the loops that load both, 16 bytes at a time, and access nothing else."""
    wide = [loop for loop in made.loops if loop.count("LDG.E.128") >= 2]
    sweeps = [loop for loop in wide if loop.count("LDG", "STG", "LDL", "STL") == loop.count("LDG.E.128")]
    entries = lambda loop: 8 * loop.count("LDG.E.128") / 2  # noqa: E731  (16-bit logits)
    return {
        "sweeps": len(sweeps),
        "sweeps_slots": round(sum(loop.instructions / entries(loop) for loop in sweeps), 2),
        "sweeps_unpacked": sum(_unpacked(loop) for loop in sweeps),
    }


def _unpacked(loop: Loop) -> int:
    """Conversions of one number at a time."""
    return sum(number for kind, number in loop.kinds.items() if kind.startswith("F2F") and "PACK_AB" not in kind)


def parting_waits(ptx: str) -> int:
    """Waits for other programs' words that a warp's lanes may leave one by one, while the rest wait for these in a
    shuffle: a wait is to end by a vote of the whole warp."""
    waits = re.findall(r"ld\.volatile\.global\.b64.*?\bbra\b", ptx, re.DOTALL)
    return sum("shfl.sync" in wait or "bar.sync" in wait for wait in waits)


def complaints(found: dict[str, Any], accepted: dict[str, Any] | None) -> list[str]:
    """What is wrong with a case."""
    name = f"{found['target']} {found['kernel']}"
    wrong = []
    if found["spill_bytes"] or found.get("vector_spills"):
        wrong.append(f"{name}: {found['spill_bytes']} bytes of local memory; there is no excuse for any")
    if found.get("parting_waits"):
        wrong.append(f"{name}: {found['parting_waits']} waits that the lanes of a warp may leave one by one")
    if accepted is None:
        return [*wrong, f"{name}: not in {ACCEPTED.name}; look at it and run with --accept"]
    if found["registers"] > accepted["registers"] + REGISTER_SLACK:
        wrong.append(f"{name}: {found['registers']} registers, accepted {accepted['registers']}")
    for key in ("wide_loads", "wide_stores"):
        if found.get(key, 0) < accepted.get(key, 0):
            wrong.append(f"{name}: {found[key]} {key.replace('_', ' ')} of 16 bytes, accepted {accepted[key]}")
    if found.get("sweeps", 0) < accepted.get("sweeps", 0):
        wrong.append(f"{name}: {found['sweeps']} loops load 16 bytes at a time, accepted {accepted['sweeps']}")
    elif found.get("sweeps_slots", 0) > accepted.get("sweeps_slots", 0) + SLOT_SLACK * found.get("sweeps", 0):
        slots = f"{found['sweeps_slots']} slots per entry in all loops, accepted {accepted.get('sweeps_slots')}"
        wrong.append(f"{name}: {slots}")
    if found.get("sweeps_unpacked"):
        wrong.append(f"{name}: {found['sweeps_unpacked']} unpacked instructions in its loops")
    for key in ("pass_1", "pass_2"):
        if f"{key}_slots" in accepted:
            if f"{key}_slots" not in found:
                wrong.append(f"{name}: the main loop of {key} has no 16-byte loads any more")
                continue
            if found[f"{key}_slots"] > accepted[f"{key}_slots"] + SLOT_SLACK:
                wrong.append(
                    f"{name}: {found[f'{key}_slots']} slots per entry in {key}, accepted {accepted[f'{key}_slots']}"
                )
            for what in ("narrow", "unpacked"):
                if found[f"{key}_{what}"]:
                    wrong.append(f"{name}: {found[f'{key}_{what}']} {what} instructions in {key}")
    return wrong


def table(every: list[dict[str, Any]]) -> str:
    """The facts, one case a line."""
    lines = [f"{'target':8}{'kernel':30}{'regs':>5}{'spill':>6}{'code':>6}{'pass 1':>8}{'pass 2':>8}{'loops':>8}"]
    for found in every:
        slots = (
            f"{found[key]:.2f}" if key in found else "" for key in ("pass_1_slots", "pass_2_slots", "sweeps_slots")
        )
        lines.append(
            f"{found['target']:8}{found['kernel']:30}{found['registers']:5}{found['spill_bytes']:6}"
            f"{found['instructions']:6}{next(slots):>8}{next(slots):>8}{next(slots):>8}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile all, print the table, compare; 1 if anything got worse."""
    parser = argparse.ArgumentParser(
        description="compile the Triton kernels without a GPU and compare with what is accepted"
    )
    parser.add_argument("--accept", action="store_true", help=f"write {ACCEPTED.name} anew")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor(options.processes) as pool:
        every = list(pool.map(facts, cases()))
    print(table(every))
    if options.accept:
        ACCEPTED.write_text(json.dumps(every, indent=1) + "\n")
        spills = [line for found in every for line in complaints(found, found)]
        print("\n".join(spills))
        return 1 if spills else 0
    accepted = {(case["target"], case["kernel"]): case for case in json.loads(ACCEPTED.read_text())}
    wrong = [line for found in every for line in complaints(found, accepted.get((found["target"], found["kernel"])))]
    print("\n".join(wrong) or f"all {len(every)} as accepted")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
