"""``{statuses}``: the table of `bilevel.Status`, from its members, so that the page cannot drift from the code."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import bilevel


class Statuses(SphinxDirective):
    """A table with one row per status: name, whether the value is withheld, the sentence that the user reads."""

    def run(self) -> list[nodes.Node]:
        rows = ["| status | failed | message |", "|---|---|---|"]
        rows += [f"| `{s.name}` | {'yes' if s.failed else 'no'} | {s.message} |" for s in bilevel.Status]
        return self.parse_text_to_nodes("\n".join(rows))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("statuses", Statuses)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
