"""What a model needs, before it is downloaded: bytes, operations and seconds, from its config. Never imports torch."""

from sparing.planning.hardware import HARDWARE, Hardware
from sparing.planning.report import Plan, plan

__all__ = ["HARDWARE", "Hardware", "Plan", "plan"]
