"""Files that somebody made to do harm: one sentence, at once, and nothing run or written."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import struct
import sys
import time
import warnings

import pytest
import torch
import yaml
from checkpoints import copy_as_bin, copy_with_tensors, load_tensors, write_adapter
from click.testing import CliRunner
from commands import ROOT, recipe, run

from mergekit_monosoup.checkpoint.documents import read_config, read_index, stays_inside
from mergekit_monosoup.checkpoint.headers import read_folder, read_safetensors_header
from mergekit_monosoup.cli import main
from mergekit_monosoup.errors import InputError, MonoSoupError
from mergekit_monosoup.planning.plain_yaml import load_yaml, read_text
from mergekit_monosoup.planning.plan import PlanOptions, make_plan

sys.path.append(str(ROOT / "benchmarks"))

START = "merge_method: monosoup\nbase_model: a\n"
BOMB = "\n".join(
    ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    + [f"{b}: &{b} [" + ",".join([f"*{a}"] * 10) + "]" for a, b in zip("abcdef", "bcdefg", strict=True)]
    + ["merge_method: monosoup", "base_model: *g", "models: [{model: ./chat}]"]
)
RECIPES = {
    "nested aliases": (BOMB, "its aliases written out"),
    "nested merge keys": (
        "a: &a {x: 1}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
            for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "its aliases written out",
    ),
    "an alias in itself": (f"{START}models: &a [*a]\n", "inside its own anchor"),
    "an object": ("a: !!python/object/apply:os.system ['touch ran']\n", "asks for an object"),
    "an object's name": ("a: !!python/name:os.system\n", "asks for an object"),
    "another tag": ("a: !thing 3\n", "asks for an object"),
    "deep brackets": ("a: " + "[" * 5000 + "]" * 5000, "levels deep"),
    "deep mappings": ("a: " + "{a: " * 200 + "1" + "}" * 200, "levels deep"),
    "a huge number": ("a: " + "9" * 5000, "cannot be read"),
    "a date that is none": ("a: 2001-99-99", "cannot be read"),
    "control characters": ('merge_method: "\\x1b[2J"\n', "U+001B"),
    "a null byte": ('base_model: "a\\0b"\n', "U+0000"),
    "half a pair": ('base_model: "\\ud800"\n', "invalid Unicode character"),
    "raw control characters": ("a: \x07\n", "not valid YAML"),
    "megabytes": ("a: " + "x" * 2_000_000, "longer than"),
    "many values": ("a: [" + "1," * 200_000 + "]", "50,000 values"),
    "two documents": ("a: 1\n---\nb: 2\n", "mergekit-multi"),
    "keys that are lists": ("? [1, 2]\n: 3\n", "unhashable"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, words = RECIPES[kind]
    file = tmp_path / "recipe.yml"
    file.write_bytes(text.encode())
    before, begin = peak(), time.process_time()
    for command in (["plan", str(file)], ["merge", str(file), "out"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit), result.exception
        assert words in result.output
        assert len(result.output.strip().splitlines()) == 1
        assert len(result.output) < 400
    # Both commands; a million characters are not parsed first.
    assert time.process_time() - begin < 5
    assert peak() - before < 400e6
    assert os.listdir(tmp_path) == ["recipe.yml"]


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_bomb_is_refused_in_less_than_a_second():
    begin = time.process_time()
    with pytest.raises(MonoSoupError):
        load_yaml(BOMB)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("first", [[], ["--lora-merge-dtype", "float16", "--cuda"]])
def test_merge_refuses_a_bomb_before_mergekit_is_imported(first, tmp_path):
    (tmp_path / "recipe.yml").write_text(BOMB)
    program = (
        "import sys, time\n"
        "from click.testing import CliRunner\n"
        "from mergekit_monosoup.cli import main\n"
        "done = CliRunner().invoke(main, ['merge', *sys.argv[1:], 'recipe.yml', 'out'])\n"
        "print(done.exit_code, sorted({'torch', 'mergekit', 'transformers'} & sys.modules.keys()))\n"
        "print(time.process_time(), done.output)\n"
    )
    done = run([sys.executable, "-c", program, *first], tmp_path)
    status, said = done.stdout.splitlines()[:2]
    assert status == "1 []"
    assert "values, its aliases written out" in said
    assert float(said.split()[0]) < 2
    assert os.listdir(tmp_path) == ["recipe.yml"]


def test_merge_still_shows_its_help_and_its_usage(tmp_path):
    (tmp_path / "recipe.yml").write_text(BOMB)
    recipe = str(tmp_path / "recipe.yml")
    assert "Usage:" in CliRunner().invoke(main, ["merge", recipe, "--help"]).output
    assert CliRunner().invoke(main, ["merge", str(tmp_path / "none.yml"), "out"]).exit_code == 2
    assert CliRunner().invoke(main, ["merge"]).exit_code == 2


def test_what_is_no_text(tmp_path):
    (tmp_path / "recipe.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MonoSoupError, match="UTF-8"):
        read_text(tmp_path / "recipe.yml")


@pytest.mark.parametrize(
    "text",
    ["models: 3", "slices: {a: 1}", "modules: [1]", "modules: {a: 3}", "slices: [3]", "models: [{model: 3}]",
     "models: [{model: {path: 3}}]", "slices: [{sources: 3}]", "slices: [{sources: [{model: a}]}]",
     "tokenizer: [1]", "dtype: [1]", "parameters: 3", "parameters: {edit: [{filter: 3}]}", "base_model: [1]",
     "base_model: {model: {path: a, revision: 3}}", "models: [{model: {model: a, lora: [1]}}]",
     "1: 2", "null: 3", "2001-01-01: 3", "chat_template: 3"],
)  # fmt: skip
def test_values_of_the_wrong_kind(text):
    """Whatever stands where something else belongs is a finding and no traceback."""
    found = make_plan(f"merge_method: monosoup\n{text}\n", PlanOptions(costs=False))
    assert found.problems.errors


def write_header(file, header, size=0):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * size)
    return file


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "overlaps"),
    "a hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "unused"),
    "beyond the file": ({"a": entry([1000], 0, 4000)}, 8, "cut off"),
    "bytes behind": ({"a": entry([1], 0, 4)}, 8, "longer"),
    "an absurd shape": ({"a": entry([2**62, 2**62], 0, 4)}, 4, "do not fit"),
    "a negative shape": ({"a": entry([-1, -1], 0, 4)}, 4, "shape"),
    "a negative offset": ({"a": entry([1], -4, 0)}, 4, "data_offsets"),
    "backwards": ({"a": entry([1], 4, 0)}, 4, "do not fit"),
    "a fraction": ({"a": entry([1.0], 0, 4)}, 4, "shape"),
    "true for one": ({"a": entry([True], 0, 4)}, 4, "shape"),
    "another type": ({"a": entry([1], 0, 4, "F37")}, 4, "dtype"),
    "a type that is none": ({"a": entry([1], 0, 4, ["F32"])}, 4, "dtype"),
    "no entry": ({"a": 3}, 4, "shape"),
    "a list": ([], 0, "no JSON object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry([1], 0, 4)}, 4, "__metadata__"),
    "control characters": ({"a\x1b[2J": entry([1], 0, 4)}, 4, "control characters"),
    "a long name": ({"a" * 100_000: entry([1], 0, 4)}, 4, "characters long"),
    "twice the same": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        4,
        "there twice",
    ),
    "no number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4, "NaN"),
    "nested without end": (b'{"a":' * 100_000, 0, "nested"),
    "another encoding": ('{"a": 1}'.encode("utf-16"), 0, "JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(tmp_path, kind):
    header, size, words = HEADERS[kind]
    with pytest.raises(InputError, match=words) as caught:
        read_safetensors_header(write_header(tmp_path / "model.safetensors", header, size))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("length", [0, 1, 10**8, 2**63, 2**64 - 1])
def test_absurd_lengths_of_headers(tmp_path, length):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(InputError):
        read_safetensors_header(file)


def test_what_the_library_reads_is_read(tmp_path):
    """No stricter than safetensors itself: empty tensors, scalars, padding, metadata, any order."""
    from safetensors.torch import load_file, save_file

    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0), "b": torch.ones(3, dtype=torch.bool)}
    tensors |= {"ä": torch.zeros(2, dtype=torch.bfloat16), "wide": torch.zeros(2, 2, dtype=torch.float64)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    held = read_safetensors_header(tmp_path / "model.safetensors")
    assert {name: t.shape for name, t in held.items()} == {
        name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()
    }


def test_a_million_tensors(tmp_path):
    names = ",".join(
        f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(1_000_000)
    )
    file = write_header(tmp_path / "model.safetensors", f"{{{names}}}".encode(), 1_000_000)
    before, begin = peak(), time.process_time()
    with pytest.raises(InputError, match="1,000,000 tensors"):
        read_safetensors_header(file)
    assert time.process_time() - begin < 2
    assert peak() - before < 400e6


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../../b", "..", "C:\\x", "\\\\host\\x", "a\0b", "", "x" * 300],
)
def test_names_that_leave_the_folder(tmp_path, name):
    assert not stays_inside(name)
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="no file of the same folder"):
        read_index(tmp_path / "index.json")


@pytest.mark.parametrize(
    "content", ["3", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 10**5]
)
def test_what_is_no_index(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(InputError):
        read_index(tmp_path / "index.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", "Qwen3ForCausalLM"),
        ("architectures", [{}]),
        ("architectures", ["\x1b"]),
        ("model_type", ["qwen3"]),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**5000 if sys.version_info < (3, 11) else 10**4000),
        ("vocab_size", {}),
        ("hidden_size", float("nan")),
        ("text_config", 3),
        ("text_config", {"num_hidden_layers": "x"}),
        ("quantization_config", [1]),
    ],
)
def test_configurations(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(InputError, match=key) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_values_that_transformers_refuses(tmp_path, family):
    """Where only its own classes know how many layers there are, their errors are one sentence."""
    models = family("qwen3-tied", "bf16")
    tuned = copy_with_tensors(models.tuned[0], tmp_path / "tuned", load_tensors(models.tuned[0]))
    config = json.loads((tuned / "config.json").read_text())
    del config["num_hidden_layers"]
    (tuned / "config.json").write_text(json.dumps(config | {"max_position_embeddings": "x"}))
    found = make_plan(yaml.safe_dump(recipe(models.base, tuned)), PlanOptions(costs=False))
    (problem,) = found.problems.errors
    assert "\n" not in str(problem)


class Hostile:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("command", ["plan", "merge", "inspect", "lora"])
def test_pickles_with_code_are_not_run(tmp_path, family, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = family("qwen3-tied", "bf16")
    hostile = copy_as_bin(models.tuned[0], tmp_path / "hostile")
    torch.save({"model.norm.weight": Hostile()}, hostile / "pytorch_model.bin")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe(models.base, hostile)))
    arguments = {
        "plan": ["recipe.yml"],
        "merge": ["recipe.yml", "out"],
        "inspect": [str(models.base), str(hostile)],
        "lora": [str(hostile), "out"],
    }[command]
    if command == "lora":
        adapter = write_adapter(tmp_path / "adapter", models.base)
        (adapter / "adapter_model.safetensors").unlink()
        torch.save({"base_model.model.x.lora_A.weight": Hostile()}, adapter / "adapter_model.bin")
        arguments[0] = str(adapter)
    result = CliRunner().invoke(main, [command, *arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert "would run code as it is loaded (posix.system); it was not loaded" in result.output
    assert "weights_only" not in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "ran").exists()


def test_pickles_that_hold_other_things(tmp_path, family):
    source = copy_as_bin(family("qwen3-tied", "bf16").tuned[0], tmp_path / "bin")
    file = source / "pytorch_model.bin"
    tensors = torch.load(file)
    torch.save({"state_dict": tensors}, file)
    assert read_folder("x", source).tensors.keys() == tensors.keys()
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert read_folder("x", source).tensors.keys() == tensors.keys()
    for other in ([1], {"a": 3}, {3: torch.ones(1)}, "x"):
        torch.save(other, file)
        with pytest.raises(InputError, match="other things than tensors"):
            read_folder("x", source)
    for raw in (b"", b"not a pickle", pickle.dumps(3), file.read_bytes()[:-20]):
        file.write_bytes(raw)
        with pytest.raises(InputError):
            read_folder("x", source)


@pytest.mark.parametrize("seed", [11, 12])
def test_a_sample_of_what_the_fuzzer_makes(tmp_path, seed):

    from fuzz import fuzz, peak_bytes

    before = peak_bytes()
    try:
        with warnings.catch_warnings():
            found = fuzz(tmp_path, 600, seed)
    finally:
        logging.disable(logging.NOTSET)
    assert not found.count, found.examples
    assert found.refused > 200
    assert found.accepted > 100
    assert peak_bytes() - before < 1 << 30
