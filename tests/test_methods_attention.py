"""Rollout: against the blocks computed by hand; which tokens are read; what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.lending import frozen
from ib_explain.methods import Call, NotApplicable, attention_rollout
from ib_explain.methods.attention import AttentionPass, read_attention, unfused
from ib_explain.methods.attention_rollout import gradient_rollout, rollout

METHODS = ("attention_rollout", "attention_gradient_rollout")


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, **options).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def by_hand(host: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The forward pass of a timm ViT with every attention matrix in the open."""
    tokens = host.norm_pre(host.patch_drop(host._pos_embed(host.patch_embed(x))))
    matrices = []
    for block in host.blocks:
        attn, normed = block.attn, block.norm1(tokens)
        batch, count, width = normed.shape
        q, k, v = attn.qkv(normed).reshape(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        matrices.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1))
        tokens = tokens + block.ls1(attn.proj((matrices[-1] @ v).transpose(1, 2).reshape(batch, count, width)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return host.forward_head(host.norm(tokens)), matrices


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_against_the_blocks_computed_by_hand(pool: str) -> None:
    host, x, target = vit(global_pool=pool), images(), torch.tensor([1, 3])
    logits, matrices = by_hand(host, x)
    torch.testing.assert_close(logits, host(x), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(logits[torch.arange(2), target].sum(), matrices)
    with frozen(host):
        seen = read_attention(Call(host, x, target, None, 0, None), gradients=True)
    assert len(seen.matrices) == len(matrices) == 6
    for ours, theirs, slope, expected in zip(seen.matrices, matrices, seen.gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-6)
    first = 0 if pool == "token" else 1
    expected_readers = torch.zeros(2, 17)
    expected_readers[:, first : (1 if pool == "token" else 17)] = 1 if pool == "token" else 1 / 16
    torch.testing.assert_close(seen.readers, expected_readers)

    heat = ibx.attribute(host, x, method="attention_rollout")
    total = torch.eye(17)
    for matrix in matrices:
        step = (matrix.detach().mean(dim=1) + torch.eye(17)) / 2
        total = step @ total
    taken = (expected_readers[:, None] @ total)[:, 0, 1:].reshape(2, 1, 4, 4)
    torch.testing.assert_close(
        heat,
        nn.functional.interpolate(taken, size=(64, 64), mode="bilinear", align_corners=False),
        rtol=1e-4,
        atol=1e-6,
    )


def test_gradient_form_follows_the_target() -> None:
    host, x = vit(), images()
    one, other = (ibx.attribute(host, x, method="attention_gradient_rollout", target=t) for t in (0, 1))
    assert one.min() >= 0
    assert not torch.allclose(one, other, rtol=0.01)


def test_rules_on_two_layers() -> None:
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]])[None, None]
    second = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[None, None]
    torch.testing.assert_close(
        rollout([first, second])[0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]) @ torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    )
    slope = torch.tensor([[2.0, -1.0], [1.0, 1.0]])[None, None]
    once = torch.eye(2) + torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(
        gradient_rollout([first, second], [slope, slope])[0], once + torch.tensor([[2.0, 0.0], [0.5, 0.5]]) @ once
    )


def test_fused_attention_comes_back_also_after_an_error() -> None:
    host = vit()
    before = [block.attn.fused_attn for block in host.blocks]
    assert any(before)  # otherwise this test shows nothing
    with pytest.raises(KeyError), unfused(host) as names:
        assert names == [f"blocks.{i}.attn.attn_drop" for i in range(6)]
        assert not any(block.attn.fused_attn for block in host.blocks)
        raise KeyError
    assert [block.attn.fused_attn for block in host.blocks] == before


@pytest.mark.parametrize("method", METHODS)
def test_hosts_without_such_attention_are_refused(method: str) -> None:
    with pytest.raises(NotApplicable, match="no module of this ResNet exposes its attention matrix"):
        ibx.attribute(timm.create_model("test_resnet"), images(), method=method)
    host = vit()
    host.blocks[2].attn.forward = lambda x, **_mask: x  # the matrix is never computed
    with pytest.raises(NotApplicable, match="'blocks.2.attn.attn_drop' shows 0 times"):
        ibx.attribute(host, images(), method=method)


def test_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="method 'attention_rollout' takes no layer"):
        ibx.attribute(vit(), images(), method="attention_rollout", layer="blocks.1")


def test_what_a_token_brings_itself_is_no_evidence(monkeypatch):
    matrix = torch.full((1, 2, 4, 4), 0.25)
    seen = AttentionPass([matrix], [torch.zeros_like(matrix)], torch.full((1, 4), 0.25), 0, (2, 2))
    monkeypatch.setattr(attention_rollout, "read_attention", lambda call, gradients: seen)
    call = SimpleNamespace(refuse_layer=lambda name: None, size=(4, 4))
    assert not attention_rollout.AttentionGradientRollout()(call).any()  # without gradients nothing is mixed
