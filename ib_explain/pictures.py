"""Pictures of maps for a report, and how a run folder keeps them: only those who have the model can draw them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ib_explain.files import write_file
from ib_explain.markup import Picture

__all__ = ["Picture", "Pictures"]

INDEX = "pictures.json"


@dataclass(frozen=True)
class Pictures:
    """What only those who have the model can draw."""

    sheets: Sequence[Picture] = ()
    """The same images under all methods on a shared scale, a page each."""
    cases: Mapping[tuple[str, int], Picture] = field(default_factory=dict)
    """(method, image index) to a picture of this image's map; the images wanted are those of `summary.extremes`."""

    def write(self, folder: Path) -> None:
        """Keep them as PNG files and an index; without any, leave the folder as it is."""
        if not self.sheets and not self.cases:
            return
        index: dict[str, list[dict[str, Any]]] = {"sheets": [], "cases": []}
        kept: list[tuple[str, dict[str, Any], Picture]] = [("sheets", {}, sheet) for sheet in self.sheets]
        kept += [("cases", {"method": m, "image": i}, picture) for (m, i), picture in self.cases.items()]
        for kind, key, picture in kept:
            name = f"{kind}-{len(index[kind])}.png"
            write_file(folder / name, picture.png)
            index[kind].append({**key, "file": name, "caption": picture.caption, "alt": picture.alt})
        write_file(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Pictures:
        """What `write` kept; none where nothing was.

        Raises:
            ValueError: they are damaged.
        """
        if not (folder / INDEX).exists():
            return cls()

        def picture(entry: Mapping[str, Any]) -> Picture:
            return Picture((folder / entry["file"]).read_bytes(), entry["caption"], entry["alt"])

        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            cases = {(entry["method"], entry["image"]): picture(entry) for entry in index["cases"]}
            return cls([picture(entry) for entry in index["sheets"]], cases)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error!r}); delete it to go on without pictures") from error
