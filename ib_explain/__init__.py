"""Information-bottleneck spatial attention for any timm classifier: heatmaps in bits, compared with every baseline.

`attribute` makes maps by any method, `IBAttention` is the bottleneck that is fitted once, `benchmark` compares methods
by metrics, `visualize` draws. The packages `data`, `methods` and `metrics` are open to users, too.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ib_explain.attribution import attribute as attribute
    from ib_explain.attribution import available_methods as available_methods
    from ib_explain.benchmark import available_metrics as available_metrics
    from ib_explain.benchmark import benchmark as benchmark
    from ib_explain.ib import IBAttention as IBAttention
    from ib_explain.leaderboard import Leaderboard as Leaderboard
    from ib_explain.quantus import quantus_explain as quantus_explain
    from ib_explain.sites import Site as Site
    from ib_explain.sites import default_layer as default_layer
    from ib_explain.sites import sites as sites
    from ib_explain.visualize import visualize as visualize

__version__ = "0.1.0"

# Loaded on first use, as the packages open to users: `import ib_explain` stays light, Captum and matplotlib come later.
_HOMES = {
    "IBAttention": "ib",
    "Leaderboard": "leaderboard",
    "Site": "sites",
    "attribute": "attribution",
    "available_methods": "attribution",
    "available_metrics": "benchmark",
    "benchmark": "benchmark",
    "default_layer": "sites",
    "quantus_explain": "quantus",
    "sites": "sites",
    "visualize": "visualize",
}

_PACKAGES = ("data", "methods", "metrics")

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"ib_explain.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"ib_explain.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ib_explain' has no attribute {name!r}")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import of a module called like its function (sites, benchmark, ...) must not take the function's place.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
