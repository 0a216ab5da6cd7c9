"""Checkpoints hold a tree exactly, atomically, and refuse what is not theirs."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import stat
import struct
import sys
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit import CheckpointError, checkpoint
from memfit.checkpoint import load, save

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
    torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    """Same types and bits throughout; tensors also the same strides."""
    if isinstance(a, torch.Tensor):
        if not (isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()):
            return False
        bits = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
        return torch.equal(*bits)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return bool(a == b)


def round_trip(tree: Any, folder: Path) -> Any:
    save(folder / "c.safetensors", tree)
    return load(folder / "c.safetensors")


def test_a_tree_of_every_kind_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tree = {
        "plain": [None, True, False, 0, -1, 2**70, "", 'ü\n"\u2028', b"\x00\xff", (1, (2,), [])],
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "keys": {0: "int", "0": "str", True: "bool", None: "none", 1.5: "float"},
        "empty": [{}, [], ()],
        "tensors": {"scalar": torch.tensor(3.5), "none": torch.empty(0, 3), "nan": torch.tensor([math.nan, -0.0])},
    }
    assert equal(round_trip(tree, tmp_path), tree)


@pytest.mark.parametrize("tree", [None, 3, "text", [], {}, torch.arange(3)], ids=str)
def test_a_tree_may_be_a_single_value(tree: Any, tmp_path: Path) -> None:
    assert equal(round_trip(tree, tmp_path), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)], ids=str)
def test_every_dtype_comes_back_with_its_bits(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    assert equal(round_trip({"t": tensor}, tmp_path)["t"], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_strides_are_kept_where_the_memory_is_dense(dtype: torch.dtype, tmp_path: Path) -> None:
    """An optimizer's moments follow their weight's strides; fast paths look at them."""
    base = torch.randn(2, 3, 4, 5, dtype=dtype)
    dense = {"transposed": base.transpose(0, 3), "channels_last": base.to(memory_format=torch.channels_last)}
    assert equal(round_trip(dense, tmp_path), dense)
    gaps = {"slice": base[:, 1], "step": base[..., ::2], "expanded": torch.randn(3, 1, dtype=dtype).expand(3, 4)}
    for gappy in gaps.values():
        assert equal(round_trip(gappy, tmp_path), gappy.contiguous())


def test_lazily_conjugated_and_negated_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.randn(4, dtype=torch.complex64)
    again = round_trip({"base": base, "conj": base.conj(), "neg": base.conj().imag}, tmp_path)
    assert torch.equal(again["conj"], base.conj().resolve_conj())
    assert torch.equal(again["neg"], -base.imag)


def test_shared_memory_is_stored_once_and_comes_back_shared(tmp_path: Path) -> None:
    big = torch.randn(256, 256)
    tree = {
        "weight": big, "tied": big, "parameter": torch.nn.Parameter(big), "transposed": big.t(), "row": big[3],
        "bits": big.view(torch.int32), "bytes": big.view(torch.uint8)[1, 3:9],
    }  # fmt: skip
    again = round_trip(tree, tmp_path)
    assert (tmp_path / "c.safetensors").stat().st_size < 1.1 * big.nbytes
    assert all(equal(again[name], tree[name].detach()) for name in tree)
    assert again["weight"] is again["tied"]
    again["weight"].zero_()
    assert all(not again[name].any() for name in tree)


def test_parts_of_one_buffer_are_stored_as_tensors_of_their_own(tmp_path: Path) -> None:
    """Such as the flattened weights of an LSTM on a GPU: they share a storage but no element."""
    buffer = torch.randn(10_000)
    tree = {"a": buffer[10:16].view(2, 3), "b": buffer[20:24]}
    assert equal(round_trip(tree, tmp_path), tree)
    stored = safetensors.torch.load_file(tmp_path / "c.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {"a": (2, 3), "b": (4,)}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_views_of_one_storage_come_back_as_the_same_views(data: st.DataObject, tmp_path_factory: Any) -> None:
    dtypes = st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128])
    storage = torch.randint(0, 256, (data.draw(st.integers(16, 12 * 16)) // 16 * 16,), dtype=torch.uint8)
    views = {}
    for index in range(data.draw(st.integers(1, 4))):
        flat = storage.view(data.draw(dtypes))
        start = data.draw(st.integers(0, flat.numel() - 1))
        room = flat.numel() - start
        rows, step = data.draw(st.integers(1, min(room, 4))), data.draw(st.integers(0, 3))
        if (rows - 1) * step < room:
            views[f"v{index}"] = flat.as_strided((rows,), (step,), start)
    again = round_trip(views, tmp_path_factory.mktemp("views"))
    for name, view in views.items():
        assert again[name].dtype == view.dtype
        assert [bits(element) for element in again[name]] == [bits(element) for element in view]
    unrolled = [name for name, view in views.items() if view.stride(0) == 0]  # a repeated element comes back as several
    for one in views.keys() - unrolled:
        for other in views.keys() - unrolled - {one}:
            assert overlap(views[one], views[other]) == overlap(again[one], again[other])


def bits(scalar: torch.Tensor) -> list[int]:
    return scalar.clone().view(1).view(torch.uint8).tolist()


def overlap(a: torch.Tensor, b: torch.Tensor) -> set[tuple[int, int]]:
    """Which byte of a's extent is which byte of b's."""
    places = [
        {view.data_ptr() + i: i for i in range(view.stride(0) * view.itemsize * (len(view) - 1) + view.itemsize)}
        for view in (a, b)
    ]
    return {(places[0][address], places[1][address]) for address in places[0].keys() & places[1].keys()}


@settings(max_examples=25, deadline=None)
@given(
    tree=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=20,
    )
)
def test_any_plain_tree_comes_back(tree: Any, tmp_path_factory: Any) -> None:
    assert equal(round_trip(tree, tmp_path_factory.mktemp("plain")), tree)


def test_subclasses_come_back_as_the_plain_type(tmp_path: Path) -> None:
    again = round_trip({"d": OrderedDict(a=torch.Size([1, 2])), "p": torch.nn.Parameter(torch.ones(2))}, tmp_path)
    assert type(again["d"]) is dict
    assert type(again["d"]["a"]) is tuple
    assert type(again["p"]) is torch.Tensor


def test_names_in_the_file_are_the_paths_in_the_tree_and_never_clash(tmp_path: Path) -> None:
    tree = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(2), "__metadata__": torch.ones(3), "list": [torch.ones(4)]}
    assert equal(round_trip(tree, tmp_path), tree)
    assert {"a.b", "list.0"} < set(safetensors.torch.load_file(tmp_path / "c.safetensors"))


def test_the_file_is_plain_safetensors_with_json_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, {"weight": torch.arange(6.0).view(2, 3), "step": 7})
    assert torch.equal(safetensors.torch.load_file(path)["weight"], torch.arange(6.0).view(2, 3))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("memfit.checkpoint", "1")
    assert json.loads(metadata["structure"])["dict"]["step"] == 7


def test_mapped_tensors_are_windows_and_the_others_have_memory_of_their_own(tmp_path: Path) -> None:
    shared = torch.randn(4)
    tree = {"model": {"w": torch.randn(1000), "c": torch.randn(3, dtype=torch.complex64), "s": shared}, "other": shared}
    path = tmp_path / "c.safetensors"
    save(path, tree)
    again = load(path, mapped=("model",))
    assert equal(again, tree)
    assert again["model"]["s"] is again["other"]
    lines = Path("/proc/self/maps").read_text().splitlines()
    mappings = [line.split()[0].split("-") for line in lines if str(path) in line]
    inside = [any(int(a, 16) <= t.data_ptr() < int(b, 16) for a, b in mappings) for t in (again["model"]["w"], shared)]
    assert inside == [True, False]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "object"),
        ({1, 2}, "set"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        ({(1, 2): 3}, "key"),
    ],
    ids=["object", "set", "sparse", "meta", "key"],
)
def test_what_cannot_be_held_is_refused_with_its_place(value: object, name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, 1)
    with pytest.raises(CheckpointError, match=name) as caught:
        save(path, {"outer": [0, value]})
    assert "outer.1" in str(caught.value)
    assert load(path) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch announces the end of these dtypes
def test_a_quantized_tensor_is_refused_with_its_dtype(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qint8"):
        save(tmp_path / "c.safetensors", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))


# What the file on disk may be.


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"c\.safetensors: there is no such checkpoint"):
        load(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="folder"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / ("n" * 300))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, {"w": torch.randn(50), "n": 3})
    whole = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"c\.safetensors: .*(truncated|not a checkpoint)"):
            load(path)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, {"w": torch.randn(10), "n": 3.25})
    whole = bytearray(path.read_bytes())
    for position in range(len(whole)):
        whole[position] ^= 1 << position % 8
        path.write_bytes(whole)
        with pytest.raises(CheckpointError, match=r"c\.safetensors"):
            load(path)
        whole[position] ^= 1 << position % 8
    path.write_bytes(whole)
    load(path)


def test_appended_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, {"w": torch.randn(10)})
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\xff" * 100, b"PK\x03\x04" + bytes(200), bytes(1000), b"\x02\x00\x00\x00\x00\x00\x00\x00{}"],
    ids=["empty", "text", "ones", "zip", "zeros", "no tensors"],
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint of memfit"):
        load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"w": torch.ones(3)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match="not a checkpoint of memfit"):
            load(path)


def test_a_newer_version_asks_for_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    save(path, {"w": torch.ones(3)})
    monkeypatch.setattr(checkpoint, "VERSION", 1)
    with pytest.raises(CheckpointError, match="update memfit"):
        load(path)


@pytest.mark.parametrize(
    "structure", ["3]", '{"dict":{"a":{"tensor":{"name":"x"}}}}', '{"call":["os.system"]}', '{"tensor":{"name":"w",'
    '"dtype":"float32","shape":[1000],"stride":[1],"offset":0}}', '{"tensor":{"name":"w","dtype":"load","shape":[1],'
    '"stride":[1],"offset":0}}', '{"tensor":{"name":"w","dtype":"float32","shape":[1],"stride":[1],"offset":-9}}'],
)  # fmt: skip
def test_a_forged_structure_is_refused_even_with_a_right_checksum(structure: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, torch.ones(4))
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    name = next(name for name in header if name != "__metadata__")
    header["__metadata__"].update(structure=structure, checksum="00000000")
    header["w"] = header.pop(name)
    text = json.dumps(header, separators=(",", ":")).encode()
    forged = len(text).to_bytes(8, "little") + text + data
    checksum = f'"checksum":"{zlib.crc32(forged):08x}"'.encode()
    path.write_bytes(forged.replace(b'"checksum":"00000000"', checksum, 1))
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        load(path)


# What may go wrong while writing.


@pytest.fixture
def small_limit() -> Iterator[None]:
    """Files may grow to 64 KiB: writing fails in the middle, as it does on a full disk."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, earlier[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_write_that_fails_half_way_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, small_limit: None
) -> None:
    path = tmp_path / "c.safetensors"
    save(path, {"good": torch.ones(10)})
    with pytest.raises(CheckpointError, match=r"c\.safetensors: the checkpoint cannot be written: .*larger"):
        save(path, {"large": torch.ones(1 << 16)})
    assert torch.equal(load(path)["good"], torch.ones(10))
    assert files(tmp_path) == {"c.safetensors"}


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "c.safetensors"
    save(path, 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: .*disk is full"):
        save(path, 2)
    assert load(path) == 1
    assert files(tmp_path) == {"c.safetensors"}


def test_an_interrupt_while_writing_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "c.safetensors"
    save(path, 1)
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, 2)
    assert load(path) == 1
    assert files(tmp_path) == {"c.safetensors"}


