"""Collation: ids carried around a data collator that would not know what to do with them."""

from __future__ import annotations

__all__ = ["CollatesIds"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.errors import TransferSetError


@dataclass(frozen=True)
class CollatesIds:
    """A data collator that takes the ids out of the examples, collates the rest, and puts the ids into the batch.

    Attributes that it lacks are the wrapped collator's.

    Parameters
    ----------
    collate : callable (examples) -> batch
    key : str
        The entry of ids. Examples without it are collated as they are.
    """

    collate: Callable[[list[Any]], Any]
    key: str

    def __call__(self, examples: list[Any]) -> Any:
        """Collate examples; ids become an int64 tensor [example], or a list of str [example].

        Raises
        ------
        TransferSetError
            Ids are missing in some of the examples, or are neither all int nor all str.
        """
        has_id = [isinstance(example, Mapping) and self.key in example for example in examples]
        if not any(has_id):
            return self.collate(examples)
        if not all(has_id):
            raise TransferSetError(
                f"{has_id.count(False)} of {len(examples)} examples of a batch have no {self.key!r}; every example "
                "of a dataset needs its id"
            )
        ids = _ids([example[self.key] for example in examples], self.key)
        batch = self.collate([{name: example[name] for name in example if name != self.key} for example in examples])
        batch[self.key] = ids
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["collate"], name)


def _ids(values: list[Any], key: str) -> torch.Tensor | list[str]:
    plain: list[Any] = [value.item() if isinstance(value, torch.Tensor | np.generic) else value for value in values]
    if all(isinstance(value, str) for value in plain):
        return plain
    if all(isinstance(value, int) and not isinstance(value, bool) for value in plain):
        return torch.tensor(plain, dtype=torch.int64)
    kinds = sorted({type(value).__name__ for value in plain})
    raise TransferSetError(f"the ids under {key!r} are of types {kinds}; they must be all str or all int")
