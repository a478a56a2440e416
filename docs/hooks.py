"""What the site takes from elsewhere in the repository, and its mathematics as MathML."""

from __future__ import annotations

import html
import posixpath
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parents[1]
# Pages, and the figures in them, that stand where people look for them without the site.
_ELSEWHERE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "csrc/README.md",
    *(
        f"{room}/results/*/*.{kind}"
        for room in ("benchmarks", "examples")
        for kind in ("md", "png", "svg")
    ),
)
_FONT = "STIXTwoMath-Regular.ttf"  # browsers need one with a MATH table, which few machines have
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
_INCLUDE = re.compile(r"^<!-- from (\S+) -->$", re.MULTILINE)
_FIGURE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*(assets/[\w-]+\.svg)" */?></p>')
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_files(files: Any, config: Any) -> Any:
    """The site's files and those that stand elsewhere, each under its path in the repository."""
    for pattern in _ELSEWHERE:
        for path in sorted(_ROOT.glob(pattern)):
            name = path.relative_to(_ROOT).as_posix()
            files.append(
                File(name, str(_ROOT), config.site_dir, config.use_directory_urls)
            )
    font = str(distribution("ziamath").locate_file(f"ziamath/fonts/{_FONT}"))
    files.append(File.generated(config, f"assets/{_FONT}", abs_src_path=font))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """`markdown` with what it includes; links between files lead to the pages of the site."""
    name = page.file.src_uri
    inside = (Path(config.docs_dir) / name).exists()
    here = posixpath.dirname(f"docs/{name}" if inside else name)

    def included(match: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(here, match[1]))
        folder = posixpath.dirname(source)
        _, _, text = (_ROOT / source).read_text(encoding="utf-8").partition("\n")
        return _LINK.sub(
            lambda link: posixpath.relpath(posixpath.join(folder, link[1]), here), text
        )

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1])).removeprefix(
            "docs/"
        )
        return posixpath.relpath(target, posixpath.dirname(name) or ".")

    return _LINK.sub(on_site, _INCLUDE.sub(included, markdown))


def on_page_content(content: str, config: Any, **_: Any) -> str:
    """`content` with its formulas as MathML, and its own figures as part of it, to take its colours."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    def figure(match: re.Match[str]) -> str:
        drawing = Path(config.docs_dir, match[2]).read_text()
        return f"<figure>{drawing}<figcaption>{match[1]}</figcaption></figure>"

    return _FIGURE.sub(figure, _FORMULA.sub(formula, content))
