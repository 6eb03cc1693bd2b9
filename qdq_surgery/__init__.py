"""qdq_surgery: NVIDIA's QDQBERT recipe on any loaded Hugging Face encoder.

import qdq_surgery as qs

qmodel = qs.convert(model)
print(qs.diff(model, qmodel))
"""

# The first of all: the other imports take seconds, in which Ctrl-C may come.
import qdq_surgery.starting

# isort: split
# Before what else imports pytorch-quantization.
import qdq_surgery.upstream  # noqa: F401

# isort: split
from qdq_surgery.calibrate import Calibration, calibrate
from qdq_surgery.collect import Statistics, collect
from qdq_surgery.convert import convert, plan
from qdq_surgery.converted import quantization_disabled, quantizers
from qdq_surgery.deploy.export import Export, export_onnx
from qdq_surgery.deploy.findings import Finding, Findings
from qdq_surgery.deploy.lint import lint
from qdq_surgery.deploy.parity import Parity, certify
from qdq_surgery.deploy.receipt import Receipt, receipt
from qdq_surgery.deploy.runner import OnnxModel, load_onnx
from qdq_surgery.diff import Diff, diff
from qdq_surgery.errors import (
    AlreadyConvertedError,
    AttentionBypassError,
    CalibrationError,
    ExportError,
    MatchError,
    ModelError,
    OptionError,
    ParityError,
    QdqSurgeryError,
    ReceiptError,
    RuleFileError,
    TraceError,
)
from qdq_surgery.explain import Explanation, explain
from qdq_surgery.plan import Plan, Refusal, Site
from qdq_surgery.pretrained.config import QDQConfig
from qdq_surgery.pretrained.qdqbert import (
    QDQBertConfig,
    QDQBertForMaskedLM,
    QDQBertForMultipleChoice,
    QDQBertForNextSentencePrediction,
    QDQBertForQuestionAnswering,
    QDQBertForSequenceClassification,
    QDQBertForTokenClassification,
    QDQBertLMHeadModel,
    QDQBertModel,
)
from qdq_surgery.quantizer import TensorQuantizer
from qdq_surgery.rule_file import load_rules, shipped_rules
from qdq_surgery.spec import RuleSet
from qdq_surgery.training import fix_ranges, learn_ranges, recalibrate_weights
from qdq_surgery.version import __version__

__all__ = [
    "AlreadyConvertedError",
    "AttentionBypassError",
    "Calibration",
    "CalibrationError",
    "Diff",
    "Explanation",
    "Export",
    "ExportError",
    "Finding",
    "Findings",
    "MatchError",
    "ModelError",
    "OnnxModel",
    "OptionError",
    "Parity",
    "ParityError",
    "Plan",
    "QDQBertConfig",
    "QDQBertForMaskedLM",
    "QDQBertForMultipleChoice",
    "QDQBertForNextSentencePrediction",
    "QDQBertForQuestionAnswering",
    "QDQBertForSequenceClassification",
    "QDQBertForTokenClassification",
    "QDQBertLMHeadModel",
    "QDQBertModel",
    "QDQConfig",
    "QdqSurgeryError",
    "Receipt",
    "ReceiptError",
    "Refusal",
    "RuleFileError",
    "RuleSet",
    "Site",
    "Statistics",
    "TensorQuantizer",
    "TraceError",
    "__version__",
    "calibrate",
    "certify",
    "collect",
    "convert",
    "diff",
    "explain",
    "export_onnx",
    "fix_ranges",
    "learn_ranges",
    "lint",
    "load_onnx",
    "load_rules",
    "plan",
    "quantization_disabled",
    "quantizers",
    "recalibrate_weights",
    "receipt",
    "shipped_rules",
]
