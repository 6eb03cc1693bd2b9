"""qdq_surgery: NVIDIA's QDQBERT recipe on any loaded Hugging Face encoder.

import qdq_surgery as qs

qmodel = qs.convert(model)
print(qs.diff(model, qmodel))
"""

from qdq_surgery.convert import convert, plan, quantization_disabled, quantizers
from qdq_surgery.diff import Diff, diff
from qdq_surgery.errors import (
    AlreadyConvertedError,
    AttentionBypassError,
    CalibrationError,
    MatchError,
    ModelError,
    QdqSurgeryError,
    RuleFileError,
    TraceError,
)
from qdq_surgery.explain import Explanation, explain
from qdq_surgery.plan import Plan, Refusal, Site
from qdq_surgery.quantizer import TensorQuantizer
from qdq_surgery.rule_file import load_rules, shipped_rules
from qdq_surgery.spec import RuleSet
from qdq_surgery.version import __version__

__all__ = [
    "AlreadyConvertedError",
    "AttentionBypassError",
    "CalibrationError",
    "Diff",
    "Explanation",
    "MatchError",
    "ModelError",
    "Plan",
    "QdqSurgeryError",
    "Refusal",
    "RuleFileError",
    "RuleSet",
    "Site",
    "TensorQuantizer",
    "TraceError",
    "__version__",
    "convert",
    "diff",
    "explain",
    "load_rules",
    "plan",
    "quantization_disabled",
    "quantizers",
    "shipped_rules",
]
