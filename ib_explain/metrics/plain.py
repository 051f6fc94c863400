"""Filing plain functions of tensors as metrics: which fields of a case are their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from ib_explain.metrics.base import Case, register_metric

__all__ = ["register_function"]


def register_function(
    function: Callable[..., Tensor],
    *,
    family: str,
    unit: str,
    needs: tuple[str, ...],
    higher_is_better: bool = True,
    suffix: str = "",
    derived: bool = False,
) -> None:
    """File `function` under its own name; its first doc line is the summary, its defaults are the settings.

    Args:
        function: called with the fields `needs` of the case, in that order, returns scores (B,).
        family: as in `register_metric`.
        unit: of the scores.
        needs: fields of `Case`.
        higher_is_better: direction.
        suffix: put behind the function's name.
        derived: as in `register_metric`.
    """

    @functools.wraps(function)
    def score(case: Case) -> Tensor:
        return function(*(getattr(case, need) for need in needs))

    name = function.__name__ + suffix
    file = register_metric(
        name, family=family, unit=unit, higher_is_better=higher_is_better, needs=needs, derived=derived
    )
    file(score)
