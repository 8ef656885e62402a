"""The page and the cell of a notebook, read as text; `test_browser` looks at them."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfuse.cli import main
from fxfuse.report.html import fragment, page
from fxfuse.report.model import Entry, Report

SVG = "{http://www.w3.org/2000/svg}"


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.stack == []
    return parser


def drawings(text: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


@pytest.mark.parametrize("make", [fragment, lambda r: page(r, "a model", seconds={"fuse": 1.0}, facts={"torch": "2"})])
def test_it_says_what_the_report_says(report: Report, make) -> None:  # type: ignore[no-untyped-def]
    text = make(report)
    parsed(text)
    for word in ("RMSNormalization", "Attention", f"{report.nodes_before} → {report.nodes_after}", "layers.0.norm"):
        assert word in text
    (miss,) = report.near_misses()
    assert miss.reason is not None and miss.reason[:40] in text
    assert "torch.softmax(scores, -1) @ h" in text, "the model's line"


def test_nothing_is_fetched_and_no_script_runs(report: Report) -> None:
    text = page(report, "a model")
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(parsed(text).seen)
    assert set(re.findall(r"https?://[^\"'\s<)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", text)


def test_what_became_what_has_one_number(report: Report) -> None:
    before, after = drawings(fragment(report))
    numbered = re.compile(r"^\d+ (RMSNormalization|Attention)$")
    titles = [[t.text for t in svg.iter(f"{SVG}title") if numbered.match(t.text or "")] for svg in (before, after)]
    assert sorted(titles[0]) == sorted(titles[1]) == ["1 RMSNormalization", "2 Attention"]
    assert len(list(before.iter(f"{SVG}text"))) > len(list(after.iter(f"{SVG}text")))


def test_everything_lies_inside_the_drawing(report: Report) -> None:
    for svg in drawings(fragment(report)):
        width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
        for rect in svg.iter(f"{SVG}rect"):
            x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            assert x >= 1 <= y and x + w <= width - 1 and y + h <= height - 1
        for path in svg.iter(f"{SVG}path"):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
            assert all(0 <= x <= width for x in numbers[::2]) and all(0 <= y <= height for y in numbers[1::2])


def test_a_models_own_text_is_text(report: Report) -> None:
    """Names, source lines and reasons come from the model's author."""
    assert report.layer is not None
    bad = "<script>alert('x')</script>&\""
    calls = tuple(replace(c, source=bad, operator=f"a.{bad}.b", inputs=(bad,)) for c in report.layer.before)
    hostile = Report(
        24,
        [*report.entries, Entry(bad, "refused", (bad,), reason=bad, source=f"{bad}:1 in f: {bad}", module=bad)],
        layer=replace(report.layer, module=bad, before=calls),
    )
    text = page(hostile, bad, facts={bad: bad})
    assert "script" not in parsed(text).seen
    assert len(drawings(text)) == 2
    assert "&lt;script&gt;" in text


def test_an_empty_report() -> None:
    text = page(Report(24), "nothing")
    parsed(text)
    assert "Nothing to fuse was found." in text and "<svg" not in text


def test_without_the_drawing_library_the_rest_is_there(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    text = fragment(report)
    parsed(text)
    assert ("<svg" not in text and "pip install &#39;fxfuse[report]&#39;" in text) or "fxfuse[report]" in text
    assert "RMSNormalization" in text


def test_a_notebook_shows_it(report: Report) -> None:
    assert report._repr_html_() == fragment(report)


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8),)), tmp_path / "m.pt2")
    path = tmp_path / "deep" / "report.html"
    assert main(["export", str(tmp_path / "m.pt2"), "--out", str(tmp_path / "o"), "--report", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    parsed(text)
    for word in ("m.pt2", "RMSNormalization", "Computes what the original does.", "ONNX Runtime", "translate"):
        assert word in text
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
