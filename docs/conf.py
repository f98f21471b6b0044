"""The pages: MyST Markdown, the interface from the docstrings, formulas as MathML. Nothing is loaded from a network."""

import sys
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ConfigError

import bilevel

for module in ("furo", "hypothesis", "latex2mathml", "myst_parser"):
    if find_spec(module) is None:
        raise ConfigError(
            f'the pages need {module}, which is not installed: pip install ".[docs]" in the folder of the repository'
        )

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "bilevel"
copyright = "The bilevel developers, Apache-2.0"
release = bilevel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "mathml", "statuses"]
exclude_patterns = ["_build"]
html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"bilevel {release}: implicit differentiation for PyTorch"
html_short_title = f"bilevel {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # say a thing once: at the base class
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# A reference that leads nowhere is an error (make docs), except to other projects: their inventories would have to
# be downloaded. `Tensor` and the rest of the second pattern are names that the annotations import.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|types|enum|dataclasses|abc|pathlib|numpy|hypothesis)(\..*)?|Tensor"),
    # the type of Hypergradient.certificate, whose answers are attributes and methods of the Hypergradient
    ("py:class", r"bilevel\.gradient\.Evidence"),
    ("py:class", r"bilevel\.entry\.Solver"),  # what `solver` has to have, for type checkers
    ("py:.*", r"applications\.meta_learning\..*|(Checkpoint|Config|Data)Error"),  # of which the page has a selection
]


def keep_first_sentence(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """An empty comment, or napoleon reads "Steps taken: a number" at the head of a property as "type: description"."""
    if what in ("attribute", "property", "data"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_first_sentence, priority=400)  # napoleon has 500
