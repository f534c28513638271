from __future__ import annotations

import io

import numpy as np
import pytest

from brewjax.console import bold, plain_console, print_ranking, track

ODD = ["[/applied]", "[applied]", "a [old] path", ":fire:", "[bold red]x[/]", "[link=http://x]"]


def printed(*renderables: object) -> str:
    file = io.StringIO()
    for renderable in renderables:
        plain_console(file=file, width=200).print(renderable)
    return file.getvalue()


@pytest.mark.parametrize("text", ODD)
def test_text_is_printed_as_it_is(text):
    assert printed(text) == text + "\n"
    assert printed(bold(text, text)) == text + text + "\n"


def test_a_ranking_shows_names_and_labels_as_they_are():
    file = io.StringIO()
    console = plain_console(file=file, width=200)
    print_ranking(console, np.full((len(ODD), 2), 0.5), ["[Yes]", "[/No]"], np.array([1, 0]), ODD, 10)
    assert all(name in file.getvalue() for name in [*ODD, "P([Yes])", "P([/No])"])


@pytest.mark.parametrize("text", ODD)
def test_a_progress_bar_takes_any_description(text):
    assert list(track([1, 2], text)) == [1, 2]
