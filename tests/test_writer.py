"""Layout and writer: the files that save_file would write, from any number of threads and processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import load_tensors
from commands import ROOT
from disks import small_disk
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_monosoup.checkpoint.headers import DTYPES
from mergekit_monosoup.errors import InputError, OutputError
from mergekit_monosoup.merging import layout as layouts
from mergekit_monosoup.merging import writer as writers
from mergekit_monosoup.merging.layout import Layout, plan_layout
from mergekit_monosoup.merging.writer import Writer

TORCH_DTYPES = [name for name, _ in DTYPES.values() if hasattr(torch, name)]


def stored_shape(tensor):
    """The shape in the header: float4 tensors hold two entries a byte."""
    shape = tuple(tensor.shape)
    if str(tensor.dtype) == "torch.float4_e2m1fn_x2":
        return (*shape[:-1], 2 * shape[-1])
    return shape


def described(tensors):
    return [(name, stored_shape(t), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]


def written(folder: Path, tensors, shard_bytes=0) -> Layout:
    layout = plan_layout(described(tensors), shard_bytes)
    writer = Writer.create(folder, layout)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    return layout


def of_bytes(dtype, *shape, seed=0):
    """A tensor of a dtype from random bytes, NaNs of all kinds included."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * torch.empty((), dtype=kind).element_size()
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(kind).reshape(shape)


def raw(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_files_are_those_of_save_file(tmp_path):
    """Byte for byte, with every dtype, scalars, empty tensors, and names that JSON must escape."""
    tensors = {f"{i:02d}.{dtype}": of_bytes(dtype, 3, 8, seed=i) for i, dtype in enumerate(TORCH_DTYPES)}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "no rows": torch.zeros(4, 0, dtype=torch.bfloat16),
        "controls \n\t\b\r\f\x00\x01\x1f\x7f": torch.ones(2),
        'quotes " \\ / é 模型 😀 \u2028': torch.ones(3),
        "": torch.ones(1),
    }
    save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    written(tmp_path / "out", tensors)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(["float32", "bfloat16", "uint8"]), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 200),
)
def test_any_layout_is_read_by_safetensors(tmp_path_factory, entries, shard_bytes):
    folder = tmp_path_factory.mktemp("layout")
    tensors = {name: of_bytes(dtype, *shape) for name, (dtype, shape) in entries.items()}
    layout = written(folder, tensors, shard_bytes)
    found = {}
    for file, size in layout.sizes.items():
        with safe_open(folder / file, "pt") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in names}
        assert (folder / file).stat().st_size == size
        data = sum(raw(found[name]).__len__() for name in names)
        assert shard_bytes == 0 or len(names) == 1 or data <= shard_bytes
    assert {name: raw(t) for name, t in found.items()} == {name: raw(t) for name, t in tensors.items()}


def test_models_are_loaded_by_transformers(tmp_path, family):
    """Sharded as mergekit shards: in the given order, the index beside them."""
    source = family("qwen3-tied", "bf16").tuned[0]
    tensors = load_tensors(source)
    layout = written(tmp_path / "out", tensors, 30_000)
    assert len(layout.headers) > 2
    shards: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        shards.setdefault(layout.slots[name].file, []).append(tensor.nbytes)
    count = len(shards)
    assert list(shards) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for one, following in pairwise(shards.values()):
        assert sum(one) + following[0] > 30_000
    (tmp_path / "out/config.json").write_bytes((source / "config.json").read_bytes())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_sub_folders_with_weights_of_their_own(tmp_path):
    """As sentence-transformers has them; the same name in both is no conflict."""
    one = plan_layout([("linear.weight", (4, 4), "float32"), ("b", (2,), "float32")], 64)
    two = plan_layout([("linear.weight", (2, 4), "float16"), ("b", (2,), "float16")], 16, folder="2_Dense")
    writer = Writer.create(tmp_path, one, two)
    values = {
        "linear.weight": torch.ones(4, 4),
        "b": torch.ones(2),
        "2_Dense/linear.weight": torch.full((2, 4), 2.0, dtype=torch.float16),
        "2_Dense/b": torch.zeros(2, dtype=torch.float16),
    }
    for name, value in values.items():
        writer.write(name, value)
    writer.finish()
    assert torch.equal(load_tensors(tmp_path / "2_Dense")["linear.weight"], values["2_Dense/linear.weight"])
    assert torch.equal(load_tensors(tmp_path)["linear.weight"], values["linear.weight"])
    with pytest.raises(OutputError, match="same name"):
        Writer.create(tmp_path / "x", one, one)


