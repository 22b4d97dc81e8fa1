"""Files that are refused: damaged ones, those of others, and those made to do harm."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import kvquant
from kvquant import QuantizedCache
from kvquant.cache import io
from kvquant.cache.header import header_bytes, read_header
from kvquant.errors import (
    CacheFileError,
    CacheTooLargeError,
    DamagedFileError,
    FormatVersionError,
    KVQuantError,
    PendingAssignmentError,
    StatesError,
    UnsavableCacheError,
)
from kvquant.plugin import BackendSpec, Capabilities, Opaque
from tests.support import FORMATS, OpaqueMinMax
from tests.unit.cache.files import GEMMA, OPTIONS, make, tampered

pytestmark = pytest.mark.usefixtures("formats")


@pytest.fixture
def saved(tmp_path):
    return make(tmp_path / "cache.kvq")


# ------------------------------------------------------------------------------------------------ damage


def test_a_truncated_file_is_refused(saved):
    """Wherever it ends, in its header or behind it."""
    whole = saved.read_bytes()
    for length in (0, 1, 7, 8, 100, read_header(saved).start, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match="it is no saved cache, or it was cut off or altered"):
            QuantizedCache.load(saved)


def test_a_file_that_goes_on_behind_its_end_is_refused(saved):
    """What is there belongs to nothing."""
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(DamagedFileError):
        QuantizedCache.load(saved)


def test_every_bit_counts(saved):
    """One that is flipped anywhere is found, in the description, in names and shapes, and in numbers."""
    whole, draw = saved.read_bytes(), random.Random(0)
    start = read_header(saved).start
    for place in [*draw.sample(range(8, start), 40), *draw.sample(range(start, len(whole)), 40)]:
        altered = bytearray(whole)
        altered[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(altered)
        with pytest.raises(CacheFileError):
            QuantizedCache.load(saved)


def test_altered_numbers_are_named(saved):
    """The tensor in which they are; without the check they are taken as they come."""
    altered = bytearray(saved.read_bytes())
    altered[-1] ^= 1
    saved.write_bytes(altered)
    with pytest.raises(DamagedFileError, match=r"layers\.\d\.\w+\.[\w.]+ was altered after it was saved"):
        QuantizedCache.load(saved)
    assert QuantizedCache.load(saved, verify=False).get_seq_length() == 60


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle in a zip", b"x" * 5000, struct.pack("<Q", 1 << 60)])
def test_other_files_are_refused(tmp_path, content):
    """In words that say what may have happened."""
    path = tmp_path / "cache.kvq"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="no saved cache"):
        QuantizedCache.load(path)


def test_a_safetensors_file_of_something_else(tmp_path):
    """A model's weights, say."""
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CacheFileError, match="a safetensors file, and not one of a cache"):
        QuantizedCache.load(tmp_path / "model.safetensors")


def test_a_file_that_is_not_there(tmp_path):
    """Is the system's error."""
    with pytest.raises(FileNotFoundError):
        QuantizedCache.load(tmp_path / "nowhere.kvq")


def test_a_file_that_is_replaced_while_it_is_read(saved, tmp_path, monkeypatch):
    """Header and numbers of two files are never mixed."""
    other = make(tmp_path / "other.kvq", "test-codebook")
    read = io.read_header

    def slowly(path):
        header = read(path)
        other.replace(path)
        return header

    monkeypatch.setattr(io, "read_header", slowly)
    with pytest.raises(DamagedFileError, match="changed while it was being read"):
        QuantizedCache.load(saved)


