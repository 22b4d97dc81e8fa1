"""Reading LongBench's files as they are published."""

import json

import pytest

from kvquant.errors import MalformedLineError, OptionValueError, UnknownOptionError
from kvquant.evaluation.longbench.data import SAMPLE_DIR, present_tasks, read_tasks
from kvquant.evaluation.longbench.tasks import TASKS, bucket_of, parse_tasks

ROW = {"input": "Who?", "context": "Ann did.", "answers": ["Ann"], "length": 3, "all_classes": None, "_id": "x1"}


def folder(path, *, lines=None, task="hotpotqa", data="data", config="config", prompt="{context} {input}", length=8):
    """Write a folder with one task: lines are objects, or bytes as they are."""
    for inner in (data, config):
        (path / inner).mkdir(exist_ok=True)
    lines = [ROW] if lines is None else lines
    encoded = (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines)
    (path / data / f"{task}.jsonl").write_bytes(b"".join(line + b"\n" for line in encoded))
    base = TASKS[task].base
    (path / config / "dataset2prompt.json").write_text(json.dumps({base: prompt}))
    (path / config / "dataset2maxlen.json").write_text(json.dumps({base: length}))
    return path


def read(path, task="hotpotqa", limit=None):
    return read_tasks(path, (TASKS[task],), limit)[0]


@pytest.mark.parametrize(("data", "config"), [("data", "config"), (".", "."), ("data", "."), (".", "config")])
def test_files_lie_in_the_folder_or_as_they_were_published(tmp_path, data, config):
    """The archive has a folder data, the repository a folder config."""
    found = read(folder(tmp_path, data=data, config=config))
    (row,) = found.rows
    assert (row.name, row.number, row.answers, row.classes, row.length) == ("x1", 0, ("Ann",), (), 3)
    assert found.prompt_of(row) == "Ann did. Who?"
    assert found.generated == 8
    assert present_tasks(tmp_path) == (TASKS["hotpotqa"],)


def test_a_line_ends_in_a_line_feed_alone(tmp_path):
    """Texts hold other signs at which Python breaks lines."""
    context = "one\u2028two\x0bthree\x85four\r"
    assert read(folder(tmp_path, lines=[{**ROW, "context": context}] * 2)).rows[1].fields["context"] == context


def test_the_first_questions_of_a_file(tmp_path):
    """As many as asked for; what is behind them is not read."""
    rows = read(folder(tmp_path, lines=[ROW, {**ROW, "_id": "x2"}, b"{broken"]), limit=2).rows
    assert [row.name for row in rows] == ["x1", "x2"]


def test_prompts_and_lengths_of_longbench_e_are_those_of_the_task(tmp_path):
    """Its files have a name of their own."""
    found = read(folder(tmp_path, task="hotpotqa_e"), "hotpotqa_e")
    assert found.task.by_length
    assert found.prompt == "{context} {input}"


@pytest.mark.parametrize(("length", "bucket"), [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (8000, "8k+")])
def test_buckets_of_longbench_e(length, bucket):
    """By words."""
    assert bucket_of(length) == bucket


@pytest.mark.parametrize(
    ("line", "task", "problem"),
    [
        (b'{"input": ', "hotpotqa", "not JSON in UTF-8, where LongBench has a question"),
        (b'{"input": "\xff"}', "hotpotqa", "not JSON in UTF-8"),
        (b"", "hotpotqa", "not JSON in UTF-8"),
        (b"[1]", "hotpotqa", "no JSON object, where LongBench has a question"),
        ({**ROW, "context": None}, "hotpotqa", "no text as 'context', which every question of LongBench has"),
        ({**ROW, "answers": "Ann"}, "hotpotqa", "no list of texts as 'answers', the true ones"),
        ({**ROW, "answers": []}, "hotpotqa", "no list of texts as 'answers'"),
        (ROW, "trec", "no list of texts as 'all_classes', which trec is scored by"),
        ({**ROW, "length": "3"}, "hotpotqa_e", "no number as 'length', by which the scores of hotpotqa_e are told"),
        (ROW, "passage_retrieval_en", "an answer that is no 'Paragraph 1', 'Paragraph 2', ..., as those of passage_re"),
    ],
)
def test_a_line_that_is_no_question(tmp_path, line, task, problem):
    """Named by its file and its number."""
    good = {**ROW, "answers": ["Paragraph 3"], "all_classes": ["Ann"]}
    folder(tmp_path, task=task, lines=[good, line, good])
    with pytest.raises(MalformedLineError, match=rf"{task}\.jsonl, line 2: {problem}") as caught:
        read(tmp_path, task)
    assert caught.value.line == 2


