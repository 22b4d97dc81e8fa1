"""Text in columns."""

from __future__ import annotations

from kvquant.cli.columns import columns, paragraph

ROWS = [
    ("NAME", "VERSION", "DISTRIBUTION", "AXES"),
    ("bitsandbytes", "0.1.0", "kvquant", "channel token"),
    ("mine", "12.0", "kvquant-plugin-of-mine", "token"),
]


def test_columns_line_up():
    """Each as wide as its widest cell, two spaces apart, nothing at the end of lines."""
    assert columns(ROWS, None) == [
        ["NAME          VERSION  DISTRIBUTION            AXES"],
        ["bitsandbytes  0.1.0    kvquant                 channel token"],
        ["mine          12.0     kvquant-plugin-of-mine  token"],
    ]


def test_cells_wrap_between_words_where_the_terminal_is_narrow():
    """The widest columns give way first."""
    assert columns(ROWS, 53) == [
        ["NAME          VERSION  DISTRIBUTION     AXES"],
        ["bitsandbytes  0.1.0    kvquant          channel token"],
        ["mine          12.0     kvquant-plugin-  token", "                       of-mine"],
    ]


def test_names_and_words_are_never_broken():
    """Names are there to be copied, so in the end a line is longer than the terminal."""
    assert columns(ROWS, 10) == [
        ["NAME          VERSION  DISTRIBUTION  AXES"],
        ["bitsandbytes  0.1.0    kvquant       channel", "                                     token"],
        [
            "mine          12.0     kvquant-      token",
            "                       plugin-of-",
            "                       mine",
        ],
    ]


def test_paragraphs_keep_words_whole():
    """So that a command in them can be copied."""
    text = "pip install 'kvquant-plugin-of-mine[a-long-extra]' now"
    assert paragraph(text, 30, "  ") == [
        "  pip install",
        "  'kvquant-plugin-of-mine[a-long-extra]'",
        "  now",
    ]
    assert paragraph(text, None, "  ") == [f"  {text}"]
