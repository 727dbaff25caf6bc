"""How far a compressed run is from the full one."""

from .fidelity import first_differing_step, psnr, teacher_forced_nll, token_agreement, token_agreement_by_scale
from .frechet import frechet_distance
from .next_token import next_token_nll
from .similarity import ssim


__all__ = [
    "first_differing_step",
    "frechet_distance",
    "next_token_nll",
    "psnr",
    "ssim",
    "teacher_forced_nll",
    "token_agreement",
    "token_agreement_by_scale",
]
