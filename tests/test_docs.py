"""The documentation is true: its Python runs, its reference is complete."""

from __future__ import annotations

import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import hyperconv_ext
from hyperconv_ext import functional, hypernet

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = sorted(_ROOT.glob("docs/**/*.md"))
_BLOCK = re.compile(
    r"^(?:<!-- no-run: (?P<reason>.+) -->\n\n?)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


class Snippet(NamedTuple):
    """A block of Python on a page; with a reason it is only compiled."""

    line: int
    code: str
    reason: str | None


def _snippets(page: Path) -> list[Snippet]:
    text = page.read_text()
    found = list(_BLOCK.finditer(text))
    assert len(found) == text.count("```python"), f"{page}: a block of Python is not told from its text"
    return [Snippet(text.count("\n", 0, m.start("code")), m["code"], m["reason"]) for m in found]


def _name(page: Path) -> str:
    return page.relative_to(_ROOT).as_posix()


_WITH_PYTHON = [page for page in (_ROOT / "README.md", *_PAGES) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", _WITH_PYTHON, ids=_name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for snippet in _snippets(page):
        # Blank lines before it, so that a traceback has the page's line numbers.
        compiled = compile("\n" * snippet.line + snippet.code, str(page), "exec")
        if snippet.reason is None:
            exec(compiled, namespace)


def test_the_reference_has_every_public_class_and_function() -> None:
    text = "\n".join(page.read_text() for page in (_ROOT / "docs/reference").glob("*.md"))
    listed = [pkgutil.resolve_name(name) for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    public = [getattr(module, name) for module in (hyperconv_ext, functional) for name in module.__all__]
    public += [value for name in hypernet.__all__ if inspect.isclass(value := getattr(hypernet, name))]
    missing = [value for value in public if callable(value) and value not in listed]
    assert missing == []
