"""User texts made fit for one line of a file, of a table or of a picture."""

from __future__ import annotations

__all__ = ["one_line", "shortened"]


def one_line(text: str) -> str:
    """Without line breaks and NUL, and encodable: a file name may hold bytes that are no UTF-8."""
    flat = " ".join(str(text).replace("\0", " ").splitlines())
    return flat.encode("utf-8", "backslashreplace").decode()


def shortened(text: str, width: int) -> str:
    """At most `width` characters, at least 3; the middle goes, as names of methods differ in their last option."""
    if len(text) <= width:
        return text
    behind = max(1, (width - 1) // 2)
    return f"{text[: max(1, width - 1 - behind)].rstrip()}…{text[-behind:].lstrip()}"
