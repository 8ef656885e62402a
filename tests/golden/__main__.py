"""`python -m tests.golden` writes all texts anew; what has changed is read in the diff."""

from __future__ import annotations

from tests.golden.case import FOLDER, cases

if __name__ == "__main__":
    wanted = cases()
    for path in FOLDER.glob("*/*.txt"):
        if path not in wanted and path.parent in {other.parent for other in wanted}:
            path.unlink()
    for path, case in wanted.items():
        text = case.text()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(FOLDER)}")
