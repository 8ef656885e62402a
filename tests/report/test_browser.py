"""The page in a real browser: light, dark, and as narrow as a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from fxfuse.report.html import page
from fxfuse.report.model import Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

PROBE = """<!doctype html><iframe src="report.html" style="width:%dpx;height:900px;border:0"></iframe><pre></pre>
<script>
onload = () => {
  const view = frames[0], page = view.document, style = view.getComputedStyle(page.documentElement);
  const cut = [...page.querySelectorAll("p, td, h1, h2, pre, summary")].filter(
    e => !e.closest(".wide") && e.getBoundingClientRect().right > view.innerWidth + 1);
  const label = page.querySelector("svg text");
  document.querySelector("pre").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, paper: style.backgroundColor, ink: style.color,
    label: view.getComputedStyle(label).fill, drawings: page.querySelectorAll("svg").length,
    fetched: view.performance.getEntriesByType("resource").length, cut: cut.map(e => e.textContent),
    text: parseFloat(view.getComputedStyle(page.querySelector("main p")).fontSize),
  });
};
</script>"""


def look(folder: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What a browser window of this width makes of the page."""
    assert BROWSER is not None, "CI installs Chromium"
    (folder / "probe.html").write_text(PROBE % width)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--dump-dom", (folder / "probe.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<pre>(.*?)</pre>", ran.stdout, re.DOTALL)
    assert found is not None and found[1], ran.stderr
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.fixture
def folder(report: Report, tmp_path: Path) -> Path:
    title = "torchtune:a_builder_with_a_very_long_name_that_has_no_space_to_break_at"
    seconds = {"load": 0.1, "capture": 2.0, "fuse": 0.5}
    (tmp_path / "report.html").write_text(page(report, title, seconds=seconds), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_the_window(folder: Path, width: int) -> None:
    seen = look(folder, width, dark=False)
    assert seen["width"] <= width, "the page scrolls sideways; only drawings may, in their own frames"
    assert seen["cut"] == [] and seen["text"] >= 14 and seen["drawings"] == 2 and seen["fetched"] == 0


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_light_and_dark(folder: Path) -> None:
    light, dark = look(folder, 1200, dark=False), look(folder, 1200, dark=True)
    assert brightness(light["paper"]) > 200 > 60 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 60 < 200 < brightness(dark["ink"])
    for seen in (light, dark):
        assert seen["label"] == seen["ink"], "drawings take the colour of the text"
