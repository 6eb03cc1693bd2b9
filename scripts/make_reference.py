"""Run the real QDQBERT (transformers 4.40.2, pytorch-quantization 2.1.3) and write what it computes into a folder.

    CASE.safetensors            for every case of reference_cases.py, tensors named by group:
        weights/    the float state dict            batch/      the call's arguments, labels included
        amax/       every range, by quantizer       memory/     encoder states of the decoder cases
        legacy/     outputs with the quantizers on  native/     the same with use_fb_fake_quant
        float/      outputs with them off           gradients/  of the loss, legacy, training off
        calibration/  the batches that gave amax    cached/     a decoder's second step from its cache
    head_mask/CASE.safetensors  the same for calls with a head_mask, which is in head_mask/, its gradient too
    checkpoints/                folders that save_pretrained wrote, each with a file of what the model in it computes
    names.json                  the state dict's names, by class
    run.json                    what ran: the packages, torch's build, kernels and threads

The config, the head and the calibration method are in a file's metadata. The tests run this on first use
(tests/reference_run.py); scripts/make_reference.sh does so by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from reference_cases import CASES, CHECKPOINTS, HEAD_MASKS, THREADS

#: Of the environment at large, and too new for transformers 4.40.2, which does without them.
HIDDEN = ("accelerate", "peft", "tokenizers")


def main(folder: Path) -> None:
    sys.modules.update(dict.fromkeys(HIDDEN))
    torch.set_num_threads(THREADS)
    import real_qdqbert as real

    for cases, place in ((CASES, folder), (HEAD_MASKS, folder / "head_mask")):
        place.mkdir(parents=True, exist_ok=True)
        for seed, case in enumerate(cases):
            real.write_case(case, seed, place)
    for seed, checkpoint in enumerate(CHECKPOINTS):
        real.write_checkpoint(checkpoint, seed, folder / "checkpoints")
    real.write_json(folder / "names.json", real.state_dict_names())
    real.write_json(folder / "run.json", real.what_ran())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
