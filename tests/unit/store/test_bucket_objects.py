"""Objects of a bucket: what the contract of all stores does not say."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading

import pytest
import torch
from object_servers import KEY_ID, SECRET
from test_forks import exit_code_of

from kdcache.errors import KdcacheError, MissingExtraError, OptionError, StoreError
from kdcache.store import open_objects
from kdcache.store.bucket_address import BucketAddress, RequestLimits
from kdcache.store.bucket_client import BucketClient, UnansweredError
from kdcache.store.bucket_objects import BucketObjects, _batches
from kdcache.store.writers import this_machine

KEY = "teachers/a/codes/c/0/0"
ENDED_PID = 2**22 + 1
"""Above the largest that Linux gives."""


@pytest.fixture
def conditional(bucket_of):
    return open_objects(bucket_of("moto"))


@pytest.fixture
def replacing(bucket_of):
    """Give objects of a server that ignores If-None-Match."""
    return open_objects(bucket_of("nanio"))


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket", BucketAddress("s3", "bucket", "")),
        ("s3://bucket/", BucketAddress("s3", "bucket", "")),
        ("gs://bucket/a/b/", BucketAddress("gs", "bucket", "a/b")),
        ("az://container/a", BucketAddress("az", "container", "a")),
    ],
)
def test_an_address_is_a_bucket_and_a_prefix(text, expected):
    assert BucketAddress.parse(text) == expected


def test_an_address_is_told_without_a_slash_at_its_end():
    assert open_objects("s3://bucket/a/b/").address == "s3://bucket/a/b"


@pytest.mark.parametrize("text", ["s3://", "s3:///a", "s3://bucket/a//b", "s3://bucket/../a"])
def test_an_address_of_no_bucket_or_folder_is_refused(text):
    with pytest.raises(StoreError, match=r"names no bucket, or no folder of one.*Give s3://BUCKET/PREFIX"):
        open_objects(text)


@pytest.mark.parametrize("text", ["s3://id:seCret@bucket/a", "s3://bucket/a?secret=seCret", "s3://bucket/a#seCret"])
def test_an_address_with_credentials_is_refused_without_repeating_them(text):
    with pytest.raises(StoreError, match="holds credentials or options") as caught:
        open_objects(text)
    assert "seCret" not in str(caught.value)


def test_an_unknown_kind_of_address_is_refused_with_those_that_are_known():
    with pytest.raises(KdcacheError, match=r"knows no ftp:// addresses.*s3://.*gs://.*az://"):
        open_objects("ftp://host/cache")


@pytest.mark.parametrize("name", ["retry_seconds", "num_connections"])
def test_limits_are_above_zero(name):
    with pytest.raises(OptionError, match=f"{name} is 0"):
        RequestLimits(**{name: 0})


# Opening --------------------------------------------------------------------------------------------------------------


def test_opening_an_address_imports_no_client_and_asks_nothing():
    program = (
        "import sys, kdcache; from kdcache.store import CacheStore; store = CacheStore.at('s3://bucket/cache'); "
        "print(repr(store), 'obstore' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "CacheStore('s3://bucket/cache') False\n"


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kdcache\[object-stores\]'"):
        open_objects("s3://bucket/cache").size(KEY)


def test_an_unencrypted_endpoint_elsewhere_is_refused(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1:9000")
    with pytest.raises(StoreError, match=r"http://192\.0\.2\.1 would send requests unencrypted.*AWS_ALLOW_HTTP=true"):
        open_objects("s3://bucket/cache").size(KEY)


def test_settings_that_do_not_do_are_told_by_the_kind_of_their_error(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing.json"))
    told = r"in the environment \(GenericError, unable to open service account, no such file\).*GOOGLE_APPLICATION"
    with pytest.raises(StoreError, match=told):
        open_objects("gs://bucket/cache").size(KEY)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_stores_without_settings_end_in_a_typed_error(monkeypatch, tmp_path, scheme):
    monkeypatch.setenv("HOME", str(tmp_path))
    limits = RequestLimits(connect_seconds=0.2, request_seconds=0.3, stall_seconds=0.3, retry_seconds=0.3)
    with pytest.raises(StoreError):
        BucketObjects(f"{scheme}://bucket/cache", limits).size(KEY)


# Credentials ----------------------------------------------------------------------------------------------------------


def test_no_credentials_are_told_or_sent_to_other_processes(conditional):
    conditional.publish(KEY, b"first")
    assert repr(conditional) == f"BucketObjects({conditional.address!r})"
    sent = pickle.dumps(conditional)
    assert KEY_ID.encode() not in sent
    assert SECRET.encode() not in sent


@pytest.mark.parametrize("ask", ["read", "publish", "size", "list"])
def test_wrong_credentials_are_named_with_a_remedy_and_not_repeated(bucket_of, monkeypatch, ask):
    objects = open_objects(bucket_of("nanio"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    calls = {
        "read": lambda: objects.read(KEY),
        "publish": lambda: objects.publish(KEY, b"x"),
        "size": lambda: objects.size(KEY),
        "list": lambda: list(objects.list("")),
    }
    with pytest.raises(StoreError, match=r"was refused .*credentials are missing, wrong.*AWS_ACCESS_KEY_ID") as caught:
        calls[ask]()
    assert "another-secret" not in str(caught.value)
    assert "somebody-else" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["localbucket", "moto", "nanio"])
@pytest.mark.parametrize("ask", ["read", "publish", "list"])
def test_a_bucket_that_is_not_there_is_named(bucket_of, name, ask):
    objects = open_objects(bucket_of(name).replace("s3://caches", "s3://no-such-bucket"))
    calls = {
        "read": lambda: objects.read(KEY),
        "publish": lambda: objects.publish(KEY, b"x"),
        "list": lambda: list(objects.list("")),
    }
    with pytest.raises(StoreError, match=r"there is no bucket 'no-such-bucket'.*Make the bucket"):
        calls[ask]()


# Publishing -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["conditional", "replacing"])
def objects(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def noted_puts(monkeypatch):
    """Note each object that is put, and whether only to be created."""
    noted = []
    put = BucketClient.put

    def note(client, path, data, *, create_only):
        noted.append((path, create_only))
        put(client, path, data, create_only=create_only)

    monkeypatch.setattr(BucketClient, "put", note)
    return noted


def test_a_server_that_refuses_to_replace_is_found_out_once(conditional, noted_puts):
    conditional.publish("a", b"x")
    conditional.publish("b", b"x")
    assert noted_puts == [(".create-only", True), (".create-only", True), ("a", True), ("b", True)]


def test_a_server_that_replaces_is_found_out_and_claims_are_put(replacing, noted_puts):
    replacing.publish("a", b"x")
    puts = [(path.rsplit("/", 1)[0] if "/" in path else path, create_only) for path, create_only in noted_puts]
    assert puts == [(".create-only", True), (".create-only", True), (".claims/a", False), ("a", False)]


def test_where_an_object_stands_nothing_is_sent(objects, noted_puts):
    objects.publish(KEY, b"first")
    noted_puts.clear()
    assert not objects.publish(KEY, b"second")
    assert noted_puts == []


def overtaken(objects, monkeypatch):
    """Let another writer store the object between this writer's first look and its request."""
    size = objects.client.size
    looks = iter(range(100))

    def size_then_theirs(path):
        found = size(path)
        if next(looks) == 0:
            objects.client.put(path, b"theirs", create_only=False)
        return found

    monkeypatch.setattr(objects.client, "size", size_then_theirs)


