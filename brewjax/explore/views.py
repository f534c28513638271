"""What a notebook shows: a prompt in colours, its tokens, and bars. HTML without scripts."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.data.text.prompt import Prompt
from brewjax.data.text.tokenizer import Tokenizer
from pallas_kernels.token_labels import TokenLabels, dense_mask

PieceKind = Literal["preamble", "event", "question"]
# Translucent, so that they are readable on white and on black.
COLOURS: dict[str, str] = {
    "preamble": "rgba(168,104,201,.22)",
    "event": "rgba(59,130,196,.22)",
    "question": "rgba(217,130,43,.25)",
}
BOX = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
SHOWN = 40  # questions of a prompt that a notebook shows


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a prompt.

    Attributes:
      kind: "preamble", "event" or "question".
      text: what the model reads.
      tokens: how many.
      attends: what the piece attends to, in words.
    """

    kind: PieceKind
    text: str
    tokens: int
    attends: str


@dataclasses.dataclass(frozen=True, repr=False)
class PromptView:
    """A prompt as the model reads it.

    Attributes:
      prompt, encoded: the prompt, as text and as tokens.
      dropped: a line for each event that the token budget left out.
    """

    prompt: Prompt
    encoded: EncodedPrompt
    dropped: Sequence[str] = ()

    def pieces(self) -> list[Piece]:
        """The pieces in the order of the prompt."""
        kinds: list[PieceKind] = ["preamble"]
        kinds += ["event"] * len(self.prompt.events)
        kinds += ["question"] * len(self.prompt.questions)
        questions = [question.heading + question.text for question in self.prompt.questions]
        texts = [self.prompt.preamble, *self.prompt.events, *questions]
        sizes = [len(piece) for piece in [*self.encoded.prefix_pieces, *self.encoded.questions]]
        mask = self.attention()
        return [
            Piece(kind, text, size, _describe_row(mask[index], index, len(self.prompt.events)))
            for index, (kind, text, size) in enumerate(zip(kinds, texts, sizes, strict=True))
        ]

    def attention(self) -> np.ndarray:
        """bool [pieces, pieces]: whether the last token of a piece attends to the first token of another."""
        sizes = np.array([len(piece) for piece in [*self.encoded.prefix_pieces, *self.encoded.questions]])
        ends = np.cumsum(sizes)
        arrays = self.encoded.arrays
        labels = TokenLabels(np.ones(len(self.encoded), np.int32), arrays["piece_id"], arrays["visibility"])
        last, first = ends - 1, ends - sizes
        queries, keys = (TokenLabels(*(field[at] for field in labels)) for at in (last, first))
        return np.asarray(dense_mask(queries, keys, last, first))

    def __repr__(self) -> str:
        return self.prompt.render()

    def _repr_html_(self) -> str:
        pieces = self.pieces()
        spans = [
            f'<span title="{html.escape(piece.attends)}; {piece.tokens} tokens" '
            f'style="background:{COLOURS[piece.kind]}">{html.escape(piece.text)}</span>'
            for piece in pieces[: 1 + len(self.prompt.events) + SHOWN]
        ]
        hidden = len(pieces) - len(spans)
        more = f"<p>and {hidden} more questions</p>" if hidden else ""
        legend = " ".join(
            f'<span style="background:{colour};padding:0 .4em">{kind}</span>' for kind, colour in COLOURS.items()
        )
        counts = f"{self.encoded.prefix_length} tokens before the questions, {len(self.encoded):,} in all"
        reads = {piece.kind: f"{piece.kind}: {piece.attends}" for piece in pieces}  # the last piece of each kind
        dropped = "".join(f"<li>{html.escape(line)}</li>" for line in self.dropped)
        left_out = f"<p>Left out by the token budget:</p><ul>{dropped}</ul>" if dropped else ""
        return (
            f"<p>{legend} {counts}</p><div style='{BOX}'>{''.join(spans)}</div>{more}"
            f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in reads.values())}</ul>{left_out}"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class TokensView:
    """A prompt as tokens: where one ends and the next begins, with ids."""

    prompt: Prompt
    encoded: EncodedPrompt
    tokenizer: Tokenizer

    def rows(self) -> Iterator[tuple[int, str, int]]:
        """The piece, the text and the id of each token."""
        for number, piece in enumerate([*self.encoded.prefix_pieces, *self.encoded.questions]):
            for token in piece:
                yield number, str(self.tokenizer.hf.decode([token])), token

    def __len__(self) -> int:
        return len(self.encoded)

    def __repr__(self) -> str:
        return "".join("|" + text for _, text, _ in self.rows())

    def _repr_html_(self) -> str:
        colours = [*COLOURS.values()]
        spans = [
            f'<span title="{token}" style="background:{colours[index % 2]}">{html.escape(text)}</span>'
            for index, (_, text, token) in enumerate(self.rows())
        ]
        return f"<p>{len(self):,} tokens; point at one for its id</p><div style='{BOX}'>{''.join(spans)}</div>"


def _describe_row(mask: np.ndarray, index: int, num_events: int) -> str:
    """What a piece attends to, of the pieces before it: preamble, then events, then questions."""
    if index == 0:
        return "attends to itself"
    names = ["itself"] + (["the preamble"] if mask[0] else [])
    events = int(mask[1 : min(index, num_events + 1)].sum())
    before = min(index - 1, num_events)
    if events:
        names.append(f"all {events} events before it" if events == before else f"{events} events")
    elif before:
        names.append("no event")
    questions = int(mask[num_events + 1 : index].sum())
    if index > num_events + 1:
        names.append(f"{questions} questions" if questions else "no other question")
    return "attends to " + ", ".join(names)


def bars_html(summary: str, rows: Iterable[tuple[str, str, float | None]], dropped: Sequence[str]) -> str:
    """Bars to the left (against) and right (for) of zero.

    Args:
      summary: above the bars.
      rows: kind, text and effect of each part; None for an effect within noise.
      dropped: the events that the token budget left out.
    """
    rows = list(rows)
    largest = max([abs(effect) for _, _, effect in rows if effect is not None], default=1.0)
    cells = []
    for kind, text, effect in rows:
        width = 0 if effect is None else abs(effect) / largest * 100
        colour = COLOURS["event"] if (effect or 0) > 0 else COLOURS["question"]
        shown = "none" if effect is None else f"{effect:+.3f}"
        cells.append(
            f"<tr><td>{kind}</td><td style='text-align:left'>{html.escape(text)}</td>"
            f"<td style='text-align:right'>{shown}</td>"
            f"<td style='width:12em'><div style='background:{colour};width:{width:.0f}%'>&nbsp;</div></td></tr>"
        )
    left_out = "".join(
        f"<tr><td>dropped</td><td style='text-align:left'>{html.escape(line)}</td></tr>" for line in dropped
    )
    head = "<tr><th>part</th><th></th><th>log-odds</th><th></th></tr>"
    return f"<p>{html.escape(summary)}</p><table>{head}{''.join(cells)}{left_out}</table>"


def facts_html(title: str, facts: Iterable[tuple[str, str]], details: str = "") -> str:
    """A title and a table of names and values, and HTML behind a fold."""
    rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{html.escape(v)}</td></tr>" for n, v in facts)
    fold = f"<details><summary>Weights</summary>{details}</details>" if details else ""
    return f"<b>{html.escape(title)}</b><table>{rows}</table>{fold}"
