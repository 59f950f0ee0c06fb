"""Plans of large and of remote models: quick, small, and without a weight being fetched."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from commands import ROOT, recipe, run, write_config
from hub_server import running_hub

EMBEDDING = "model.embed_tokens.weight"


def sparse_checkpoint(folder: Path, layers: int) -> Path:
    """A checkpoint of Qwen3-14B's shapes whose files have their size and no content."""
    hidden, inner, vocabulary, heads, narrow = 5120, 17408, 151936, 5120, 1024
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, hidden)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}self_attn.q_norm.weight": (128,),
            f"{prefix}self_attn.k_norm.weight": (128,),
            f"{prefix}self_attn.q_proj.weight": (heads, hidden),
            f"{prefix}self_attn.k_proj.weight": (narrow, hidden),
            f"{prefix}self_attn.v_proj.weight": (narrow, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, heads),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * prod(s) for s in shards[-1].values()) + 2 * prod(shape) > 4e9:
            shards.append({})
        shards[-1][name] = shape
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        end, header = 0, {}
        for name, shape in shard.items():
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            stream.truncate(8 + len(encoded) + end)
        weight_map |= dict.fromkeys(shard, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MEASURE = """
import json, resource, sys
sys.path.insert(0, "tests")
from own_memory import peak_bytes
from mergekit_monosoup.cli import main
try:
    main(sys.argv[1:], prog_name="mergekit-monosoup", standalone_mode=False)
finally:
    heavy = sorted({"torch", "transformers", "mergekit"} & set(sys.modules))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"heavy": heavy, "peak": peak_bytes(), "cpu": used.ru_utime + used.ru_stime}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sparse files, and memory in kilobytes")
def test_fourteen_billion_parameters(tmp_path):
    """The whole process: under 5 s of work and 1 GB, without torch, transformers or mergekit."""
    base, tuned = (sparse_checkpoint(tmp_path / name, 40) for name in ("base", "tuned"))
    file = write_config(tmp_path, recipe(base, tuned, dtype="bfloat16"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "plan", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert "443 tensors" in done.stdout or "282 tensors" in done.stdout
    assert measured["heavy"] == []
    assert measured["peak"] < 1e9
    # Processor time: the tests share their cores, and waiting for them is not the plan's doing.
    assert measured["cpu"] < 5


@pytest.mark.slow
def test_hub_models_are_planned_from_headers(tmp_path, family):
    """Of models on a Hub only configuration and headers are fetched."""
    # Larger than the first range that the client asks for.
    models = family("qwen3-untied", "fp32")
    with running_hub() as hub:
        hub.publish("tester/base", models.base)
        hub.publish("tester/tuned", models.tuned[0])
        file = write_config(tmp_path, recipe("tester/base", "tester/tuned@main"))
        code = "from mergekit_monosoup.cli import main; main(prog_name='mergekit-monosoup')"
        env = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
        }
        done = run([sys.executable, "-c", code, "plan", str(file)], tmp_path, env)
        assert "this merge would run" in done.stdout
        weights = models.base / "model.safetensors"
        assert hub.sent_bytes < 2 * weights.stat().st_size
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        file = write_config(tmp_path, recipe("tester/base", "tester/tund"))
        done = run([sys.executable, "-c", code, "plan", str(file)], tmp_path, env, check=False)
        assert done.returncode == 1
        assert "line 4: model tester/tund is neither a folder" in done.stdout
        assert "Traceback" not in done.stdout
