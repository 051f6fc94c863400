"""The order of the house: imports run one way, the front door is light, what is promised is there."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ib_explain as ibx
from ib_explain.metrics import METRICS
from ib_explain.metrics.base import FAMILIES

PACKAGE = Path(ibx.__file__).parent


def imports_of(path):
    """Modules of the package that a file imports when it is imported itself (not inside functions, nor for types)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ib_explain"):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ib_explain")}
    return found


def modules():
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def test_imports_make_no_circle():
    named = modules()
    graph = {name: (imports_of(path) & named.keys()) - {name} for name, path in named.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_page_on_the_code_names_every_file_once_and_imports_run_down_its_groups():
    page = (PACKAGE.parent / "docs" / "code.md").read_text(encoding="utf-8").split("## The files")[1]
    groups = [re.findall(r"`([a-z_]+)(?:\.py|/)`", group) for group in page.split("\n**")[1:]]
    named = [name for group in groups for name in group]
    assert len(named) == len(set(named))
    assert set(named) == {name.split(".")[1] for name in modules() if name != "ib_explain"}
    floor = {name: number for number, group in enumerate(groups) for name in group}
    for name, path in modules().items():
        for used in {imported.split(".")[1] for imported in imports_of(path) if imported.count(".")} & floor.keys():
            assert name == "ib_explain" or floor[used] <= floor[name.split(".")[1]], (name, used)


def test_only_hooks_registers_forward_hooks_on_the_host():
    users = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if "register_forward_hook" in path.read_text() or "register_forward_pre_hook" in path.read_text()
    ]
    # lending looks at the host's images, buffers at what its passes move, the survey at all layers at once, cuts at
    # what enters a head of zeros, the sanity checks at a copy's order
    allowed = {"hooks.py", "buffers.py", "lending.py", "tails.py", "survey.py", "cuts.py", "random_weights.py"}
    assert set(users) <= allowed, users


def test_the_front_door_is_light():
    heavy = ["captum", "matplotlib", "timm", "accelerate", "scipy", "pandas"]
    code = f"import sys, ib_explain; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_packages_open_to_users_come_with_the_front_door():
    code = (
        "import ib_explain as ibx; before = set(dir(ibx)); "
        "print(ibx.metrics.insertion.__name__, len(ibx.methods.METHODS) > 20, ibx.data.Synthetic.__name__, "
        "{'data', 'methods', 'metrics'} <= before)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["insertion", "True", "Synthetic", "True"]


def test_every_public_name_is_there_and_documented():
    assert ibx.__all__ == sorted(ibx.__all__)
    for name in ibx.__all__:
        assert getattr(ibx, name).__doc__, name


def test_functions_stay_functions_after_their_modules_are_imported():
    code = (
        "import ib_explain as ibx; import ib_explain.visualize, ib_explain.sites; "
        "from ib_explain.visualize import overlay; from ib_explain.sites import Site; "
        "import ib_explain.visualize as v; "
        "print(callable(ibx.visualize), callable(ibx.sites), v.overlay is overlay, v.contact_sheet.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True", "contact_sheet"]


def test_every_public_function_of_the_package_has_a_docstring():
    missing = []
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                documented = ast.get_docstring(node) or any(
                    isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list
                )
                missing += [] if documented else [f"{name}.{node.name}"]
    assert not missing


COUNT_METRICS = "from ib_explain.metrics import METRICS; print(*METRICS)"
LIST_METRICS = "import ib_explain; print(*ib_explain.available_metrics())"


@pytest.mark.parametrize("code", [COUNT_METRICS, LIST_METRICS])
def test_a_fresh_process_knows_every_metric(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = done.stdout.split()
    named = {
        call.args[0].value
        for path in (PACKAGE / "metrics").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("register_metric", "_file_cost")
        if isinstance(call.args[0], ast.Constant)
    }
    assert {"insertion", "time", "memory", "forward_passes", "backward_passes"} <= named <= set(listed)
    assert sorted(listed) == sorted(METRICS)


def test_families_are_those_that_metrics_have_and_the_docs_explain():
    assert {METRICS.get(name).family for name in METRICS} == set(FAMILIES)
    page = (PACKAGE.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = page.split("## What each family can tell")[1].lower()
    assert all(f"**{family}" in explained for family in FAMILIES)
