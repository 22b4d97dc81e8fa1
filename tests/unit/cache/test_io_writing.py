"""Writing a cache to a file: it is there whole, or what was there before is."""

from __future__ import annotations

import contextlib
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvquant import QuantizedCache
from kvquant.errors import CacheSaveError
from tests.unit.cache.files import assert_same

#: What another process does: write a large cache under a small one's name, again and again.
WRITING = """
import json, sys
from kvquant.cache.container import open_tensors, write
from kvquant.cache.header import read_header

header = read_header(sys.argv[1])
tensors = {name: source.read() for name, source in open_tensors(header).items()}
print("ready", flush=True)
while True:
    write(sys.argv[2], tensors, json.dumps(header.description))
"""


def filled(tokens=200):
    cache = QuantizedCache(nbits=4, group_size=16, residual_length=16)
    cache.update(torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16), 0)
    return cache


@pytest.fixture
def saved(tmp_path):
    filled().save(tmp_path / "cache.kvq")
    return tmp_path / "cache.kvq"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_disk_that_is_full_leaves_the_old_file(saved):
    """The system refuses to write on after some kilobytes: one error, the old file is whole, nothing else is there."""
    before = saved.read_bytes()
    cache = filled(2000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CacheSaveError) as caught:
            cache.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    expected = f"cannot save the cache as '{saved}': File too large. What was there before is as it was."
    assert str(caught.value) == expected
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["cache.kvq"]


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_file(saved, tmp_path_factory):
    """The old one, or one of its own: at whatever moment it dies, what is under the name can be loaded."""
    large = tmp_path_factory.mktemp("large") / "large.kvq"
    filled(60_000).save(large)
    command = [sys.executable, "-c", WRITING, str(large), str(saved)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while not _half_written(saved.parent):
            assert time.monotonic() < deadline, "the other process never began to write"
        process.kill()
    assert QuantizedCache.load(saved).get_seq_length() in (200, 60_000)


def _half_written(folder: Path) -> bool:
    """Whether there is a temporary file with something in it; it may be gone by the time that it is looked at."""
    with contextlib.suppress(FileNotFoundError):
        return any(file.stat().st_size for file in folder.glob(".*.tmp"))
    return False


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_whatever_else_stops_it_leaves_the_old_file(saved, failure):
    """A Ctrl-C, an error on the way to a tensor's numbers: it goes through as it is."""

    cache = filled()
    stores = cache.layers[0].stores
    view = stores[1].recent.view

    def stop(*_):
        stores[1].recent.view = view
        raise failure

    stores[1].recent.view = stop
    before = saved.read_bytes()
    with pytest.raises(failure):
        cache.save(saved)
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["cache.kvq"]


@pytest.mark.parametrize(("place", "reason"), [("nowhere/cache.kvq", "No such file"), (".", "no file")])
def test_a_place_where_nothing_can_be_written(tmp_path, place, reason):
    """A folder that is not there, and one that is."""
    with pytest.raises(CacheSaveError, match=reason) as caught:
        filled().save(tmp_path / place)
    assert isinstance(caught.value, OSError)
    assert names(tmp_path) == []


def test_a_device_is_not_replaced():
    """Whoever writes to /dev/null by mistake keeps it."""
    with pytest.raises(CacheSaveError, match="there is something that is no file"):
        filled().save("/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_link_stays_one(tmp_path):
    """What it points to is replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.kvq").symlink_to(tmp_path / "folder" / "cache.kvq")
    cache = filled()
    for _ in range(2):
        cache.save(tmp_path / "link.kvq")
    assert (tmp_path / "link.kvq").is_symlink()
    assert names(tmp_path / "folder") == ["cache.kvq"]
    assert_same(cache, QuantizedCache.load(tmp_path / "link.kvq"))


def test_the_file_is_as_readable_as_others(tmp_path):
    """Its mode is what the process gives to new files."""
    (tmp_path / "plain").write_bytes(b"")
    filled().save(tmp_path / "cache.kvq")
    assert (tmp_path / "cache.kvq").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_same_cache_gives_the_same_bytes(tmp_path):
    """No time, no path, no chance in it."""
    cache = filled()
    cache.save(tmp_path / "one.kvq")
    cache.save(tmp_path / "two.kvq")
    assert (tmp_path / "one.kvq").read_bytes() == (tmp_path / "two.kvq").read_bytes()
