"""Which teachers of an ensemble are meant, and with which weights."""

from __future__ import annotations

__all__ = ["Weights", "refuse_members", "selected_teachers"]

from collections.abc import Mapping, Sequence

from kdcache.errors import MergedCacheError, OptionError, UnknownTeacherError

Weights = Sequence[float] | Mapping[str, float]
"""Weights of teachers: in the order of the selected ones, or by name."""


def selected_teachers(
    known: tuple[str, ...], teachers: Sequence[str] | None, weights: Weights | None
) -> tuple[tuple[int, ...], Sequence[float] | None]:
    """Give the selected teachers' places in the ensemble, and their weights in the same order.

    Parameters
    ----------
    known : tuple of str
        Names of the ensemble's teachers.
    teachers : sequence of str, optional
        The selected ones. All where absent.
    weights : sequence of float, or mapping of teacher's name to float, optional
        A sequence is given back as it is.

    Raises
    ------
    OptionError
        A teacher is named twice, or `teachers` is a text.
    UnknownTeacherError
        A name in `teachers` or `weights` is not of this ensemble, or `weights` lacks a selected teacher.
    """
    names = known if teachers is None else _checked_names(teachers, known)
    indices = tuple(known.index(name) for name in names)
    if not isinstance(weights, Mapping):
        return indices, weights
    return indices, _weights_by_name(weights, names, known)


def refuse_members(members: tuple[str, ...], *, mean: str, weights: object, teachers: object) -> None:
    """Refuse, with a `MergedCacheError`, what a cache that keeps only the geometric mean of its members cannot give."""
    asked = {"weights": weights, "teachers": teachers}
    refused = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
    if mean != "geometric":
        refused.insert(0, f"mean={mean!r}")
    if refused:
        raise MergedCacheError(
            f"This cache keeps only the geometric mean of {', '.join(members)}; it cannot give "
            f"{' or '.join(refused)}. Leave that out, or build the cache without `merge` to keep the members apart."
        )


def _checked_names(teachers: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(teachers, str):
        raise OptionError(f"`teachers` is a sequence of names, got the text {teachers!r}; write [{teachers!r}].")
    names = tuple(teachers)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UnknownTeacherError(f"Unknown teachers {unknown} among {list(names)}; the ensemble has {list(known)}.")
    if len(set(names)) < len(names):
        raise OptionError(f"A teacher is named twice in {list(names)}; use `weights` to give it more weight.")
    return names


def _weights_by_name(weights: Mapping[str, float], names: tuple[str, ...], known: tuple[str, ...]) -> list[float]:
    if set(weights) != set(names):
        raise UnknownTeacherError(
            f"Weights are given for {sorted(weights)}, the selected teachers are {list(names)} of {list(known)}. "
            "Name exactly the selected teachers; a weight may be 0."
        )
    return [weights[name] for name in names]