def test_pieces_of_any_strides(tmp_path, monkeypatch):
    """Transposed, expanded and sliced tensors are written as their contiguous copies would be."""
    monkeypatch.setattr(writers, "_PIECE", 64)
    base = torch.arange(6 * 7 * 8, dtype=torch.float32).reshape(6, 7, 8)
    tensors = {
        "contiguous": base,
        "transposed": base.permute(2, 0, 1),
        "one row": base.permute(2, 0, 1)[:1],
        "expanded": torch.tensor([1.0, 2.0]).expand(50, 2),
        "stepped": base[::2, 1::3],
        "parameter": torch.nn.Parameter(base.mT),
        "tall": torch.arange(1000.0)[:, None].expand(1000, 2),
    }
    layout = plan_layout(described(tensors), 0)
    writer = Writer.create(tmp_path, layout)
    for name, tensor in tensors.items():
        expected = hashlib.sha256(raw(tensor.detach())).hexdigest()
        assert writer.write(name, tensor) == expected == writer.stored_hash(name)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def many(count=40):
    return {
        f"layer.{i}": torch.randn(50, 33 + i, generator=torch.Generator().manual_seed(i))
        for i in range(count)
    }


def write_some(folder, part):
    tensors = many()
    writer = Writer.reopen(folder, plan_layout(described(tensors), 30_000))
    return {name: writer.write(name, tensors[name]) for name in sorted(tensors)[part::2]}


@pytest.mark.slow
def test_threads_and_processes_write_the_same_bytes(tmp_path):
    tensors = many()
    layout = written(tmp_path / "one", tensors, 30_000)
    by_threads = Writer.create(tmp_path / "threads", layout)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: by_threads.write(name, tensors[name]), reversed(list(tensors))))
    by_processes = Writer.create(tmp_path / "processes", layout)
    hashes = {}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for some in pool.map(write_some, [tmp_path / "processes"] * 2, range(2)):
            hashes |= some
    by_processes.sync()
    assert hashes == {name: by_processes.stored_hash(name) for name in tensors}
    for file in layout.headers:
        expected = (tmp_path / "one" / file).read_bytes()
        assert (tmp_path / "threads" / file).read_bytes() == expected
        assert (tmp_path / "processes" / file).read_bytes() == expected


def test_what_was_not_planned_is_refused(tmp_path):
    writer = Writer.create(tmp_path, plan_layout([("w", (2, 3), "bfloat16")], 0))
    for wrong in (torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(2, 3)):
        with pytest.raises(OutputError, match=r"tensor w came out as .* where bfloat16 \(2, 3\) was planned"):
            writer.write("w", wrong)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("w", (2,), "complex64"), "complex64"),
        (("w", (3,), "float4_e2m1fn_x2"), "shape"),
        (("w", (-1, -2), "float32"), "shape"),
        (("__metadata__", (2,), "float32"), "__metadata__"),
        (("\ud800", (2,), "float32"), "rename"),
    ],
)
def test_what_no_file_can_hold_is_refused(entry, message):
    with pytest.raises(OutputError, match=message):
        plan_layout([entry], 0)


def test_names_come_once():
    with pytest.raises(OutputError, match="twice"):
        plan_layout([("w", (2,), "float32"), ("w", (2,), "float32")], 8)


def test_reopen_checks_headers_and_sizes(tmp_path):
    layout = plan_layout(described(many(4)), 0)
    file = tmp_path / "model.safetensors"
    Writer.create(tmp_path, layout)
    Writer.reopen(tmp_path, layout)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole.replace(b"F32", b"F16", 1), b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors .*--restart"):
            Writer.reopen(tmp_path, layout)
    file.unlink()
    with pytest.raises(InputError, match="--restart"):
        Writer.reopen(tmp_path, layout)


