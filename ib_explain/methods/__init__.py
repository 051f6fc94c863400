"""Attribution methods, a small file for each or for a family; importing this package fills the registry."""

from ib_explain.methods import (
    am,
    attention_rollout,
    br_npa,
    captum_methods,
    controls,
    eigen_cam,
    grad_cam,
    grad_cam_pp,
    hires_cam,
    ib,
    iba,
    layer_cam,
    rise,
    score_cam,
)
from ib_explain.methods.base import METHODS, Call, Method, NotApplicable, register_method
from ib_explain.methods.br_npa import br_npa_ranked_maps

__all__ = [
    "METHODS",
    "Call",
    "Method",
    "NotApplicable",
    "am",
    "attention_rollout",
    "br_npa",
    "br_npa_ranked_maps",
    "captum_methods",
    "controls",
    "eigen_cam",
    "grad_cam",
    "grad_cam_pp",
    "hires_cam",
    "ib",
    "iba",
    "layer_cam",
    "register_method",
    "rise",
    "score_cam",
]
