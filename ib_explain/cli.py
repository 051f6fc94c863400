"""The command `ib-explain`: parsing, and what errors look like. What the commands do is in `commands`.

Exit codes: 0 done, 2 the user's mistake (one line on standard error), 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

__all__ = ["main"]

Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"

DONE, FAILED, MISTAKE = 0, 1, 2
LAYER = "dotted name of a layer"
METHODS = "ib,grad_cam,layer_cam,br_npa,integrated_gradients,center_gaussian,random"  # that `benchmark` compares
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # a line for them, and no traceback
FILE_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _prepare_streams()
    command = ""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with _flushed_at_the_end():
                args = _parsed(argv)
                command = args.command
                return int(importlib.import_module(f"ib_explain.commands.{command}").run(args))
        except KeyboardInterrupt:
            goes_on = command in ("attribute", "benchmark")  # `fit` asks for --resume and says so
            return _say("interrupted" + "; the same command goes on after what is written" * goes_on, FAILED)
        except BrokenPipeError:  # `ib-explain layers ... | head`
            _let_go_of_stdout()
            return FAILED
        except ConnectionError as error:
            return _say(str(error), FAILED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                if error.filename is None:  # perhaps of standard output, where the end would say it again
                    _let_go_of_stdout()
                where = f"{error.filename}: " if error.filename else ""
                return _say(f"cannot write {where}{error.strerror}; what is finished stays", FAILED)
            line = _mistake(error)
            if line is None:
                raise
            return _say(line, MISTAKE)


def _prepare_streams() -> None:
    """Streams that can be written to: where the caller has closed one, what is said there is lost, and no more."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):  # no terminal's encoding ends a command that has done its work
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _flushed_at_the_end() -> Iterator[None]:
    """What is wrong with standard output is then raised here, not by the interpreter when all is over."""
    try:
        yield
    finally:
        sys.stdout.flush()


def _let_go_of_stdout() -> None:
    with contextlib.suppress(io.UnsupportedOperation):  # of what is no file, nothing is written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    args, rest = _parser().parse_known_args(argv)
    end = rest.index("--") if "--" in rest else len(rest)  # behind it a name may begin with a dash
    if hasattr(args, "images") and not any(word.startswith("-") for word in rest[:end]):
        # argparse takes one run of positional words; here they may stand between options
        args.images += map(Path, rest[:end] + rest[end + 1 :])
    elif rest:
        unknown = " ".join([word for word in rest if word.startswith("-")] or rest)
        hint = "; a file of such a name is given as ./-NAME" if hasattr(args, "images") else ""
        told = f"unknown arguments: {unknown}; see `ib-explain {args.command} --help`{hint}"
        raise SystemExit(_say(told, MISTAKE))
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ib-explain",
        description="Where does a timm image classifier take its evidence from, in bits?",
        epilog="examples:\n"
        "  ib-explain demo\n"
        "  ib-explain layers resnet50\n"
        "  ib-explain fit resnet50 --pretrained --data imagenet --split train --out resnet50-ib\n"
        "  ib-explain attribute resnet50 --pretrained --bottleneck resnet50-ib photos/ cat.jpg --out maps\n"
        "  ib-explain benchmark resnet50 --pretrained --bottleneck resnet50-ib --data imagenet --split val\n",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_demo, _add_layers, _add_fit, _add_attribute, _add_benchmark):
        add(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole path on pictures with known evidence; offline, a minute or two",
        description="Fit a bottleneck on a small shipped classifier of synthetic pictures, draw maps, and measure "
        "whether they find the evidence, beside Grad-CAM and a centred Gaussian. Needs no data and no network.",
        epilog="example:\n  ib-explain demo --out ib-demo\n",
    )
    _out(demo, "folder of the results", "ib-demo")
    demo.add_argument("--overwrite", action="store_true", help="write into a folder that holds other files")
    _compute(demo, batch_size=None)


def _add_layers(commands: Commands) -> None:
    layers = commands.add_parser(
        "layers",
        help="where a bottleneck can sit in a model, and how well each layer cuts",
        description="Probe the layers of a model: how the output is laid out, its grid, channels, depth (share of the "
        "model that has run), leak (share of the response that flows around the grid; 0 % is a perfect cut) and "
        "effect (share that the grid alone carries).",
        epilog="examples:\n  ib-explain layers vit_small_patch16_224 --pretrained\n"
        "  ib-explain layers resnet18 --input-size 128 --out sites.csv\n",
    )
    _host(layers, layer="dotted name of one layer (default: all)")
    _device(layers)
    layers.add_argument("--out", type=Path, metavar="FILE", help="also write the table as CSV")
    layers.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")


