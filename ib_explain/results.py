"""Where a benchmark keeps what it measured while it runs: a folder that survives being killed.

`run.json` says what was run, `rows.csv` what came out (see `rows`), `curves/` holds whole curves, one file a batch. The
rows are the means of resuming: a batch counts only if all its rows are there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ib_explain.files import write_file
from ib_explain.rows import (
    WITH_CURVES,
    CurveBatch,
    Row,
    curves_to_npz,
    join_curves,
    read_curves,
    read_rows,
    rows_to_csv,
)

__all__ = ["RunStore", "check_folder"]

FORMAT = 1
OURS = ("rows.csv", "rows-*.csv", "summary.*", "report.html", "figures", "curves")


@dataclass
class RunStore:
    """The results of one run, on disk. Make one with `RunStore.open`.

    >>> store = RunStore.open(None, {"model": "resnet18"})
    >>> store.append(0, [Row(0, "cat.jpg", "grad_cam", "insertion", 0.5)])
    >>> store.done(0), store.done(1), store.rows()[0].value
    (True, False, 0.5)
    """

    folder: Path
    run: dict[str, Any]
    """What `run.json` says: format, fingerprint, settings, info, and the info of each later start under "resumed"."""
    rank: int = 0
    dropped: int = 0
    """Lines of an unfinished batch that were found and dropped when the store was opened."""
    _done: set[int] = field(default_factory=set, repr=False)
    _found: dict[int, list[Row]] = field(default_factory=dict, repr=False)
    _whole: dict[int, bool] = field(default_factory=dict, repr=False)
    _begun_here: bool = False
    _made_folder: bool = False
    _former: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        info: Mapping[str, Any] | None = None,
        *,
        rank: int = 0,
        extend: bool = False,
    ) -> RunStore:
        """Start a run in `folder`, or go on with the one that is there.

        Args:
            folder: the run folder, made if missing; None is a temporary one that goes with the store.
            settings: all that the numbers depend on (model, data fingerprint, seed, batch size, methods with their
                options, metrics with their conventions). JSON types; the order of keys does not matter. A folder is
                resumed only if its settings are the same.
            info: what may differ between a start and its resumption: command, device, versions, reference method.
            rank: number of this process. Process 0 opens first and alone writes run.json; each process appends to a
                file of its own, and all see what all had finished when they opened.
            extend: take the run of a folder whose settings differ by lacking methods or metrics alone.

        Raises:
            TypeError: a setting that JSON cannot hold.
            ValueError: the folder is a file, holds results without a run.json, or another run (the error names the
                settings that differ). Nothing is written then.
        """
        plain, extra = _plain("settings", settings), _plain("info", info or {})
        temporary = None
        if folder is None:
            if rank > 0:
                raise ValueError("several processes need a common folder, got None")
            folder = temporary = tempfile.mkdtemp(prefix="ib-explain-")
        path = Path(folder)
        run = check_folder(path, plain, extend=extend)
        former: dict[str, Any] | None = None
        begun_here, made_folder = run is None and rank == 0, not path.exists()
        if run is None:
            if rank > 0:
                raise ValueError(f"process 0 must open {path} before process {rank}")
            run = {"format": FORMAT, "fingerprint": _fingerprint(plain), "settings": plain, "info": extra}
            run["resumed"] = []
        elif rank == 0:
            former = copy.deepcopy(run)
            run |= {"fingerprint": _fingerprint(plain), "settings": plain}
            run["resumed"].append(extra)
        if rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            write_file(path / "run.json", _json(run))
        store = cls(path, run, rank, _begun_here=begun_here, _made_folder=made_folder, _former=former)
        if temporary is not None:  # gone with the store
            weakref.finalize(store, shutil.rmtree, temporary, ignore_errors=True)
        store._clean()
        store._found = store._batches()
        store._done = set(store._found)
        return store

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunStore:
        """Open the run in `folder` to look at it; nothing is written.

        Raises:
            ValueError: there is no run in `folder`.
        """
        path = Path(folder)
        run = _read_run(path)
        if run is None:
            raise ValueError(f"{path} holds no run: run.json is missing")
        store = cls(path, run)
        store._done = set(store._batches())
        return store

    def done(self, batch: int) -> bool:
        """Whether rows of this batch are stored."""
        return batch in self._done

    def cells(self, batch: int) -> frozenset[tuple[str, str]]:
        """Method and metric of each cell of a batch that was stored when the store was opened."""
        return frozenset((row.method, row.metric) for row in self._found.get(batch, ()))

    def append(self, batch: int, rows: Sequence[Row], curves: Sequence[CurveBatch] = ()) -> None:
        """Store a finished batch, on disk when this returns. Either all of it counts or, after a crash, nothing.

        Args:
            batch: its number in the whole run, the same however many processes share the work.
            rows: every cell of the batch, also those that failed or do not apply; of a batch that was stored when the
                store was opened those that it lacks. It is written again with them.
            curves: the whole curves behind some of the rows, if any.

        Raises:
            ValueError: no rows, the same cell twice, or a batch that this process has stored.
        """
        found = self._found.get(batch, [])
        if self.done(batch) and not found:
            raise ValueError(f"batch {batch} is already stored in {self.folder}")
        if not rows:
            raise ValueError(f"batch {batch} has no rows")
        rows = [*found, *rows]
        if len({row.key for row in rows}) < len(rows):
            raise ValueError(f"batch {batch} has more than one row for the same image, method and metric")
        # Curves first: the rows are what makes a batch count, so a batch that counts has its curves.
        if curves:
            curves_path = self._curves_path(batch)
            curves_path.parent.mkdir(exist_ok=True)
            former = read_curves(curves_path) if found and curves_path.exists() else []
            unique = {(curve.method, curve.metric): curve for curve in (*former, *curves)}
            write_file(curves_path, curves_to_npz([*unique.values()]))
        self._whole[batch] = True
        path = self._rows_path(self.rank)
        with path.open("ab") as file:
            file.write(rows_to_csv({batch: rows}, head=file.tell() == 0).encode())
            file.flush()
            os.fsync(file.fileno())
        self._former = None
        self._done.add(batch)
        self._found.pop(batch, None)

    def rows(self) -> list[Row]:
        """All rows of finished batches, of all processes, sorted by image, method, metric."""
        return sorted((row for rows in self._batches().values() for row in rows), key=lambda row: row.key)

    def curves(self) -> list[CurveBatch]:
        """The curves of finished batches, one entry for each method and metric, images in rising order.

        Raises:
            ValueError: the curves of one method and metric have different fractions in two batches.
        """
        parts: dict[tuple[str, str], list[CurveBatch]] = defaultdict(list)
        for batch, rows in sorted(self._batches().items()):
            cells = {(row.method, row.metric) for row in rows}
            if (path := self._curves_path(batch)).exists():
                for part in read_curves(path):
                    if (part.method, part.metric) in cells:  # a kill may have left curves whose rows are not there yet
                        parts[part.method, part.metric].append(part)
        return [join_curves(parts[key]) for key in sorted(parts)]

    def undo_if_empty(self) -> None:
        """Leave the folder as it was where nothing was measured: a mistake in the data must not hold it."""
        if _read_run(self.folder) != self.run:  # the same command was started once more meanwhile, and goes on
            return
        if self._former is not None:  # what a run was to be extended by would bind all later starts
            write_file(self.folder / "run.json", _json(self._former))
        if self._begun_here and not any(any(self.folder.glob(pattern)) for pattern in OURS):
            (self.folder / "run.json").unlink(missing_ok=True)
            if self._made_folder and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def finish(self) -> None:
        """Merge the files of all processes into a sorted rows.csv; process 0 calls it when all others have ended.

        The file is the same to the byte for one process and for several, resumed or not.
        """
        write_file(self.folder / "rows.csv", rows_to_csv(self._batches()))
        for path in self.folder.glob("rows-*.csv"):
            path.unlink()
        self._found.clear()

    def copy_to(self, folder: Path) -> None:
        """Make `folder` hold this run too, unless it is this very folder.

        Raises:
            ValueError: the folder is a file, or holds another run, more of this run, or results without a run.json.
                Nothing is written then.
        """
        if folder.exists() and folder.resolve() == self.folder.resolve():
            return
        if not self.folder.exists():
            raise ValueError(f"the run's own folder {self.folder} is gone; it goes with the board that was made first")
        batches = self._batches()
        present = check_folder(folder, self.run["settings"])
        if present is not None:
            ours = {row.key for rows in batches.values() for row in rows}
            if not {row.key for row in RunStore.read(folder).rows()} <= ours:
                raise ValueError(f"{folder} holds more of this run than is to be saved; choose another folder")
        (folder / "curves").mkdir(parents=True, exist_ok=True)
        for path in (self._curves_path(batch) for batch in batches):
            if path.exists():
                write_file(folder / "curves" / path.name, path.read_bytes())
        write_file(folder / "rows.csv", rows_to_csv(batches))
        for path in folder.glob("rows-*.csv"):
            path.unlink()
        write_file(folder / "run.json", _json(self.run))

    def _rows_path(self, rank: int) -> Path:
        return self.folder / ("rows.csv" if rank == 0 else f"rows-{rank}.csv")

    def _curves_path(self, batch: int) -> Path:
        return self.folder / "curves" / f"batch-{batch:06d}.npz"

    def _batches(self) -> dict[int, list[Row]]:
        """Finished batches of all processes. One that two files hold counts once, with the rows of the fuller one."""
        found: dict[int, list[Row]] = {}
        for path in sorted(self.folder.glob("rows*.csv")):
            for batch, rows in read_rows(path)[0].items():
                if len(rows) > len(found.get(batch, ())) and self._curves_whole(batch, rows):
                    found[batch] = rows
        return found

    def _curves_whole(self, batch: int, rows: Sequence[Row]) -> bool:
        """Whether the curves of a batch, if it has any, can be read; where not, it is not finished."""
        if not self._whole.get(batch):  # another process may have made it whole since
            path = self._curves_path(batch)
            with_curves = any(row.metric in WITH_CURVES and row.status == "ok" for row in rows)
            expected = with_curves and any(path.parent.glob("batch-*.npz"))  # rows may be stored without
            try:
                self._whole[batch] = bool(read_curves(path)) if expected or path.exists() else True
            except (EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
                self._whole[batch] = False
        return self._whole[batch]

    def _clean(self) -> None:
        """Take what a killed process left half-written out of this process's file, so that it can be appended to."""
        path = self._rows_path(self.rank)
        if not path.exists():
            return
        batches, self.dropped = read_rows(path)
        if self.dropped:
            write_file(path, rows_to_csv(batches))


