"""Jobs that do next to nothing, for workers to import; run as a script, the toy track's quick score."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def note(task, word):
    with Path(task.arguments["calls"]).open("a") as file:
        print(word, file=file)


def write(task):
    note(task, task.arguments["text"])
    (task.folder / "text").write_text(task.arguments["text"])
    task.progress(1, 1, 0.0)
    return {}


def append(task):
    note(task, task.arguments["text"])
    return {"text": (task.inputs["before"].folder / "text").read_text() + task.arguments["text"]}


def fail(task):
    print("printed before")
    (task.scratch / "left").write_text("behind")
    raise RuntimeError("no luck")


def vanish(task):
    os._exit(1)


def wait(task):
    note(task, "waiting")
    time.sleep(600)


if __name__ == "__main__":
    import numpy as np
    from safetensors.numpy import load_file

    # What ToyTrack.scores computes, without torch.
    aims = np.load(os.environ["STUDY_TOY"])
    tensors = load_file(Path(sys.argv[-1]) / "model.safetensors")
    far = sum(((tensor - aims[f"aim {name}"]) ** 2).sum() for name, tensor in tensors.items()) ** 0.5
    gone = sum(((tensor - aims[f"start {name}"]) ** 2).sum() for name, tensor in tensors.items()) ** 0.5
    print(far + 0.01 * gone)
