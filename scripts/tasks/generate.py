"""Write the tasks that the run scripts are tried on: seeded, of our own words, in the formats that users have.

    python scripts/tasks/generate.py qa OUTDIR --seed 0 --train 3000 --held-out 400

Writes OUTDIR/qa_train.json and OUTDIR/qa_held_out.json; pairs and sentences as .tsv, ner as .txt, ``all`` everything.
The same seed and counts give the same bytes.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

# Run as a file: Python looks for modules in this folder and not in the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks import make_ner, make_pairs, make_qa, make_sentences

__all__ = ["TASKS", "generate", "main"]

TASKS = {"qa": make_qa, "pairs": make_pairs, "sentences": make_sentences, "ner": make_ner}

#: Examples to train on and held out, where the command line does not say.
_COUNTS = {"qa": (3000, 400), "pairs": (2000, 400), "sentences": (2000, 400), "ner": (2000, 400)}


def generate(
    task: str, folder: Path, *, seed: int = 0, train: int | None = None, held_out: int | None = None
) -> tuple[Path, Path]:
    """Write one task.

    Args:
        task: One of ``TASKS``.
        folder: Where the files go; made if it is missing.
        seed: Of the random numbers; each task and part has its own sequence.
        train, held_out: Number of questions or sentences; the task's own if left out.

    Returns:
        The file to train on and the one held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    maker, counts = TASKS[task], _COUNTS[task]
    files = (folder / f"{task}_train.{maker.FILE_ENDING}", folder / f"{task}_held_out.{maker.FILE_ENDING}")
    for file, wanted, count, is_held_out in zip(files, (train, held_out), counts, (False, True), strict=True):
        rng = random.Random(f"{seed} {task} {'held out' if is_held_out else 'train'}")
        maker.write(file, rng, count if wanted is None else wanted, is_held_out)
    return files


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=[*TASKS, "all"])
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, help="examples to train on")
    parser.add_argument("--held-out", type=int, help="examples held out")
    given = parser.parse_args(arguments)
    for count in (given.train, given.held_out):
        if count is not None and count < 1:
            parser.error(f"a part has at least one example, not {count}")
    for task in TASKS if given.task == "all" else [given.task]:
        for file in generate(task, given.folder, seed=given.seed, train=given.train, held_out=given.held_out):
            print(file)


if __name__ == "__main__":
    main()