def check_folder(folder: Path, settings: Mapping[str, Any], *, extend: bool = False) -> dict[str, Any] | None:
    """The content of run.json if `folder` holds a run with these settings, None if the folder can take a new run.

    With `extend` the run may lack some of the methods and metrics.

    Raises:
        ValueError: the folder is a file, holds results without a run.json, or another run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, it is a file")
    run = _read_run(folder)
    if run is None:
        if stray := [path.name for pattern in OURS for path in folder.glob(pattern)]:
            raise ValueError(f"{folder} holds {', '.join(sorted(stray))} but no run.json; choose another folder")
        return None
    differences = _differences(run["settings"], _plain("settings", settings))
    lacks_some = not _differences(run["settings"], _shared(_plain("settings", settings), run["settings"]))
    if differences and not (extend and lacks_some):
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        told = "; ".join(differences[:3])
        way = "extend the run (extend=True, --extend)" if lacks_some else "the same settings"
        raise ValueError(f"{folder} holds another run: {told}{more}. Choose another folder, or {way}")
    return run


def _read_run(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        known = run["format"]
        kinds = {"settings": dict, "info": dict, "resumed": list}
        wrong = [key for key, kind in kinds.items() if known == FORMAT and not isinstance(run[key], kind)]
        if wrong:
            raise TypeError(*wrong)
    except (ValueError, RecursionError) as error:
        told = f"it cannot be read ({type(error).__name__}); delete it to begin again"
        raise ValueError(f"{path} is not a run of ib_explain: {told}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run of ib_explain; choose another folder") from error
    if known != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {known!r}")
    return run


def _plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON keeps of a mapping (tuples become lists), so that now and later compare equal."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must hold only what JSON can (text, finite numbers, lists, dicts): {error}") from error


def _json(run: Mapping[str, Any]) -> str:
    return json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _shared(settings: dict[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those methods and metrics alone that a run has."""
    grown = {
        key: {name: told for name, told in settings[key].items() if name in run.get(key, {})}
        for key in ("methods", "metrics")
        if key in settings
    }
    return settings | grown


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Each setting that differs, by its dotted name, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing: Any = _Missing()
        return [
            difference
            for key in [*old, *(key for key in new if key not in old)]
            for difference in _differences(old.get(key, missing), new.get(key, missing), f"{path}.{key}".lstrip("."))
        ]
    if old == new:
        return []
    kind, _, name = path.partition(".")
    whole = kind in ("methods", "metrics") and "." not in name
    if whole and (isinstance(old, _Missing) or isinstance(new, _Missing)):
        return [f"{kind.rstrip('s')} {name} is only {'here' if isinstance(old, _Missing) else 'there'}"]
    if path in DIGESTS:
        return [f"{DIGESTS[path]} differ"]
    return [f"{path} is {_short(old)} there and {_short(new)} here"]


DIGESTS = {  # of which a reader learns nothing
    "data.first_batch": "images, labels or truths of the first batch",
    "data.batches": "the images",
    "data.names": "the images' names",
    "model.structure": "shapes of the model's weights",
    "model.weights": "the model's weights",
}


class _Missing:
    def __repr__(self) -> str:
        return "absent"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
