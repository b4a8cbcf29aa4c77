"""Mending: what a plan says, in an order that leaves no cache that reads wrong, wherever it stops.

The steps, and what a process that dies within or after each leaves behind. From every one, the same repair, run again,
goes on.

1. Files that follow from others are written while complete.json still vouches for what they must be, each in place of
   the damaged one, whole or not at all; the parts of the id index are first taken away. *Left:* some are written,
   others are not. Readers are where they were; a reader of the index gets an error.
2. Parameters are written, if the fit gave the very ones that the teacher's document names; the example table, if the
   transfer set gives the very bytes. *Left:* some are written.
3. complete.json is taken away, where it vouches for anything that is dropped, missing or written with other bytes.
   *Left:* an unfinished cache. Readers refuse it; those that had it open read right rows, or an error from what is bad.
4. Documents that are not of the plan are taken away, of teachers without a record, behind the metadata of their codes.
   *Left:* what a build leaves that stopped at this teacher's document. Then bad records are taken away. *Left:* shards
   without records, as a stopped build leaves them. A bad one among them that cannot be decoded is dropped by the next
   repair; one that can, such as another shard's bytes, is held against the teacher's logits by the build, which refuses
   or certifies it anew.
5. Bad shards are taken away. *Left:* an unfinished cache of sound shards. `kdcache build JOB` goes on, too.
6. An example table of other bytes, as another release of Arrow writes it, is written. *Left:* as after step 5.
7. What is missing is built, by the ordinary way of a build. *Left:* what a stopped build leaves.
8. complete.json is written from the records, last.

Beside a running build this is harmless: a builder never replaces what stands, so that nothing sound can come under a
key while something bad stands there, and no two things can be taken for each other. Every file is read again just
before it is taken away, and stays if it is right then. No other repair is at work from the verification to step 6, and
at step 8: `kdcache.repair.claim`. Step 7 is a build, beside which another repair is as harmless as beside any.
"""

from __future__ import annotations

__all__ = ["Mending"]

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kdcache.build.finalise import finalise
from kdcache.documents import PlanDocument
from kdcache.errors import KdcacheError, StoreError
from kdcache.repair.actions import Action
from kdcache.repair.claim import RepairClaim
from kdcache.repair.origin import Origin
from kdcache.repair.planning import RepairPlan
from kdcache.repair.sources import finished_plan_by_root
from kdcache.store import layout
from kdcache.store.arrays import encode_small_array, group_metadata, to_json
from kdcache.store.files import ATTRIBUTE, CacheFiles
from kdcache.store.nodes import consolidated_root, expected_nodes, gathered_metadata, index_keys
from kdcache.store.teachers import describe_parameters
from kdcache.verify import Finding
from kdcache.verify.planned import unplanned_teachers
from kdcache.verify.shards import digest_of
from kdcache.verify.standing import Standing

_RECORD = re.compile(r".*/(0|[1-9][0-9]*)\.json")