def test_other_format_versions_are_refused(saved):
    """Before anything else of them is looked at."""
    saved.write_bytes(saved.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"'))
    with pytest.raises(FormatVersionError, match="its format is version '2', and this kvquant reads version '1'"):
        QuantizedCache.load(saved)


# ------------------------------------------------------------------------------------------------ made to do harm


def nested(told):
    told["config"]["options"] = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["config"].update(nbits=4), "quantised with nbits=3, and the config asks for 4"),
        (lambda told: told["config"].update(group_size=16), "quantised with group_size=8"),
        (
            lambda told: told["config"].update(outlier_share=0.2),
            "has 0 outlier tokens in each block, and the config asks",
        ),
        (lambda told: told["config"].update(sink_length=3), "has sink of shape"),
        (lambda told: told["config"].update(secret=1), "unknown option 'secret'"),
        (lambda told: told["config"].update(layers={"0-99999999999": {"nbits": 2}}), "4096 layers are the most"),
        (lambda told: told["config"].update(layers={"0-9999": {"nbits": 2}}), "4096 layers are the most"),
        (lambda told: told["config"].update(device="cuda:99"), "device='cuda:99' cannot work"),
        (lambda told: told.update(layers=told["layers"] * 3000), "a list of at most 4096"),
        (lambda told: told.update(layers=[*told["layers"], {"kind": "quantized"}, 3]), r"layers\.3 is not described"),
        (lambda told: told["layers"].pop(), "a tensor that nothing asks for: 'layers.1"),
        (lambda told: told["layers"].append(told["layers"][0]), "layers.2.key.body has no center"),
        (lambda told: told["layers"][0]["key"].update(kv_heads=3), "has center of shape"),
        (lambda told: told["layers"][0]["key"].update(dtype="float16"), "has .* in float32, where"),
        (lambda told: told["layers"][0]["key"]["window"].update(stop=1 << 60), "has stop="),
        (lambda told: told["layers"][0]["key"]["window"].update(capacity=1000), "never needs more than"),
        (lambda told: told["layers"][0]["key"]["body"]["pages"][0].update(capacity=1 << 40), "has capacity="),
        (lambda told: told["layers"][0]["key"]["body"]["pages"][0].update(length=47), "has codes of shape"),
        (lambda told: told["layers"][0].update(kind="Popen"), "has kind='Popen', where one of DynamicLayer"),
        (nested, "options="),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(saved, change, message):
    """Though the checksums are right, which anybody can make so."""
    with pytest.raises(CacheFileError, match=message):
        QuantizedCache.load(tampered(saved, change))


def test_no_more_memory_is_asked_for_than_there_is(saved):
    """A file of some kilobytes may speak of a window of terabytes."""

    def boast(told):
        told["config"].update(group_size=1 << 40, residual_length=1 << 40, axis_value="channel")
        for layer in told["layers"]:
            for stream in ("key", "value"):
                layer[stream].update(group_size=1 << 40, block=1 << 40, axis="channel", body={"pages": []})
                layer[stream]["window"].update(capacity=1 << 40)

    with pytest.raises(CacheTooLargeError, match="GiB of memory beside the file, and there are") as caught:
        QuantizedCache.load(tampered(saved, boast))
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("attribute", ["__class__", "update", "../../etc/passwd", "_config", "layers"])
def test_attributes_that_a_layer_does_not_have_are_refused(tmp_path, attribute):
    """A file sets nothing but the state of transformers' own layers."""
    path = make(tmp_path / "cache.kvq", config=GEMMA)

    def add(told):
        told["layers"][0]["attributes"][attribute] = 1

    with pytest.raises(CacheFileError, match="which no DynamicSlidingWindowLayer has"):
        QuantizedCache.load(tampered(path, add))


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "layers.0.key.body.pages.0.codes/../x", "layers.9.x"])
def test_names_that_lead_elsewhere_are_refused(saved, name):
    """A tensor's name is its place in the description, and nothing else."""
    header = read_header(saved)
    numbers = saved.read_bytes()[header.start :]
    last = header.entries[-1]
    entries = [*header.entries[:-1], type(last)(name, last.kind, last.shape)]
    checksums = {**header.checksums, name: header.checksums[last.name]}
    checksums.pop(last.name)
    saved.write_bytes(header_bytes(json.dumps(header.description), entries, checksums) + numbers)
    before = sorted(saved.parent.iterdir())
    with pytest.raises(CacheFileError):
        QuantizedCache.load(saved)
    assert sorted(saved.parent.iterdir()) == before


#: What stands in for a value of a description.
JUNK = st.sampled_from(
    [0, -1, 3, 64, 2**31, 2**47, 10**30, 1.5, None, True, "", "float32", "cpu", "meta", "../../etc/passwd", [], {}, [1],
     "DynamicLayer", "quantized", {"tensor": "keys"}, {"dtype": "float32"}, {"device": None}, [[]]]
)  # fmt: skip


