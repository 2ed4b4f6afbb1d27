"""`make bench`: output tokens/s of pawl against `transformers.generate`, same weights, same prompts, same lengths.

The comparison of `python -m pawl_loadtest.peers`, with the one peer that needs no installing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pawl_loadtest.arguments import positive
from pawl_loadtest.peers.__main__ import main as compare_peers
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.workloads import NAMED

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 when pawl's outputs disagree."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.bench", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--requests", type=positive, nargs="*", help="only the cases with these numbers of requests")
    parser.add_argument("--output-tokens", type=positive, help="instead of each case's own")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    cases = [NAMED[name] for name in ("single", "sixteen", "sixty-four")]
    if options.requests:
        cases = [case for case in cases if case.requests in options.requests]
    if options.output_tokens:
        cases = [replace(case, output_tokens=options.output_tokens) for case in cases]
    texts = [f"{case.requests}x{case.prompt_tokens}/{case.output_tokens}" for case in cases]
    flags = ["--shape", options.shape, "--rounds", str(options.rounds), "--threads", str(options.threads)]
    flags += ["--kv", "exact", "--peers", "transformers generate", "--workloads", *texts]
    return compare_peers([*flags, "--json", str(options.json)] if options.json else flags)


if __name__ == "__main__":
    sys.exit(main())
