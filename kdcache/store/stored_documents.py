"""The documents of a whole cache: its plans, the cache document in the root group, and the completion document."""

from __future__ import annotations

__all__ = ["StoredDocuments"]

from typing import Self

from kdcache.documents import CacheDocument, CompleteDocument, PlanDocument, differences
from kdcache.errors import CacheNotFoundError, PlanMismatchError
from kdcache.store import arrays, layout
from kdcache.store.files import ATTRIBUTE, CacheFiles
from kdcache.store.objects import Objects
from kdcache.store.place import Place


class StoredDocuments:
    """What one cache says of itself as a whole.

    Parameters
    ----------
    objects : Objects
        Where the parts are kept.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._files = CacheFiles(objects)
        self._told: CacheDocument | None = None

    def told(self, cache_document: CacheDocument) -> Self:
        """Give the store of a cache whose root cannot be read, and whose document is known from elsewhere."""
        store = type(self)(self._objects)
        store._told = cache_document  # noqa: SLF001 - its own kind
        return store

    @property
    def address(self) -> str:
        """The cache's address."""
        return self._objects.address

    @property
    def objects(self) -> Objects:
        """Where the parts are kept."""
        return self._objects

    def plans(self) -> list[PlanDocument]:
        """Read all plans, oldest first; the last is in force.

        Raises
        ------
        DocumentError
            A plan's file breaks its schema.
        """
        plans: list[PlanDocument] = []
        while (plan := self.plan(len(plans))) is not None:
            plans.append(plan)
        return plans

    def plan(self, index: int) -> PlanDocument | None:
        """Read a plan by its number; None where there is none.

        Raises
        ------
        DocumentError
            The plan's file breaks its schema.
        """
        return self._files.read_document(PlanDocument, layout.plan_key(index))

    def publish_plan(self, index: int, plan: PlanDocument) -> bool:
        """Store a plan unless one with this number stands; True when this one was stored."""
        return self._objects.publish(layout.plan_key(index), plan.to_json())

    def write_root(self, cache_document: CacheDocument) -> None:
        """Store the root group with the cache document, and the groups below it.

        Raises
        ------
        PlanMismatchError
            The root stands already and describes another cache; both sides are shown.
        """
        metadata = arrays.group_metadata({ATTRIBUTE: cache_document.to_mapping()})
        if not self._objects.publish(layout.ROOT, arrays.to_json(metadata)):
            standing = self.cache_document()
            if standing != cache_document:
                raise PlanMismatchError(_mismatch(self._files.place(layout.ROOT), cache_document, standing))
        for group in layout.GROUPS:
            self._files.publish_json(layout.metadata_key(group), arrays.group_metadata({}))

    def cache_document(self) -> CacheDocument:
        """Read the cache document.

        Raises
        ------
        CacheNotFoundError
            Nothing stands at the address.
        DocumentError
            The root group or the document in it breaks its schema.
        """
        document = self._told or self._files.read_group_document(CacheDocument, "")
        if document is None:
            raise CacheNotFoundError(
                f"{self.address} holds no cache: {layout.ROOT} is not there. Check the address, or build a cache there "
                "with kdcache.build_cache or `kdcache build`."
            )
        return document

    def complete(self) -> CompleteDocument | None:
        """Read the completion document; None while the cache is not complete."""
        return self._files.read_document(CompleteDocument, layout.COMPLETE)

    def replace_complete(self, document: CompleteDocument) -> None:
        """Store the completion document, in place of an earlier one where a teacher was added."""
        self._objects.replace(layout.COMPLETE, document.to_json())

    def consolidate(self) -> None:
        """Gather the metadata of all groups and arrays in the root's, so that Zarr readers need list nothing.

        To be run again after a teacher was added: readers that use the consolidated metadata see nothing else.
        """
        place = self._files.place(layout.ROOT)
        root = self._files.read_json(place)
        if root is None:
            raise place.corrupt("the root group is missing")
        self._objects.replace(
            layout.ROOT, arrays.to_json(arrays.consolidated_metadata(root, dict(self._files.read_nodes())))
        )


def _mismatch(place: Place, ours: CacheDocument, theirs: CacheDocument) -> str:
    lines = "\n".join(
        f"  {path}: this plan {left!r}, the cache {right!r}"
        for path, left, right in differences(ours.to_mapping(), theirs.to_mapping())
    )
    return f"{place} describes another cache:\n{lines}\nNothing was changed. Build at another address."
