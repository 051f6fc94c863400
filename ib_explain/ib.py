"""`IBAttention`: the bottleneck on a frozen host, as a user holds it. Fit, attribute, restrict, save, load."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from captum.attr import LayerAttribution
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from ib_explain.bottleneck.gates import GATES
from ib_explain.bottleneck.module import Bottleneck, Restriction, empty_bottleneck
from ib_explain.checkpoints import check_checkpoint_folder, digest, read_checkpoint, write_checkpoint
from ib_explain.checks import (
    ONE_CLASS,
    check_bool,
    check_images,
    check_maps,
    check_positive_int,
    did_you_mean,
    warn_user,
)
from ib_explain.data.batches import Batches, Share
from ib_explain.data.origins import source_of
from ib_explain.facts import weights_state, with_fresh_facts
from ib_explain.files import replace_folder
from ib_explain.fitting import (
    check_fit_options,
    check_varies,
    choose_precision,
    default_steps,
    doubts,
    estimate_statistics,
    launched,
    new_bottleneck,
    train,
)
from ib_explain.hooks import LayerError, capture
from ib_explain.hosts import channels_of
from ib_explain.io import (
    FILES,
    FORMAT,
    check_host,
    data_config,
    fingerprint,
    host_facts,
    read_folder,
    versions,
    write_folder,
)
from ib_explain.layouts import LayoutChanged
from ib_explain.lending import HostArgs, frozen, outside_inference_mode, run_host
from ib_explain.maps import resize
from ib_explain.masked_evidence import masked_evidence
from ib_explain.modules import find_module, host_device, host_dtype, module_name, on_host, unwrap
from ib_explain.observation import Observation, observe
from ib_explain.outputs import bits_map, check_output, relevance_map
from ib_explain.per_image import REFINING_LR, PerImageSettings, mask_pairs, optimise
from ib_explain.places import Place, check_reached, find_place, warn_of_leak, warn_of_window
from ib_explain.randomness import check_seed
from ib_explain.reference import reference_statistics, warn_of_another_range
from ib_explain.restricting import Plan, as_attention, passes_restricted
from ib_explain.sites import Site, input_size_of
from ib_explain.targets import Target, spread_target
from ib_explain.training import FitSettings

__all__ = ["IBAttention"]

READS = ("gradient", "features")
OPTIONS = ("gate", "reads", "anchors", "per_element", "relevance", "seed")  # that a saved bottleneck is built with
MODEL_CARD = "README.md"

F = TypeVar("F", bound=Callable[..., Any])


def _as_captum(method: F) -> F:
    """Captum's NoiseTunnel calls `attribute.__wrapped__`; every public `attribute` there is wrapped, so is ours."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


