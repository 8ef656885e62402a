"""Every architecture of transformers through `fxfuse.onnx.export`: what fuses, and is it right?

    python -m tests.zoo.coverage                      # all that transformers maps to a causal LM head; resumes
    python -m tests.zoo.coverage --archs llama,phi
    python -m tests.zoo.coverage --encoders           # encoders of text, images and sound
    python -m tests.zoo.coverage --table              # only write the page from what has been run

Each architecture runs in a process of its own. `results.jsonl` gets a line for each, `coverage.md` the table; those of
the encoders are `encoders.jsonl` and `encoders.md`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import pages

HERE = Path(__file__).parent


def architectures() -> list[str]:
    """Text decoders: those whose configuration holds no other configurations."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [a for a in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not getattr(CONFIG_MAPPING[a], "sub_configs", None)]


def every_encoder() -> list[str]:
    """``kind/architecture``, of every kind."""
    from . import encoders

    return [f"{kind}/{arch}" for kind in encoders.KINDS for arch in encoders.architectures(kind)]


def run(arch: str) -> dict[str, Any]:
    """A decoder: export at (2, 16), count, and compare in ONNX Runtime there and at (3, 11)."""
    from .models import build, tokens

    def sample(batch: int, length: int) -> Any:
        return tokens(batch, length, seed=length)

    return _run(arch, lambda: build(arch), lambda model: sample, {0: "batch", 1: "sequence"})


def run_encoder(name: str) -> dict[str, Any]:
    """An encoder, alike. Of text and sound batch and length are dynamic, of images the batch."""
    from . import encoders

    kind, arch = name.split("/")
    axes = {0: "batch", 1: "sequence"} if kind in ("text", "sound") else {0: "batch"}

    def samples(model: Any) -> Callable[[int, int], Any]:
        return lambda batch, length: encoders.sample(model, kind, batch, length)

    return _run(name, lambda: encoders.build(arch, kind), samples, axes)


def _run(
    name: str, build: Callable[[], Any], samples: Callable[[Any], Callable[[int, int], Any]], axes: dict[int, str]
) -> dict[str, Any]:
    import torch

    import fxfuse
    import fxfuse.onnx
    from fxfuse.parity.ort import OnnxRuntime

    from . import graphs
    from .executed import executed

    torch.set_num_threads(1)
    result: dict[str, Any] = {"arch": name, "stage": "build"}
    try:
        model = build()
        sample = samples(model)
        result["executed"] = executed(model, sample(2, 16))
        result["stage"] = "export"
        started = time.process_time()
        program = fxfuse.onnx.export(model, (sample(2, 16),), dynamic_shapes=(axes,))
        result["seconds"] = round(time.process_time() - started, 1)
        report = fxfuse.report(program)
        result["fused"] = graphs.counts(program.model)
        result["open"] = sorted({f"{e.operator}: {e.reason}" for e in (*report.refused(), *report.near_misses())})
        result["expanded"] = len(graphs.expanded_keys(program.model))
        result["stage"] = "run"
        session = OnnxRuntime(program)
        for batch, length in ((2, 16), (3, 11)):
            given = sample(batch, length)
            with torch.no_grad():
                expected = model(given)
            # A float32 sum of large numbers is off by parts of the largest, small though the sum may be.
            absolute = max(1e-4, 16 * torch.finfo(torch.float32).eps * float(expected.abs().max()))
            torch.testing.assert_close(session(given)[0], expected, rtol=1e-3, atol=absolute)
        result["stage"] = "done"
    except BaseException as error:  # whatever a model or an exporter raises is this architecture's result
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return result


def _child(function: Callable[[str], dict[str, Any]], arch: str, queue: Any) -> None:
    queue.put(function(arch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--archs", help="comma separated; all by default")
    parser.add_argument("--encoders", action="store_true", help="encoders in place of decoders")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    page = pages.ENCODERS if arguments.encoders else pages.DECODERS
    results = page.recorded()
    every = every_encoder if arguments.encoders else architectures
    wanted = arguments.archs.split(",") if arguments.archs else [a for a in every() if a not in results]
    context = multiprocessing.get_context("spawn")
    for arch in [] if arguments.table else wanted:
        queue = context.Queue()
        process = context.Process(target=_child, args=(run_encoder if arguments.encoders else run, arch, queue))
        process.start()
        try:
            result = queue.get(timeout=arguments.timeout)
        except Exception:  # queue.Empty: it hangs or died
            result = {"arch": arch, "stage": "export", "error": f"no result after {arguments.timeout:.0f} s"}
            process.kill()
        process.join()
        print(result, flush=True)
        page.add(result)
    page.write()


if __name__ == "__main__":
    main()
