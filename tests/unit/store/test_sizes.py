from tiny_caches import build_tiny

from kdcache import Codes


def size_of(paths) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def test_sizes_tell_codes_parameters_and_ids_apart(tmp_path):
    cache = build_tiny(tmp_path / "cache", codec=Codes())
    sizes, folder = cache.sizes(), tmp_path / "cache"
    assert sizes.code_bytes == sum(teacher.num_bytes for teacher in cache.complete.teachers)
    assert sizes.parameter_bytes == size_of(folder.glob("teachers/*/parameters-*/*/c/**/*"))
    assert sizes.id_bytes == size_of([folder / "examples.parquet", *folder.glob("index/**/*")])
    assert sizes.num_bytes == size_of(folder.rglob("*"))
