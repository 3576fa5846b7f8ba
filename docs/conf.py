"""The documentation: `python -m sphinx -W docs site`, then site/index.html.

No page needs anything from elsewhere: the theme has the system's fonts, and equations are MathML, which browsers draw.
"""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import pages  # noqa: E402

project = "pitools"
author = "The pitools authors"
html_title = "pitools"
extensions = ["myst_nb"]
exclude_patterns = ["pages.py"]
html_theme = "furo"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_show_copyright = False
smartquotes = False  # a prime is a prime
html_copy_source = False
pygments_style = "tango"
pygments_dark_style = "github-dark"
highlight_language = "none"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown with the outputs that they were saved with
nb_merge_streams = True


def setup(app: Sphinx) -> None:
    pages.write(DOCS.parent, DOCS / "generated")
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))


html_math_renderer = "mathml"


def inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode
