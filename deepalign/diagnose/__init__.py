"""Where alignment stops: what the aligned model changed, position by position."""

from deepalign.diagnose.bootstrap import BootstrapOptions
from deepalign.diagnose.gradient_magnitude import GradientMagnitude, gradient_magnitude
from deepalign.diagnose.influence import Influence, alignment_deviation, influence
from deepalign.diagnose.position_profile import PositionProfile, kl_by_position, profiles_by_position
from deepalign.diagnose.positions import PositionOptions, analyse_positions, measure_responses
from deepalign.diagnose.rows import RowOptions, RowStatistics
from deepalign.diagnose.run import DiagnosisOptions, diagnose, load_pair_tokenizer

__all__ = [
    "BootstrapOptions",
    "DiagnosisOptions",
    "GradientMagnitude",
    "Influence",
    "PositionOptions",
    "PositionProfile",
    "RowOptions",
    "RowStatistics",
    "alignment_deviation",
    "analyse_positions",
    "diagnose",
    "gradient_magnitude",
    "influence",
    "kl_by_position",
    "load_pair_tokenizer",
    "measure_responses",
    "profiles_by_position",
]
