"""lm-evaluation-harness, the real one, with the model that `kvquant.integrations.lm_eval` gives it."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import T5Config

from kvquant import QuantizedCache
from kvquant.demo import MODEL_DIR
from kvquant.errors import OptionValueError, UnknownBackendError, UnknownOptionError, UnsupportedError
from kvquant.integrations.lm_eval import KVQuantLM, __main__
from kvquant.integrations.lm_eval.arguments import split_arguments
from tests.integration.environment import ROOT

pytestmark = pytest.mark.slow

TASKS = "tests/integration/lm_eval_tasks"
NAMES = ["kvquant_passkey", "kvquant_passkey_choice", "kvquant_prose"]
MODEL = {"pretrained": str(MODEL_DIR), "dtype": "float32"}
TWO_BITS = {"backend": "reference", "nbits": 2}
#: Questions that are asked; two processes get two of them and one.
LIMIT = 3


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In the root of the repository, where the tasks find their data; what `datasets` keeps goes elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def evaluate(model: str, batch_size: int = 1, names: list[str] = NAMES, **arguments: Any) -> Any:
    """What the harness finds out, without looking through its own ten thousand tasks."""
    return lm_eval.simple_evaluate(
        model=model,
        model_args={**MODEL, **arguments},
        tasks=names,
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        limit=LIMIT,
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )


def responses(samples: list[Any]) -> list[Any]:
    """The answers to each question, in order; a process with fewer questions than others answers its last one again."""
    return [[given[0] for given in one["resps"]] for one in sorted(samples, key=lambda sample: sample["doc_id"])]


def scores(samples: list[Any]) -> list[float]:
    """The log-likelihoods of all questions; in files the harness writes them as texts."""
    answers = [answer for row in responses(samples) for answer in row]
    return [float(answer[0] if isinstance(answer, (list, tuple)) else answer) for answer in answers]


@pytest.fixture(scope="module")
def plain() -> Any:
    """The harness's own model, two questions at a time, of different lengths."""
    return evaluate("hf", batch_size=2)


@pytest.fixture(scope="module")
def quantized() -> Any:
    """Two bits, one question at a time."""
    return evaluate("kvquant", **TWO_BITS)


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("cache", [{"residual_length": 2048, **TWO_BITS}, {"cache": "full"}], ids=["window", "full"])
def test_what_is_not_quantised_is_what_the_harness_itself_says(plain: Any, cache: dict[str, Any]) -> None:
    """The same texts, padded batches and stops included; the same log-likelihoods up to rounding."""
    ours = evaluate("kvquant", batch_size=2, **cache)
    generation, *scored = NAMES
    assert responses(ours["samples"][generation]) == responses(plain["samples"][generation])
    for name in scored:
        assert scores(ours["samples"][name]) == pytest.approx(scores(plain["samples"][name]), rel=1e-4, abs=1e-3)
    assert ours["results"]["kvquant_passkey_choice"]["acc,none"] == 1


def test_tasks_really_go_through_the_quantised_cache(plain: Any, quantized: Any) -> None:
    """Every request fills a cache in which tokens are quantised, at the bits asked for, and scores say so."""
    told = quantized["config"]["kvquant"]
    assert (told["cache"], told["settings"]["nbits"]) == ("reference:2", 2)
    assert 2.25 < told["bits_per_element"] < 2.5  # scales in bytes, and what smoothing remembers of short texts
    assert told["caches"] == told["caches_that_quantized"] == LIMIT * (1 + 4 + 1)
    for name in NAMES[1:]:
        pairs = zip(scores(quantized["samples"][name]), scores(plain["samples"][name]), strict=True)
        assert all(abs(ours - theirs) > 1e-3 for ours, theirs in pairs)
    assert quantized["results"]["kvquant_passkey"]["exact_match,key"] == 1


