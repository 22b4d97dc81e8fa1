"""The record of finished parts."""

import json
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import JournalSettingsError, MalformedLineError, OptionValueError, OutOfMemoryError
from kvquant.evaluation.failures import is_out_of_memory
from kvquant.evaluation.journal import Journal

SETTINGS = {"model": {"weights": "ab12", "dtype": "float32"}, "contexts": (512, 1024), "seed": 0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def test_finished_parts_are_there_again_to_the_bit(path):
    """Whatever JSON can hold comes back; tuples come back as lists in a run that was interrupted and in one not."""
    result = {"nll": 0.1 + 0.2, "tokens": (1, 2), "nothing": None, "text": "naïve\u2028"}
    with Journal(path, SETTINGS) as first:
        told = first.add(("reference:4", 512, 0), result)
        assert told == first["reference:4", 512, 0] == {**result, "tokens": [1, 2]}
    with Journal(path, SETTINGS) as again:
        assert again.done(("reference:4", 512, 0))
        assert not again.done(("reference:4", 512, 1))
        assert len(again) == 1
        assert again["reference:4", 512, 0] == told


@given(st.floats(allow_nan=False))
def test_numbers_survive(number):
    """Every float is read back as it was written."""
    with Journal(None, {}) as journal:
        assert journal.add(("a",), number) == number


def test_each_part_is_on_the_disk_before_the_next_begins(path):
    """A crash right after `add` loses nothing: another process reads the part while the journal is still open."""
    with Journal(path, SETTINGS) as journal:
        journal.add(("a", 1), 1.5)
        assert json.loads(path.read_text().splitlines()[1]) == {"key": ["a", 1], "result": 1.5}


@pytest.mark.parametrize("torn", range(1, 25))
def test_a_torn_last_line_is_dropped(path, torn):
    """However much of it had been written; what is added then stands on a line of its own."""
    with Journal(path, SETTINGS) as journal:
        journal.add(("a", 1), 1.5)
        journal.add(("a", 2), 2.5)
    path.write_bytes(path.read_bytes()[:-torn])
    with Journal(path, SETTINGS) as journal:
        assert journal.done(("a", 1))
        assert not journal.done(("a", 2))
        journal.add(("a", 2), 2.5)
    with Journal(path, SETTINGS) as journal:
        assert (journal["a", 1], journal["a", 2]) == (1.5, 2.5)


def test_a_torn_first_line_begins_anew(path):
    """An empty file, and one whose settings were being written."""
    with Journal(path, SETTINGS):
        whole = path.read_bytes()
    for length in (0, 1, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with Journal(path, SETTINGS):
            assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("number", "line", "problem"),
    [
        (2, "{broken", "not JSON, where a journal has a finished part"),
        (2, "[1, 2]", "no object with key and result"),
        (2, '{"key": [1]}', "no object with key and result"),
        (1, "# Notes", "not JSON, where a journal has the settings of a run"),
        (1, '{"a": 1}', "no object with kvquant_journal and settings"),
        (1, '{"kvquant_journal": 7, "settings": {}}', "a journal of format 7; this version of kvquant has 1"),
    ],
)
def test_a_malformed_line_is_an_error_with_its_number_and_changes_nothing(path, number, line, problem):
    """A file that is no journal is never overwritten."""
    with Journal(path, SETTINGS) as journal:
        journal.add(("a", 1), 1.5)
        journal.add(("a", 2), 2.5)
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(MalformedLineError) as caught:
        Journal(path, SETTINGS)
    assert (caught.value.line, caught.value.path) == (number, str(path))
    assert str(caught.value).startswith(f"{path}, line {number}: {problem}")
    assert path.read_bytes() == before


def test_a_file_of_one_unfinished_line_that_is_not_ours_is_kept(path):
    """It has no end either, and is no journal."""
    path.write_text("my notes")
    with pytest.raises(MalformedLineError, match="line 1: not JSON"):
        Journal(path, SETTINGS)
    assert path.read_text() == "my notes"


def test_other_settings_are_refused_by_name(path):
    """What differs, both values, and what would work."""
    with Journal(path, SETTINGS):
        pass
    with pytest.raises(JournalSettingsError) as caught:
        Journal(path, {"model": {"weights": "cd34", "dtype": "float32"}, "contexts": [512], "prefill": 4, "seed": 0})
    assert caught.value.differences == {
        "model.weights": ("ab12", "cd34"),
        "contexts": ([512, 1024], [512]),
        "prefill": (None, 4),
    }
    assert str(caught.value) == (
        f"{path} holds the results of a run with other settings: model.weights was 'ab12' and is 'cd34'; contexts was "
        "[512, 1024] and is [512]; prefill was nothing and is 4. Run with the settings that it has, or give another "
        "file with --output."
    )


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """Before any work."""
    with pytest.raises(OptionValueError, match=r"output=.*No such file or directory"):
        Journal(tmp_path / "nowhere" / "run.jsonl", {})
    with pytest.raises(OptionValueError, match="a file, and not a folder"):
        Journal(tmp_path, {})


def test_a_disk_that_is_full_is_said_and_nothing_counts_as_done(path):
    """Here: a limit on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, SETTINGS) as journal:
        journal.add(("a",), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        try:
            with pytest.raises(OptionValueError, match=r"output=.*read and written \(File too large\)"):
                journal.add(("b",), 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not journal.done(("b",))
        journal.add(("c",), 3)  # room again
    with Journal(path, SETTINGS) as journal:
        assert (len(journal), journal["a",], journal["c",]) == (2, 1, 3)


def test_run_does_what_is_left(path):
    """Finished parts are not done again, and progress hears of all."""
    done, heard = [], []

    def part(number):
        return (("part", number), lambda: done.append(number) or number * 0.1)

    with Journal(path, SETTINGS) as journal:
        journal.run([part(0), part(1)])
    with Journal(path, SETTINGS) as journal:
        journal.run([part(number) for number in range(4)], heard.append)
        assert [journal["part", number] for number in range(4)] == [number * 0.1 for number in range(4)]
    assert done == [0, 1, 2, 3]
    assert heard == [("part", number) for number in range(4)]


def test_running_out_of_memory_keeps_finished_parts(path):
    """The message says where, what is kept, and what would help; torch's own allocator is understood."""

    def too_much():
        return torch.empty(1 << 60)

    with Journal(path, SETTINGS) as journal, pytest.raises(OutOfMemoryError) as caught:
        journal.run([(("small", 1), lambda: 1), (("large", 2), too_much)], advice="shorter contexts")
    assert str(caught.value) == (
        f"out of memory in large 2. 1 finished part is kept in {path}: the same command goes on there. "
        "What needs less: shorter contexts."
    )
    with Journal(path, SETTINGS) as journal:
        assert journal.done(("small", 1))
    with Journal(None, {}) as journal, pytest.raises(OutOfMemoryError, match="With --output FILE"):
        journal.run([(("large", 2), too_much)])


def test_other_errors_are_not_taken_for_it():
    """They pass as they are."""
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("the plugin failed"))

    def fails():
        raise RuntimeError("the plugin failed")

    with Journal(None, {}) as journal, pytest.raises(RuntimeError, match="the plugin failed"):
        journal.run([(("a",), fails)])
