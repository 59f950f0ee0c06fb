"""Models on the Hub that are not here yet: what fails in the merge, the plan says before the download."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from beside import write_embedder, write_files
from checkpoints import build_model, build_tokenizer, fine_tune, write_adapter, write_checkpoint
from commands import recipe, run, write_config
from hub_server import running_hub

# One process for all recipes: it costs seconds to start. Each merge has a cache of its own, as if it were the
# first.
PROGRAM = """
import json, sys
from pathlib import Path
import huggingface_hub.constants as known
from click.testing import CliRunner
from mergekit_monosoup.cli import main
from mergekit.io.tasks import LoaderCache

found = []
for command, file in json.loads(sys.argv[1]):
    known.HF_HUB_CACHE = file + ".cache." + command
    LoaderCache().loaders.clear()
    out = [] if command == "plan" else [file + ".out", "--quiet"]
    done = CliRunner().invoke(main, [command, file, *out])
    held = Path(known.HF_HUB_CACHE).rglob("*.safetensors")
    # Modules are small, and the plan reads their headers.
    weights = [p.name for p in held if p.parent.name != "2_Dense"]
    found.append([done.exit_code, done.output, weights])
print(json.dumps(found))
"""


def _stranger(folder: Path) -> Path:
    """A tokenizer that has next to nothing in common with that of the tests."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"strange{i}": i for i in range(96)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="strange0")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Mapping[str, Path]:
    """Folders by their names on the Hub."""
    folder = tmp_path_factory.mktemp("published")
    model = build_model("qwen3-tied")
    base = write_checkpoint(folder / "base", model, torch.bfloat16)
    tuned = write_checkpoint(folder / "tuned", fine_tune(model, seed=1), torch.bfloat16)
    other = write_checkpoint(folder / "other", build_model("qwen3-tied", seed=99), torch.bfloat16)
    bare = shutil.copytree(tuned, folder / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    strange = _stranger(shutil.copytree(tuned, folder / "strange"))
    swapped = shutil.copytree(tuned, folder / "tuned7")
    write_files(swapped, {"README.md": "---\nbase_model: org/base\n---\n# A model\n"})
    words = build_tokenizer(extra=("<one>", "<two>"))
    grown = fine_tune(model, seed=3)
    grown.resize_token_embeddings(len(words))
    added = write_checkpoint(folder / "added", grown, torch.bfloat16, tokenizer=words)
    adapter = write_adapter(folder / "adapter", base)
    wrong = write_adapter(folder / "wrong", base)
    settings = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps(settings | {"r": settings["r"] * 2}))
    embedders = dict(zip(("st-base", "st-tuned"), write_embedder(folder / "embedders"), strict=True))
    broken = shutil.copytree(embedders["st-tuned"], folder / "st-broken")
    module = broken / "2_Dense" / "model.safetensors"
    module.write_bytes(module.read_bytes()[:100])
    names = {
        "base": base,
        "tuned": tuned,
        "other": other,
        "bare": bare,
        "strange": strange,
        "tuned7": swapped,
    }
    names |= {"added": added, "adapter": adapter, "wrong": wrong}
    return names | embedders | {"st-broken": broken}


# What is asked for -> exit status and a part of what is said
CASES = {
    "sound": (recipe("org/base", "org/tuned"), 0, ""),
    "unrelated": (recipe("org/other", "org/tuned"), 1, "may not be the base"),
    "swapped": (recipe("org/tuned7", "org/base"), 1, "swapped"),
    "tokens added": (recipe("org/base", "org/added"), 0, ""),
    "another vocabulary": (recipe("org/base", "org/strange"), 1, "tokens in common"),
    "its tokenizer": (recipe("org/base", "org/tuned", tokenizer={"source": "org/tuned"}), 0, ""),
    "no tokenizer": (
        recipe("org/base", "org/bare", tokenizer={"source": "org/bare"}),
        1,
        "asks for the tokenizer of org/bare, which has none",
    ),
    "adapter": (recipe("org/base", "org/base+org/adapter"), 0, ""),
    "adapter of another rank": (recipe("org/base", "org/base+org/wrong"), 1, "rank"),
    "modules": (recipe("org/st-base", "org/st-tuned"), 0, ""),
    "a damaged module": (recipe("org/st-base", "org/st-broken"), 1, "2_Dense/model.safetensors"),
}


@pytest.mark.slow
def test_plan_and_merge_of_models_on_the_hub_end_alike(tmp_path, published):
    with running_hub() as hub:
        for name, folder in published.items():
            hub.publish(f"org/{name}", folder)
        files = {name: str(write_config(tmp_path / name, case[0])) for name, case in CASES.items()}
        wanted = [[command, file] for file in files.values() for command in ("plan", "merge")]
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run([sys.executable, "-c", PROGRAM, json.dumps(wanted)], tmp_path, environment)
    found = json.loads(done.stdout.splitlines()[-1])
    for (name, (_, status, said)), plan, merge in zip(CASES.items(), found[::2], found[1::2], strict=True):
        assert plan[0] == status, (name, plan[1])
        assert merge[0] == status, (name, merge[1])
        assert said in plan[1], (name, plan[1])
        assert said in merge[1], (name, merge[1])
        assert not [file for file in plan[2] if file != "adapter_model.safetensors"], name
        assert ("2_Dense/linear.weight" in plan[1]) is (name == "modules")
        # What the plan refuses is not downloaded by the merge either.
        assert status == 0 or not [file for file in merge[2] if file.startswith("model")], name
