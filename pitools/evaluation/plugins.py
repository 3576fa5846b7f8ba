"""Names of extractors and scorers: `NAME` or `NAME:ARGUMENT` of an installed one, or `MODULE:FUNCTION` of anybody's.

An installed one is an entry point of the group `pitools.extractors` or `pitools.scorers`, a function
`(argument, device) -> extractor or scorer`; the argument is "" where there is none.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import entry_points
from typing import Any

import torch


def named(kind: str, group: str, name: str, device: torch.device | str = "cpu") -> Any:
    """What `name` means: made for `device` where it is installed in `group`, else a function as it is.

    kind: what messages call it.  A module is one that is installed or lies in the current folder.
    Raises `ValueError` for a name that means nothing, and what an installed one raises of its argument; `ImportError`
    for an installed one that lacks what it needs.
    """
    installed = {entry.name: entry for entry in entry_points(group=group)}
    head, _, rest = name.partition(":")
    if head in installed:
        try:
            make = installed[head].load()
        except ImportError as error:
            raise ImportError(f'the {kind} {head} needs more ({error}): run `pip install "pitools[scale]"`') from error
        return make(rest, torch.device(device))
    if not head or not rest:
        known = ", ".join(sorted(installed)) or "none"
        raise ValueError(f'a {kind} is named as "MODULE:FUNCTION", got {name!r}; installed ones: {known}')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(head)
    except Exception as error:  # whatever a user's file does
        raise ValueError(f"the {kind}'s module {head!r} cannot be imported: {error}") from error
    found = getattr(module, rest, None)
    if not callable(found):
        instead = "" if found is None else f", but a value of type {type(found).__name__}"
        raise ValueError(f"the {kind}'s module {head!r} has no function {rest!r}{instead}")
    return found
