"""Where alignment stops: what the aligned model changed, position by position."""

from deepalign.diagnose.position_profile import PositionProfile, kl_by_position, profiles_by_position

__all__ = ["PositionProfile", "kl_by_position", "profiles_by_position"]
