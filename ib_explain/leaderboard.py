"""What a benchmark hands back: the standings, as text, as files, as a page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ib_explain.checks import warn_user
from ib_explain.figures import plots
from ib_explain.files import write_file
from ib_explain.pictures import Pictures
from ib_explain.report import case_metric, write_report
from ib_explain.results import RunStore
from ib_explain.rows import CurveBatch, Row
from ib_explain.summary import CurveSummary, Extreme, MetricFacts, Summary, extremes, summarise, summarise_curves
from ib_explain.tables import csv_table, json_summary, markdown_tables, text_table

__all__ = ["Leaderboard"]

AS_RUN = "as in the run"


@dataclass(frozen=True, repr=False)
class Leaderboard:
    """How methods stand under metrics. `print(board)` shows the table, a notebook the tables as Markdown; `save` writes
    files and a page.

    Made by `ib_explain.benchmark`, or from a run folder by `Leaderboard.read`.

    Attributes:
        summary: means, intervals, differences and ranks, to compute with.
        rows: every image under every method and metric.
        curves: the whole curves behind insertion, deletion and the like, image by image.
        store: where the run lies.
        pictures: for the page: maps of the same images under all methods, and of the extreme cases.
    """

    summary: Summary
    rows: Sequence[Row]
    curves: Sequence[CurveBatch]
    store: RunStore
    pictures: Pictures = field(default_factory=Pictures)

    @classmethod
    def of(
        cls,
        store: RunStore,
        *,
        reference: str | None = AS_RUN,
        pictures: Pictures | None = None,
    ) -> Leaderboard:
        """The standings of a run, also of an unfinished one: its finished batches, and what has any rows.

        The run's settings must hold "methods" (a dict by name, in the user's order) and "metrics" (a dict by name of
        dicts with family, unit, higher_is_better, protocol); its "seed" is also that of the bootstrap.

        Args:
            store: the run.
            reference: the method that others are held against, None for none; by default that of the run's last start.
            pictures: see the field.

        Raises:
            ValueError: no finished batch, an unknown reference.
        """
        settings, rows = store.run["settings"], store.rows()
        last = [store.run["info"], *store.run.get("resumed", [])][-1]
        if not rows:
            raise ValueError(f"the run in {store.folder} has no finished batch yet")
        # An extension that was stopped may not have come to all of them.
        begun = {name for row in rows for name in (row.method, row.metric)}
        methods = [name for name in settings["methods"] if name in begun]
        if reference == AS_RUN:
            reference = last.get("reference") if last.get("reference") in methods else None
        summary = summarise(
            rows,
            [_facts(name, told) for name, told in settings["metrics"].items() if name in begun],
            reference,
            methods=methods,
            seed=settings.get("seed", 0),
        )
        return cls(summary, rows, store.curves(), store, pictures or Pictures())

    @classmethod
    def read(cls, folder: str | os.PathLike[str], *, reference: str | None = AS_RUN) -> Leaderboard:
        """The standings of what `benchmark(..., out=folder)` wrote; neither the model nor the data is needed.

        Warns:
            UserWarning: images are missing, since the run was stopped or files are damaged.

        Raises:
            ValueError: no run there, no finished batch, an unknown reference.
        """
        store = RunStore.read(folder)
        board = cls.of(store, reference=reference, pictures=Pictures.read(Path(folder) / "figures"))
        if told := _unfinished(board):
            warn_user(f"{folder} holds {told}; the same command goes on")
        return board

    @property
    def run(self) -> Mapping[str, Any]:
        """What was run: the content of run.json."""
        return self.store.run

    def table(self, *, width: int | None = None) -> str:
        """The scores as plain text, in blocks as wide as `width` characters (None: the terminal)."""
        return text_table(self.summary, width=width)

    def to_markdown(self) -> str:
        """Scores, paired differences and ranks as GitHub Markdown."""
        return markdown_tables(self.summary)

    def to_csv(self) -> str:
        """One line for each method and metric, in full precision."""
        return csv_table(self.summary)

    def to_json(self) -> str:
        """The whole summary as JSON; null where there is no number."""
        return json_summary(self.summary)

    def mean_curves(self) -> list[CurveSummary]:
        """The curves behind insertion, deletion and the like, averaged over images, with pointwise intervals."""
        return summarise_curves(self.curves, confidence=self.summary.confidence, seed=self.summary.seed)

    def extremes(self, count: int = 3) -> dict[str, tuple[list[Extreme], list[Extreme]]]:
        """Each method's best and worst images, by the first metric that is not a cost: those the report shows."""
        return extremes(self.rows, case_metric(self.summary), count=count)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write tables, figures and report.html into `folder`, with the rows if they are not there; return the page.

        Raises:
            ValueError: the folder is a file, or holds another run, more of this run, or results of unknown origin;
                nothing is written then.
        """
        path = self.save_tables(folder)
        curves = self.mean_curves()
        self.pictures.write(path / "figures")
        for plot in plots(self.summary, curves):
            write_file(path / "figures" / f"{plot.name}.png", plot.png())
        page = path / "report.html"
        write_report(page, self.summary, self.run, curves=curves, rows=self.rows, pictures=self.pictures)
        return page

    def save_tables(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tables alone, with the rows if they are not there; return the folder. Raises as `save`."""
        path = Path(folder)
        self.store.copy_to(path)
        for kind, text in (("csv", self.to_csv()), ("json", self.to_json()), ("md", self.to_markdown())):
            write_file(path / f"summary.{kind}", text)
        return path

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        s = self.summary
        return f"<Leaderboard of {len(s.methods)} methods and {len(s.metrics)} metrics on {s.images} images>"

    def _repr_markdown_(self) -> str:
        """What a notebook shows of a cell that ends with the board."""
        return self.to_markdown()


def _unfinished(board: Leaderboard) -> str:
    """What was measured where something was not, else nothing."""
    settings, summary = board.run["settings"], board.summary
    data = settings.get("data")
    total = data.get("images") if isinstance(data, Mapping) else None
    metrics = [name for name, told in settings["metrics"].items() if told["family"] != "cost"]  # of the first batch
    if isinstance(total, int) and summary.images < total and metrics:
        return f"{summary.images} of the run's {total} images"
    measured = Counter((row.method, row.metric) for row in board.rows)
    wanted = [(method, metric) for method in settings["methods"] for metric in metrics]
    short = [cell for cell in wanted if measured[cell] < summary.images]
    if not short:
        return ""
    method, metric = short[0]
    more = f" (and {len(short) - 1} more)" if short[1:] else ""
    return f"{metric} of {method}{more} for {measured[short[0]]} of {summary.images} images"


def _facts(name: str, told: Mapping[str, Any]) -> MetricFacts:
    shown = {key: told[key] for key in ("family", "unit", "higher_is_better", "protocol", "derived") if key in told}
    return MetricFacts(name, **shown)
