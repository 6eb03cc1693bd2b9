"""All public names, and with them torch, transformers and this package's place in it; ``import qdq_surgery`` is this.

Only the command line begins without: it answers ``--help`` at once.
"""

# Before what else imports pytorch-quantization.
import qdq_surgery.safety.upstream

# isort: split
# What transformers loads frozen models by.
import qdq_surgery.load_frozen  # noqa: F401

# isort: split
from qdq_surgery.calibration.collect import Statistics, collect
from qdq_surgery.calibration.equalization import Equalization, equalize
from qdq_surgery.calibration.ranges import Calibration, calibrate
from qdq_surgery.calibration.rounding import Rounding, round_weights
from qdq_surgery.calibration.training import fix_ranges, learn_ranges, recalibrate_weights
from qdq_surgery.checkpoint.config import QDQConfig
from qdq_surgery.convert import convert, plan
from qdq_surgery.errors import (
    AlreadyConvertedError,
    AttentionBypassError,
    CalibrationError,
    ExportError,
    LossError,
    MatchError,
    ModelError,
    OptionError,
    ParityError,
    QdqSurgeryError,
    ReceiptError,
    RuleFileError,
    TraceError,
)
from qdq_surgery.freeze.freeze import freeze
from qdq_surgery.freeze.receipt import frozen_receipt
from qdq_surgery.html_report.report import Report, report
from qdq_surgery.match.plan import Plan, Refusal, Site
from qdq_surgery.onnx_export import Export, export_onnx
from qdq_surgery.onnx_graph.findings import Finding, Findings
from qdq_surgery.prove.lint import lint
from qdq_surgery.prove.parity import Parity, certify
from qdq_surgery.prove.receipt import Receipt, receipt
from qdq_surgery.qdqbert.classes import (
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
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.report.diff import Diff, diff
from qdq_surgery.report.explain import Explanation, explain
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules
from qdq_surgery.sensitivity.evaluate import Evaluation, evaluate
from qdq_surgery.sensitivity.measure import sensitivity
from qdq_surgery.sensitivity.result import Sensitivity
from qdq_surgery.serve.model import OnnxModel, load_onnx
from qdq_surgery.serve.rows import run_rows
from qdq_surgery.surgery.model_state import quantization_disabled, quantizers
from qdq_surgery.tuning.result import Tuning
from qdq_surgery.tuning.search import tune
from qdq_surgery.version import __version__

__all__ = [
    "AlreadyConvertedError",
    "AttentionBypassError",
    "Calibration",
    "CalibrationError",
    "Diff",
    "Equalization",
    "Evaluation",
    "Explanation",
    "Export",
    "ExportError",
    "Finding",
    "Findings",
    "LossError",
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
    "Report",
    "Rounding",
    "RuleFileError",
    "RuleSet",
    "Sensitivity",
    "Site",
    "Statistics",
    "TensorQuantizer",
    "TraceError",
    "Tuning",
    "__version__",
    "calibrate",
    "certify",
    "collect",
    "convert",
    "diff",
    "equalize",
    "evaluate",
    "explain",
    "export_onnx",
    "fix_ranges",
    "freeze",
    "frozen_receipt",
    "learn_ranges",
    "lint",
    "load_onnx",
    "load_rules",
    "plan",
    "quantization_disabled",
    "quantizers",
    "recalibrate_weights",
    "receipt",
    "report",
    "round_weights",
    "run_rows",
    "sensitivity",
    "shipped_rules",
    "tune",
]