def test_a_writer_that_is_overtaken_after_its_look_is_told_so(objects, monkeypatch):
    objects.publish("first", b"")
    overtaken(objects, monkeypatch)
    assert not objects.publish(KEY, b"ours")
    assert objects.read(KEY) == b"theirs"


def test_claims_are_taken_away_again(replacing):
    replacing.publish(KEY, b"first")
    assert list(replacing.client.list(".claims")) == []


def test_claims_are_taken_away_when_storing_is_refused(replacing, monkeypatch):
    replacing.publish("first", b"")
    put = replacing.client.put

    def refuse(path, data, *, create_only):
        if path == KEY:
            raise StoreError("refused")
        put(path, data, create_only=create_only)

    monkeypatch.setattr(replacing.client, "put", refuse)
    with pytest.raises(StoreError, match="refused"):
        replacing.publish(KEY, b"x")
    assert list(replacing.client.list(".claims")) == []


def unanswered(*_, **__):
    raise UnansweredError("no answer")


def test_a_claim_is_taken_away_when_the_others_are_not_told(replacing, monkeypatch):
    replacing.publish("first", b"")
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.store.claims._is_alone", unanswered)
        with pytest.raises(UnansweredError):
            replacing.publish(KEY, b"ours")
    assert list(replacing.client.list(".claims")) == []


@pytest.mark.parametrize("look", [1, 2], ids=["before the claim", "behind it"])
def test_no_claim_is_left_when_the_size_is_not_told(replacing, monkeypatch, look):
    replacing.publish("first", b"")
    size, looks = replacing.client.size, iter(range(100))
    told = lambda path: unanswered() if next(looks) == look else size(path)  # noqa: E731
    monkeypatch.setattr(replacing.client, "size", told)
    with pytest.raises(UnansweredError):
        replacing.publish(KEY, b"ours")
    assert list(replacing.client.list(".claims")) == []


def test_a_claim_stays_when_the_object_may_be_stored_yet(replacing, monkeypatch):
    replacing.publish("first", b"")
    put = replacing.client.put
    sent = lambda path, *rest, **options: unanswered() if path == KEY else put(path, *rest, **options)  # noqa: E731
    monkeypatch.setattr(replacing.client, "put", sent)
    with pytest.raises(UnansweredError):
        replacing.publish(KEY, b"ours")
    assert len(replacing.client.list(f".claims/{KEY}")) == 1


