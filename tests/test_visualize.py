"""What is drawn is what was given: pictures, values, units, signs; and nothing is invented where a map is empty."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ib_explain.colours import reduced
from ib_explain.data import preprocess
from ib_explain.hosts import class_names
from ib_explain.io import data_config
from ib_explain.visualize import contact_sheet, denormalize, overlay, visualize


@pytest.fixture
def x():
    return torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def heat():
    return torch.rand(3, 1, 24, 32, generator=torch.Generator().manual_seed(1))


def texts(figure):
    """All words on a figure."""
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def bars(figure):
    """Axes that carry a colour bar: those with tick labels below."""
    return [axes for axes in figure.axes if len(axes.get_xticks())]


def drawn(axes):
    return np.asarray(axes.images[0].get_array())


# visualize ---------------------------------------------------------------------------------------


def test_a_row_per_image_and_the_picture_first(x, heat):
    figure = visualize(x, heat)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 3 * 2 + 1
    np.testing.assert_allclose(drawn(figure.axes[0]), x[0].permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(drawn(figure.axes[2]), x[1].permute(1, 2, 0), atol=1e-6)


def test_both_map_shapes_draw_the_same(x, heat):
    first, second = visualize(x, heat), visualize(x, heat[:, 0])
    for a, b in zip(first.axes[:6], second.axes[:6], strict=True):
        np.testing.assert_array_equal(drawn(a), drawn(b))


def test_one_scale_for_all_maps_of_a_unit(x, heat):
    weak = heat * 0.1
    figure = visualize(x, {"strong": heat, "weak": weak})
    limit = np.percentile(torch.cat([heat, weak]).numpy(), 99.5)
    assert len(bars(figure)) == 1
    np.testing.assert_allclose(bars(figure)[0].get_xlim(), (0, limit), rtol=1e-5)
    expected = overlay(x[0], weak[0], limit=limit, signed=False)
    np.testing.assert_array_equal(drawn(figure.axes[2]), expected)
    alone = visualize(x, {"weak": weak})
    assert not np.array_equal(drawn(alone.axes[1]), expected)  # the neighbour did matter


def test_a_scale_per_row_is_asked_for_by_name(x, heat):
    heat = heat * torch.tensor([1.0, 0.01, 0.0])[:, None, None, None]
    figure = visualize(x, heat, scale="row")
    limits = [bar.get_xlim()[1] for bar in bars(figure)]
    assert len(limits) == 3 and limits[0] == pytest.approx(100 * limits[1], rel=0.1)
    assert "bits per pixel (all zero)" in texts(figure)


def test_units_have_their_own_scales_and_bars(x, heat):
    maps = {"ib": heat, "grad_cam": 50 * heat, "ib, refined": heat * 2}
    figure = visualize(x, maps, unit={"ib": "bits", "grad_cam": "logit", "ib, refined": "bits"})
    labels = [bar.get_xlabel() for bar in bars(figure)]
    assert labels == ["bits per pixel, non-negative", "logit, non-negative", "bits per pixel, non-negative"]
    ends = [bar.get_xlim()[1] for bar in bars(figure)]
    assert ends[0] == ends[2] and ends[1] > 20 * ends[0]


def test_a_map_called_as_a_method_has_its_unit(x, heat):
    figure = visualize(x, {"ib": heat, "grad_cam": 100 * heat, "by eye": heat})
    labels = [bar.get_xlabel().removesuffix(", non-negative") for bar in bars(figure)]
    assert labels == ["bits per pixel", "gradient x feature", "bits per pixel"]


def test_signed_maps_are_symmetric_about_zero(x, heat):
    figure = visualize(x, heat - 0.3, unit="relevance")
    low, high = bars(figure)[0].get_xlim()
    assert low == -high
    assert bars(figure)[0].get_xlabel() == "relevance, signed"
    negative_only = visualize(x, -heat)
    assert bars(negative_only)[0].get_xlabel() == "bits per pixel, signed"


def test_zero_and_constant_maps_are_drawn_and_named(x):
    maps = torch.zeros(3, 1, 24, 32)
    maps[1] = 0.25
    maps[2, 0, :5, :5] = 1.0
    figure = visualize(x, maps)
    said = texts(figure)
    assert "all zero" in said and "constant 0.25, 192 bits in total" in said and "25 bits in total" in said
    plain = drawn(figure.axes[1])
    assert (np.ptp(plain.astype(int), axis=2) == 0).all()  # grey all over: no colour was invented
    washed = drawn(figure.axes[3]).astype(float)
    np.testing.assert_array_equal(washed, overlay(x[1], maps[1], limit=1.0))


def test_a_figure_of_zeros_alone_has_no_scale(x):
    figure = visualize(x, torch.zeros(3, 24, 32))
    assert bars(figure)[0].get_xlabel() == "bits per pixel (all zero)"
    assert list(bars(figure)[0].get_xticks()) == [0]


def test_the_sum_in_bits_is_written_only_for_bits(x, heat):
    assert f"{heat[0].sum():.3g} bits in total" in texts(visualize(x, heat))
    assert not any("in all" in text for text in texts(visualize(x, heat, unit="attention")))


def test_small_values_are_written_with_a_power_of_ten(x, heat):
    bar = bars(visualize(x, heat * 1e-4))[0]
    assert bar.get_xlabel().startswith("$10^{-5}$ bits per pixel")
    bar.figure.canvas.draw()
    assert max(float(label.get_text()) for label in bar.get_xticklabels()) >= 7.5


def test_an_arrow_says_that_values_lie_beyond(x, heat):
    heat = heat.clone()
    assert len(bars(visualize(x, torch.full_like(heat, 0.5)))[0].patches) == 0
    heat[0, 0, 0, 0] = 100.0  # one hot pixel neither darkens the others nor goes unsaid
    bar = bars(visualize(x, heat))[0]
    assert bar.get_xlim()[1] < 1.01 and len(bar.patches) == 1


def test_titles_name_rows_and_columns(x, heat):
    figure = visualize(x, {"ib": heat}, titles=["disc", "ring", "a very long title that does not fit beside a picture"])
    said = texts(figure)
    assert {"image", "ib", "disc", "ring"} <= set(said)
    assert any(text.startswith("a very long") and text.endswith("…") for text in said)
    assert "map 2" in texts(visualize(x, [heat, heat]))
    long = {f"grad_cam(layer=stages.1.blocks.0, relu={relu})": heat for relu in (True, False)}
    shown = [text for text in texts(visualize(x, long)) if text.startswith("grad_cam")]
    assert len(shown) == len(set(shown)) == 2 and all(len(text) <= 24 for text in shown)


def test_no_display_and_no_open_figures(x, heat):
    code = (
        "import sys, torch; from ib_explain.visualize import visualize;"
        "assert 'matplotlib' not in sys.modules;"
        "visualize(torch.rand(1, 3, 8, 8), torch.rand(1, 8, 8)).savefig(sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "/dev/null"], capture_output=True, text=True, check=False)
    # /dev/null has no suffix: matplotlib appends none and writes PNG bytes there.
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"maps": torch.rand(2, 24, 32)}, ValueError, "each of the 3 images, got 2"),
        ({"maps": torch.rand(3, 12, 16)}, ValueError, r"the images' size \(24, 32\), got \(12, 16\)"),
        ({"maps": torch.full((3, 24, 32), torch.nan)}, ValueError, "must be finite"),
        ({"maps": {}}, ValueError, "at least one map, got none"),
        ({"maps": "ib"}, TypeError, "a mapping of names to tensors or a list, got str"),
        ({"maps": {"ib": torch.rand(3, 24, 32)}, "unit": {"IB": "bits"}}, ValueError, "got none for 'ib'"),
        ({"unit": 3}, TypeError, "unit must be a string"),
        ({"scale": "image"}, ValueError, "scale must be 'shared' or 'row', got 'image'"),
        ({"titles": ["one"]}, ValueError, "each of the 3 images, got 1"),
        ({"titles": "one"}, TypeError, "titles must be a list of one title for each image, got 'one'"),
    ],
)
def test_mistakes_are_named(x, heat, change, error, text):
    with pytest.raises(error, match=text):
        visualize(x, **{"maps": heat, **change})


# denormalize -------------------------------------------------------------------------------------


def test_mean_and_std_come_from_the_model_or_the_caller(x):
    model = timm.create_model("test_vit")
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    normalised = (x - mean) / std
    torch.testing.assert_close(denormalize(normalised, model=model), x)
    torch.testing.assert_close(denormalize(normalised, mean=config["mean"], std=config["std"]), x)
    torch.testing.assert_close(denormalize((x - 0.5) / 0.25, mean=0.5, std=0.25), x)
    torch.testing.assert_close(denormalize(x), x)
    # What the caller says counts more than the model.
    torch.testing.assert_close(denormalize((x - 0.5) / 0.25, model=model, mean=0.5, std=0.25), x)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_tells_what_its_own_tells(x, wrap):
    model = timm.create_model("test_resnet", num_classes=2)
    model.pretrained_cfg["label_names"] = ["cat", "dog"]
    assert torch.equal(denormalize(x - 0.5, model=wrap(model)), denormalize(x - 0.5, model=model))
    assert preprocess(wrap(model)) == preprocess(model)
    assert class_names(wrap(model)) == ["cat", "dog"]
    assert data_config(wrap(model)) == data_config(model)


def test_a_configuration_as_timm_once_kept_it(x):
    model = torch.nn.Conv2d(3, 2, 3)
    model.default_cfg = timm.models.PretrainedCfg(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), architecture="old")
    assert preprocess(model).mean == (0.1, 0.2, 0.3)
    assert data_config(model)["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("config", ["theirs", 3, {"mean": None, "std": (1.0, 1.0, 1.0)}])
def test_an_attribute_of_that_name_that_is_none_of_timms(config):
    model = torch.nn.Conv2d(3, 2, 3)
    model.pretrained_cfg = config
    assert data_config(model) is None


def test_grey_images_get_three_channels(x):
    assert denormalize(x[:, :1]).shape == (3, 3, 24, 32)


def test_normalised_images_without_mean_and_std_are_refused(x):
    with pytest.raises(ValueError, match=r"x lies in \[-2, .*pass model= .* or mean= and std="):
        denormalize(4 * x - 2 + (x == x.min()) * (-2 - (4 * x.min() - 2)))
    with pytest.raises(ValueError, match="Linear carries no timm configuration"):
        denormalize(x, model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="mean and std go together, got only mean"):
        denormalize(x, mean=0.5)
    with pytest.raises(ValueError, match="each of the 3 channels, got 2"):
        denormalize(x, mean=[0.5, 0.5], std=[1, 1])
    with pytest.raises(ValueError, match="std must be above 0"):
        denormalize(x, mean=0.5, std=0.0)
    with pytest.raises(ValueError, match="1 or 3 channels to be drawn, got 4"):
        denormalize(torch.rand(1, 4, 8, 8))


# overlay -----------------------------------------------------------------------------------------


def test_zero_shows_the_picture_in_grey(x):
    shown = overlay(x[0], torch.zeros(24, 32)).astype(float) / 255
    luminance = (x[0] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0).numpy()
    np.testing.assert_allclose(shown, np.repeat(luminance[..., None], 3, axis=2), atol=1 / 255)


def test_colour_grows_with_the_value_and_ends_at_the_limit():
    grey = torch.full((3, 1, 50), 0.5)
    ramp = torch.linspace(0, 1, 50)[None]
    saturation = np.ptp(overlay(grey, ramp).astype(int), axis=2)[0]
    assert saturation[0] == 0 and saturation[25] > 30 and saturation[49] > 90
    half = overlay(grey, ramp, limit=0.5)
    np.testing.assert_array_equal(half[0, 30], half[0, 49])


def test_signs_have_their_own_colours():
    grey = torch.full((3, 1, 3), 0.5)
    red, zero, blue = overlay(grey, torch.tensor([[1.0, 0.0, -1.0]]))[0].astype(int)
    assert red[0] > red[2] + 60 and blue[2] > blue[0] + 60 and np.ptp(zero) == 0


def test_overlay_takes_arrays_and_refuses_what_does_not_fit(x):
    heat = torch.rand(24, 32)
    np.testing.assert_array_equal(overlay(x[0].permute(1, 2, 0).numpy(), heat.numpy()), overlay(x[0], heat[None]))
    with pytest.raises(ValueError, match=r"of one size, got \(3, 24, 32\) and \(12, 16\)"):
        overlay(x[0], torch.rand(12, 16))
    with pytest.raises(ValueError, match=r"image must lie in \[0, 1\].*see denormalize"):
        overlay(x[0] * 3, heat)
    with pytest.raises(ValueError, match="heat must be finite"):
        overlay(x[0], heat / 0)
    with pytest.raises(ValueError, match="limit must be above 0, got 0"):
        overlay(x[0], heat, limit=0)


# contact_sheet -----------------------------------------------------------------------------------


def test_a_contact_sheet_is_a_small_png_of_pairs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(20, 3, 9, 9, generator=generator)
    x = nn.functional.interpolate(coarse, size=(180, 180), mode="bicubic").clamp(0, 1)
    maps = torch.zeros(20, 1, 180, 180)
    maps[:, :, 40:80, 40:80] = torch.rand(20, 1, 1, 1, generator=generator)
    path = contact_sheet(x, maps, tmp_path / "sheet.png", titles=[f"image {i}" for i in range(20)], columns=4)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"] and path.stat().st_size < 1_000_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        sheet = np.asarray(image.convert("RGB"))
    assert sheet.shape[:2] == (8 + 5 * (112 + 14 + 8) + 52, 8 + 4 * (2 * 112 + 1 + 8))
    small = nn.functional.interpolate(x[:1], size=112, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(sheet[22:134, 8:120] / 255, small, atol=1.5 / 255)  # pixel by pixel
    right = sheet[22:134, 121:233].astype(int)
    assert np.ptp(right, axis=2)[:20].max() == 0 and np.ptp(right, axis=2)[30:45, 30:45].min() > 20


def test_a_failed_contact_sheet_leaves_nothing(tmp_path, x, heat):
    with pytest.raises(ValueError, match="path must end in .png, got '.*sheet.jpg'"):
        contact_sheet(x, heat, tmp_path / "sheet.jpg")
    with pytest.raises(ValueError, match="columns must be an integer >= 1, got 0"):
        contact_sheet(x, heat, tmp_path / "sheet.png", columns=0)
    assert not list(tmp_path.iterdir())


def test_a_contact_sheet_of_zeros(tmp_path, x):
    with Image.open(contact_sheet(x, torch.zeros(3, 24, 32), tmp_path / "zeros.png")) as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    assert np.ptp(sheet[8:32, 41:73], axis=2).max() == 0


def test_labels_of_neighbouring_bars_do_not_run_into_each_other():
    maps = {name: torch.rand(1, 1, 24, 24) for name in "ab"}
    units = {"a": "an own unit of a method with a long name", "b": "another unit of another method, as long"}
    figure = visualize(torch.rand(1, 3, 24, 24), maps, unit=units)
    figure.canvas.draw()
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes if "unit" in axes.get_xlabel()]
    assert len(boxes) == 2 and boxes[0].x1 < boxes[1].x0


def test_a_reduced_map_holds_the_means():
    heat = torch.rand(2, 8, 12)
    _, small = reduced(torch.zeros(2, 3, 8, 12), heat, 6)
    torch.testing.assert_close(small, heat.unflatten(1, (4, 2)).unflatten(3, (6, 2)).mean(dim=(2, 4)))
