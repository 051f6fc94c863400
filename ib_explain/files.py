"""Writing so that nothing is lost: to a temporary name beside, then renamed. Files, and folders as a whole."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

__all__ = [
    "check_replaceable",
    "check_writable",
    "current_folder",
    "is_leftover",
    "remove_folder",
    "replace_file",
    "replace_folder",
    "write_file",
]


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed to it on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_beside(path.stem), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's 600 would surprise whoever shares the folder
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file bears a name that `replace_file` gives until all is written: what a killed command leaves."""
    return re.fullmatch(r"\..*-[a-z0-9_]{8}(\.\w+)?", path.name) is not None


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a whole file by `replace_file`: a reader, or a crash, finds the old one or the new one, never a half."""
    with replace_file(path) as file, file.open("wb") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replace_folder(path: str | Path, ours: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; takes its place on success, removed on failure.

    An older folder is set aside under a hidden name first, so that at every moment one whole folder exists; after a
    crash in between, `current_folder` finds it.

    Args:
        path: of the folder.
        ours: names of the files that may be replaced.

    Raises:
        FileExistsError: as `check_replaceable`.
    """
    path = Path(path)
    if path.is_symlink() and path.is_dir():
        path = path.resolve()  # the link stays; what it points to is replaced
    check_replaceable(path, ours)
    temporary = Path(tempfile.mkdtemp(prefix=_beside(path.name), dir=path.parent))
    aside = _aside(path)
    try:
        yield temporary
        temporary.chmod(0o755)  # as files: mkdtemp and safetensors keep them to the owner
        for file in temporary.iterdir():
            file.chmod(0o644)
        check_replaceable(path, ours)  # a fit takes a while
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        temporary.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: str | Path, ours: Collection[str]) -> None:
    """Make sure that a folder can be written at `path` and that nothing of the user's would be lost by it.

    Args:
        path: of the folder; those above it are made.
        ours: names of the files that may be replaced.

    Raises:
        FileExistsError: a file of that name, or a folder that holds anything else than `ours`.
        OSError: the place cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        if path.samefile("."):
            raise FileExistsError(f"{path} is the current folder, which cannot be replaced; name one in it")
        for other in sorted(path.iterdir()):
            if other.name not in ours or not other.is_file():
                raise FileExistsError(f"{path} holds other files ({other.name}); name another folder")
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} is no folder; name another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path.parent)


def check_writable(path: str | Path) -> None:
    """Make sure that files can be made in the folder `path`, or that it can be made itself; nothing stays behind.

    Raises:
        FileExistsError: a file of that name, or a link to nothing.
        OSError: the place cannot be written to.
    """
    path = Path(path)
    for place in (path, *path.absolute().parents):
        if place.is_dir():
            with tempfile.TemporaryDirectory(prefix=_beside(path.name), dir=place):
                return
        if place.exists() or place.is_symlink():
            raise FileExistsError(f"{place} is no folder; name another one")


def current_folder(path: str | Path) -> Path | None:
    """The folder itself, or the older one left behind by a crash, or None."""
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    return next((candidate for candidate in (path, _aside(path)) if candidate.is_dir()), None)


def remove_folder(path: str | Path, ours: Collection[str]) -> None:
    """Remove what `replace_folder` wrote, if it is there.

    Raises:
        FileExistsError: as `check_replaceable`.
    """
    check_replaceable(path, ours)
    for folder in (Path(path), _aside(Path(path))):
        shutil.rmtree(folder, ignore_errors=True)


def _beside(name: str) -> str:
    """How a temporary name begins; short, as a name may be as long as a file system takes."""
    return f".{name[:40]}-"


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.set-aside")
