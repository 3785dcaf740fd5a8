"""Metadata of the built package that pyproject.toml cannot hold: the text for a package index and the project's URLs.

A package index shows README.md outside of the repository, so its relative links need an address. The release workflow
gives that address in the variable CARFT_RAY_REPOSITORY. A build without it keeps README.md as it is and names no URLs.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<start>(?P<picture>!?)\[[^\]]*\]\()(?P<target>(?![a-z]+:|#)[^)\s]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    """Sets ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds both fields; a source distribution brings its own."""
        repository = os.environ.get("CARFT_RAY_REPOSITORY", "").rstrip("/")
        if "readme" not in metadata:
            text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
            if repository:
                text = absolute(text, repository, f"v{metadata['version']}")
            metadata["readme"] = {"content-type": "text/markdown", "text": text}
        if "urls" not in metadata and repository:
            pages = {"Documentation": "#readme", "Changelog": "/blob/HEAD/CHANGELOG.md", "Issues": "/issues"}
            metadata["urls"] = {"Repository": repository} | {name: repository + end for name, end in pages.items()}


def absolute(text: str, repository: str, tag: str) -> str:
    """Returns a Markdown text whose links and pictures, if relative, lead to the files of a tag."""

    def change(match: re.Match[str]) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['start']}{repository}/{kind}/{tag}/{match['target']})"

    return LINK.sub(change, text)