def test_a_folder_that_is_not_there_or_has_no_task(tmp_path):
    """What it must look like, and where the files come from, is said."""
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(OptionValueError, match=r"expected a folder with LongBench's files: .*data\.zip"):
            present_tasks(path)
    with pytest.raises(OptionValueError, match="a folder with LongBench's files"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["dataset2prompt.json", "dataset2maxlen.json", "hotpotqa.jsonl"])
def test_a_file_that_is_missing(tmp_path, name):
    """By its name."""
    folder(tmp_path, data=".", config=".")
    (tmp_path / name).unlink()
    with pytest.raises(OptionValueError, match=rf"expected {name} in it; it is a folder with"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": 3}, r"a text as the prompt of hotpotqa in dataset2prompt\.json"),
        (
            {"prompt": "{contxt}"},
            r"a prompt of hotpotqa in dataset2prompt\.json that is made of \{input\}, \{context\}",
        ),
        ({"prompt": "{context"}, "a prompt of hotpotqa"),
        ({"prompt": "{context.x}"}, "a prompt of hotpotqa"),
        ({"length": 0}, r"a number of tokens for hotpotqa in dataset2maxlen\.json"),
        ({"length": "32"}, "a number of tokens for hotpotqa"),
        ({"lines": []}, "a question, and the file is empty"),
    ],
)
def test_prompts_and_lengths_that_cannot_work(tmp_path, changed, message):
    """Before a model is loaded."""
    with pytest.raises(OptionValueError, match=message):
        read(folder(tmp_path, **changed))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_config_that_is_none(tmp_path, content):
    """Broken, of another kind, or without the task."""
    path = folder(tmp_path) / "config" / "dataset2maxlen.json"
    path.write_text(content)
    with pytest.raises(
        OptionValueError, match=r"dataset2maxlen\.json' cannot work: expected (JSON|a JSON object|an entry)"
    ):
        read(tmp_path)


def test_settings_tell_other_questions_and_prompts_apart(tmp_path):
    """A run goes on with the same ones only."""
    found = [
        read(folder(tmp_path, **changed)).settings()
        for changed in (
            {},
            {},
            {"prompt": "{input}"},
            {"lines": [{**ROW, "context": "Bob did."}]},
            {"lines": [ROW, ROW]},
        )
    ]
    assert found[0] == found[1]
    assert len({one["content"] for one in found}) == 4


def test_tasks_as_they_are_typed():
    """In the order typed; a misspelt one is answered with what it may mean."""
    assert [task.name for task in parse_tasks("trec, samsum_e")] == ["trec", "samsum_e"]
    with pytest.raises(UnknownOptionError, match=r"unknown task 'hotpot_qa'. Did you mean 'hotpotqa'"):
        parse_tasks("trec,hotpot_qa")
    for text in ("trec,trec", "", "trec,"):
        with pytest.raises(OptionValueError, match="expected names separated by commas, each once"):
            parse_tasks(text)


def test_all_english_and_code_tasks_are_known():
    """16 of LongBench, 13 of them in LongBench-E as well."""
    names = [name for name, task in TASKS.items() if not task.by_length]
    assert len(names) == 16
    assert len(TASKS) == 29
    assert [name for name in names if not TASKS[name].chat] == ["trec", "triviaqa", "samsum", "lcc", "repobench-p"]
    assert [name for name in TASKS if TASKS[name].one_line] == ["samsum", "samsum_e"]


def test_the_sample_ships():
    """In the package's own folder, in the published format."""
    for data in read_tasks(SAMPLE_DIR, present_tasks(SAMPLE_DIR)):
        assert len(data.rows) == 3
        assert {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"} == {
            *data.rows[0].fields
        }
