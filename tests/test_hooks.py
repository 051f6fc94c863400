"""Hooks: whatever happens inside, the host comes back as it was, and nothing is swallowed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.hooks import capture, registered, replace_output, uninterrupted
from ib_explain.layouts import map_tensors
from ib_explain.lending import frozen
from ib_explain.modules import find_module
from ib_explain.tails import Tail, TailRecorder
from tests.models import TinyCNN
from tests.states import assert_same, mixed, state

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Odd(nn.Module):
    """A host with a layer that never runs, one that runs twice, one inside a wrapper of containers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.idle = nn.Identity()
        self.shared = nn.Tanh()
        self.last = nn.Conv2d(4, 4, 1)
        self.fail: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.shared(self.stem(x)))
        self.fail()
        return self.shared(x).mean(dim=(2, 3))


class Behind(nn.Module):
    """conv -> an in-place operation that is not idempotent -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).mean(dim=(2, 3))


class Reuse(nn.Module):
    """The output of `early` is read again behind `late`: neither is a cut on its own, `join` is."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 4, 3, padding=1)
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.join = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.early(x)
        return self.join(torch.cat([first, self.late(first)], dim=1)).tanh().mean(dim=(2, 3))


def interrupt() -> None:
    raise KeyboardInterrupt


def explode() -> None:
    raise ArithmeticError("the host's own error")


