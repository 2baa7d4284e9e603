"""docs: every snippet runs as it stands, in order, and prints what the page says it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES)
def test_snippets_print_what_the_page_says(page):
    blocks = BLOCK.findall((DOCS / page).read_text())
    names, checked = {}, 0
    for i, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, f"{page}, block {i + 1}", "exec"), names)
        if i + 1 < len(blocks) and blocks[i + 1][0] == "text":
            assert said.getvalue() == blocks[i + 1][1], f"block {i + 1} prints:\n{said.getvalue()}"
            checked += 1
    assert checked > 0


def test_the_lessons_are_there():
    assert "lessons.md" in PAGES