class IBAttention(LayerAttribution, ModelHubMixin, library_name="ib-explain"):
    """Information-bottleneck attention at one layer of a frozen classifier.

    Fitted, `attribute` costs about one forward pass (`reads="features"`), or one forward pass and one backward pass
    through the part behind the layer (`reads="gradient"`). Not fitted, it optimises the attention for the given
    images. The object obeys Captum's conventions and works inside its NoiseTunnel and metrics; it changes nothing in
    the host.

    Args:
        model: the host, any nn.Module that maps (B, 3, H, W) to (B, K) logits. Wrappers (DataParallel,
            torch.compile) are looked through.
        layer: dotted name, module of the host, or None for `default_layer`.
        gate: "gaussian", "noise" or "residual", see `ib_explain.bottleneck.gates`.
        reads: "gradient" or "features", what the fitted attention reads.
        anchors: number of learnable anchor values that quantise the fitted attention; 0 for none.
        per_element: statistics per feature element instead of per channel; ties the bottleneck to one input size.
        relevance: `fit` also learns the label's information of each position (`ib_explain.relevance`), for
            `attribute(output="relevance")`; a step then takes three more passes behind the layer.
        seed: of everything random.

    Attributes:
        record: what the last fit was and reached, a dict; None before.
        asked_layer: dotted name of the layer that was asked for, None for the default.
        layer_name: of the layer in use; known from the first `fit` or `attribute` on.

    Raises:
        TypeError: `model` is no eager nn.Module, `relevance` or `per_element` no bool.
        ValueError: no such layer, gate or reads (with the nearest names).
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        *,
        gate: str = "gaussian",
        reads: str = "gradient",
        anchors: int = 0,
        per_element: bool = False,
        relevance: bool = False,
        seed: int = 0,
    ) -> None:
        host = unwrap(model)
        module = layer if layer is None or isinstance(layer, nn.Module) else find_module(host, layer)
        self.asked_layer = None if module is None else module_name(host, module)
        self.layer_name = self.asked_layer
        super().__init__(model, module)
        measures_bits = GATES.get(gate).measures_bits
        if check_bool(relevance, "relevance") and not measures_bits:
            raise ValueError(f"the {gate!r} gate passes everything, so it has no relevance; use gate='gaussian'")
        if reads not in READS:
            raise ValueError(f"unknown reads {reads!r}{did_you_mean(str(reads), READS)}")
        if isinstance(anchors, bool) or not hasattr(anchors, "__index__"):
            raise TypeError(f"anchors must be an integer, 0 (none) or at least 2, got {anchors!r}")
        self.anchors = anchors.__index__()
        if self.anchors < 0 or self.anchors == 1:
            raise ValueError(f"anchors must be 0 (none) or at least 2, got {anchors}")
        self.gate, self.reads, self.per_element = gate, reads, check_bool(per_element, "per_element")
        self.seed = check_seed(seed)
        self.relevance = relevance
        self.record: dict[str, Any] | None = None
        self._fitted_to: dict[str, Any] | None = None  # the host then, by `host_facts`
        # Of the host, when its weights were last compared with those of the fit.
        self._weights_seen: tuple[int, torch.dtype] | None = None
        self._bottleneck: Bottleneck | None = None
        self._place: Place | None = None

    @property
    def host(self) -> nn.Module:
        """The user's own module, out of any wrapper."""
        return unwrap(self.forward_func)

    def __repr__(self) -> str:
        layer = repr(self.layer_name) if self.layer_name else "the default layer"
        where = f"{type(self.host).__name__} at {layer}"
        if self._place is not None:
            (h, w), channels = self.site.grid, self.site.channels
            where += f", grid {h}x{w} of {channels} channels"
        state = f"fitted on {(self.record or {}).get('images', 'unknown')} images" if self.fitted else "not fitted"
        return f"<IBAttention of {where}; gate {self.gate!r}, reads {self.reads!r}; {state}>"

    @property
    def fitted(self) -> bool:
        """Whether there is a fitted bottleneck, by `fit` or `load`."""
        return self._bottleneck is not None

    @property
    def bottleneck(self) -> Bottleneck:
        """The fitted bottleneck, an nn.Module.

        Raises:
            RuntimeError: before `fit`.
        """
        return self._require_fitted()

    @property
    def site(self) -> Site:
        """Where the bottleneck sits, as probed at the first `fit` or `attribute`.

        Raises:
            RuntimeError: before that.
        """
        if self._place is None:
            raise RuntimeError("the site is probed at the first fit or attribute; before, use ib_explain.sites(model)")
        return self._place.site

    def fit(
        self,
        data: Iterable[Any],
        *,
        steps: int | None = None,
        beta: float | None = None,
        lr: float | None = None,
        objective: str = "prediction",
        precision: str | None = None,
        checkpoint: str | Path | None = None,
        every: int | None = None,
        resume: bool = False,
        show_progress: bool = True,
    ) -> IBAttention:
        """Estimate the features' statistics and train the attention; the host stays as it is.

        Args:
            data: iterable of (images, labels) or of images, normalised as the host expects: a DataLoader, a list, what
                `timm.data.create_loader` gives. Training images, shuffled: the statistics come from the first ones.
            steps: batches, with two steps of the optimiser on each (they share the host's clean pass); by default as
                many as show 6,400 images, 8,960 with reads="features", at least 100.
            beta: weight of the rate (`ib_explain.objective.rate`) against the cross-entropy in nats; larger gives
                sparser maps that keep fewer of the host's answers. None for twice what is at stake in each image (the
                divergence of the host's prediction from that with nothing let through), which carries over from layer
                to layer and host to host. With reads="features" the weight rises to beta over the first 18 % of the
                steps.
            lr: peak learning rate, 2e-3 by default.
            objective: "prediction" explains what the host says (targets drawn from its own predictive distribution),
                "label" the labels in the data.
            precision: "fp32", "bf16", "fp16", or None for the launcher's choice.
            checkpoint: folder that keeps the state of the run; it may hold nothing else.
            every: steps between two checkpoints, besides the one at the end; None for a tenth of the fit, at most 100.
            resume: continue from `checkpoint` if it is there; ends at the weights of an uninterrupted run.
            show_progress: a bar on a terminal and in a notebook, lines in a pipe.

        Returns:
            self; `.record` tells the run.

        Warns:
            UserWarning: the grid alone, with class tokens and the like held at their mean, keeps less than nine of ten
                of the host's answers (`record["grid_alone"]`); or the attention has closed for more than one image in
                twenty, whose answer is lost by it (`record["final_shut"]`): their maps are empty; or `checkpoint` is
                of a fit whose data began with other images.

        Raises:
            TypeError: data that is no iterable of image tensors.
            ValueError: empty data, images of several sizes or that the host refuses, an unknown objective or precision,
                a layer whose grid no gradient of the logits reaches, a host of one class, another run's checkpoint.
            FileExistsError: the checkpoint's folder holds other files, a saved bottleneck or, without `resume`, an
                interrupted fit.
        """
        check_fit_options(objective, beta, lr, checkpoint, every, resume, show_progress)
        device = host_device(self.host)
        # `precision` says what computes, not the caller's autocast.
        plainly = torch.autocast(device.type, enabled=False)
        with plainly, frozen(self.forward_func) as host, torch.enable_grad(), launched(device) as accelerator:
            share = Share(accelerator.process_index, accelerator.num_processes)
            batches = Batches(data, self.seed, share, labelled=objective == "label")
            with contextlib.closing(batches.first(1)) as beginning:
                first, _ = next(beginning)
            check_images(first, name="images from data", channels=channels_of(host))
            place = with_fresh_facts(host, lambda: self._find_place(host, first))
            self._check_place(place)
            by_default = default_steps(self.reads, len(first) * share.world)
            settings = FitSettings(
                steps=check_positive_int(by_default if steps is None else steps, "steps"),
                beta=None if beta is None else float(beta),
                lr=2e-3 if lr is None else float(lr),
                objective=objective,
                precision=choose_precision(precision, accelerator),
                seed=self.seed,
            )
            description = {**self._describe(place), "host": host_facts(host), "batch_size": len(first)}
            begins = digest(first)
            state = None
            if checkpoint is not None:
                check_checkpoint_folder(checkpoint, resume=resume)
                if resume:  # the main process wrote it, and others read other batches
                    seen = begins if accelerator.is_main_process else None
                    state = read_checkpoint(checkpoint, description, dataclasses.asdict(settings), seen)
            if state is None:
                found = estimate_statistics(
                    host,
                    place,
                    batches,
                    per_element=self.per_element,
                    show_progress=show_progress and accelerator.is_main_process,
                )
                bottleneck = new_bottleneck(
                    host,
                    found,
                    gate=self.gate,
                    gradient=self.reads == "gradient",
                    anchors=self.anchors,
                    relevance=self.relevance,
                    seed=self.seed,
                )
            else:
                bottleneck = self._empty(state["weights"], place).to(device)

            def save(now: dict[str, Any]) -> None:
                write_checkpoint(Path(str(checkpoint)), bottleneck.state_dict(), description, now, begins)

            record = train(
                bottleneck,
                host,
                place,
                batches,
                settings,
                accelerator,
                state=state,
                save=None if checkpoint is None else save,
                every=every or min(100, max(1, settings.steps // 10)),
                show_progress=show_progress,
            )
        # Only now: a run that is interrupted leaves an earlier fit as it was.
        self._bottleneck = bottleneck.requires_grad_(False)
        self._fitted_to, self._weights_seen = host_facts(self.host), self._weights_now()
        self._settle(place)
        images = int(bottleneck.restriction.moments.get_buffer("count"))
        about = {"layer": place.site.name, "device": str(device), "data": source_of(data)}
        self.record = {**about, "statistics_images": images, "versions": versions(), **record}
        for told in doubts(self.record):
            warn_user(told)
        return self

    @_as_captum
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        refine: int = 0,
        output: str = "bits",
    ) -> Tensor | tuple[Tensor]:
        """Maps of the information that passes the layer for a class: how much, and where.

        Args:
            inputs: images (B, 3, H, W), or a tuple of one such tensor (then a tuple comes back).
            target: None for the host's own top-1 (Captum's None means no selection), an int, a list, a 1-D tensor.
            additional_forward_args: further arguments of the host's forward.
            refine: steps of per-image optimisation that start from the fitted attention, guided by a pair of passes
                over the partly hidden images for every five steps, forward and backward through the whole host.
            output: "bits", information that passes at each pixel, non-negative, its sum the image's bits;
                "attention", A in [0, 1]; or, where it was fitted, "relevance", label bits: what each pixel tells of
                the class, signed, their sum log2 p(class | x) - E log2 p(class | nothing).

        Returns:
            (B, 1, H, W) float32 on the inputs' device, detached. For Captum's `infidelity`, `.expand_as(inputs)` it.

        Raises:
            TypeError, ValueError, IndexError: inputs, target or options that are not as above.
        """
        x, echo = (inputs[0], True) if isinstance(inputs, tuple) and len(inputs) == 1 else (inputs, False)
        if isinstance(x, tuple):
            raise ValueError(f"inputs must be one tensor or a tuple of one, got a tuple of {len(x)}")
        self.check_options(refine=refine, output=output)
        settings = PerImageSettings(seed=self.seed)
        if self.fitted:
            beta = (self.record or {}).get("settings", {}).get("beta")
            settings = dataclasses.replace(settings, steps=int(refine), lr=REFINING_LR, beta=beta)
        maps = self._maps(x, target, additional_forward_args, settings, output, from_fit=self.fitted)
        return (maps,) if echo else maps

    def check_options(self, *, refine: int = 0, output: str = "bits") -> None:
        """Refuse what `attribute` would refuse, before there are images.

        Raises:
            ValueError: `refine` or `output` is none that this object can serve.
        """
        if isinstance(refine, bool) or not hasattr(refine, "__index__") or refine < 0:
            raise ValueError(f"refine must be an integer >= 0, got {refine!r}")
        if refine and not self.fitted:
            raise ValueError(f"refine starts from a fitted attention; call .fit(data) first, got refine={refine}")
        check_output(output, self.gate, relevance=self.fitted and self.relevance)
        if output == "relevance" and refine:
            raise ValueError(f"refine moves the attention, and relevance does not depend on it; got {refine}")

    def attribute_per_image(
        self,
        inputs: Tensor,
        target: Target = None,
        *,
        settings: PerImageSettings,
        reference: Tensor | None = None,
        output: str = "bits",
    ) -> Tensor:
        """Maps from attention optimised for these images from scratch, with explicit settings.

        Args:
            inputs: images (B, 3, H, W).
            target: as in `attribute`.
            settings: of the optimisation, an `ib_explain.per_image.PerImageSettings` (steps, lr, beta, copies, seed).
            reference: images (N, 3, H, W) from which the features' statistics are taken; by default those of the
                fitted bottleneck, else smooth noise images.
            output: "bits" or "attention".

        Returns:
            (B, 1, H, W) float32, as `attribute`.

        Raises:
            TypeError, ValueError, IndexError: inputs, target or output that are not as above.
        """
        check_output(output, self.gate, relevance=False)
        return self._maps(inputs, target, None, settings, output, from_fit=False, reference=reference)

    def information(self, inputs: Tensor) -> Tensor:
        """Bits that the bottleneck passes for each image and the host's own top-1: (B, 3, H, W) -> (B,).

        Raises:
            ValueError: the gate measures no bits ("residual"); and as `attribute`.
        """
        maps = self.attribute(inputs)
        return (maps[0] if isinstance(maps, tuple) else maps).sum(dim=(1, 2, 3))

    @contextlib.contextmanager
    def restrict(self, attention: float | Tensor | None = None, *, target: Target = None) -> Iterator[nn.Module]:
        """While inside, the host's forward passes run through the bottleneck, with the mean attention and seeded noise.

        Each pass takes a clean one before it, for the attention. Contexts nest, at one layer or several: each has the
        attention of the intact host. Methods and metrics see the restricted host. Other threads that want the host wait
        until the end of the context; do not wait for them inside.

        Args:
            attention: instead of the fitted attention, a number or a tensor (B, 1, h, w) in [0, 1].
            target: the class whose attention is used; by default the host's own top-1 for each image.

        Yields:
            The host, unwrapped: call this one (a compiled wrapper would not see the bottleneck).

        Raises:
            RuntimeError: not fitted, and no `attention` given.
            TypeError, ValueError: `attention` is none of that.
        """
        if attention is None:
            self._require_fitted()
            self._check_weights()
        fixed = None if attention is None else as_attention(attention)
        with frozen(self.forward_func, random_state=False) as host:
            if self.layer_name is None:  # by the host's own size; of other images it is found when they come
                with contextlib.suppress(LayerError, ValueError):
                    self._settle(find_place(host, None, input_size_of(host)))

            def plan(x: Tensor, args: HostArgs) -> Plan:
                return self._plan(host, x, target, args, fixed)

            with passes_restricted(host, lambda: self.layer_name, plan, seed=self.seed):
                yield host

    def save(self, path: str | Path) -> None:
        """Write the fitted bottleneck as a folder with `bottleneck.safetensors` and `config.json`.

        An older one of that name is replaced only when the new one is whole; its model card (`README.md`, which
        `save_pretrained` writes) is kept.

        Raises:
            RuntimeError: not fitted.
            FileExistsError: the folder holds anything else.
        """
        self._require_fitted()
        with replace_folder(path, (*FILES, MODEL_CARD)) as folder:
            self._save_pretrained(folder)
            if (card := Path(path) / MODEL_CARD).is_file():
                shutil.copy2(card, folder)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> IBAttention:
        """Read what `save` wrote, for the same architecture.

        Raises:
            TypeError: `path` is no name.
            FileNotFoundError: no saved bottleneck there.
            ValueError: damaged, or fitted to another architecture or another shape of the layer.

        Warns:
            UserWarning: same architecture, other weights; or a checkpoint of a fit that was not at its end.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path must be the name of a folder, got {type(path).__name__}")
        with outside_inference_mode():
            tensors, config = read_folder(path)
        fitted_to = config["host"]
        check_host(path, config, model)
        options = {name: config[name] for name in OPTIONS}
        self = cls(model, config["layer"], **options)
        channels, height, width = config["input_size"]
        with frozen(model) as host:
            place = find_place(host, self.layer_name, (channels, height, width), read=False)
            self._check_place(place)
            try:
                place = self._settle(place.as_stored(config))
                self._bottleneck = self._empty(tensors, place).to(host_device(host)).requires_grad_(False)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                told = " ".join(str(error).split())
                raise ValueError(f"{path} does not fit this model: {told}") from error
        self.record, self._fitted_to = config.get("record"), fitted_to
        self._weights_seen = self._weights_now()
        return self

    @classmethod
    def from_pretrained(cls, name: str | Path, model: nn.Module, **hub: Any) -> IBAttention:  # type: ignore[override]
        """Load from a local folder or a repository of the Hugging Face hub (revision=, token=, cache_dir=, ...)."""
        if isinstance(name, Path) or str(name).startswith((".", "/", "~")):  # never a repository's name
            return cls.load(Path(name).expanduser(), model)
        return super().from_pretrained(name, model=model, **hub)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub (private=, token=, ...).

        Raises:
            RuntimeError: not fitted; no repository is made then.
        """
        self._require_fitted()
        return super().push_to_hub(repo_id, **hub)

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    def has_convergence_delta(self) -> bool:
        return False

    @classmethod
    def get_name(cls) -> str:
        return "IB Attention"

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {"format": FORMAT, "host": self._fitted_to, "versions": versions(), "record": self.record}
        config["classes"] = (self.record or {}).get("classes")
        if self._place is not None:
            config |= self._describe(self._place)
        write_folder(Path(save_directory), self.bottleneck.state_dict(), config)

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # the mixin's keywords and our `model`
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        model: nn.Module,
        **_configuration: Any,
    ) -> IBAttention:
        folder = model_id
        if not Path(model_id).is_dir():
            folder = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return cls.load(folder, model)

    def _settle(self, place: Place) -> Place:
        """Remember where the bottleneck sits; from then on None as a layer means this one."""
        self._place, self.layer_name = place, place.site.name
        self.layer = find_module(self.host, place.site.name)
        return place

    def _check_place(self, place: Place, args: tuple[Any, ...] = ()) -> None:
        """Refuse a layer that nothing can be fitted at, and warn, once, of one that is no cut."""
        check_reached(place.site)
        if place == self._place:
            return
        warn_of_window(self.host, place.site, args)
        if self.gate != "residual":
            warn_of_leak(self.host, place.site, args)

    def _weights_now(self) -> tuple[int, torch.dtype]:
        """What changes with the host's weights, and their precision."""
        return weights_state(self.host), host_dtype(self.host)

    def _check_weights(self) -> None:
        """Warn, once, that the host is not as it was when the bottleneck was fitted to it."""
        now = self._weights_now()
        if now != self._weights_seen and self._fitted_to is not None:
            # Another precision rounds the weights: they cannot be compared.
            same_precision = self._weights_seen is None or self._weights_seen[1] == now[1]
            self._weights_seen = now
            if same_precision and fingerprint(self.host) != self._fitted_to["weights"]:
                warn_user("the model's weights were changed since the fit; fit again for bits that hold")

    def _find_place(self, host: nn.Module, images: Tensor) -> Place:
        """Where a fit on such images sits, looked at with two of them."""
        place = find_place(host, self.asked_layer, _size(images))
        with torch.no_grad(), capture(host, [place.site.name], stop=True) as seen:
            run_host(host, on_host(images[:2], host))
        place.site.layout.to_grid(seen[place.site.name])
        return place

    def _describe(self, place: Place) -> dict[str, Any]:
        """What a saved bottleneck or a checkpoint says of itself."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return {**place.to_json(), **options, "data_config": data_config(self.host)}

    def _require_fitted(self) -> Bottleneck:
        if self._bottleneck is None:
            raise RuntimeError("this IBAttention is not fitted; call .fit(data) or IBAttention.load(path, model) first")
        return self._bottleneck

    def _empty(self, tensors: dict[str, Tensor], place: Place) -> Bottleneck:
        """A bottleneck filled with stored tensors."""
        return empty_bottleneck(
            tensors,
            gate=self.gate,
            deeper=len(place.deeper),
            gradient=self.reads == "gradient",
            anchors=self.anchors,
            relevance=self.relevance,
        )

    def _observe(
        self, host: nn.Module, x: Tensor, target: Target, args: HostArgs, *, read: bool, gradient: bool
    ) -> tuple[Observation, Place]:
        """A clean pass at the place that holds for this input size; `read` the deeper layers, or only the site."""
        if self._bottleneck is not None:
            self._bottleneck.to(host_device(host))  # the user may have moved the host since
        size = _size(x)

        def look() -> tuple[Observation, Place]:
            if self._place is None or not self.fitted:
                # By what was asked for: an image of another size may have another default layer.
                place = find_place(host, self.asked_layer, size, args)
                self._check_place(place, args)
                self._settle(place)
            elif self._place.input_size == size:
                place = self._place
            elif self.per_element:
                fitted_size = self._place.input_size
                raise ValueError(f"per-element statistics hold for the fitted size {fitted_size}, got {size}")
            else:
                place = self._place.at_size(host, size, args)
            deeper = place.deeper if read else ()
            return observe(host, place.site, x.detach(), target, deeper=deeper, gradient=gradient, args=args), place

        if not self.fitted:
            return with_fresh_facts(host, look)
        try:
            return look()
        except LayoutChanged as error:
            raise ValueError(f"the bottleneck was fitted to another layer {self.layer_name!r}: {error}") from error

    def _maps(
        self,
        x: Tensor,
        target: Target,
        additional: Any,
        settings: PerImageSettings,
        output: str,
        *,
        from_fit: bool,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Maps, optimised by `settings` from the fitted attention on or, also for a fitted object, from scratch."""
        check_images(x, name="inputs", channels=channels_of(self.host), device=host_device(self.host))
        args = HostArgs.of(additional, len(x))
        if not from_fit and args.differ():  # the statistics are those of the features under an image's own arguments
            classes = [None] * len(x) if target is None else [*spread_target(target, len(x)).split(1)]
            one_by_one = [
                self._maps(x[i : i + 1], classes[i], args.row(i), settings, output, from_fit=False, reference=reference)
                for i in range(len(x))
            ]
            return torch.cat(one_by_one)
        if from_fit:
            self._check_weights()
        with frozen(self.forward_func) as host, torch.no_grad():
            # The optimisation is priced by the deeper layers' evidence, whatever the attention itself reads.
            gradient = settings.steps > 0 or self.reads == "gradient"
            seen, place = self._observe(host, x, target, args, read=True, gradient=gradient)
            if seen.logits.shape[1] < 2:
                raise ValueError(ONE_CLASS)
            size = (int(x.shape[2]), int(x.shape[3]))
            if output == "relevance":
                maps = relevance_map(self.bottleneck, seen, place, size)
            else:
                restriction = self._restriction(host, place, args, reference)
                start = self.bottleneck.attend(seen).value if from_fit else None
                evidence = self._evidence(host, x, seen, settings, args) if from_fit else None
                if reference is None and not self.fitted:
                    warn_of_another_range(restriction.moments(seen.features))
                attention = optimise(restriction, seen, place.site.layout, settings, start, evidence)
                as_bits = output == "bits"
                maps = bits_map(restriction, seen, attention, place, size) if as_bits else resize(attention, size)
                if from_fit and as_bits and not maps.any():
                    warn_user("no information passes for any of these images; are they normalised as in the fit?")
            check_maps(maps)
            return maps

    def _evidence(
        self, host: nn.Module, x: Tensor, seen: Observation, settings: PerImageSettings, args: HostArgs
    ) -> Tensor | None:
        """What refining goes by; None where nothing is refined."""
        if settings.steps == 0:
            return None
        grid = (int(seen.features.shape[2]), int(seen.features.shape[3]))
        pairs = mask_pairs(settings.steps)
        return masked_evidence(host, x, seen.target, grid, pairs=pairs, seed=settings.seed, args=args)

    def _restriction(
        self, host: nn.Module, place: Place, args: HostArgs, reference: Tensor | None = None
    ) -> Restriction:
        """The fitted restriction, or one whose statistics come from reference images, never from the explained ones."""
        if reference is None and self.fitted:
            return self.bottleneck.restriction
        if args.differ():
            raise ValueError("without a fit all images must have the same further arguments, got different ones")
        found = reference_statistics(host, place.site, reference, per_element=self.per_element, args=args)
        check_varies(place.site.name, found.varies, found.moments.count)
        return Restriction(self.gate, found.moments, found.side).to(host_device(host)).requires_grad_(False)

    def _plan(self, host: nn.Module, x: Tensor, target: Target, args: HostArgs, attention: Tensor | None) -> Plan:
        """What `restrict` needs for one forward pass."""
        with outside_inference_mode(), torch.no_grad():
            x = x.clone() if x.is_inference() else x
            gradient = attention is None and self.reads == "gradient"
            seen, place = self._observe(host, x, target, args, read=attention is None, gradient=gradient)
            restriction = self._restriction(host, place, args)
            if attention is None:
                value = self.bottleneck.attend(seen).value
            else:
                expected = (len(x), 1, *place.site.grid)
                if attention.ndim > 0 and tuple(attention.shape) not in (expected, (1, *expected[1:])):
                    raise ValueError(f"attention must be a number or {expected}, got {tuple(attention.shape)}")
                value = attention.to(x.device).expand(expected)
        return Plan(restriction, seen, place.site.layout, value)


def _size(x: Tensor) -> tuple[int, int, int]:
    return int(x.shape[1]), int(x.shape[2]), int(x.shape[3])
