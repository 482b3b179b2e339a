"""The format: rows by number, shards that are whole or refused."""

import shutil

import pytest
import torch
from safetensors import safe_open

from deepalign.train.teacher_cache import (
    CacheIndex,
    DamagedShardError,
    TeacherCache,
    check_shard,
    map_shard,
    plan_shards,
    read_index,
    shard_path,
    write_index,
    write_shard,
)

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]
SIZES = {"aligned": 6, "base": 4}


def make_cache(folder, dtype="bfloat16", **fingerprint):
    """A cache of known values; returns its index and, per teacher, all its rows."""
    folder.mkdir()
    index = CacheIndex(
        fingerprint=fingerprint,
        dtype=dtype,
        hidden_sizes=SIZES,
        streams={"harmful": 3, "utility": 5},
        answer_lengths=LENGTHS,
        shard_starts=plan_shards(LENGTHS, row_bytes=12, shard_bytes=100),
    )
    write_index(folder, index)
    rows = {}
    for teacher, size in SIZES.items():
        rows[teacher] = torch.randn(sum(LENGTHS), size, generator=torch.Generator().manual_seed(size))
        for shard in range(index.shards):
            examples = index.examples(shard)
            part = rows[teacher][index.offsets[examples.start] : index.offsets[examples.stop]]
            write_shard(folder, index, teacher, shard, part)
    return index, rows


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    index, rows = make_cache(folder)
    return folder, index, rows


def test_shards_hold_whole_examples_and_about_the_size_asked_for():
    assert plan_shards(LENGTHS, row_bytes=12, shard_bytes=100) == [0, 3, 5, 6]
    assert plan_shards([50, 1, 1], row_bytes=12, shard_bytes=100) == [0, 1], "a longer example alone"
    assert plan_shards(LENGTHS, row_bytes=12, shard_bytes=1) == list(range(8))
    assert plan_shards(LENGTHS, row_bytes=12, shard_bytes=10**9) == [0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_any_rows_in_any_order_are_found(tmp_path, dtype):
    _, rows = make_cache(tmp_path / "cache", dtype)
    cache = TeacherCache(tmp_path / "cache")
    number = sum(LENGTHS)
    for asked in (
        torch.arange(number),
        torch.arange(number).flip(0),
        torch.randint(number, (200,), generator=torch.Generator().manual_seed(0)),
        torch.tensor([number - 1]),
        torch.empty(0, dtype=torch.int64),
    ):
        for teacher in SIZES:
            expected = rows[teacher].to(getattr(torch, dtype))[asked]
            assert torch.equal(cache.rows(teacher, asked), expected)


def test_reading_rows_copies_these_rows_alone(tmp_path):
    """32 rows out of 32 MiB: memory of the process's own (pages that are no file's) grows by nothing like the shard."""
    folder = tmp_path / "cache"
    folder.mkdir()
    index = CacheIndex({}, "bfloat16", {"aligned": 1024, "base": 1024}, {"harmful": 1}, [2**14], [0])
    write_index(folder, index)
    for teacher in index.hidden_sizes:
        write_shard(folder, index, teacher, 0, torch.zeros(2**14, 1024))
    before = own_bytes()
    cache = TeacherCache(folder)
    rows = [cache.rows("aligned", torch.arange(start, 2**14, 2**9)) for start in range(16)]
    assert len(rows) == 16
    assert own_bytes() - before < 8 * 2**20


def own_bytes():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


def test_a_shard_is_a_safetensors_file(cache):
    folder, index, rows = cache
    with safe_open(shard_path(folder, "base", 1), framework="pt") as file:
        assert torch.equal(file.get_tensor("hidden"), rows["base"][8:14].to(torch.bfloat16))
        assert file.metadata()["cache"] == index.identity


def damage_cut_short(path, folder):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)


def damage_cut_inside_the_header(path, folder):
    with path.open("r+b") as file:
        file.truncate(20)


def damage_missing(path, folder):
    path.unlink()


def damage_a_byte_of_data(path, folder):
    flip(path, -5)


def damage_a_byte_of_the_header(path, folder):
    flip(path, 30)


def damage_other_teacher(path, folder):
    shutil.copy(shard_path(folder, "base", 2), path)


def damage_other_cache(path, folder):
    make_cache(folder.parent / "other", data="other")
    shutil.copy(shard_path(folder.parent / "other", "aligned", 2), path)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


DAMAGES = {
    damage_cut_short: "bytes, expected",
    damage_cut_inside_the_header: "has 20 bytes, expected",
    damage_missing: "aligned-00002.safetensors is missing",
    damage_a_byte_of_data: "has been altered",
    damage_a_byte_of_the_header: "is not a shard of this cache",
    damage_other_teacher: "bytes, expected",
    damage_other_cache: "is not a shard of this cache",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_shard_is_refused(cache, damage):
    folder, index, _ = cache
    check_shard(folder, index, "aligned", 2)
    damage(shard_path(folder, "aligned", 2), folder)
    with pytest.raises(DamagedShardError, match=DAMAGES[damage]):
        check_shard(folder, index, "aligned", 2)
    if damage is not damage_a_byte_of_data:  # its contents are compared where the cache is opened for training
        with pytest.raises(DamagedShardError, match=r"1 shard\(s\) cannot be used .* run `deepalign cache-teacher`"):
            TeacherCache(folder)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(cache, monkeypatch):
    folder, index, rows = cache
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_shard(folder, index, "aligned", 0, torch.zeros(8, 6))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(map_shard(folder, index, "aligned", 0), rows["aligned"][:8].to(torch.bfloat16))


def test_an_index_that_cannot_be_used_says_why(cache, tmp_path):
    folder, index, _ = cache
    assert read_index(folder) == index
    with pytest.raises(FileNotFoundError, match=r"holds no teacher cache .* write it with"):
        read_index(tmp_path)
    path = folder / "index.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="is of format 7, expected 1"):
        read_index(folder)
    altered = text.replace('"shard_starts": [0', '"shard_starts": [9')
    for damaged in (text[:-50], "[]", "{}", text.replace("answer_lengths", "lengths"), altered):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"is damaged .* keeps the \d+ shards \(\d\.\d MiB\) beside it"):
            read_index(folder)
