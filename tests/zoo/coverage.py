"""Every decoder architecture of transformers through `fxfuse.onnx.export`: what fuses, and is it right?

    python -m tests.zoo.coverage                      # all that transformers maps to a causal LM head; resumes
    python -m tests.zoo.coverage --archs llama,phi
    python -m tests.zoo.coverage --table              # only write coverage.md from what has been run

Each architecture runs in a process of its own. `results.jsonl` gets a line for each, `coverage.md` the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

from .expected import UPSTREAM

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.jsonl", HERE / "coverage.md"


def architectures() -> list[str]:
    """Text decoders: those whose configuration holds no other configurations."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [a for a in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not getattr(CONFIG_MAPPING[a], "sub_configs", None)]


def run(arch: str) -> dict[str, Any]:
    """Export at (2, 16), count, and compare in ONNX Runtime there and at (3, 11)."""
    import torch

    import fxfuse
    import fxfuse.onnx
    from fxfuse.parity.ort import OnnxRuntime

    from . import graphs
    from .models import build, tokens

    torch.set_num_threads(1)
    result: dict[str, Any] = {"arch": arch, "stage": "build"}
    try:
        model = build(arch)
        with torch.no_grad():
            model(tokens(2, 16))
        result["stage"] = "export"
        dims = {0: "batch", 1: "sequence"}
        started = time.process_time()
        program = fxfuse.onnx.export(model, (tokens(2, 16),), dynamic_shapes={"input_ids": dims})
        result["seconds"] = round(time.process_time() - started, 1)
        report = fxfuse.report(program)
        result["fused"] = graphs.counts(program.model)
        result["open"] = sorted({f"{e.operator}: {e.reason}" for e in (*report.refused(), *report.near_misses())})
        result["expanded"] = len(graphs.expanded_keys(program.model))
        result["stage"] = "run"
        session = OnnxRuntime(program)
        for batch, length in ((2, 16), (3, 11)):
            ids = tokens(batch, length, seed=length)
            with torch.no_grad():
                torch.testing.assert_close(session(ids)[0], model(ids), rtol=1e-3, atol=1e-4)
        result["stage"] = "done"
    except BaseException as error:  # whatever a model or an exporter raises is this architecture's result
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return result


def _child(arch: str, queue: Any) -> None:
    queue.put(run(arch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--archs", help="comma separated; all by default")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    results = recorded()
    wanted = arguments.archs.split(",") if arguments.archs else [a for a in architectures() if a not in results]
    context = multiprocessing.get_context("spawn")
    for arch in [] if arguments.table else wanted:
        queue = context.Queue()
        process = context.Process(target=_child, args=(arch, queue))
        process.start()
        try:
            result = queue.get(timeout=arguments.timeout)
        except Exception:  # queue.Empty: it hangs or died
            result = {"arch": arch, "stage": "export", "error": f"no result after {arguments.timeout:.0f} s"}
            process.kill()
        process.join()
        print(result, flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
    TABLE.write_text(table(recorded()))


def recorded() -> dict[str, dict[str, Any]]:
    """The last result of each architecture."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {r["arch"]: r for r in map(json.loads, lines)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The matrix as Markdown."""
    built = [r for r in results.values() if r["stage"] != "build"]
    done = [r for r in built if r["stage"] == "done"]
    lines = [
        "# Decoders of transformers",
        "",
        f"{len(built)} architectures, tiny and with random weights; {len(done)} export with batch and sequence dynamic",
        "and give PyTorch's numbers in ONNX Runtime at (2, 16) and (3, 11).",
        "`python -m tests.zoo.coverage` writes this.",
        "",
        "| architecture | RMSNormalization | RotaryEmbedding | Attention | k, v expanded | right | open |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for result in sorted(built, key=lambda r: r["arch"]):
        norms, rotations, attentions = result.get("fused", ("", "", ""))
        why = UPSTREAM.get(result["arch"], result.get("error", ""))
        said = "; ".join([*result.get("open", []), *([why] if result["stage"] != "done" else [])])
        right = "yes" if result["stage"] == "done" else "no"
        lines.append(
            f"| {result['arch']} | {norms} | {rotations} | {attentions} | {result.get('expanded', '') or ''} | {right} "
            f"| {said.replace('|', '/')} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
