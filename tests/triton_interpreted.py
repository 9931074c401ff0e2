"""Runs test functions in Triton's interpreter: ``python triton_interpreted.py results.json name ...``.

TRITON_INTERPRET must be set before Triton is first imported, and would change every other test of the same
process; so the interpreter has a process of its own, which reports one line of JSON per test.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
import traceback

import torch

from triton_checks import CHECKS
from triton_group_mix_checks import INTERPRETED_CHECKS as GROUP_MIX_CHECKS
from triton_normalised_branches_checks import INTERPRETED_CHECKS as BRANCHES_CHECKS
from triton_support import PASSES, check_pass, interpreter_cases, kernels


def tests() -> dict[str, object]:
    every = {}
    for case in interpreter_cases():
        for pass_name in PASSES:
            every[f"{pass_name}-{case.name}"] = lambda c=case, p=pass_name: check_pass(c, p, "cpu")
    return every | CHECKS | GROUP_MIX_CHECKS | BRANCHES_CHECKS


def main(results: str, names: list[str]) -> None:
    kernels()
    # torch then fills every torch.empty with NaN: an output element no kernel writes shows.
    torch.use_deterministic_algorithms(True)
    every = tests()
    with open(results, "w") as file:
        for name in names:
            try:
                every[name]()
                outcome = None
            except Exception:
                outcome = traceback.format_exc()
            print(json.dumps({"name": name, "failure": outcome}), file=file, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
