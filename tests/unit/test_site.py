"""The site: it builds without a warning, needs no network, and has all of the public API."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fcluster
import fcluster.schema_registry
import fcluster.testing

REPOSITORY = Path(__file__).parents[2]
REFERENCE = sorted((REPOSITORY / "docs" / "reference").glob("*.md"))
NAMES = {
    f"{module.__name__}.{name}"
    for module in (fcluster, fcluster.schema_registry, fcluster.testing)
    for name in module.__all__
    if name != "__version__"
}
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']([^"']+)|<link\b[^>]*\bhref=["']([^"']+)"""
)
"""What a browser loads by itself when it shows a page. Links that a reader may click don't count."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. What Sphinx warns of fails the build, as in `make docs`."""
    directory = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--conf-dir", "docs"]
    command = [sys.executable, "-m", "sphinx", *options, "--doctree-dir", str(directory / "doctrees")]
    built = subprocess.run(
        [*command, ".", str(directory / "site")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory / "site"


@pytest.mark.timeout(600)
def test_site_builds_without_warnings(site: Path) -> None:
    start = (site / "docs" / "index.html").read_text(encoding="utf-8")
    assert "guides/first-job.html" in start
    assert "docs/index.html" in (site / "index.html").read_text(encoding="utf-8")
    reference = (site / "docs" / "reference" / "job.html").read_text(encoding="utf-8")
    assert 'id="fcluster.Job"' in reference
    for inherited in ("fcluster.Context.offset", "fcluster.CallContext.offset"):
        assert f'id="{inherited}"' in reference


@pytest.mark.timeout(600)
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 100
    for page in pages:
        for loaded in LOADED.findall(page.read_text(encoding="utf-8")):
            assert not re.match(r"(https?:)?//", "".join(loaded)), f"{page.name} loads {''.join(loaded)}"


def test_reference_has_each_public_name_once() -> None:
    listed = [
        name
        for page in REFERENCE
        for name in re.findall(r"^\.\. auto\w+:: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) >= NAMES, f"add {NAMES - set(listed)} to a page in docs/reference"


def test_examples_in_docstrings_are_valid_code() -> None:
    examples = [
        example
        for name in sorted(NAMES)
        for example in re.findall(
            r"^Example::\n\n((?:(?: +.*)?\n)+)", (inspect.getdoc(_public(name)) or "") + "\n", re.MULTILINE
        )
    ]
    assert len(examples) >= 4
    for example in examples:
        ast.parse(textwrap.dedent(example))


def _public(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules[module], attribute)
