"""The README as package indexes show it: links to files of this repository become links to where it is published."""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<before>\]\(|<img[^>]*? src=\")(?!https?://|mailto:|#|data:)(?P<path>[^)\s\"]+)")
PICTURES = (".png", ".jpg", ".gif", ".svg", ".webp")


def absolute(text: str, repository: str, tag: str) -> str:
    """A page of Markdown whose links to files beside it go to the repository.

    Args:
        text: The page.
        repository: The repository's address.
        tag: The version that the links go to.
    """

    def there(match: re.Match[str]) -> str:
        path = match["path"]
        kind = "raw" if path.partition("#")[0].lower().endswith(PICTURES) else "blob"
        return f"{match['before']}{repository}/{kind}/{tag}/{path.removeprefix('./')}"

    return LINK.sub(there, text)


class Readme(MetadataHookInterface):
    """Gives the project its readme."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, object]) -> None:
        """Adds the readme to the project's metadata, in place."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        urls, version = metadata["urls"], metadata["version"]
        assert isinstance(urls, dict)
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, str(urls["Repository"]).rstrip("/"), f"v{version}"),
        }
