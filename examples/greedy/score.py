"""Score one checkpoint on everyday.yaml with EleutherAI's harness; prints the accuracy last.

    pip install lm-eval
    mergekit-monosoup greedy ./a ./b ./c --out ./soup \\
        --eval "python examples/greedy/score.py {model} examples/greedy/everyday.jsonl"

The data file is an argument so that the journal knows its content: other questions, other scores.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(model: str, data: str) -> None:
    """Evaluate the folder `model` on the questions in the file `data`."""
    # Before the imports: both libraries read these once.
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lm_eval
    import yaml
    from lm_eval.tasks import TaskManager

    task = yaml.safe_load((HERE / "everyday.yaml").read_text("utf-8"))
    # The harness would look for the file in the current folder.
    task["dataset_kwargs"]["data_files"]["test"] = str(Path(data).resolve())
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(Path(model).resolve()), "dtype": "auto"},
        tasks=[task],
        task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
        device=os.environ.get("DEVICE", "cpu"),
        batch_size=8,
        bootstrap_iters=0,
    )
    print(results["results"][task["task"]]["acc,none"])


if __name__ == "__main__":
    main(*sys.argv[1:])
