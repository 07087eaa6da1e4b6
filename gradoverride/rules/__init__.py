"""Ready-made rules: each a function, or a small object that is called as one, under the name of its formula."""

from gradoverride.rules.attribution import (
    deconv_relu,
    guided_relu,
    lrp_alpha_beta,
    lrp_epsilon,
    lrp_flat,
    lrp_gamma,
    lrp_identity,
    lrp_w_square,
    lrp_z_box,
    lrp_z_plus,
    smooth_relu,
)

__all__ = [
    "guided_relu",
    "deconv_relu",
    "smooth_relu",
    "lrp_epsilon",
    "lrp_z_plus",
    "lrp_gamma",
    "lrp_alpha_beta",
    "lrp_z_box",
    "lrp_flat",
    "lrp_w_square",
    "lrp_identity",
]