@dataclass(frozen=True, eq=False)
class Mending:
    """Carries a plan out.

    Parameters
    ----------
    standing : Standing
        As it was when the findings were made.
    plan : RepairPlan
    origin : Origin
    claim : RepairClaim or None
        Looked at before each change. None for a dry run: give the actions and change nothing.
    """

    standing: Standing
    plan: RepairPlan
    origin: Origin
    claim: RepairClaim | None

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing is changed."""
        return self.claim is None

    def steps(self) -> Iterator[Action]:
        """Do steps 1 to 6, and give what was done, in order."""
        self._refuse_what_came_back()
        _ = self._plan_by_root  # found before anything is written
        table = self._table()
        is_same = table is not None and not self._is_other_table(table)
        yield from self._write_derived(has_table=table is not None)
        yield from self._fit()
        if table is not None and is_same:
            yield from self._write_examples(table)
        if self._drops_completion(table):
            yield self._drop(layout.COMPLETE, "it vouches for what is dropped, missing or written with other bytes")
        for name, item in self.plan.drop_documents.items():
            yield from self._drop_document(name, item)
        for key, item in self.plan.drop_records.items():
            if self.standing.store.objects.size(key) is not None:
                yield self._drop_if(key, item, self._is_record_bad)
        for key, item in self.plan.drop_shards.items():
            yield self._drop_if(key, item, self._is_shard_bad)
        if table is not None and not is_same:
            yield from self._write_examples(table)
        yield from self._left()

    def _refuse_what_came_back(self) -> None:
        """Stop where shards that were missing are there: their folder was away, and may be again."""
        back = [
            item.key
            for item in self.plan.drop_records.values()
            if item.kind == "missing" and self.standing.store.objects.size(item.key) is not None
        ]
        if back:
            raise StoreError(
                f"{self.standing.store.address}: {len(back)} file(s) that were missing a moment ago are there, such as "
                f"{back[0]}: a folder was being mounted or copied. Nothing was changed. Run the repair again when all "
                "of the cache is in its place"
            )

    def finish(self) -> bool:
        """Write complete.json from the records if all shards of a plan are done; True if they are.

        The plan is the newest, or the one that complete.json named or, where that is gone, the root's gathered metadata
        tell of: an older one would take teachers out of the cache.
        """
        store, complete = self.standing.store, self.standing.complete
        plans = dict(self.standing.plans) | self.plan.plans
        named = self._plan_by_root if complete is None else complete.plan_index
        for index in dict.fromkeys((max(plans, default=-1), -1 if named is None else named)):
            plan = plans.get(index)
            if plan is not None and self._is_done(plan):
                if self._lacks_index():
                    return False  # nothing vouches for the example table: a build makes it from the transfer set
                if self.claim is not None:
                    self.claim.check()
                    finalise(store, index, plan, is_repair=True)
                return True
        return False

    def _lacks_index(self) -> bool:
        store, would_be_there = self.standing.store, self.plan.write if self.is_dry_run else {}
        keys = [key for key in index_keys(self.standing.cache) if key not in would_be_there]
        return any(store.objects.size(key) is None for key in keys)

    @functools.cached_property
    def _plan_by_root(self) -> int | None:
        return finished_plan_by_root(self.standing) if self.standing.complete is None else None

    def _gathered(self) -> tuple[str, ...]:
        """Give the teachers that the root is to gather: those of complete.json, or those that it has gathered."""
        by_root = self.standing.plans.get(-1 if self._plan_by_root is None else self._plan_by_root)
        return self.standing.completed or (() if by_root is None else by_root.stored_names)

    def missing_shards(self) -> int:
        """Count the shards that have no record, of the teachers that complete.json or the newest plan names."""
        names = self.standing.completed or self.standing.names
        return sum(self.standing.cache.num_shards - self._num_records(name) for name in names)

    def _num_records(self, name: str) -> int:
        """Count a teacher's records by one list, since who planned the cache may have claimed any number of shards."""
        found = (_RECORD.fullmatch(key) for key in self.standing.store.objects.list(layout.records_folder(name)))
        shards = {int(number[1]) for number in found if number}
        would_go = self.plan.drop_records if self.is_dry_run else {}
        return sum(
            shard < self.standing.cache.num_shards and layout.record_key(name, shard) not in would_go
            for shard in shards
        )

    def _left(self) -> Iterator[Action]:
        """Name what is not mended here."""
        if self.plan.examples is not None and not self.origin.has_transfer_set:
            then = "run the repair with the cache's job file, or with transfer_set=..., which makes it anew"
            yield Action("build", layout.EXAMPLES, self.plan.examples.what, then)
        for item in self.plan.cannot:
            yield Action("cannot", item.key, item.what, self._by_hand(item))
        for item in self.plan.build:
            yield Action("build", item.key, item.what)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _table(self) -> bytes | None:
        if self.plan.examples is None or not self.origin.has_transfer_set:
            return None
        table = self.origin.table(self.standing.cache)
        bound = table.to_parquet(transfer_set_digest=self.standing.cache.transfer_set_digest)
        earlier = table.to_parquet()  # as earlier releases wrote it
        return earlier if self._is_other_table(bound) and not self._is_other_table(earlier) else bound

    def _is_other_table(self, table: bytes) -> bool:
        """Tell whether a table made anew has other bytes than complete.json names."""
        complete = self.standing.complete
        return complete is not None and hashlib.sha256(table).hexdigest() != complete.examples_sha256

    def _write_examples(self, table: bytes) -> Iterator[Action]:
        self._replace(layout.EXAMPLES, table)
        yield Action("write", layout.EXAMPLES, self.plan.examples.what if self.plan.examples else "")
        if any(key.startswith(layout.INDEX) for key in self.plan.write):
            yield self._write_index()

    def _drops_completion(self, table: bytes | None) -> bool:
        store, complete = self.standing.store, self.standing.complete
        if store.objects.size(layout.COMPLETE) is None:
            return False
        if complete is None:  # it cannot be read
            return True
        return (table is not None and self._is_other_table(table)) or self.plan.drops_from(self.standing.completed)

    def _drop(self, key: str, why: str) -> Action:
        if self.claim is not None:
            self.claim.check()
            self.standing.store.objects.delete(key)
        return Action("drop", key, why)

    def _drop_document(self, name: str, item: Finding) -> Iterator[Action]:
        """Take away a teacher's document that is not of the plan, behind the metadata that follow from it."""
        store, group = self.standing.store, layout.teacher_group(name)
        metadata = layout.metadata_key(f"{group}/{layout.CODES}")
        is_bad = self.is_dry_run or name in unplanned_teachers(Standing.read(store))
        if is_bad and store.objects.size(metadata) is not None:
            yield self._drop(metadata, "it follows from the document that is taken away")
        yield self._drop_if(item.key, item, lambda *_: is_bad)

    def _drop_if(self, key: str, item: Finding, is_bad: Callable[[str, Finding], bool]) -> Action:
        """Take a file away if a second reading finds it bad again."""
        if not self.is_dry_run and not is_bad(key, item):
            then = "Two readings differ: look at the disk, its cables and the memory of this machine."
            return Action("keep", key, f"the first reading said: {item.what}; a second one is right", then)
        return self._drop(key, _why(key, item))

    def _is_shard_bad(self, key: str, item: Finding) -> bool:
        store = self.standing.store
        if item.kind == "extra":
            return True
        if item.expected is None:  # it has no record: can it be decoded?
            document = self.standing.teachers[str(item.teacher)]
            try:
                store.codes_reader(document, self.standing.cache, cache_bytes=0).read_shard(item.shard_index or 0)
            except StoreError:  # the store could not be asked, which says nothing of the cache
                raise
            except KdcacheError:
                return True
            return False
        size = store.objects.size(key)
        found = digest_of(store, key) if len(item.expected) == len(str(item.found)) == 64 else str(size)
        return found != item.expected

    def _is_record_bad(self, key: str, item: Finding) -> bool:
        if key != item.key:  # it goes with its shard, or with all of its teacher
            shard_key = layout.shard_key(str(item.teacher), item.shard_index or 0)
            return item.key != shard_key or item.kind == "missing" or self._is_shard_bad(item.key, item)
        try:
            record = self.standing.store.record(str(item.teacher), item.shard_index or 0)
        except StoreError:
            raise
        except KdcacheError:
            return True
        if item.kind == "extra" or record is None:
            return True
        if self.standing.store.objects.read(key) != record.to_json():
            return True
        document = {**self.standing.teachers, **self.plan.teachers}.get(record.teacher)
        is_recorded = document is None or record.document_digest in {None, document.digest()}
        return not is_recorded or record.num_rows != self.standing.cache.rows_in_shard(record.shard_index)

    def _write_derived(self, *, has_table: bool) -> Iterator[Action]:
        store, plan = self.standing.store, self.plan
        for index, document in plan.plans.items():
            yield self._write(layout.plan_key(index), document.to_json())
        for key, record in plan.records.items():
            if key in plan.write:
                yield self._write(key, record.to_json())
        teachers = {**self.standing.teachers, **plan.teachers}
        nodes = expected_nodes(self.standing.cache, teachers.values())
        told = gathered_metadata(CacheFiles(store.objects))
        for name, teacher in plan.teachers.items():
            metadata = group_metadata({ATTRIBUTE: teacher.to_mapping()})
            yield self._write(layout.metadata_key(layout.teacher_group(name)), to_json(metadata))
        for path, accepted in nodes.items():
            key = layout.metadata_key(path)
            if key in plan.write and path.split("/")[-1] not in plan.teachers:
                chosen = told[path] if told.get(path) in accepted else accepted[0]
                yield self._write(key, to_json(chosen))
        index_parts = {layout.INDEX, *index_keys(self.standing.cache)} - {layout.metadata_key(path) for path in nodes}
        if layout.ROOT in plan.write or plan.teachers:
            completed = [teachers[name] for name in self._gathered() if name in teachers]
            nodes = expected_nodes(self.standing.cache, completed)
            root = group_metadata({ATTRIBUTE: self.standing.cache.to_mapping()})
            if completed:
                root = consolidated_root(CacheFiles(store.objects), self.standing.cache, nodes)
            yield self._write(layout.ROOT, to_json(root))
        if not index_parts.isdisjoint(plan.write) and not has_table:  # behind the root, which says how many examples
            yield self._write_index()

    def _write(self, key: str, data: bytes) -> Action:
        self._replace(key, data)
        item = self.plan.write.get(key)
        return Action("write", key, item.what if item else "it holds a copy of what was written anew")

    def _replace(self, key: str, data: bytes) -> None:
        if self.claim is not None:
            self.claim.check()
            self.standing.store.objects.replace(key, data)

    def _write_index(self) -> Action:
        store = self.standing.store
        why = next(item.what for key, item in self.plan.write.items() if key.startswith(layout.INDEX))
        if self.plan.examples is not None and not self.origin.has_transfer_set:
            return Action("build", layout.INDEX, why, "it is made anew once the example table is right")
        if self.claim is not None:
            self.claim.check()
            table = store.examples()
            for key in index_keys(self.standing.cache):
                if not key.endswith(f"/{layout.METADATA}"):
                    store.objects.delete(key)
            store.write_index(table)
        return Action("write", layout.INDEX, why)

    def _fit(self) -> Iterator[Action]:
        names = dict.fromkeys(str(item.teacher) for item in self.plan.fit.values())
        for name in names:
            keys = {key: item for key, item in self.plan.fit.items() if item.teacher == name}
            if not self.origin.has_teachers:
                then = "`kdcache repair JOB`, or teachers=..., fits it again"
                yield from (Action("build", key, item.what, then) for key, item in keys.items())
            elif self.is_dry_run:
                yield from (Action("fit", key, item.what) for key, item in keys.items())
            else:
                yield from self._fitted(name, keys)

    def _fitted(self, name: str, keys: dict[str, Finding]) -> Iterator[Action]:
        parameters = self.origin.fitted(name)
        document = {**self.standing.teachers, **self.plan.teachers}[name]
        if describe_parameters(parameters)[1] != document.parameters_group:
            why = "the fit gave other parameters than those that the stored shards were encoded with"
            then = _build_teacher_anew(name)
            yield from (Action("cannot", key, f"{item.what}; {why}", then) for key, item in keys.items())
            return
        for parameter, array in sorted(parameters.items()):
            node = f"{layout.teacher_group(name)}/{document.parameters_group}/{parameter}"
            key = layout.chunk_key(node, (0,) * array.ndim)
            if key in keys:
                self._replace(key, encode_small_array(array))
                yield Action("fit", key, keys[key].what)

    def _is_done(self, plan: PlanDocument) -> bool:
        store = self.standing.store
        for name in plan.stored_names:
            if self._num_records(name) < plan.cache.num_shards:
                return False
            if store.objects.size(layout.metadata_key(layout.teacher_group(name))) is None:
                return False
        return True

    def _by_hand(self, item: Finding) -> str:
        if item.key.startswith(f"{layout.PLANS}/"):
            return (
                "Run `kdcache repair JOB`, with the cache's job file, which may tell what it was; or bring the file "
                "back from a copy."
            )
        if item.key.startswith(f"{layout.INDEX}/"):
            return "Move the file out of the cache."
        if item.teacher is not None and item.key.startswith(layout.TEACHERS):
            return _build_teacher_anew(item.teacher)
        return item.remedy


def _why(key: str, item: Finding) -> str:
    """Say why a file is taken away: a record may go because of its shard, which is told by itself."""
    if key == item.key or item.shard_index is None:
        return item.what
    return f"it vouches for {item.key}, which is {'missing' if item.kind == 'missing' else 'bad'}"


def _build_teacher_anew(name: str) -> str:
    return (
        f"Bring the file back from a copy; or delete {layout.COMPLETE}, {layout.records_folder(name)} and "
        f"{layout.teacher_group(name)} and run `kdcache build JOB`, which builds this teacher anew."
    )