def leave_claim(objects, *, machine, pid):
    objects.client.put(f".claims/{KEY}/{machine}-{pid}-{'0' * 16}", b"", create_only=False)


def test_the_claim_of_a_process_that_ended_holds_nobody_up(replacing):
    leave_claim(replacing, machine=this_machine(), pid=ENDED_PID)
    assert replacing.publish(KEY, b"ours")
    assert list(replacing.client.list(".claims")) == []


def test_the_claim_of_another_machine_holds_up_until_no_request_of_it_can_last(bucket_of):
    limits = RequestLimits(request_seconds=0.5, retry_seconds=0.5, first_wait_seconds=0.1)
    objects = BucketObjects(bucket_of("nanio"), limits)
    leave_claim(objects, machine="00000000", pid=1)
    tried = []
    threading.Timer(0.5, lambda: tried.append(objects.size(KEY))).start()
    assert objects.publish(KEY, b"ours")
    assert tried == [None]


def test_a_claim_that_is_renewed_for_ever_ends_in_an_error(bucket_of, monkeypatch):
    limits = RequestLimits(request_seconds=0.1, retry_seconds=0.1, first_wait_seconds=0.1)
    objects = BucketObjects(bucket_of("nanio"), limits)
    monkeypatch.setattr("kdcache.store.claims._is_stale", lambda *_: False)
    leave_claim(objects, machine="00000000", pid=1)
    with pytest.raises(StoreError, match="is claimed by another writer"):
        objects.publish(KEY, b"ours")
    assert objects.size(KEY) is None


def test_an_object_larger_than_one_request_takes_is_refused(conditional, monkeypatch):
    monkeypatch.setattr("kdcache.store.bucket_objects.MAX_OBJECT_BYTES", 3)
    with pytest.raises(StoreError, match=r"has 4 bytes, and an object may have 3; nothing was stored.*shard_rows"):
        conditional.publish(KEY, b"four")


# Reading --------------------------------------------------------------------------------------------------------------


def test_ranges_within_a_known_size_are_read_in_one_request(conditional, monkeypatch):
    conditional.publish(KEY, bytes(10_000))
    conditional.size(KEY)
    monkeypatch.setattr(BucketClient, "size", lambda *_: pytest.fail("the size was asked again"))
    assert [len(part) for part in conditional.read_ranges(KEY, [(0, 10), (5000, 20), (20, 5)])] == [10, 20, 5]


def test_a_range_that_was_read_together_with_others_does_not_keep_what_lies_between(conditional):
    conditional.publish(KEY, bytes(10_000))
    parts = list(conditional.read_ranges(KEY, [(0, 10), (5000, 20)]))
    assert [part.base for part in parts] == [None, None]


def test_a_range_of_an_object_of_the_size_believed_is_one_request(conditional, monkeypatch):
    conditional.publish(KEY, bytes(10_000))
    monkeypatch.setattr(BucketClient, "size", lambda *_: pytest.fail("the size was asked"))
    assert conditional.read_sized(KEY, 9000, 1000, believed_bytes=10_000) == (bytes(1000), 10_000)
    assert [len(part) for part in conditional.read_ranges(KEY, [(0, 10)])] == [10]


def test_what_is_held_of_many_ranges_is_bounded():
    ranges = [(number * 2**23, 2**23) for number in range(9)]
    assert [len(batch) for batch in _batches(ranges)] == [3, 3, 3]


def test_a_range_larger_than_the_bound_is_read_alone():
    assert list(_batches([(0, 10), (10, 2**40), (5, 5)])) == [[(0, 10)], [(10, 2**40)], [(5, 5)]]


# Forked processes -----------------------------------------------------------------------------------------------------


def test_a_forked_process_reads_and_publishes_after_its_parent_did(objects):
    objects.publish(KEY, b"first")

    def work():
        reads = objects.read(KEY) == b"first" and objects.read_range(KEY, 1, 2) == b"ir" and objects.size(KEY) == 5
        reads &= objects.read_sized(KEY, 1, 2, believed_bytes=5) == (b"ir", 5) and objects.sizes("") == {KEY: 5}
        reads &= not objects.is_empty()
        return reads and objects.publish("second", b"x") and list(objects.list("")) == ["second", KEY]

    assert exit_code_of(work) == 0
    assert objects.read("second") == b"x"


def test_a_forked_process_is_told_what_is_missing(conditional):
    conditional.publish(KEY, b"first")

    def work():
        with pytest.raises(FileNotFoundError, match="nothing"):
            conditional.read("nothing")
        return True

    assert exit_code_of(work) == 0


class Stored(torch.utils.data.Dataset):
    def __init__(self, objects):
        self.objects = objects

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.objects.read_range(KEY, index, 1)


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_of_a_dataloader_read_after_their_parent_did(conditional, method):
    conditional.publish(KEY, b"abcd")
    loader = torch.utils.data.DataLoader(
        Stored(conditional), num_workers=2, batch_size=None, multiprocessing_context=method, timeout=30
    )
    assert list(loader) == [b"a", b"b", b"c", b"d"]
