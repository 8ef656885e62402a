"""What was recorded of the zoo, as pages: one for the decoders, one for the encoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .expected import UPSTREAM

HERE = Path(__file__).parent
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Page:
    """A file of results, a line an architecture, and the page that is made of it."""

    results: Path
    page: Path
    head: Callable[[Results], list[str]]

    def recorded(self) -> Results:
        """The last result of each architecture."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        return {r["arch"]: r for r in map(json.loads, lines)}

    def add(self, result: dict[str, Any]) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def table(self) -> str:
        """The matrix as Markdown."""
        results = {arch: r for arch, r in self.recorded().items() if r["stage"] != "build"}
        lines = [
            *self.head(results),
            "",
            "| architecture | RMSNormalization | RotaryEmbedding | Attention | k, v expanded | right | open |",
            "|---|---:|---:|---:|---:|---|---|",
        ]
        for result in sorted(results.values(), key=lambda r: r["arch"]):
            why = UPSTREAM.get(result["arch"], result.get("error", ""))
            said = "; ".join([*result.get("open", []), *([why] if result["stage"] != "done" else [])])
            lines.append(
                f"| {result['arch']} | {' | '.join(_counts(result))} | {result.get('expanded', '') or ''} "
                f"| {'yes' if result['stage'] == 'done' else 'no'} | {said.replace('|', '/')} |"
            )
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        self.page.write_text(self.table())


def whole(result: dict[str, Any]) -> bool:
    """Is it right, and is every norm, rotation and attention that eager runs one operator?"""
    if result["stage"] != "done" or "executed" not in result:
        return False
    return all(got >= ran for got, ran in zip(result["fused"], result["executed"], strict=True))


def _counts(result: dict[str, Any]) -> list[str]:
    """How many of each operator; ``2 of 4`` where eager runs more than were found."""
    fused = result.get("fused", ("", "", ""))
    ran = result.get("executed", (0, 0, 0))
    return [f"{got} of {n}" if got != "" and got < n else str(got) for got, n in zip(fused, ran, strict=True)]


def _decoders(results: Results) -> list[str]:
    done = sum(r["stage"] == "done" for r in results.values())
    return [
        "# Decoders of transformers",
        "",
        f"{len(results)} architectures, tiny and with random weights; {done} export with batch and sequence dynamic",
        "and give PyTorch's numbers in ONNX Runtime at (2, 16) and (3, 11).",
        "`python -m tests.zoo.coverage` writes this.",
    ]


def _encoders(results: Results) -> list[str]:
    lines = [
        "# Encoders of transformers",
        "",
        "Masked language models, and towers for images and sound, tiny and with random weights. Right: they export",
        "with a dynamic batch (text and sound: and length) and give PyTorch's numbers in ONNX Runtime at two shapes.",
        "Whole: every RMSNorm, rotation and attention that eager PyTorch runs is one operator.",
        "`python -m tests.zoo.coverage --encoders` writes this.",
        "",
        "| of | run in PyTorch | right | whole |",
        "|---|---:|---:|---:|",
    ]
    for kind in dict.fromkeys(arch.split("/")[0] for arch in results):
        these = [r for arch, r in results.items() if arch.startswith(kind + "/")]
        right = sum(r["stage"] == "done" for r in these)
        lines.append(f"| {kind} | {len(these)} | {right} | {sum(map(whole, these))} |")
    return lines


DECODERS = Page(HERE / "results.jsonl", HERE / "coverage.md", _decoders)
ENCODERS = Page(HERE / "encoders.jsonl", HERE / "encoders.md", _encoders)