def _add_fit(commands: Commands) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a bottleneck to a model, once, on training images",
        description="Train the bottleneck's attention on images, the model stays as it is; save it as a folder. Runs "
        "under `torchrun` or `accelerate launch -m ib_explain.cli fit ...` as well.",
        epilog="examples:\n"
        "  ib-explain fit resnet50 --pretrained --data imagenet --split train --out resnet50-ib\n"
        "  ib-explain fit resnet18 --checkpoint flowers.safetensors --num-classes 102 --data flowers.tar\n",
    )
    _host(fit, layer=f"{LAYER} (default: `ib_explain.default_layer`'s)")
    _data(fit)
    _compute(fit, batch_size=64)
    fit.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="batches (default: 6,400 images, 8,960 with --reads features)",
    )
    fit.add_argument(
        "--beta",
        type=float,
        metavar="B",
        help="weight of the bits: less keeps more of the model's answers (default: twice what is at stake in an image)",
    )
    _choice(fit, "--gate", ("gaussian", "noise", "residual"))
    _choice(fit, "--reads", ("gradient", "features"))
    fit.add_argument(
        "--anchors", type=_natural, default=0, metavar="N", help="learnable levels of attention (default: 0, none)"
    )
    fit.add_argument(
        "--relevance", action="store_true", help="also learn label bits, for `attribute --output relevance`"
    )
    _choice(fit, "--objective", ("prediction", "label"))
    _choice(fit, "--precision", ("fp32", "bf16", "fp16"), default="the launcher's, else fp32")
    _out(fit, "folder of the bottleneck", "MODEL-ib")
    again = fit.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted fit")
    again.add_argument("--overwrite", action="store_true", help="replace a bottleneck of that name")


def _add_attribute(commands: Commands) -> None:
    attribute = commands.add_parser(
        "attribute",
        help="maps of images: a picture and the raw numbers of each",
        description="Draw where the evidence for a class is. With --bottleneck about one forward and one backward pass "
        "an image; without it, the attention is optimised for each. The same command continues an interrupted run, and "
        "with other images adds their maps.",
        epilog="examples:\n"
        "  ib-explain attribute resnet50 --pretrained cat.jpg holiday/ --out maps\n"
        "  ib-explain attribute resnet50 --pretrained --bottleneck resnet50-ib --refine 10 cat.jpg --target 281\n"
        "  ib-explain attribute resnet50 --pretrained --data imagenet --split val --limit 1000\n",
    )
    _host(attribute, layer=f"{LAYER} (default: the method's own)")
    attribute.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files, or folders with all below")
    _data(attribute)
    attribute.add_argument("--limit", type=_positive, metavar="N", help="only the first N images")
    attribute.add_argument("--bottleneck", type=Path, metavar="FOLDER", help="a fitted bottleneck, from `fit`")
    attribute.add_argument("--target", type=_natural, metavar="CLASS", help="class index (default: the model's top-1)")
    attribute.add_argument("--method", default="ib", metavar="NAME", help="attribution method (default: ib)")
    attribute.add_argument(
        "--refine",
        type=_natural,
        default=0,
        metavar="K",
        help="per-image steps on top of a fitted bottleneck, ten make 16 to 39 passes in all (default: 0)",
    )
    attribute.add_argument(
        "--output",
        default="bits",
        metavar="WHAT",
        help="bits, attention or relevance; all but bits need --bottleneck (default: bits)",
    )
    _compute(attribute, batch_size=32)
    _out(attribute, "folder of the maps", "MODEL-maps")
    attribute.add_argument("--overwrite", action="store_true", help="replace the maps of another command")


def _add_benchmark(commands: Commands) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        help="compare methods by metrics: a leaderboard and one page that explains it",
        description="Score the maps of several methods on the same images and classes; means with intervals, paired "
        "differences, ranks, curves, pictures. The same command continues an interrupted run, with the same numbers. "
        "Runs under `torchrun` or `accelerate launch -m ib_explain.cli benchmark ...` as well.",
        epilog="examples:\n"
        "  ib-explain benchmark resnet50 --pretrained --data imagenet --split val --images 500 --out leaderboard\n"
        "  ib-explain benchmark resnet50 --pretrained --bottleneck resnet50-ib --data photos --boxes boxes.csv \\\n"
        "    --methods ib,grad_cam,score_cam --metrics insertion,deletion,energy_inside,time\n"
        "  ib-explain benchmark resnet50 --pretrained --gaze etocvd --metrics nss,cc\n",
    )
    _host(benchmark, layer=f"{LAYER}, for all methods (default: each method's own)")
    _data(benchmark)
    benchmark.add_argument("--boxes", type=Path, metavar="CSV", help="boxes of the data: file,xmin,ymin,xmax,ymax")
    benchmark.add_argument("--gaze", type=Path, metavar="FOLDER", help="instead of --data: images with human gaze")
    benchmark.add_argument(
        "--images",
        type=_positive,
        dest="count",
        metavar="N",
        help="N of the images, evenly over the data (default: all)",
    )
    benchmark.add_argument("--methods", default=METHODS, metavar="A,B", help=f"names, or all (default: {METHODS})")
    benchmark.add_argument(
        "--metrics", metavar="A,B", help="names, or all that the data allows (default: a few of each kind)"
    )
    benchmark.add_argument(
        "--bottleneck",
        type=Path,
        metavar="FOLDER",
        help="also compare this fitted one, as `ib_fitted`; `ib` is per image",
    )
    benchmark.add_argument(
        "--reference",
        default="grad_cam",
        metavar="NAME",
        help="method that the others are compared with (default: grad_cam)",
    )
    benchmark.add_argument(
        "--target",
        default="prediction",
        metavar="WHAT",
        help="class to explain: prediction or label (default: prediction)",
    )
    _compute(benchmark, batch_size=32)
    _out(benchmark, "folder of the results", "MODEL-benchmark")
    benchmark.add_argument(
        "--extend", action="store_true", help="add methods or metrics to the run in DIR; name all, the old ones too"
    )


