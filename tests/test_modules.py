"""What is behind a wrapper, and layers by their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ib_explain.hooks import capture
from ib_explain.lending import frozen, run_host
from ib_explain.modules import find_module, module_name, unwrap
from tests.models import TinyCNN

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class TestUnwrap:
    def test_data_parallel(self) -> None:
        model = TinyCNN()
        assert unwrap(nn.DataParallel(model)) is model

    def test_compiled(self) -> None:
        model = TinyCNN()
        assert unwrap(torch.compile(model, backend="eager")) is model
        assert unwrap(nn.DataParallel(torch.compile(model, backend="eager"))) is model

    def test_scripted_is_refused(self) -> None:
        with pytest.raises(TypeError, match="TorchScript module, whose layers cannot be hooked; pass the eager model"):
            unwrap(torch.jit.trace(nn.Conv2d(3, 2, 1), X))

    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
            unwrap("resnet18")  # type: ignore[arg-type]

    def test_hooks_fire_in_a_model_compiled_before(self) -> None:
        compiled = torch.compile(TinyCNN().eval(), backend="eager")
        compiled(X)
        with frozen(compiled) as host, torch.no_grad(), capture(host, ["stages.1"]) as seen:
            run_host(host, X)
        assert seen["stages.1"].shape == (2, 12, 8, 8)

    def test_hooks_fire_in_a_submodule_compiled_in_place(self) -> None:
        model = TinyCNN().eval()
        model.stages.compile(backend="eager")
        expected = model(X)
        with frozen(model) as host, torch.no_grad(), capture(host, ["stages.1"]) as seen:
            run_host(host, X)
        assert "stages.1" in seen
        assert model.stages._compiled_call_impl is not None
        torch.testing.assert_close(model(X), expected)


class TestNames:
    def test_nearest_name(self) -> None:
        with pytest.raises(ValueError, match="TinyCNN has no layer 'stage.1'; did you mean .*'stages.1'"):
            find_module(TinyCNN(), "stage.1")

    @pytest.mark.parametrize("name", ["stages.1", "module.stages.1", "_orig_mod.stages.1", "module._orig_mod.stages.1"])
    def test_names_as_a_wrapper_lists_them(self, name: str) -> None:
        model = TinyCNN()
        assert find_module(model, name) is model.stages[1]

    def test_name_of_a_module(self) -> None:
        model = TinyCNN()
        assert module_name(model, model.stages[1].conv) == "stages.1.conv"
        with pytest.raises(ValueError, match="the given Conv2d is not a layer of this TinyCNN"):
            module_name(model, nn.Conv2d(3, 3, 1))
