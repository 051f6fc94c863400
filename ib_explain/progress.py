"""Progress for people: a bar on a terminal and in a notebook, plain lines into a pipe, nothing when switched off."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts steps on standard error.

    Args:
        total: number of steps.
        label: what is being done.
        show: False is silent.
        done: steps finished before (a resumed run).
    """

    def __init__(self, total: int, label: str, *, show: bool = True, done: int = 0) -> None:
        self.total, self.label, self.show, self.done = total, label, show, done
        self._first, self._started, self._last_line = done, time.monotonic(), 0.0
        self._bar = tqdm(total=total, initial=done, desc=label, dynamic_ncols=True) if show and _can_rewrite() else None

    def step(self, count: int = 1, **figures: float) -> None:
        """Advance, at most to the total (the last batch may hold more than was left), and show the latest figures."""
        count = min(count, self.total - self.done)
        self.done += count
        if not self.show:
            return
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or self.done >= self.total:
            left = (now - self._started) / max(self.done - self._first, 1) * (self.total - self.done)
            line = [f"{self.label} {self.done}/{self.total}", text, f"{left:.0f} s left"]
            print("  ".join(filter(None, line)), file=sys.stderr, flush=True)
            self._last_line = now

    def note(self, line: str) -> None:
        """Say something between the steps, where they are shown."""
        if self.show:
            tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _can_rewrite() -> bool:
    """Whether a line on standard error can be written over: on a terminal, and in a notebook's cell."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
