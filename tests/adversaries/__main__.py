"""Wrong fusions by the dozen: `python -m tests.adversaries --count 300 [--family F] [--patterns none|decomposed]`.

Nothing is shrunk: each failure is printed as it was drawn, with the time and the share that was fused at the end.
"""

from __future__ import annotations

import argparse
import collections
import logging
import time
import warnings

import torch

from tests.adversaries.program import Program
from tests.adversaries.programs import FAMILIES
from tests.adversaries.property import (
    BATCH,
    Calls,
    Coverage,
    WrongFusion,
    check,
    decomposed,
    drawn_with,
    examples_as_patterns,
    unfused,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--family", choices=sorted(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patterns", choices=["all", "none", "decomposed"], default="all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    coverage = Coverage()
    seen: set[str] = set()
    failures: collections.Counter[str] = collections.Counter()

    with examples_as_patterns() as patterns:
        fuse = {"all": patterns, "none": unfused, "decomposed": decomposed}[options.patterns]

        def search(drawn: Program, runs: Calls) -> None:
            text = drawn.source()
            if text in seen:  # the simplest of a family begins every batch
                return
            seen.add(text)
            try:
                check(drawn, runs, fuse, coverage)
            except WrongFusion as wrong:
                failures[drawn.family] += 1
                print(f"--- {text}\n{wrong}\n", flush=True)

        started = time.perf_counter()
        for batch in range(options.seed, options.seed + -(-options.count // BATCH)):
            drawn_with(batch, options.family)(search)()
    seconds = time.perf_counter() - started
    print(coverage)
    print(f"{sum(failures.values())} wrong: {dict(failures)}; {seconds / len(seen):.2f} s each")


if __name__ == "__main__":
    main()
