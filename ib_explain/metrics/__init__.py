"""Measures of a map: plain functions on tensors, and a registry for the benchmark."""

from ib_explain.metrics.base import METRICS, Case, Curve, Metric, register_function, register_metric
from ib_explain.metrics.consistency import Consistency, input_modification_consistency
from ib_explain.metrics.correlation import dc, ic, sensitivity_n
from ib_explain.metrics.cost import Cost, count_passes, measure_cost
from ib_explain.metrics.ground_truth import boxes_to_masks, centred_gaussian, fixations_to_density, other_fixations
from ib_explain.metrics.human import CONVENTIONS, auc, auc_judd, auc_shuffled, cc, information_gain, kld, nss, sim
from ib_explain.metrics.imputation import noisy_linear_imputation
from ib_explain.metrics.localisation import (
    best_iou,
    effective_heat_ratio,
    energy_inside,
    pointing_game,
    relative_to_centre,
    top_share,
)
from ib_explain.metrics.masking import (
    add,
    average_drop,
    increase_in_confidence,
    sparsity,
    sparsity_max_over_mean,
    sparsity_mean_over_max,
)
from ib_explain.metrics.perturbation import (
    degradation,
    degradation_area,
    deletion,
    insertion,
    insertion_deletion,
)
from ib_explain.metrics.probe import Probe
from ib_explain.metrics.road import road, road_combined
from ib_explain.metrics.robustness import infidelity, max_sensitivity
from ib_explain.metrics.sanity import (
    Randomisation,
    TargetSensitivity,
    cascading_randomisation,
    label_randomisation,
    seed_correlation,
    target_sensitivity,
)
from ib_explain.metrics.similarity import rank_correlation, ssim

__all__ = ["METRICS", "Case", "Curve", "Metric", "Probe", "register_function", "register_metric"]
__all__ += ["dc", "degradation", "degradation_area", "deletion", "ic", "insertion", "insertion_deletion"]
__all__ += ["noisy_linear_imputation", "road", "road_combined", "sensitivity_n"]
__all__ += ["add", "average_drop", "increase_in_confidence"]
__all__ += ["sparsity", "sparsity_max_over_mean", "sparsity_mean_over_max"]
__all__ += ["infidelity", "max_sensitivity"]
__all__ += ["best_iou", "effective_heat_ratio", "energy_inside", "pointing_game", "relative_to_centre", "top_share"]
__all__ += ["CONVENTIONS", "auc", "auc_judd", "auc_shuffled", "cc", "information_gain", "kld", "nss", "sim"]
__all__ += ["boxes_to_masks", "centred_gaussian", "fixations_to_density", "other_fixations"]
__all__ += ["Randomisation", "TargetSensitivity", "cascading_randomisation", "label_randomisation"]
__all__ += ["rank_correlation", "seed_correlation", "ssim", "target_sensitivity"]
__all__ += ["Consistency", "input_modification_consistency"]
__all__ += ["Cost", "count_passes", "measure_cost"]
