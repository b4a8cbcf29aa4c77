"""Spool: a pilot's logits are held once, in memory or in a temporary file that leaves nothing behind."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_caches import TinyTeacher, build_tiny, tiny_transfer_set

from kdcache import Codes, Lossless, Spectral, TopK, plan_cache
from kdcache.build import spool
from kdcache.build.spool import PilotLogits
from kdcache.codecs.head_logits import Head
from kdcache.errors import CodecError, StoreError, TeacherError

MAPS = Path("/proc/self/maps")


def batches(dtype=torch.float32):
    return list(torch.randn(10, 7, generator=torch.Generator().manual_seed(0)).to(dtype).split(4))


def collected(pieces, num_rows=10):
    logits = PilotLogits("a", num_rows)
    for piece in pieces:
        logits.add(piece)
    return logits.rows()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def spooled(folder, monkeypatch):
    """The same, where everything goes to a file."""
    monkeypatch.setattr(spool, "SPOOL_BYTES", 100)
    return folder


def is_mapped(logits) -> bool:
    """Tell whether a tensor's memory is that of a file, by the system's own list."""
    address = logits.data_ptr()
    with MAPS.open() as lines:
        for line in lines:
            span, *_, inode_and_name = line.split(maxsplit=4)
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return inode_and_name.split()[0] != "0"
    return False


@pytest.mark.usefixtures("spooled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_logits_of_a_file_are_those_that_were_given(dtype):
    pieces = batches(dtype)
    logits = collected(pieces)
    assert logits.dtype == dtype
    assert torch.equal(logits, torch.cat(pieces))


@pytest.mark.usefixtures("folder")
@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mapped files")
def test_many_logits_lie_in_a_file_and_few_in_memory(monkeypatch):
    assert not is_mapped(collected(batches()))
    monkeypatch.setattr(spool, "SPOOL_BYTES", 10 * 7 * 4)
    assert not is_mapped(collected(batches()))
    monkeypatch.setattr(spool, "SPOOL_BYTES", 10 * 7 * 4 - 1)
    assert is_mapped(collected(batches()))


def test_a_file_leaves_nothing_behind(spooled):
    logits = collected(batches())
    assert list(spooled.iterdir()) == []
    del logits


def test_a_process_that_is_killed_leaves_nothing_behind(tmp_path):
    program = (
        "import os, signal, torch; from kdcache.build import spool; spool.SPOOL_BYTES = 1; "
        "logits = spool.PilotLogits('a', 5); logits.add(torch.ones(5, 3)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mapped files")
def test_the_room_of_a_file_is_free_again_once_the_logits_are_gone(spooled):
    logits = collected(batches())
    assert str(spooled) in MAPS.read_text()
    del logits
    gc.collect()
    assert str(spooled) not in MAPS.read_text()


def test_rows_that_were_not_given_are_not_there():
    assert collected(batches()[:2]).shape == (8, 7)


def test_a_folder_without_room_is_named_with_what_to_do(folder):
    message = (
        rf"pilot of teacher 'a' has 1,000,000,000,000,000 rows that take 28,000,000,000,000,000 bytes.*{folder} has "
        r"[0-9,]+ free\. Nothing was written\. Set TMPDIR .*num_pilot_rows"
    )
    with pytest.raises(StoreError, match=message):
        collected(batches(), num_rows=10**15)


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_no_crash(spooled):
    """A file may not become larger than the process's limit: the system then refuses it, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    standing = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(StoreError, match=r"gave none \(File too large\)"):
            collected(batches())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, standing)
    assert list(spooled.iterdir()) == []


def test_a_head_moves_to_where_the_hidden_states_lie():
    hidden = PilotLogits("a", 10)
    hidden.add(torch.empty(10, 7, device="meta"))
    logits = hidden.logits(Head(torch.ones(30, 7), torch.ones(30)))
    assert {made.device.type for made in (logits.hidden, logits.head.weight, logits.head.bias)} == {"meta"}


def test_a_head_that_lies_there_already_is_the_same():
    hidden = PilotLogits("a", 10)
    hidden.add(torch.ones(10, 7))
    head = Head(torch.ones(30, 7))
    assert hidden.logits(head).head is head


def test_batches_of_two_types_are_refused():
    with pytest.raises(TeacherError, match=r"'a' gives logits of type torch.float64 after some of type torch.float32"):
        collected([*batches()[:2], batches(torch.float64)[2]])


# whole pilots ---------------------------------------------------------------------------------------------------------

TARGETS = [{"max_kl": 0.01}, {"bytes_per_row": 30}]
CODECS = [{"codec": spec} for spec in (Codes(), Lossless(), TopK(k=3), TopK(k=2, tail="samples"), Spectral())]


def forecast(tmp_path, **options):
    teacher = TinyTeacher(num_classes=30)
    return plan_cache(tmp_path / "cache", tiny_transfer_set(400), {"a": teacher}, **options).teachers[0]


@pytest.mark.parametrize("options", [*TARGETS, *CODECS], ids=str)
def test_a_pilot_of_a_file_says_the_same_as_one_of_memory(folder, monkeypatch, options):
    expected = forecast(folder, **options)
    monkeypatch.setattr(spool, "SPOOL_BYTES", 100)
    found = forecast(folder, **options)
    assert found.codec == expected.codec
    assert [point.certificate for point in found.points] == [point.certificate for point in expected.points]


@pytest.mark.usefixtures("spooled")
def test_a_build_whose_pilot_lay_in_a_file_is_the_same(monkeypatch, tmp_path):
    one = build_tiny(tmp_path / "one")
    monkeypatch.setattr(spool, "SPOOL_BYTES", 2**31)
    assert build_tiny(tmp_path / "other").complete == one.complete


def test_a_pilot_that_fails_leaves_nothing_behind(spooled):
    with pytest.raises(CodecError, match="Lossless"):
        forecast(spooled, codec=Lossless(dtype="bfloat16"))
    assert list(spooled.iterdir()) == []
