"""The delta rule: `delta_rule` for sequences, `delta_rule_step` for decoding."""

from effattn.pallas_kernels.delta_rule.api import delta_rule, explain
from effattn.pallas_kernels.delta_rule.step import delta_rule_step

__all__ = ["delta_rule", "delta_rule_step", "explain"]
