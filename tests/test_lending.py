"""A host is lent as it must be and comes back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ib_explain.guard import HostChanged, unharmed
from ib_explain.lending import frozen, run_host
from tests.models import TinyCNN
from tests.states import assert_same, mixed, state

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class TestFrozen:
    def test_inside_eval_and_no_gradients_outside_as_before(self) -> None:
        model = mixed(TinyCNN())
        before = state(model)
        with frozen(model) as host:
            assert host is model
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            torch.manual_seed(99)
            torch.randn(3)
            model.train()
        assert_same(before, state(model))

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_restored_and_raised_on_any_exit(self, error: type[BaseException]) -> None:
        model = mixed(TinyCNN())
        before = state(model)
        with pytest.raises(error), frozen(model):
            raise error
        assert_same(before, state(model))

    def test_nested(self) -> None:
        model = mixed(TinyCNN())
        before = state(model)
        with frozen(model):
            with frozen(model):
                pass
            assert not any(m.training for m in model.modules())
        assert_same(before, state(model))

    def test_a_host_that_writes_into_some_images_is_found_out_by_the_first_of_them(self) -> None:
        class Scaling(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if x.max() > 50:
                    x.div_(255)
                return x.mean(dim=(2, 3))

        host = Scaling()
        with frozen(host), torch.no_grad():
            for _ in range(2):
                host(torch.rand(1, 3, 4, 4))
            host(torch.full((1, 3, 4, 4), 200.0))
        loud = torch.full((1, 3, 4, 4), 200.0)
        with frozen(host), torch.no_grad():
            assert host(loud).max() < 1
        assert loud.min() == 200

    def test_a_host_that_writes_behind_autograds_back_gets_copies(self) -> None:
        class Scaling(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                x.data.mul_(0.5)
                return x.mean(dim=(2, 3))

        host, x = Scaling(), torch.ones(1, 3, 4, 4)
        with frozen(host), torch.no_grad():
            for _ in range(3):
                assert host(x).max() == 0.5
        assert x.min() == 1

    def test_gradient_checkpointing_is_off_and_comes_back_from_nested_and_failing_ones(self) -> None:
        host = nn.Sequential(nn.Linear(2, 2))
        host[0].grad_checkpointing = True
        with pytest.raises(ZeroDivisionError), frozen(host):
            with frozen(host):
                assert host[0].grad_checkpointing is False
            assert host[0].grad_checkpointing is False
            raise ZeroDivisionError
        assert host[0].grad_checkpointing is True


class TestUnharmed:
    def test_buffers_come_back_and_other_weights_are_told(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with unharmed(model):
            model(torch.randn(2, 3, 4, 4))  # in training mode
            assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        expected = pytest.raises(HostChanged, match=r"changed the model.s weights")
        with expected, unharmed(model), torch.no_grad():
            model[0].bias.add_(1)
        with expected as caught, unharmed(model), torch.no_grad():  # also where that is not all that went wrong
            model[0].bias.add_(1)
            raise ArithmeticError("the method's own")
        assert isinstance(caught.value.__cause__, ArithmeticError)

    def test_weights_that_came_back_and_buffers_of_another_size(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
        model.register_buffer("cache", torch.zeros(2))
        with unharmed(model):
            model.load_state_dict(model.state_dict())  # as Captum's LRP ends
            model.cache.resize_(5)
        assert torch.equal(model.cache, torch.zeros(2))
        with pytest.raises(ArithmeticError, match="own"), unharmed(model):
            raise ArithmeticError("the method's own")
        with pytest.raises(KeyboardInterrupt), unharmed(model):
            raise KeyboardInterrupt


class TestRunHost:
    def test_anything_but_logits_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"logits \(B, K\) with B = 2, got \(2, 4, 32, 32\)"):
            run_host(nn.Conv2d(3, 4, 1), X)
