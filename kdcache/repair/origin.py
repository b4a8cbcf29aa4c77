"""The origin: the transfer set and the teachers that a cache was built from, asked for only where they are needed."""

from __future__ import annotations

__all__ = ["Origin"]

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from kdcache.build.builder import BuildProgress, build_cache, example_table
from kdcache.build.draft import PlanOptions, as_teachers, make_draft, propose_plan
from kdcache.build.executors import open_executor
from kdcache.documents import CacheDocument, InProcess, PlanDocument
from kdcache.errors import KdcacheError, PlanMismatchError
from kdcache.store import ExampleTable
from kdcache.transfer_set import TransferSet


@dataclass(frozen=True, eq=False)
class Origin:
    """What a cache was built from.

    Parameters
    ----------
    arguments : callable () -> dict
        Gives the arguments of `build_cache`, as far as they are known; called once, when something is to be built.
    command : str
        What a person runs in place of this.
    has_teachers, has_transfer_set : bool
        Whether there are any.
    """

    arguments: Callable[[], dict[str, Any]]
    command: str
    has_teachers: bool
    has_transfer_set: bool

    def table(self, cache: CacheDocument) -> ExampleTable:
        """Make the example table anew.

        Raises
        ------
        PlanMismatchError
            The transfer set is not the cache's.
        """
        transfer_set: TransferSet = self._arguments["transfer_set"]
        if transfer_set.digest() != cache.transfer_set_digest:
            raise PlanMismatchError(
                f"the transfer set has digest {transfer_set.digest()}, the cache's has {cache.transfer_set_digest}: it "
                "is another one, with other ids, labels, row counts or inputs. Nothing was changed. Give the one that "
                "the cache was built from"
            )
        return example_table(transfer_set)

    def refuse_others(self) -> None:
        """Refuse what a build would refuse as not the cache's, before anything is taken away.

        Raises
        ------
        PlanMismatchError
            Teachers, transfer set or options are not those of the plan that stands.
        """
        arguments = self._arguments
        try:
            make_draft(arguments["address"], arguments["transfer_set"], arguments["teachers"], self._options())
        except PlanMismatchError:
            raise
        except KdcacheError:  # of what is damaged, which is what the repair is about
            return

    def proposed_plan(self) -> PlanDocument:
        """Plan what is asked for as if nothing stood at the address."""
        options, members = self._options(), self._arguments["teachers"]
        teachers = as_teachers(members, device=options.device, autocast=options.autocast)
        return propose_plan(self._arguments["transfer_set"], teachers, [], options)

    def fitted(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """Run a stored teacher's pilot, and give the parameters that were fitted."""
        arguments = self._arguments
        draft = make_draft(arguments["address"], arguments["transfer_set"], arguments["teachers"], self._options())
        with open_executor(arguments.get("executor") or InProcess()) as executor:
            return executor.pilot(draft.work, name).parameters

    def build(self, on_progress: Callable[[BuildProgress], None] | None) -> None:
        """Build what is missing, by the ordinary way."""
        build_cache(**self._arguments, on_progress=on_progress)

    @functools.cached_property
    def _arguments(self) -> dict[str, Any]:
        return self.arguments()

    def _options(self) -> PlanOptions:
        beside = ("address", "transfer_set", "teachers", "executor")
        return PlanOptions(**{name: value for name, value in self._arguments.items() if name not in beside})
