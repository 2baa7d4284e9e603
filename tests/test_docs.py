"""docs: every snippet runs as it stands, in order, and prints what the page says it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEED_A_RUN = ("generate.md", "rewards.md", "runs.md")  # their snippets read a run of the reader's
PAGES = [
    page.name for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text() and page.name not in NEED_A_RUN
]


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


ROOT = DOCS.parent
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]+)?\)|\]\((#[^)\s]+)\)")


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in DOCS.glob("*.md"))])
def test_links_within_the_project_lead_somewhere(page):
    """Files are there, and so are the headings that a link names."""
    text = (ROOT / page).read_text()
    for path, anchor, own in LINK.findall(text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {path}"
        if (anchor or own) and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert (anchor or own)[1:] in slugs, f"{page} links to {path}{anchor or own}"


def test_every_page_of_docs_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in text] == []