def test_a_missing_folder_and_a_folder_in_the_files_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/c\.safetensors.*folder does not exist"):
        save(tmp_path / "nowhere" / "c.safetensors", 1)
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"c\.safetensors.*folder has that name"):
        save(tmp_path / "c.safetensors", 1)
    assert files(tmp_path) == {"c.safetensors"}


def test_a_folder_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "c.safetensors", 1)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write anywhere: be somebody else for a moment
        try:
            with pytest.raises(CheckpointError, match=r"c\.safetensors.*may not be written to"):
                save(folder / "c.safetensors", 2)
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)
        assert load(folder / "c.safetensors") == 1


def test_what_a_killed_run_left_behind_is_removed_at_the_next_save(tmp_path: Path) -> None:
    for name in (".c.safetensors.0123abcd.partial", ".d.safetensors.0123abcd.partial", ".c.safetensors.mine.partial"):
        (tmp_path / name).write_bytes(b"half")
    save(tmp_path / "c.safetensors", 1)
    assert files(tmp_path) == {"c.safetensors", ".d.safetensors.0123abcd.partial", ".c.safetensors.mine.partial"}


def test_a_link_is_followed_and_the_permissions_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "c.safetensors"
    link.symlink_to(tmp_path / "disk" / "real")
    earlier = os.umask(0o027)
    try:
        save(link, 5)
    finally:
        os.umask(earlier)
    assert link.is_symlink()
    assert load(tmp_path / "disk" / "real") == 5
    assert stat.S_IMODE((tmp_path / "disk" / "real").stat().st_mode) == 0o640


def test_saving_and_loading_draw_no_random_numbers(tmp_path: Path) -> None:
    from memfit.run import random_state

    before = random_state.capture()
    round_trip({"w": torch.ones(3)}, tmp_path)
    assert equal(random_state.capture(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_takes_no_memory_of_the_trees_size(tmp_path: Path) -> None:
    def resident_peak() -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

    tree = {"a": torch.ones(16 << 20), "b": torch.ones(4096, 4096).t()}  # 64 MiB each
    save(tmp_path / "warm.safetensors", {"w": torch.ones(10)})
    # Start the peak anew: everything after is the save's.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    save(tmp_path / "c.safetensors", tree)
    assert resident_peak() - before < 16 << 20