def _places(value, place=()):
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*place, key)
        yield from _places(child, (*place, key))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Files of all formats, with transformers' own layers and without."""
    folder = tmp_path_factory.mktemp("originals")
    return [
        make(folder / f"{kind}-{config is None}.kvq", f"test-{kind}", config)
        for kind in FORMATS
        for config in (None, GEMMA)
    ]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_description_says_a_cache_comes_out_or_an_error_of_ours(originals, tmp_path, data):
    """Any value for any entry: it fits after all and the cache works, or it is refused in a sentence."""
    original = data.draw(st.sampled_from(originals))
    path = tmp_path / "cache.kvq"
    path.write_bytes(original.read_bytes())

    def change(told):
        *way, last = data.draw(st.sampled_from(list(_places(told))))
        for key in way:
            told = told[key]
        told[last] = copy.deepcopy(data.draw(JUNK))

    try:
        cache = QuantizedCache.load(tampered(path, change))
        for layer in range(len(cache.layers)):
            cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), layer)
    except KVQuantError as error:
        assert len(str(error)) < 1500  # noqa: PT017  # any of ours is right, and none is, too


# ------------------------------------------------------------------------------------------------ what cannot be saved


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.zeros(1, 61, dtype=torch.int64),
            r"need to be those of the 60 tokens .* leave it out, with ids\[:, :60\]",
        ),
        (torch.zeros(2, 60, dtype=torch.int64), "in 1 batch rows, and are"),
        (torch.zeros(1, 60), "whole numbers"),
        ("a text", "whole numbers"),
        ([[1, 2], [3]], "whole numbers"),
    ],
)
def test_token_ids_that_are_not_those_of_the_cache(tmp_path, ids, message):
    """They would lie about what the cache stands for; nothing is written."""
    cache = QuantizedCache.load(make(tmp_path / "cache.kvq"))
    with pytest.raises(StatesError, match=message):
        cache.save(tmp_path / "other.kvq", token_ids=ids)
    assert not (tmp_path / "other.kvq").exists()


def test_a_cache_between_two_assignments_cannot_be_saved(tmp_path):
    """Its keys and values do not go together."""
    cache = QuantizedCache.load(make(tmp_path / "cache.kvq"))
    cache.layers[0].keys = torch.zeros(1, 2, 5, 16)
    with pytest.raises(PendingAssignmentError):
        cache.save(tmp_path / "other.kvq")


class Odd(OpaqueMinMax):
    """Blocks with something in them that no file can hold."""

    def quantize(self, rows):
        block = super().quantize(rows)
        return Opaque({**block.tensors, **self.tensors()}, self.meta())

    def tensors(self):
        return {}

    def meta(self):
        return {}


@pytest.mark.parametrize(
    ("method", "value", "error", "message"),
    [
        ("tensors", {"x": torch.zeros(2, dtype=torch.complex64)}, UnsavableCacheError, "torch.complex64"),
        ("tensors", {"x": torch.nn.Parameter(torch.zeros(2))}, UnsavableCacheError, "is no plain tensor"),
        ("tensors", {"x": torch.zeros(2).to_sparse()}, UnsavableCacheError, "sparse"),
        ("meta", {"x": (1, 2)}, kvquant.KVQuantError, "Opaque.meta does not survive a round trip through JSON"),
        ("meta", {1: 2}, kvquant.KVQuantError, "does not survive"),
        ("meta", {"x": object()}, kvquant.KVQuantError, "does not survive"),
    ],
)
def test_what_no_file_can_hold_is_said_when_it_is_saved(tmp_path, method, value, error, message):
    """And what was there before is as it was."""
    path = make(tmp_path / "cache.kvq")
    before = path.read_bytes()
    factory = type("Odder", (Odd,), {method: lambda _: value})
    kvquant.register(BackendSpec("test-odd", factory, Capabilities(nbits=(3,), formats=("opaque",))))
    try:
        cache = QuantizedCache("test-odd", **OPTIONS)
        cache.update(torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 16), 0)
        with pytest.raises(error, match=message):
            cache.save(path)
    finally:
        kvquant.unregister("test-odd")
    assert path.read_bytes() == before
    assert sorted(file.name for file in Path(tmp_path).iterdir()) == ["cache.kvq"]
