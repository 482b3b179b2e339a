"""Where alignment stops: what the aligned model changed, position by position."""

from deepalign.diagnose.position_profile import PositionProfile, kl_by_position, profiles_by_position
from deepalign.diagnose.positions import PositionOptions, analyse_positions

__all__ = ["PositionOptions", "PositionProfile", "analyse_positions", "kl_by_position", "profiles_by_position"]
