"""The documentation is true: its Python runs, its reference is complete."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import hyperconv_ext
from hyperconv_ext import conversion, functional, hypernet
from hyperconv_ext.modules import HyperConvNd

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
    modules = (hyperconv_ext, functional, conversion)
    public = [getattr(module, name) for module in modules for name in module.__all__]
    public += [value for name in hypernet.__all__ if inspect.isclass(value := getattr(hypernet, name))]
    missing = [value for value in public if callable(value) and value not in listed]
    assert missing == []


def test_the_reference_has_every_method_of_a_layer() -> None:
    page = (_ROOT / "docs/reference/layers.md").read_text()
    members = {
        name
        for name, value in vars(HyperConvNd).items()
        if isinstance(value, (property, classmethod, FunctionType))
        and not name.startswith("_")
        and not hasattr(nn.Module, name)
    }
    assert "with_kernel_size" in members
    assert {name for name in members if f"- {name}\n" not in page} == set()


def _template(message: ast.expr) -> str | None:
    """The text of a message, with … for what differs from call to call; None if it is made elsewhere."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in message.values)
    if isinstance(message, ast.BinOp):
        return "".join(_template(side) or "…" for side in (message.left, message.right))
    return None


def _messages() -> Iterator[tuple[str, str]]:
    """(where, what comes before `got` and the remedy) of every error that the package raises."""
    for path in sorted((_ROOT / "hyperconv_ext").glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Raise)
                or not isinstance(node.exc, ast.Call)
                or not node.exc.args
            ):
                continue
            text = _template(node.exc.args[0])
            if text is not None:
                yield f"{_name(path)}:{node.lineno}", re.split(r",? got |; ", text)[0]


def test_every_error_message_has_its_cause_on_a_page() -> None:
    page = (_ROOT / "docs/guides/troubleshooting.md").read_text()
    messages = dict(_messages())
    assert len(messages) > 50
    missing = {where: message for where, message in messages.items() if f"`{message}`" not in page}
    assert missing == {}


def test_every_environment_variable_is_described() -> None:
    page = (_ROOT / "docs/install.md").read_text()
    sources = [_ROOT / "setup.py", *(_ROOT / "hyperconv_ext").glob("**/*.py")]
    # Those that the code reads are quoted, macros for the compiler are not.
    read = {name for path in sources for name in re.findall(r'"(HYPERCONV_[A-Z_]+)"', path.read_text())}
    assert "HYPERCONV_BACKEND" in read
    assert {name for name in read if f"`{name}`" not in page} == set()


def test_the_readme_links_to_what_is_there() -> None:
    """Pages of the site are checked when that is built."""
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", (_ROOT / "README.md").read_text())
    assert "docs/index.md" in links
    assert [link for link in links if not (_ROOT / link).exists()] == []
