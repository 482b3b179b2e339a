"""Where alignment stops: what the aligned model changed, position by position."""

from deepalign.diagnose.gradient_magnitude import GradientMagnitude, gradient_magnitude
from deepalign.diagnose.influence import Influence, alignment_deviation, influence
from deepalign.diagnose.position_profile import PositionProfile, kl_by_position, profiles_by_position

__all__ = [
    "GradientMagnitude",
    "Influence",
    "PositionProfile",
    "alignment_deviation",
    "gradient_magnitude",
    "influence",
    "kl_by_position",
    "profiles_by_position",
]
