"""IBAttention: targets of every kind, and what bad input gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ib_explain as ibx
from ib_explain.ib import IBAttention
from tests.models import images, tiny


class TestTargets:
    @pytest.mark.parametrize(
        "target", [2, np.int64(2), torch.tensor(2), [2, 2, 2], torch.tensor([2, 2, 2]), np.array([2, 2, 2]), -3]
    )
    def test_every_form_of_the_same_class(self, cnn, target):
        x = images(3)
        assert torch.equal(cnn[0].attribute(x, target=target), cnn[0].attribute(x, target=2))

    @pytest.mark.parametrize(
        ("target", "error", "text"),
        [
            (5, IndexError, "class 5 is out of range for a model with 5 classes"),
            ([0, 1], ValueError, r"one class for each of the 3 images, got \(2,\)"),
            (True, TypeError, "got the bool True"),
            (1.0, TypeError, "got float"),
            ("cat", TypeError, "got str"),
            (torch.tensor([0.0, 1.0, 2.0]), TypeError, "torch.float32"),
            (torch.zeros(3, 1, dtype=torch.long), ValueError, r"got \(3, 1\)"),
            ([0, True, 1], TypeError, "True"),
        ],
    )
    def test_wrong_targets(self, cnn, target, error, text):
        with pytest.raises(error, match=text):
            cnn[0].attribute(images(3), target=target)
        with pytest.raises(error, match=text):
            ibx.attribute(cnn[1], images(3), target=target)


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (lambda: images(1)[0], ValueError, r"shape \(B, C, H, W\), got \(3, 24, 24\); add a batch axis"),
            (lambda: torch.zeros(2, 3, 24, 24, dtype=torch.uint8), TypeError, "floating-point images, got torch.uint8"),
            (lambda: torch.full((2, 3, 24, 24), torch.nan), ValueError, "finite, got 3456 NaN"),
            (lambda: torch.zeros(0, 3, 24, 24), ValueError, "at least one image"),
            (lambda: torch.zeros(2, 4, 24, 24), ValueError, "3 channels, got 4"),
            (lambda: np.zeros((2, 3, 24, 24)), TypeError, "torch.Tensor of shape"),
        ],
    )
    def test_images(self, cnn, make, error, text):
        for run in (cnn[0].attribute, lambda x: ibx.attribute(cnn[1], x)):
            with pytest.raises(error, match=text):
                run(make())

    def test_inference_tensors(self, cnn):
        with torch.inference_mode():
            x = images(2)
        with pytest.raises(ValueError, match=r"inference_mode\(\).*clone"):
            cnn[0].attribute(x)

    @pytest.mark.parametrize("channels", [1, 4])
    def test_other_channels_of_a_host_that_timm_did_not_make(self, channels):
        host = tiny()
        host.stem = torch.nn.Conv2d(channels, 8, 3, padding=1, stride=2)
        x = images(2)[:, :1].expand(-1, channels, -1, -1)
        assert ibx.attribute(host, x, layer="stages.1").shape == (2, 1, 24, 24)
        ib = IBAttention(host, "stages.1").fit([x] * 2, steps=1, show_progress=False)
        assert ib.attribute(x).shape == (2, 1, 24, 24)
        with pytest.raises(ValueError, match="channels"):
            ib.attribute(images(2)[:, :2])

    def test_a_device_other_than_the_models(self, cnn):
        with pytest.raises(ValueError, match=r"is on meta but the model is on cpu"):
            cnn[0].attribute(images(2).to("meta"))

    def test_layers(self, cnn):
        host = cnn[1]
        with pytest.raises(ValueError, match=r"no layer 'stage.1'; did you mean 'stages.1'"):
            IBAttention(host, "stage.1")
        with pytest.raises(ValueError, match="is not a layer of this TinyCNN"):
            IBAttention(host, torch.nn.ReLU())
        with pytest.raises(ValueError, match="'fc' has no spatial grid"):
            IBAttention(host, "fc").attribute(images(2))

    def test_options(self, cnn):
        host = cnn[1]
        with pytest.raises(ValueError, match="unknown gate 'gauss'; did you mean 'gaussian'"):
            IBAttention(host, gate="gauss")
        with pytest.raises(ValueError, match="unknown reads 'gradients'; did you mean 'gradient'"):
            IBAttention(host, reads="gradients")
        with pytest.raises(ValueError, match="unknown output 'bit'; did you mean 'bits'"):
            cnn[0].attribute(images(2), output="bit")
        with pytest.raises(ValueError, match="refine must be an integer >= 0, got -1"):
            cnn[0].attribute(images(2), refine=-1)
        with pytest.raises(ValueError, match=r"refine starts from a fitted attention; .* got refine=5"):
            IBAttention(tiny()).attribute(images(2), refine=5)
        for seed in (None, "a", 1.5, True):
            with pytest.raises(TypeError, match=f"seed must be an integer, got {seed!r}"):
                IBAttention(tiny(), seed=seed)
        with pytest.raises(TypeError, match="the name of a gate must be a str, got None"):
            IBAttention(tiny(), gate=None)
        with pytest.raises(IndexError, match="target class 1180591620717411303424 is out of range"):
            cnn[0].attribute(images(2), target=2**70)
        with pytest.raises(TypeError, match="inputs must be a torch.Tensor of shape .* got NoneType"):
            cnn[0].attribute(None)
        with (
            cnn[0].restrict() as restricted,
            pytest.raises(TypeError, match="with positional arguments, images first; got 0 and by name x"),
        ):
            restricted(x=images(2))
        with pytest.raises(TypeError, match=r"no option 'step'; did you mean 'steps'"):
            ibx.attribute(host, images(2), step=3)
        with pytest.raises(ValueError, match="steps must be"):
            ibx.attribute(host, images(2), steps=0)
        with pytest.raises(ValueError, match="unknown method 'gradcam'; did you mean 'grad_cam'"):
            ibx.attribute(host, images(2), method="gradcam")
        with pytest.raises(ValueError, match="anchors must be 0"):
            IBAttention(host, anchors=1)

    def test_numbers_of_numpy(self, tmp_path):
        ib = IBAttention(tiny(), "stages.1", seed=np.int64(3), anchors=np.int64(4))
        ib.fit([images(4)], steps=np.int64(2), beta=np.float32(0.1), show_progress=False).save(tmp_path / "ib")
        assert IBAttention.load(tmp_path / "ib", ib.host).anchors == 4

    def test_no_module_and_scripted_module(self):
        with pytest.raises(TypeError, match="must be a torch.nn.Module, got function"):
            IBAttention(lambda x: x)

    def test_before_the_fit(self):
        ib = IBAttention(tiny())
        with pytest.raises(RuntimeError, match="not fitted"):
            ib.save("nowhere")
        with pytest.raises(RuntimeError, match="not fitted"):
            _ = ib.bottleneck

    def test_residual_gate_has_no_bits(self):
        ib = IBAttention(tiny(), gate="residual").fit([images(4)], steps=2, show_progress=False)
        with pytest.raises(ValueError, match="has no bits; use output='attention'"):
            ib.attribute(images(2))
        assert ib.attribute(images(2), output="attention").shape == (2, 1, 24, 24)
