"""How `make docs` builds the site from the pages and the docstrings (docs/decisions/0159-the-site.md).

The pages are the same that are read in the repository: links between them are relative to the repository, and
each page is listed in docs/index.md. Building and reading the site need no network.
"""

from sphinx.pycode import ModuleAnalyzer

from fcluster.graph.operators import TopicSpec

project = "fcluster"
copyright = "the fcluster authors"  # noqa: A001  Sphinx's name

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The repository is the source directory, because the README and the pages in docs link to each other.
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**.md", "examples/**.md"]
exclude_patterns = [".*", "build", "dist"]

# Headings get the anchors that they have on GitHub. colon_fence is the syntax of toctrees.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# Docstrings are in Google's style. Single backticks are code there, not references.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

# A reference without a target fails the build. The standard library isn't linked to, and type variables and a
# few types that only appear in signatures aren't described.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|datetime|pathlib|typing)\..*"),
    ("py:class", r"(fcluster\.[a-z_.]+\.)?_?[A-Z](_co|_contra)?"),
    ("py:class", r"fcluster\.api\.context\.AnyFunction"),
    ("py:class", r"fcluster\.graph\.(record\.Unset|states\.State|windows\.Gathered)"),
]

# Sphinx would describe an alias as an alias: users know the class by this name only.
TopicSpec.__module__, TopicSpec.__name__, TopicSpec.__qualname__ = "fcluster", "Topic", "Topic"

html_theme = "furo"
html_title = "fcluster"
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["site"]


def _without_decisions(_app, page, source):
    """Decisions are listed in their index. In the sidebar of each page they would be noise."""
    if page.startswith("docs/decisions/") and not page.endswith("/README"):
        source[0] = f"---\norphan: true\n---\n\n{source[0]}"


# Users get objects of these from fcluster and never make one, so their parameters aren't shown.
_MADE_BY_FCLUSTER = {
    "fcluster.Stream",
    "fcluster.Table",
    "fcluster.GlobalTable",
    "fcluster.GroupedTable",
    "fcluster.WindowedStream",
    "fcluster.api.windowed.GatheredStream",
    "fcluster.testing.DeadLetter",
    "fcluster.testing.JobStopped",
    "fcluster.testing.TopicRecord",
}


def _without_parameters(_app, _what, name, _obj, _options, signature, returns):
    return ("", None) if name in _MADE_BY_FCLUSTER else (signature, returns)


def _without_overloads(_app):
    """Overloads are for type checkers: fifteen of `Job.topic`. Readers get the signature that covers them."""
    for module in (
        "fcluster.api.job",
        "fcluster.api.streams",
        "fcluster.api.tables",
        "fcluster.graph.states",
    ):
        analyzer = ModuleAnalyzer.for_module(module)
        analyzer.analyze()
        analyzer.overloads.clear()


def setup(app):
    app.connect("builder-inited", _without_overloads)
    app.connect("source-read", _without_decisions)
    app.connect("autodoc-process-signature", _without_parameters)
