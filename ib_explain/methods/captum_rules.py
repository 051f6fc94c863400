"""Which hosts Captum's rule-based methods are right for. Where they are not, it would run and be silently wrong."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ib_explain.methods.base import NotApplicable
from ib_explain.methods.captum_host import Structure

__all__ = ["PROPAGATED", "check_deep_lift", "check_guided", "check_lrp"]

# What DeepLIFT's linear rule covers: the gradient is the multiplier. Products count as long as one factor is constant.
LINEAR = {"Convolution", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "Addmm", "Mm", "Mv", "Add", "Sub"}
LINEAR |= {"Neg", "Mean", "Sum", "AvgPool2D", "AdaptiveAvgPool2D", "Cat", "Stack", "Split", "SplitWithSizes", "Unbind"}
LINEAR |= {"ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D", "UpsampleBilinear2D", "UpsampleNearest2D", "Repeat"}
LINEAR |= {"PixelShuffle", "PixelUnshuffle", "Roll", "Flip", "Index", "CopySlices", "Copy", "Bmm", "Mul", "Div"}
BRANCHING = {"Add", "Sub", "Cat", "Stack", "CopySlices", "Copy"}

# Nonlinear nodes with the module types that Captum rescales (by exact type).
RESCALED = {
    "Relu": nn.ReLU,
    "Elu": nn.ELU,
    "LeakyRelu": nn.LeakyReLU,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "Softplus": nn.Softplus,
    "MaxPool2DWithIndices": nn.MaxPool2d,
    "Softmax": nn.Softmax,
}

PROPAGATED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Tanh)


def check_deep_lift(host: nn.Module, structure: Structure) -> None:
    """Refuse a host with an operation that neither the linear nor the rescale rule covers.

    Raises:
        NotApplicable: naming the operation.
    """
    name = type(host).__name__
    for node, count in structure.nodes.items():
        if node in RESCALED:
            runs = _runs(structure, RESCALED[node])
            if runs != count:
                raise NotApplicable(
                    f"DeepLIFT needs every {node} of this {name} to be an nn.{RESCALED[node].__name__}, {runs} of "
                    f"{count} are"
                )
        elif node not in LINEAR:
            raise NotApplicable(f"DeepLIFT has no rule for the operation {node} of this {name}")
        elif structure.joins[node] and node not in BRANCHING:
            raise NotApplicable(f"DeepLIFT has no rule for the {node} of two features in this {name}")


def check_guided(host: nn.Module, structure: Structure) -> None:
    """Refuse a host without ReLU modules, or with ReLUs that are not modules.

    Raises:
        NotApplicable: saying how many there are.
    """
    count, runs = structure.nodes["Relu"], _runs(structure, nn.ReLU)
    if count == 0 or runs != count:
        raise NotApplicable(
            f"guided backpropagation needs every ReLU of the host to be an nn.ReLU, {runs} of {count} in this "
            f"{type(host).__name__} are"
        )


def check_lrp(host: nn.Module, structure: Structure) -> None:
    """Refuse a host that is no chain of modules for which Captum has a rule.

    Raises:
        NotApplicable: naming the module or operation.
    """
    name = type(host).__name__
    silent = (nn.Dropout, nn.Identity, nn.Flatten)  # nothing happens in them
    for module in structure.calls:
        if type(module) not in (*PROPAGATED, *silent):
            raise NotApplicable(f"Captum's LRP has no rule for the {type(module).__name__} of this {name}")
    if structure.joins:
        node = next(iter(structure.joins))
        raise NotApplicable(f"Captum's LRP needs a chain of modules, an {node} joins two branches of this {name}")
    runs = sum(count for module, count in structure.calls.items() if isinstance(module, PROPAGATED))
    outside = structure.nodes.total() - runs
    if outside < 0:
        raise NotApplicable(f"Captum's LRP needs a chain of modules, {-outside} modules of this {name} lead nowhere")
    if outside:
        raise NotApplicable(
            f"Captum's LRP needs modules, {outside} of this {name}'s operations are none; it runs {_most(structure)}"
        )


def _runs(structure: Structure, kind: type[nn.Module]) -> int:
    return sum(count for module, count in structure.calls.items() if type(module) is kind)


def _most(structure: Structure) -> str:
    nodes: Counter[str] = structure.nodes
    return ", ".join(name for name, _ in nodes.most_common(6))
