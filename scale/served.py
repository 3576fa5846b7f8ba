"""What may be asked of a student: the steps and the embedded guidance that it was trained for, or others by force."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """What messages call the three: they are arguments of a call, or options of a command."""

    steps: str = "num_inference_steps"
    guidance: str = "guidance_scale"
    force: str = "force=True"


CALL, COMMAND = Words(), Words("--nfe", "--guidance", "--force")


def steps_of(trained: int, asked: int | None, force: bool, *, elastic: bool, words: Words = CALL) -> int:
    """Network evaluations: as many as the student was `trained` for or, where students are elastic, more.

    asked: None for the trained ones.  `ValueError` for others, unless by force.
    """
    steps = trained if asked is None else asked
    if not force and (steps < trained or (steps > trained and not elastic)):
        raise ValueError(
            f"{words.steps} must be {trained}{' or more' if elastic else ''} for this adapter, got {steps}; "
            f"{words.force} tries it all the same"
        )
    return steps


def guidance_of(trained: float | None, asked: float | None, force: bool, *, words: Words = CALL) -> float | None:
    """The embedded scale, which is the `trained` one unless by force; None where none is embedded.

    asked: None for the trained one.  `ValueError` for others, and for any but 1 where none is embedded.
    """
    if trained is None:
        if asked not in (None, 1):
            raise ValueError(f"{words.guidance} must be 1, got {asked}: this network embeds no guidance; leave it out")
        return None
    if asked is None or asked == trained or force:
        return trained if asked is None else asked
    raise ValueError(
        f"{words.guidance} must be {trained}, which the adapter was trained for, got {asked}; "
        f"{words.force} tries it all the same"
    )
