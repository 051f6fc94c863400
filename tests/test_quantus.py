"""Quantus itself calls our methods: its metrics give what ours give, and its randomised copies are explained afresh."""

from __future__ import annotations

import numpy as np
import pytest
import quantus
import torch

import ib_explain as ibx
from ib_explain import quantus_explain
from ib_explain.ib import IBAttention
from ib_explain.metrics import pointing_game, top_share
from tests.models import images, tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def host():
    return tiny()


@pytest.fixture(scope="module")
def batch(host):
    x = images(4)
    masks = torch.zeros(4, 1, 24, 24, dtype=torch.bool)
    masks[:, :, 4:16, 6:20] = True
    return x, host(x).argmax(1), masks


def ask(metric, host, batch, **options):
    x, target, masks = batch
    return metric(
        model=host,
        x_batch=x.numpy(),
        y_batch=target.numpy(),
        s_batch=masks.float().numpy(),
        explain_func=quantus_explain,
        explain_func_kwargs=options,
        device="cpu",
    )


@pytest.mark.parametrize("method", ["grad_cam", "edges", "ib"])
def test_localisation_by_quantus_is_ours(host, batch, method):
    x, target, masks = batch
    options = {"method": method, "steps": 2} if method == "ib" else {"method": method}
    maps = ibx.attribute(host, x, target=target, **options)
    quiet = {"disable_warnings": True, "display_progressbar": False, "abs": False, "normalise": False}
    assert [float(score) for score in ask(quantus.PointingGame(**quiet), host, batch, **options)] == pointing_game(
        maps, masks
    ).tolist()
    # Its top-k intersection divides by k, which is the mask's size here.
    found = ask(quantus.TopKIntersection(k=int(masks[0].sum()), **quiet), host, batch, **options)
    np.testing.assert_allclose(found, top_share(maps, masks).numpy(), atol=0.02)  # it cuts ties by its sort


def test_pixel_flipping_follows_the_maps(host, batch):
    metric = quantus.PixelFlipping(features_in_step=96, disable_warnings=True, display_progressbar=False)
    curves = [np.asarray(ask(metric, host, batch, method=method)) for method in ("grad_cam", "edges")]
    assert curves[0].shape == (4, 3 * 24 * 24 // 96) and np.isfinite(curves).all()  # it flips channels one by one
    np.testing.assert_allclose(curves[0][:, -1], curves[1][:, -1], rtol=1e-5)  # in the end all is gone
    assert not np.allclose(curves[0][:, 0], curves[1][:, 0], rtol=1e-3)


def test_each_copy_of_the_model_is_explained_afresh_and_a_fitted_bottleneck_says_no(host, batch):
    x, target, _ = batch
    other = tiny(seed=1)
    one, two = (quantus_explain(m, x.numpy(), target.numpy(), method="ib", steps=2) for m in (host, other))
    assert one.shape == (4, 1, 24, 24) and one.dtype == np.float32 and not np.allclose(one, two)
    fitted = IBAttention(host, "stages.1").fit([x], steps=1, show_progress=False)
    assert quantus_explain(host, x.numpy(), target.numpy(), method=fitted, device="cpu").shape == (4, 1, 24, 24)
    with pytest.raises(ValueError, match="belongs to another TinyCNN.*pass the method's name"):
        quantus_explain(other, x.numpy(), target.numpy(), method=fitted)


def test_mistakes(host, batch):
    x, target, _ = batch
    with pytest.raises(TypeError, match="method 'edges' has no option 'sigmas'"):
        quantus_explain(host, x.numpy(), target.numpy(), method="edges", sigmas=1)
    with pytest.raises(ValueError, match="device must be the model's, cpu, got cuda"):
        quantus_explain(host, x.numpy(), target.numpy(), method="edges", device="cuda")
    with pytest.raises(IndexError, match="class 7 is out of range"):
        quantus_explain(host, x.numpy(), np.array([7] * 4), method="edges")
    assert quantus_explain(host, x.numpy(), None, method="edges").shape == (4, 1, 24, 24)
