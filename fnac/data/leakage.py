"""Clips that occur in training and in test. The published ``vggss_144k.txt`` has 3,715 of the 5,158 test clips."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from fnac.data.clip import some
from fnac.data.ids import commonest_form, comparable, example
from fnac.data.layout import read_ids

OnLeakage = Literal["error", "warn"]


class LeakageError(ValueError):
    """Clips that are tested on are also trained on."""


def shared_clips(first: Collection[str], second: Collection[str]) -> list[str]:
    """The ids of the second that are in both, in its order; VGG-Sound's seconds may have leading zeros or not."""
    lookup = set(map(comparable, first))
    return [name for name in second if comparable(name) in lookup]


def refuse_leakage(train: Collection[str], tested: Collection[str], what: str, on_leakage: OnLeakage = "error") -> None:
    """Raise :class:`LeakageError`, or warn, if any clip of ``tested`` (called ``what``) is in ``train``."""
    if not (shared := shared_clips(train, tested)):
        return
    message = f"{len(shared)} of the {len(tested)} {what} clips are also training clips: {some(shared)}"
    if on_leakage == "error":
        raise LeakageError(message)
    rank_zero_warn(message)


def check_leakage(train: str, test: str) -> None:
    """Tell whether two lists of clips share any.

    Args:
        train: list of clips: text with one id a line, csv with the id first (or ``id,second``, as in VGG-Sound's own
            list), or json annotations.
        test: another such list.

    Raises:
        LeakageError: they do.
        ValueError: they do not, but write ids differently, so that it says nothing about the clips.
    """
    train_ids, test_ids = read_ids(train), read_ids(test)
    refuse_leakage(train_ids, test_ids, f"{test}")
    if commonest_form(train_ids) != commonest_form(test_ids):
        raise ValueError(
            f"cannot tell whether {train} and {test} share clips: no id is in both, but ids are written differently, "
            f"{example(train_ids)!r} and {example(test_ids)!r}; they should have the same form, as clips of the same "
            "data set do"
        )
    print(f"no clip is in both: {len(train_ids)} in {train}, {len(test_ids)} in {test}")