def _host(parser: argparse.ArgumentParser, *, layer: str) -> None:
    parser.add_argument("model", metavar="MODEL", help="timm's name of the model, or hf-hub:OWNER/NAME")
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained", action="store_true", help="timm's weights")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="your weights, a state dict as timm saves it")
    group.add_argument("--num-classes", type=_positive, metavar="N", help="number of classes, if not the model's own")
    group.add_argument("--input-size", type=_size, metavar="N|HxW", help="size of the input, if not the model's own")
    group.add_argument(
        "--in-chans", type=_positive, metavar="N", help="image channels, if not the model's own (1: grey)"
    )
    group.add_argument("--layer", metavar="NAME", help=layer)


def _data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, metavar="ROOT", help="folder of class folders, of images, or a tar file")
    group.add_argument("--split", metavar="NAME", help='folder or tar file in ROOT, such as "train" or "val"')
    named = 'data by timm\'s name, such as "hfds/..."; without --split its training images for fit, else for validation'
    group.add_argument("--dataset", default="", metavar="NAME", help=named)
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        told = f"{what} that images are normalised by, one or one a channel, if not the model's own"
        group.add_argument(f"--{name}", type=_numbers, metavar="R,G,B", help=told)
    several = "processes that read images (default: 2, on one processor 1)"
    group.add_argument("--workers", type=_natural, default=min(2, _processors()), metavar="N", help=several)


def _processors() -> int:
    """Those that this process may use; torch warns of more readers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compute(parser: argparse.ArgumentParser, *, batch_size: int | None) -> None:
    _device(parser)
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="random seed (default: 0)")
    if batch_size is not None:
        parser.add_argument(
            "--batch-size",
            type=_positive,
            default=batch_size,
            metavar="N",
            help=f"images at a time (default: {batch_size})",
        )


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def _choice(
    parser: argparse.ArgumentParser, option: str, choices: tuple[str, ...], *, default: str | None = None
) -> None:
    """An option of a few words; without `default`, which tells what its absence means, the first one is it."""
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}"

    def word(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be {listed}, got {text!r}")
        return text

    chosen = choices[0] if default is None else None
    parser.add_argument(
        option, type=word, default=chosen, metavar="WHAT", help=f"{listed} (default: {default or chosen})"
    )


def _out(parser: argparse.ArgumentParser, what: str, default: str) -> None:
    fixed = None if default.startswith("MODEL") else Path(default)
    parser.add_argument("--out", type=Path, default=fixed, metavar="DIR", help=f"{what} (default: {default})")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be a side such as 224 or HxW such as 192x256, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or one a channel such as .5,.5,.5, got {text!r}") from None


class _Parser(argparse.ArgumentParser):
    """Errors in one line; help texts keep their examples' line breaks; no guessing at abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        if self.description:
            import textwrap

            self.description = textwrap.fill(self.description, 100)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_say(f"{message}; see `{self.prog} --help`", MISTAKE))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_args: Any) -> NoReturn:
        from ib_explain import __version__

        print(f"ib-explain {__version__}")
        raise SystemExit(DONE)


def _say(line: str, code: int) -> int:
    print(f"ib-explain: {line}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print(f"ib-explain: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _mistake(error: Exception) -> str | None:
    """The line for the user, or None for an error that is none of theirs.

    This package checks what it is given and raises these types with one line; the same types from deeper inside (torch,
    timm) are failures, whose traceback is needed. Errors about files are about the files that the user named.
    """
    if isinstance(error, FILE_ERRORS):
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    text = str(error).strip()
    if type(error).__name__ == "LayerError":  # by name: torch is imported by the commands alone
        return " ".join(text.split())
    if "DataLoader worker process" in text:  # torch puts the traceback of the worker into the message
        text, raised_in = text.splitlines()[-1].partition(": ")[2], text
    else:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = str(Path(__file__).parent)
    if not isinstance(error, ValueError | TypeError | IndexError) or ours not in raised_in:
        return None
    return " ".join(text.split())


if __name__ == "__main__":
    raise SystemExit(main())
