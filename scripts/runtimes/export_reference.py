"""Export the real QDQBERT (transformers 4.40.2, pytorch-quantization 2.1.3) as its users did. Run by that Python.

    python export_reference.py FOLDER FILE

FOLDER has the config, the float weights and the calibration batches; FILE becomes the ONNX.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from absl import logging
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from safetensors.torch import load_file
from transformers import QDQBertConfig, QDQBertForQuestionAnswering


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=8, calib_method="max"))
    quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=8, axis=((0,))))
    config = QDQBertConfig.from_json_file(folder / "config.json")
    model = QDQBertForQuestionAnswering(config).eval()
    model.load_state_dict(load_file(folder / "weights"))
    batches = [load_file(file) for file in sorted(folder.glob("batch-*"))]

    quantizers = [each for each in model.modules() if isinstance(each, quant_nn.TensorQuantizer)]
    for each in quantizers:
        each.disable_quant()
        each.enable_calib()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for each in quantizers:
        each.load_calib_amax()
        each.enable_quant()
        each.disable_calib()

    quant_nn.TensorQuantizer.use_fb_fake_quant = True
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        torch.onnx.export(
            model,
            tuple(batches[0][name] for name in inputs),
            str(path),
            opset_version=13,  # the first with ranges for each channel
            dynamo=False,
            input_names=list(inputs),
            output_names=["start_logits", "end_logits"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*inputs, "start_logits", "end_logits")},
        )


if __name__ == "__main__":
    main()