def test_a_continuation_is_scored_as_if_it_were_generated() -> None:
    """Token by token behind the context's prefill, in a few lines of one's own; contexts that are shared do not mix."""
    options = {"residual_length": 32, "group_size": 16, **TWO_BITS}
    model = KVQuantLM(**MODEL, **options, device="cpu")
    tokens = model.tok_encode("The harbour lay still in the morning light, and nobody spoke of what had come. " * 9)
    asked = [(tokens[:120], tokens[120:180]), (tokens[:120], tokens[121:170]), (tokens[:120], tokens[7:8])]
    asked += [(tokens[:119], tokens[119:120]), (tokens[:119], tokens[3:4])]
    found = model._loglikelihood_tokens([(None, *pair) for pair in asked], disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(asked, found, strict=True):
        cache = QuantizedCache(config=model.config, **options)
        step, expected, first = context, 0.0, True
        for token in continuation:
            with torch.no_grad():
                logits = model.model(torch.tensor([step]), past_key_values=cache).logits[0, -1]
            expected += float(logits.log_softmax(-1)[token])
            first &= int(logits.argmax()) == token
            step = [token]
        assert cache.bits_per_element is not None
        assert total == pytest.approx(expected, rel=1e-5)
        assert greedy == first
    assert (model.caches, model.quantizing) == (4, 4)  # of the last two questions one pass answers both


def test_a_continuation_that_does_not_fit_is_refused() -> None:
    """The context is cut from the left, as the harness does; of what is scored nothing can be."""
    model = KVQuantLM(**MODEL, **TWO_BITS, device="cpu", max_length=16)
    cut, whole = model._loglikelihood_tokens([(None, [*range(9, 60)], [5, 6]), (None, [*range(45, 60)], [5, 6])])
    assert cut == whole
    with pytest.raises(OptionValueError, match=r"max_length=16 cannot work: expected at least 17"):
        model._loglikelihood_tokens([(None, [5], [*range(17)])])


def test_transformers_own_quantised_cache_through_the_same_class() -> None:
    """For a side-by-side; its bits are measured too."""
    told = evaluate("kvquant", names=NAMES[:1], cache="transformers:hqq:4:q_group_size=32")["config"]["kvquant"]
    assert told["settings"]["kind"] == "transformers"
    assert told["caches_that_quantized"] == LIMIT
    assert 4 < told["bits_per_element"] <= 6


@pytest.mark.parametrize(
    ("context", "answer", "says"),
    [
        ([*range(9)], [5, 6], "reference:2: nothing was quantised, because every text fits in the full-precision win"),
        ([*range(300)], [5], "reference:2: every answer that was scored has one token, which comes out of the prefill"),
        ([*range(300)], [5, 6], ""),
    ],
)
def test_scores_that_are_those_of_full_precision_say_so(
    context: list[int], answer: list[int], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a user would take them for those of two bits."""
    model = KVQuantLM(**MODEL, **TWO_BITS)  # on a device that is there
    model._loglikelihood_tokens([(None, context, answer)], disable_tqdm=True)
    with caplog.at_level(logging.WARNING):
        told = model.get_model_info()["kvquant"]
    assert (told["caches"], told["caches_that_quantized"]) == (1, len(context) // 300)
    assert (told["scored_tokens"], told["scored_through_the_cache"]) == (len(answer), len(answer) - 1)
    warned = [record.message for record in caplog.records if record.name.startswith("kvquant")]
    assert says in "".join(warned)
    assert len(warned) == bool(says)


# ------------------------------------------------------------------------------------------------ several processes


#: The module's command line, without looking through the harness's own tasks.
SCRIPT = """
import functools
import lm_eval.tasks
from kvquant.integrations.lm_eval.__main__ import main
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
main()
"""


def test_two_machines_share_the_work(quantized: Any, tmp_path: Path) -> None:
    """Two launchers of accelerate with a process each: every question is answered once, and the results are those of
    one process. (The harness itself numbers processes on their own machine: both would be the first.)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = "-m accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --same_network "
    launch += f"--main_process_ip 127.0.0.1 --main_process_port {port} --mixed_precision no --dynamo_backend no"
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    command = [
        *(str(script), "run", "--model", "kvquant", "--include_path", TASKS),
        *("--model_args", ",".join(f"{name}={value}" for name, value in {**MODEL, **TWO_BITS}.items())),
        *("--tasks", ",".join(NAMES), "--limit", str(LIMIT), "--log_samples", "--output_path", str(tmp_path / "out")),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    settings = {**os.environ, **offline, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"machine{number}.log" for number in range(2)]
    machines = []
    for number, log in enumerate(logs):
        arguments = [sys.executable, *launch.split(), "--machine_rank", str(number), *command]
        with log.open("w") as file:
            machines.append(subprocess.Popen(arguments, env=settings, stdout=file, stderr=subprocess.STDOUT))
    codes = [machine.wait(timeout=240) for machine in machines]
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert (found["config"]["kvquant"]["processes"], found["config"]["kvquant"]["caches"]) == (2, 2 * (1 + 4 + 1))
    for name in NAMES:
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_2*.jsonl")  # and a date
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        assert [sample["doc_id"] for sample in samples] == [0, 2, 1]  # of the first process, then of the second
        if name == "kvquant_passkey":
            assert responses(samples) == responses(quantized["samples"][name])
        else:
            assert scores(samples) == pytest.approx(scores(quantized["samples"][name]), rel=1e-6)
        for metric, value in quantized["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found["results"][name][metric] == pytest.approx(value)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("typed", "label", "options"),
    [
        ({"backend": "hqq", "nbits": 2}, "hqq:2", {"backend": "hqq", "nbits": 2}),
        ({}, "reference:4", {"backend": "reference", "nbits": 4}),
        ({"preset": "kivi-2", "sink_length": 4}, "kivi-2:sink_length=4", {"nbits": 2, "group_size": 32}),
        ({"preset": "kivi-2", "backend": "hqq"}, "kivi-2:backend=hqq", {"backend": "hqq", "residual_length": 128}),
        ({"nbits_key": 8, "q_group_size": 32}, "reference:4:nbits_key=8:group_size=32", {"group_size": 32}),
        ({"cache_device": "cpu"}, "reference:4:device=cpu", {"device": "cpu"}),
        ({"layers": {"0": {"nbits": 8}}}, "reference:4:layers={'0':{'nbits':8}}", {"layers": {"0": {"nbits": 8}}}),
        ({"backend": "hqq", "options": '{"optimize": false}'}, None, {"options": {"optimize": False}}),
        ({"skip_layers": -1.0}, "reference:4:skip_layers=-1", {"skip_layers": [-1]}),  # the harness's own float
        ({"axis_value": "channel", "check_finite": False}, None, {"axis_value": "channel", "check_finite": False}),
        ({"cache": "full"}, "full", {}),
        ({"cache": "hqq:2:group_size=32"}, "hqq:2:group_size=32", {"backend": "hqq", "group_size": 32}),
        ({"cache": "transformers:hqq:4"}, "transformers:hqq:4", {"backend": "hqq", "nbits": 4}),
    ],
)
def test_the_cache_among_the_arguments(typed: dict[str, Any], label: str | None, options: dict[str, Any]) -> None:
    """Options of `CacheConfig` under their own names, a preset, or a cache as ``kvquant eval`` writes it."""
    theirs = {"pretrained": "model", "dtype": "float32", "device": "cpu", "max_length": 512, "device_map": "auto"}
    cache, others = split_arguments({**theirs, **typed})
    assert others == theirs
    assert label in (None, cache.label)
    assert {name: cache.settings()[name] for name in options} == options


@pytest.mark.parametrize(
    ("typed", "error", "says"),
    [
        ({"nbit": 2}, UnknownOptionError, r"unknown model argument 'nbit'. Did you mean 'nbits'"),
        ({"backend": "hqqq"}, UnknownBackendError, r"unknown backend 'hqqq'. Did you mean 'hqq'"),
        ({"backend": "causal"}, UnknownBackendError, "unknown backend 'causal'"),
        ({"nbits": 5}, OptionValueError, "nbits=5 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8"),
        ({"backend": "quanto", "nbits": 3}, UnsupportedError, "backend 'quanto' cannot be used"),
        ({"preset": "kivi2"}, UnknownOptionError, "unknown preset 'kivi2'. Did you mean 'kivi-2'"),
        ({"cache": "hqq:2", "nbits": 4}, OptionValueError, "all in one, without nbits beside it"),
        ({"cache": "hqq:4:2"}, OptionValueError, "cache='hqq:4:2' cannot work: expected one cache"),
        ({"cache": "full,hqq:2"}, OptionValueError, "cache='full,hqq:2' cannot work: expected one cache"),
        ({"cache": "hqq:2:x"}, OptionValueError, "cache='hqq:2:x' cannot work: expected BACKEND"),
        ({"cache": "transformers:quanto:3"}, OptionValueError, "cache='transformers:quanto:3' cannot work"),
        ({"pretrained": None}, OptionValueError, "pretrained=None cannot work: expected the name or the folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    typed: dict[str, Any], error: type[Exception], says: str
) -> None:
    """In kvquant's words. There is no such model, and that is never noticed."""
    with pytest.raises(error, match=says):
        KVQuantLM(**{"pretrained": "no/such-model", **typed})


def test_what_does_not_fit_the_model_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    """There are none in the folder."""
    shutil.copy(MODEL_DIR / "config.json", tmp_path)
    with pytest.raises(UnsupportedError, match="group_size=48 does not divide head_dim=64"):
        KVQuantLM(str(tmp_path), device="cpu", group_size=48)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"an encoder-decoder \(t5\), and kvquant evaluates decoders alone"):
        KVQuantLM(str(tmp_path), device="cpu")


# ------------------------------------------------------------------------------------------------ the command line


def typed(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    """Run the module's command line, without looking through the harness's own tasks."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    command = f"lm-eval run --model kvquant --tasks kvquant_passkey --include_path {TASKS} --limit 1 --device cpu"
    monkeypatch.setattr(sys, "argv", [*command.split(), *arguments.split()])
    __main__.main()


def test_the_harness_s_own_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the model in it, under the name and with the arguments that its documentation gives."""
    typed(monkeypatch, f"--model_args pretrained={MODEL_DIR},dtype=float32,backend=hqq,nbits=2")
    table = capsys.readouterr().out
    assert "'backend': 'hqq', 'nbits': 2" in table
    row = next(line for line in table.splitlines() if "exact_match" in line)
    assert [cell.strip() for cell in row.split("|")][1:8] == [
        "kvquant_passkey",
        "1",
        "key",
        "0",
        "exact_match",
        "↑",
        "1",
    ]


def test_an_error_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And the exit code of bad usage; a traceback where it is asked for."""
    with pytest.raises(SystemExit) as stopped:
        typed(monkeypatch, f"--model_args pretrained={MODEL_DIR},backend=hqq,nbits=7")
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "Error: nbits=7 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."
    monkeypatch.setenv("KVQUANT_DEBUG", "1")
    with pytest.raises(OptionValueError):
        typed(monkeypatch, f"--model_args pretrained={MODEL_DIR},backend=hqq,nbits=7")


def test_without_the_harness_it_says_what_brings_it() -> None:
    """In a process that cannot import it."""
    code = "import sys; sys.modules['lm_eval'] = None; import kvquant.integrations.lm_eval"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = result.stderr.splitlines()[-1]
    assert last.endswith(
        "this needs lm-evaluation-harness, which is not installed. Run: pip install 'kvquant[lm-eval]'"
    )