class TestUninterrupted:
    @pytest.fixture(autouse=True)
    def _as_in_a_terminal(self) -> Iterator[None]:
        """A shell that runs pytest in the background lets it ignore Ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_a_ctrl_c_waits_for_the_end(self) -> None:
        done = []
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        assert done == ["inner", "outer"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_in_the_middle_of_registering_and_of_removing(self) -> None:
        """A forward hook that exists before its handle is known would stay."""
        model = TinyCNN()

        def register(module: nn.Module) -> Any:
            handle = module.register_forward_hook(lambda *_: None)
            signal.raise_signal(signal.SIGINT)
            return handle

        modules = list(model.modules())[:3]
        with pytest.raises(KeyboardInterrupt), registered(*(partial(register, module) for module in modules)):
            raise AssertionError("nothing runs inside")
        assert not any(module._forward_hooks for module in model.modules())

        class Rude:
            def remove(self) -> None:
                signal.raise_signal(signal.SIGINT)

        look = partial(modules[0].register_forward_hook, lambda *_: None)
        with pytest.raises(KeyboardInterrupt), registered(Rude, look):  # type: ignore[arg-type]
            pass
        assert not any(module._forward_hooks for module in model.modules())

    def test_in_the_middle_of_freezing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = mixed(TinyCNN())
        before = state(model)
        plain = nn.Parameter.requires_grad_
        asked = iter([True])

        def interrupted(parameter: nn.Parameter, flag: bool = True) -> nn.Parameter:
            if next(asked, False):
                signal.raise_signal(signal.SIGINT)
            return plain(parameter, flag)

        monkeypatch.setattr(nn.Parameter, "requires_grad_", interrupted)
        with pytest.raises(KeyboardInterrupt), frozen(model):
            raise AssertionError("nothing runs inside")
        assert_same(before, state(model))

    def test_other_threads_have_no_ctrl_c(self) -> None:
        def run() -> None:
            with uninterrupted():
                said.append("ran")

        said: list[str] = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert said == ["ran"]


class TestCapture:
    def test_outputs_by_name(self) -> None:
        model = TinyCNN().eval()
        before = state(model)
        with torch.no_grad(), capture(model, ["stem", "stages.2"]) as seen:
            model(X)
        assert {name: tuple(t.shape) for name, t in seen.items()} == {"stem": (2, 8, 16, 16), "stages.2": (2, 16, 4, 4)}
        assert_same(before, state(model))

    def test_stop_ends_the_pass_at_the_last_of_them(self) -> None:
        model, arrived = TinyCNN().eval(), []
        handle = model.fc.register_forward_hook(lambda *_: arrived.append("fc"))
        with torch.no_grad(), capture(model, ["stages.0", "stem"], stop=True) as seen:
            model(X)
        handle.remove()
        assert set(seen) == {"stem", "stages.0"}
        assert not arrived

    def test_nested_stops_end_their_own_pass_only(self) -> None:
        model = TinyCNN().eval()
        with torch.no_grad(), capture(model, ["stages.2"], once=False) as outer:
            with capture(model, ["stem"], stop=True) as inner:
                model(X)
            assert "stages.2" not in outer
            model(X)
        assert "stem" in inner
        assert "stages.2" in outer

    def test_not_fired(self) -> None:
        model = Odd()
        before = state(model)
        with (
            pytest.raises(RuntimeError, match="layer 'idle' did not run in the forward pass"),
            capture(model, ["idle"]),
        ):
            model(X)
        assert_same(before, state(model))

    def test_fired_twice(self) -> None:
        model = Odd()
        before = state(model)
        with pytest.raises(RuntimeError, match="layer 'shared' ran more than once"), capture(model, ["shared"]):
            model(X)
        assert_same(before, state(model))

    @pytest.mark.parametrize(("action", "error"), [(interrupt, KeyboardInterrupt), (explode, ArithmeticError)])
    def test_a_host_that_raises(self, action: Callable[[], None], error: type[BaseException]) -> None:
        model = Odd()
        model.fail = action
        before = state(model)
        with pytest.raises(error), capture(model, ["stem", "idle"]):
            model(X)
        assert_same(before, state(model))

    def test_an_unknown_name_leaves_no_hook_of_the_known_ones(self) -> None:
        model = Odd()
        before = state(model)
        with pytest.raises(ValueError, match="no layer 'stemm'"), capture(model, ["stem", "stemm"]):
            pass
        assert_same(before, state(model))

    def test_inside_data_parallel(self) -> None:
        wrapped = nn.DataParallel(TinyCNN())
        with frozen(wrapped) as host, torch.no_grad(), capture(host, ["stages.1"]) as seen:
            wrapped(X)
        assert "stages.1" in seen


class TestReplaceOutput:
    def test_the_host_goes_on_with_what_edit_returns(self) -> None:
        model = TinyCNN().eval()
        before = state(model)
        with torch.no_grad(), replace_output(model, "stages", torch.zeros_like):
            logits = model(X)
        torch.testing.assert_close(logits, model.fc.bias.expand(2, -1))
        assert_same(before, state(model))

    def test_nested_edits_are_both_made(self) -> None:
        model = TinyCNN().eval()
        with torch.no_grad():
            expected = model.fc((model.stages(model.act(model.stem(X))) * 2 + 1).mean(dim=(2, 3)))
            with replace_output(model, "stages", lambda o: o * 2), replace_output(model, "stages", lambda o: o + 1):
                torch.testing.assert_close(model(X), expected)

    @pytest.mark.parametrize(("name", "what"), [("idle", "did not run"), ("shared", "ran more than once")])
    def test_a_layer_that_does_not_run_once(self, name: str, what: str) -> None:
        model = Odd()
        before = state(model)
        with pytest.raises(RuntimeError, match=f"layer '{name}' {what}"), replace_output(model, name, lambda o: o):
            model(X)
        assert_same(before, state(model))

    @pytest.mark.parametrize(("action", "error"), [(interrupt, KeyboardInterrupt), (explode, ArithmeticError)])
    def test_a_host_that_raises(self, action: Callable[[], None], error: type[BaseException]) -> None:
        model = Odd()
        model.fail = action
        before = state(model)
        with pytest.raises(error), replace_output(model, "stem", lambda o: o):
            model(X)
        assert_same(before, state(model))

    def test_inside_data_parallel(self) -> None:
        wrapped = nn.DataParallel(TinyCNN().eval())
        with torch.no_grad(), replace_output(wrapped, "module.stages", torch.zeros_like):
            torch.testing.assert_close(wrapped(X), wrapped.module.fc.bias.expand(2, -1))


def recorded_tail(model: nn.Module, name: str) -> tuple[Any, Tail]:
    with torch.no_grad(), TailRecorder(model, name) as recorder, capture(model, [name]) as seen:
        model(X)
    return seen[name], recorder.tail(X)


class TestTail:
    @pytest.mark.parametrize("name", ["stem", "stages.0", "stages.1", "stages"])
    def test_equals_a_full_pass_with_the_output_replaced(self, name: str) -> None:
        model = TinyCNN().eval()
        output, tail = recorded_tail(model, name)
        changed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(tail(changed), Tail(model, name, None, X)(changed), rtol=0, atol=0)

    def test_runs_nothing_before_the_layer(self) -> None:
        model = TinyCNN().eval()
        output, tail = recorded_tail(model, "stages.1")
        ran = []
        for name in ("stem", "stages.0.conv", "stages.2"):
            conv = find_module(model, name)
            own = conv.forward
            conv.forward = lambda x, own=own, name=name: (ran.append(name), own(x))[1]  # type: ignore[method-assign]
        before = state(model)
        with torch.no_grad():
            tail(output)
        assert ran == ["stages.2"]
        assert_same(before, state(model))  # an instance's own forward came back

    def test_gradient_behind_the_layer(self) -> None:
        model = TinyCNN().eval().requires_grad_(False)
        output, tail = recorded_tail(model, "stages.1")
        short, full = output.clone().requires_grad_(), output.clone().requires_grad_()
        tail(short).square().sum().backward()
        Tail(model, "stages.1", None, X)(full).square().sum().backward()
        torch.testing.assert_close(short.grad, full.grad)

    @pytest.mark.parametrize("full", [False, True])
    def test_in_place_operations_behind_the_layer_leave_the_output_alone(self, full: bool) -> None:
        model = Behind().eval()
        output, tail = recorded_tail(model, "conv")
        tail = Tail(model, "conv", None, X) if full else tail
        given = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        kept = given.clone()
        with torch.no_grad():
            torch.testing.assert_close(tail(given), F.silu(kept).mean(dim=(2, 3)))
            assert torch.equal(given, kept)
            torch.testing.assert_close(tail(given), F.silu(kept).mean(dim=(2, 3)))

    def test_full_is_exact_where_something_is_used_again_behind_the_layer(self) -> None:
        model = Reuse().eval()
        output, _ = recorded_tail(model, "late")
        with torch.no_grad():
            expected = model.join(torch.cat([model.early(X), output * 2], dim=1)).tanh().mean(dim=(2, 3))
            torch.testing.assert_close(Tail(model, "late", None, X)(output * 2), expected)

    @pytest.mark.parametrize("full", [False, True])
    def test_restored_when_the_host_raises(self, full: bool) -> None:
        model = Odd()
        output, tail = recorded_tail(model, "last")
        tail = Tail(model, "last", None, X) if full else tail
        before = state(model)
        model.fail = interrupt
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            tail(output)
        assert_same(before, state(model))


class Pair(NamedTuple):
    count: int
    grid: Tensor


def test_map_tensors_keeps_containers_and_other_values() -> None:
    ones = torch.ones(2)
    value = (ones, [Pair(3, ones), {"a": ones, "b": "text"}], None)
    twice = map_tensors(value, lambda t: t * 2)
    torch.testing.assert_close(twice[0], ones * 2)
    assert type(twice[1][0]) is Pair
    assert twice[1][0].count == 3
    torch.testing.assert_close(twice[1][1]["a"], ones * 2)
    assert twice[1][1]["b"] == "text"
    assert twice[2] is None
    assert torch.equal(ones, torch.ones(2))
