"""Documents as hypothesis draws them: every field within its schema, every rule between fields kept."""

from __future__ import annotations

from hypothesis import strategies as st

from kdcache.documents import (
    BoundDocument,
    CacheDocument,
    CertificateDocument,
    Codes,
    CompleteDocument,
    CompletedTeacher,
    Fingerprint,
    Histogram,
    Lossless,
    Parameter,
    PlanDocument,
    Record,
    TeacherDocument,
    TopK,
    View,
)

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}(\.[A-Za-z0-9_-]{1,4})?", fullmatch=True)
counts = st.integers(1, 2**53)
nats = st.floats(0, 1e300)
logits = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)  # no negative zero
weights = st.floats(0, 1)
targets = st.none() | st.floats(1e-12, 1)
codec_specs = st.one_of(
    st.builds(Lossless, dtype=st.sampled_from(["float32", "float16", "bfloat16"])),
    st.builds(
        Codes,
        dtype=st.sampled_from(["uint8", "uint16"]),
        spacing=st.sampled_from(["uniform", "companded"]),
        max_kl=targets,
    ),
    st.builds(TopK, k=st.integers(1, 4096), step=st.floats(2**-6, 1), max_kl=targets),
    st.builds(TopK, tail=st.just("samples"), num_samples=st.integers(1, 4096)),
)
views = st.builds(View, name=names, seed=st.integers(0, 2**63 - 1))
fingerprints = st.builds(
    Fingerprint,
    name=names,
    source=st.text(min_size=1, max_size=30),
    weights_sha256=digests,
    autocast=st.sampled_from([None, "bfloat16", "float16"]),
)


def ensembles(min_size: int = 1):
    return st.lists(fingerprints, min_size=min_size, max_size=3, unique_by=lambda item: item.name).map(tuple)


@st.composite
def cache_documents(draw):
    chunk_rows = draw(st.integers(1, 2**20))
    num_examples = draw(st.integers(1, 2**40))
    view = draw(st.none() | views)
    return CacheDocument(
        num_classes=draw(counts),
        num_examples=num_examples,
        num_rows=num_examples + draw(st.integers(0, 2**40)),
        num_views=1 if view is None else draw(st.integers(1, 100)),
        shard_rows=chunk_rows * draw(st.integers(1, 64)),
        chunk_rows=chunk_rows,
        example_id_type=draw(st.sampled_from(["int64", "string"])),
        transfer_set_digest=draw(digests),
        has_labels=draw(st.booleans()),
        has_input_digests=draw(st.booleans()),
        view=view,
        merge=draw(st.sampled_from([None, "geometric"])),
    )


@st.composite
def plan_documents(draw):
    cache = draw(cache_documents())
    teachers = draw(ensembles())
    given = st.tuples(*[weights] * len(teachers))
    return PlanDocument(
        cache=cache,
        teachers=teachers,
        weights=None if cache.merge is None else draw(st.none() | given),
        codec=draw(codec_specs),
        batch_size=draw(counts),
        num_pilot_rows=draw(counts),
        previous=draw(st.none() | digests),
        keeps_chunk_rows=draw(st.sampled_from([None, True])),
    )


parameters = st.builds(
    Parameter,
    dtype=st.sampled_from(["float32", "float16", "float64", "int64", "uint8", "uint16"]),
    shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    sha256=digests,
)


@st.composite
def teacher_documents(draw):
    members = draw(ensembles())
    described = draw(st.dictionaries(names, parameters, max_size=3))
    return TeacherDocument(
        name=draw(names),
        members=members,
        weights=draw(st.none() | st.tuples(*[weights] * len(members))),
        num_classes=draw(counts),
        codec=draw(codec_specs),
        num_columns=draw(counts),
        chunk_rows=draw(st.none() | counts),
        storage_dtype=draw(st.sampled_from(["uint8", "uint16", "float16", "float32"])),
        parameters=described,
        parameters_group=draw(names) if described else None,
        num_pilot_rows=draw(st.integers(0, 2**40)),
    )


@st.composite
def certificates(draw, num_rows=None):
    temperatures = draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5))
    divergences = st.tuples(*[nats] * len(temperatures))
    measured = draw(st.lists(nats, min_size=1, max_size=5))
    is_bounded = draw(st.booleans()) if num_rows is None else num_rows > 0
    bounded = [draw(nats)] * (num_rows or 2)
    return CertificateDocument(
        temperatures=tuple(temperatures),
        mean_kl=draw(divergences),
        max_kl=draw(divergences),
        kl_histograms=(Histogram.of(measured),) * len(temperatures),
        num_measured_rows=len(measured),
        max_error_range=draw(nats) if is_bounded else None,
        bounds=tuple(bounds_from(start, bounded) for start in (1.0, 2.0, 4.0)) if is_bounded else (),
    )


def bounds_from(temperature, numbers):
    return BoundDocument(temperature=temperature, mean=min(numbers), max=max(numbers), histogram=Histogram.of(numbers))


@st.composite
def records(draw):
    num_rows = draw(st.integers(1, 50))
    return Record(
        format_version=1,
        teacher=draw(names),
        shard_index=draw(st.integers(0, 2**53)),
        num_rows=num_rows,
        num_bytes=draw(counts),
        sha256=draw(digests),
        min_logit=draw(logits),
        max_logit=draw(logits),
        certificate=draw(certificates(num_rows=draw(st.sampled_from([0, num_rows])))),
    )


completed_teachers = st.builds(
    CompletedTeacher,
    name=names,
    num_shards=counts,
    num_bytes=counts,
    document_digest=digests,
    records_digest=digests,
    data_digest=digests,
    certificate=certificates(),
)
complete_documents = st.builds(
    CompleteDocument,
    format_version=st.just(1),
    plan_index=st.integers(0, 2**53),
    plan_digest=digests,
    examples_sha256=digests,
    index_digest=digests,
    teachers=st.lists(completed_teachers, min_size=1, max_size=2).map(tuple),
    data_digest=digests,
)
documents = st.one_of(
    cache_documents(), plan_documents(), teacher_documents(), certificates(), records(), complete_documents
)