def test_a_full_disk_is_known_at_the_beginning(tmp_path):
    """Before the first tensor is computed; and nothing is left on the disk."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        layout = plan_layout([("a", (400, 400), "float32"), ("b", (400, 400), "float32")], 700_000)
        with pytest.raises(
            OutputError, match=r"disk of .*out is full: the weights need 1\.28 MB and .*B are free; make room"
        ):
            Writer.create(disk / "out", layout)
        assert not list(disk.rglob("*.safetensors"))


def test_a_disk_that_fills_up_while_files_are_reserved(tmp_path, monkeypatch):
    """Another process takes the room between the look and the reservation."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        layout = plan_layout([("a", (400, 400), "float32"), ("b", (400, 400), "float32")], 700_000)
        monkeypatch.setattr(writers, "free_bytes", lambda path: 10**9)
        with pytest.raises(
            OutputError,
            match=r"the disk of .*out is full: model-.*\.safetensors needs 640 kB and .* are free",
        ):
            Writer.create(disk / "out", layout)
        assert not list(disk.rglob("*.safetensors"))


def test_a_disk_that_fills_up_while_tensors_are_written(tmp_path, monkeypatch):
    """Where the file system cannot reserve, the write says it."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        monkeypatch.delattr("os.posix_fallocate")
        writer = Writer.create(disk, plan_layout([("a", (400, 400), "float32")], 0))
        (disk / "other").write_bytes(bytes(500_000))
        with pytest.raises(OutputError, match=r"the disk of .*disk is full: model\.safetensors needs 640 kB"):
            writer.write("a", torch.zeros(400, 400))


def test_absurd_shapes_are_a_sentence(tmp_path):
    layout = plan_layout([("w", (2**40, 2**40), "float32")], 0)
    with pytest.raises(OutputError, match="the weights need"):
        Writer.create(tmp_path / "out", layout)
    assert not list((tmp_path / "out").iterdir())


def test_links_are_not_followed(tmp_path):
    """What lies in the folder already cannot direct the writer elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").symlink_to(elsewhere)
    layout = plan_layout([("w", (2,), "float32")], 0)
    writer = Writer.create(out, layout)
    writer.write("w", torch.ones(2))
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(OutputError):
        writer.write("w", torch.ones(2))
    assert elsewhere.read_bytes() == b"precious"


def test_headers_stay_readable(tmp_path, monkeypatch):
    """safetensors refuses headers above 100 MB: shards end before that."""
    monkeypatch.setattr(layouts, "_LARGEST_HEADER", 2000)
    tensors = {f"tensor.{i}": torch.tensor([float(i)]) for i in range(100)}
    layout = written(tmp_path, tensors, 0)
    assert len(layout.headers) > 4
    assert all(len(header) - 8 <= 2000 for header in layout.headers.values())
    assert load_tensors(tmp_path) == tensors


def test_peak_memory_of_a_large_transposed_tensor(tmp_path):
    """No second copy of a tensor is made, whatever its strides."""
    code = """
import sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from own_memory import peak_bytes
from mergekit_monosoup.merging.layout import plan_layout
from mergekit_monosoup.merging.writer import Writer
tensor = torch.ones(8192, 8192).mT
writer = Writer.create(Path(sys.argv[1]), plan_layout([("w", (8192, 8192), "float32")], 0))
before = peak_bytes()
writer.write("w", tensor)
print((peak_bytes() - before) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 64, "256 MB are written"


def test_a_writer_can_be_handed_to_threads_while_another_syncs(tmp_path):
    tensors = many(20)
    writer = Writer.create(tmp_path, plan_layout(described(tensors), 0))
    stop = threading.Event()

    def keep_syncing():
        while not stop.is_set():
            writer.sync()

    thread = threading.Thread(target=keep_syncing)
    thread.start()
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    finally:
        stop.set()
        thread.join()
    assert load_tensors(tmp_path).keys() == tensors.keys()
