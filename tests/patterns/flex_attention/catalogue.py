"""The catalogue's page: ``python -m tests.patterns.flex_attention.catalogue`` measures every idiom and writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch._dynamo

from tests.patterns.flex_attention.checks import check
from tests.patterns.flex_attention.idioms import IDIOMS, Entry

PAGE = Path(__file__).parents[3] / "patterns" / "flex_attention" / "catalogue.md"
MEASURED = Path(__file__).with_name("catalogue.json")
HEAD = """# What flex_attention's mods become

Written by `python -m tests.patterns.flex_attention.catalogue`; `test_catalogue.py` beside it checks this page. Each
idiom (`tests/patterns/flex_attention/idioms.py`) was exported with batch and length free at opset 23 and 24, and run in
PyTorch and ONNX Runtime at the exported length and at another; the error is the largest difference to eager
flex_attention in float32.

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
            nodes = f"{row.nodes} ONNX node{'s' if row.nodes > 1 else ''}"
            lines.append(
                f"### {row.name}\n\n{entry.source}\n\n```python\n{entry.text}\n```\n\n"
                f"{'Encoding' if row.whole else 'Reason'}: {row.encoding}. {nodes}, "
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
