"""Looking into a checkpoint: what it is, and whether it computes what transformers computes."""

from sparing.inspection.comparison import Comparison, against_transformers
from sparing.inspection.report import Inspection, inspect

__all__ = ["Comparison", "Inspection", "against_transformers", "inspect"]
