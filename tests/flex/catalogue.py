"""The catalogue's page: ``python -m tests.flex.catalogue`` measures every idiom and writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch._dynamo

from tests.flex.checks import check
from tests.flex.idioms import IDIOMS, Entry

PAGE = Path(__file__).parents[2] / "patterns" / "flex_attention" / "catalogue.md"
MEASURED = Path(__file__).with_name("catalogue.json")
HEAD = """# What flex_attention's mods become

Written by `python -m tests.flex.catalogue`; `tests/flex/test_catalogue.py` checks it. Each idiom
(`tests/flex/idioms.py`) was exported with batch and length free at opset 23 and 24, and run in PyTorch and ONNX Runtime
at the exported length and at another; the error is the largest difference to eager flex_attention in float32, of values
of size 1. "Attention" counts the nodes of that name in the ONNX graph.

"""


@dataclass(frozen=True)
class Row:
    name: str
    whole: bool
    encoding: str
    error: float
    nodes: int


def measure(entry: Entry) -> Row:
    torch._dynamo.reset()
    outcomes = [check(entry, dynamic=True, opset=opset) for opset in (23, 24)]
    last = outcomes[-1]
    assert all(o.encoding == last.encoding for o in outcomes)
    return Row(entry.name, last.whole, last.encoding, max(o.error for o in outcomes), last.nodes)


def load() -> dict[str, Row]:
    """What was measured last, by name."""
    rows = [Row(**row) for row in json.loads(MEASURED.read_text())]
    return {row.name: row for row in rows}


def render(rows: Iterable[Row]) -> str:
    rows = list(rows)
    texts = {e.name: e for e in IDIOMS}
    whole = [row for row in rows if row.whole]
    error = max(row.error for row in rows)
    lines = [
        f"{len(whole)} of {len(rows)} are one Attention, {len(rows) - len(whole)} are written out in primitives; "
        f"largest error {error:.1e}.\n\n"
    ]
    for title, chosen in (
        ("One Attention", whole),
        ("Written out, and why", [row for row in rows if not row.whole]),
    ):
        lines.append(f"## {title}\n\n")
        for row in chosen:
            entry = texts[row.name]
            lines.append(
                f"### {row.name}\n\n{entry.source}\n\n```python\n{entry.text}\n```\n\n"
                f"{'Encoding' if row.whole else 'Reason'}: {row.encoding}. {row.nodes} ONNX nodes, "
                f"error {row.error:.1e}.\n\n"
            )
    return HEAD + "".join(lines).rstrip() + "\n"


def main() -> None:
    rows = []
    for entry in IDIOMS:
        rows.append(measure(entry))
        print(rows[-1], flush=True)
    MEASURED.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    PAGE.write_text(render(rows))


if __name__ == "__main__":
    main()
