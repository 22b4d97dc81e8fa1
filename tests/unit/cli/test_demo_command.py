"""``kvquant demo``."""

import json

import pytest

SHORT = ("demo", "--prompt", "The function returns a list of " * 40, "--max-new-tokens", "8")


def test_texts_and_figures_side_by_side(kvquant):
    """Both texts, where they part, and a row of figures for each cache."""
    result = kvquant(*SHORT, "--backend", "hqq", "--residual-length", "0", "--nbits", "8,1")
    assert result.exit_code == 0
    for shown in ("full-precision cache", "hqq, 8 bits", "hqq, 1 bits", "parts here", "8 of 8", "8.6", "1.4"):
        assert shown in result.stdout
    assert "next token agrees" in result.stdout
    assert "torch" in result.stdout.splitlines()[0]


def test_json(kvquant):
    """All figures and both texts, and nothing else on standard output."""
    result = kvquant(*SHORT, "--nbits", "4", "--json")
    shown = json.loads(result.stdout)
    (one,) = shown["comparisons"]
    assert len(one["full"]["tokens"]) == len(one["forced"]) == 8
    assert one["quantized"]["bits_per_element"] == 4.5
    assert one["byte_ratio"] > 1
    assert shown["prompt_tokens"] > 200
    assert shown["machine"]["torch"]


def test_options_reach_the_cache(kvquant):
    """Group size and window, as the table shows them."""
    result = kvquant(*SHORT, "--nbits", "4", "--group-size", "32", "--residual-length", "16", "--json")
    (one,) = json.loads(result.stdout)["comparisons"]
    assert one["quantized"]["bits_per_element"] == 5.0
    assert (one["config"]["group_size"], one["config"]["residual_length"]) == (32, 16)


def test_a_prompt_from_a_file(kvquant, tmp_path):
    """Read as UTF-8."""
    path = tmp_path / "prompt.txt"
    path.write_text("The list is sorted, naïvely. " * 30, encoding="utf-8")
    assert kvquant("demo", "--prompt-file", str(path), "--max-new-tokens", "3", "--nbits", "4").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prompt", "a", "--prompt-file", __file__), 2, "--prompt and --prompt-file exclude each other."),
        (("--nbits", "four"), 2, "'four' is not a width or a list of widths such as 4 or 8,4,2"),
        (("--nbits", "5"), 2, "nbits=5 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."),
        (("--max-new-tokens", "0"), 2, "0 is not in the range"),
        (("--prompt", ""), 2, "prompt='' cannot work: expected some text."),
        (("--prompt-file", "nowhere.txt"), 2, "'nowhere.txt' does not exist"),
        (("--backend", "referense"), 1, "unknown backend 'referense'. Did you mean 'reference'"),
        (("--backend", "bitsandbytes", "--nbits", "3"), 2, "nbits=3 is not supported; supported: 4, 8"),
        (("--model", "./no/such/model"), 1, "cannot load the model './no/such/model': "),
        (("--max-new-tokens", "9999"), 2, "max_new_tokens=9999 cannot work: expected at most "),
        (("--device", "gpu"), 2, "device='gpu' cannot work: expected a torch device such as 'cpu' or 'cuda:0'."),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(kvquant, arguments, code, message):
    """2 for what could never work, 1 for what failed; no traceback."""
    result = kvquant("demo", *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
