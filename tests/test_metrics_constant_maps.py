"""A constant map that went through a resize holds rounding; no metric may rank it."""

from __future__ import annotations

import pytest
import torch

from ib_explain.maps import resize
from ib_explain.metrics import METRICS, Case, centred_gaussian
from tests.models import images, tiny

GAZE = ("auc", "auc_judd", "auc_shuffled")


@pytest.mark.parametrize("metric", ["insertion", "deletion", "degradation_8", "road", "tied_share", *GAZE])
def test_a_resized_constant_counts_as_a_constant(metric):
    host, x = tiny(), images(3, size=30)
    generator = torch.Generator().manual_seed(0)
    fixations = [torch.randint(0, 30, (5, 2), generator=generator).float() for _ in range(3)]
    other = [torch.cat(fixations[:i] + fixations[i + 1 :]) for i in range(3)]
    even = torch.full((3, 1, 30, 30), 0.3)
    resized = resize(torch.full((3, 1, 4, 4), 0.3), (30, 30))
    assert resized.unique().numel() > 1, "the case that this is about"
    scores = [
        METRICS.get(metric)(
            Case(host, x, maps, 1, fixations=fixations, other=other, baseline=centred_gaussian((30, 30)))
        )
        for maps in (even, resized)
    ]
    torch.testing.assert_close(*scores, rtol=0, atol=0, equal_nan=True)
    if metric in GAZE:
        assert (scores[0] == 0.5).all()
