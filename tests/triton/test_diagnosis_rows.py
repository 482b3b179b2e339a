"""The rows of a diagnosis over Triton's kernels, in the interpreter, against float64."""

from tests.diagnose import test_rows as shared
from tests.triton import interpreted  # noqa: F401  (puts "interpreted" into the tables)


def test_every_statistic_equals_float64() -> None:
    shared.test_every_statistic_equals_float64("interpreted", None, 1.0)


def test_a_model_favors_nothing_over_itself() -> None:
    shared.test_a_model_favors_nothing_over_itself("interpreted")
