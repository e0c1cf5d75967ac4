"""Builds the page before the package is, so that an installed wheel serves it without Node."""

import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent / "page"))
import build_page


class Page(BuildHookInterface):
    """Into whence/serve/static; a checkout that is installed as editable builds it with `make page`.

    The page of errors goes into the wheel as well: `whence explain` reads it.
    """

    def dependencies(self) -> list[str]:
        """Node where the machine has none, and the page isn't built."""
        if build_page.fresh():
            return []
        try:
            build_page.node_at()
        except RuntimeError:
            return [build_page.NODE]
        return []

    def initialize(self, version: str, build_data: dict) -> None:
        if version != "editable":
            build_page.build()
            if self.target_name == "wheel":
                build_data["force_include"]["docs/errors.md"] = "whence/errors.md"
