"""Tests of the store of log-probabilities: it returns stored rows, and detects damage.

The store's files are called segments. The store uses only the segments of its own reference.
"""

import os

import numpy as np
import pyarrow as pa
import pytest

from dpo_engine.errors import DataError
from dpo_engine.scoring.store import SEGMENT, VALUES, Numerics, ReferenceStore, Rows, keys

NUMERICS = Numerics("a" * 32, "float32", "native")


def some(count, seed=0):
    generator = np.random.default_rng(seed)
    digests = generator.integers(-(2**63), 2**63, size=(count, 2), dtype=np.int64)
    digests[:3] &= 0xFFFF  # so that some keys end with zero bytes
    return digests, generator.normal(size=(count, len(VALUES))).astype(np.float32)


def in_order(digests):
    return np.sort(keys(digests))


def fresh(root, numerics=NUMERICS):
    return ReferenceStore(root, numerics)


def only_segment(store):
    (path,) = [path for path in store.folder.iterdir() if SEGMENT.fullmatch(path.name)]
    return path


class TestRows:
    def test_find_agrees_with_a_dictionary(self):
        digests, values = some(500)
        rows = Rows.empty().with_more(keys(digests), values)
        expected = {digest.tobytes(): value for digest, value in zip(digests, values, strict=True)}
        others, _ = some(20, seed=1)
        for digest in [*digests, *others]:
            place = rows.find(keys(digest))[0]
            if digest.tobytes() in expected:
                assert rows.values[place].tolist() == expected[digest.tobytes()].tolist()
            else:
                assert place == -1

    def test_empty_rows_find_nothing(self):
        assert Rows.empty().find(keys(some(3)[0])).tolist() == [-1] * 3

    def test_first_of_equal_keys_is_kept(self):
        digests, values = some(4)
        rows = Rows.empty().with_more(keys(digests), values).with_more(keys(digests[:2]), values[:2] + 1)
        assert rows.values[rows.find(keys(digests))].tolist() == values.tolist()
        twice = Rows.empty().with_more(keys(digests[[0, 0, 1]]), values[:3])
        assert len(twice.keys) == 2 and twice.values[twice.find(keys(digests[:1]))].tolist() == values[:1].tolist()


class TestStore:
    def test_appended_rows_are_read_by_another_process(self, tmp_path):
        digests, values = some(50)
        writer = fresh(tmp_path)
        writer.append(digests[:20], values[:20])
        writer.append(digests[20:], values[20:])
        reader = fresh(tmp_path)
        rows = reader.read(in_order(digests[10:30]))
        assert len(rows.keys) == 20, "only the requested rows are kept in memory"
        assert rows.values[rows.find(keys(digests[10:30]))].tolist() == values[10:30].tolist()
        assert reader.complaints() == []

    def test_segments_of_other_writers_are_read(self, tmp_path):
        digests, values = some(6)
        one, other = fresh(tmp_path), fresh(tmp_path)
        wanted = in_order(digests)
        assert len(one.read(wanted).keys) == 0
        other.append(digests[:4], values[:4])
        one.append(digests[2:], values[2:] + 1)  # both writers scored the two pairs in the middle
        expected = values.copy()
        expected[4:] += 1
        for store in (one, other, fresh(tmp_path)):
            rows = store.read(wanted)
            assert rows.values[rows.find(keys(digests))].tolist() == expected.tolist(), (
                "the first writer's values must be kept"
            )

    def test_segments_with_the_same_number_do_not_collide(self, tmp_path, monkeypatch):
        digests, values = some(4)
        for part in (slice(0, 2), slice(2, 4)):
            blind = fresh(tmp_path)
            monkeypatch.setattr(blind, "_segments", set)  # as if two writers had listed the segments at the same time
            blind.append(digests[part], values[part])
        names = sorted(path.name for path in (tmp_path / NUMERICS.folder).iterdir())
        assert [name[:8] for name in names] == ["00000001"] * 2
        assert len(fresh(tmp_path).read(in_order(digests)).keys) == 4

    @pytest.mark.parametrize("other", [{"weights": "b" * 32}, {"dtype": "bfloat16"}, {"spec": "te"}])
    def test_other_numerics_use_another_folder(self, other, tmp_path):
        digests, values = some(3)
        fresh(tmp_path).append(digests, values)
        assert len(fresh(tmp_path, NUMERICS._replace(**other)).read(in_order(digests)).keys) == 0

    def test_every_flipped_bit_is_detected(self, tmp_path):
        digests, values = some(5)
        store = fresh(tmp_path)
        path = store.append(digests, values)
        content = path.read_bytes()
        generator = np.random.default_rng(0)
        for place in generator.choice(len(content) * 8, 200, replace=False):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << (place % 8)
            path.write_bytes(flipped)
            reader = fresh(tmp_path)
            assert len(reader.read(in_order(digests)).keys) == 0
            assert reader.complaints() == [
                f"{path}: is damaged: its SHA-256 differs from the one in its name; its rows are not used, "
                "and the file can be removed"
            ]

    def test_every_truncation_is_detected(self, tmp_path):
        digests, values = some(5)
        path = fresh(tmp_path).append(digests, values)
        content = path.read_bytes()
        for length in range(0, len(content), 37):
            path.write_bytes(content[:length])
            assert len(fresh(tmp_path).read(in_order(digests)).keys) == 0

    def test_segment_of_another_reference_is_not_used(self, tmp_path):
        digests, values = some(5)
        theirs = fresh(tmp_path, NUMERICS._replace(weights="b" * 32))
        path = theirs.append(digests, values)
        mine = fresh(tmp_path)
        mine.folder.mkdir()
        (mine.folder / path.name).write_bytes(path.read_bytes())
        assert len(mine.read(in_order(digests)).keys) == 0
        assert "belongs to another reference; its rows are not used" in mine.complaints()[0]

    @pytest.mark.parametrize("kind", ["no arrow", "other columns"])
    def test_foreign_file_with_a_valid_name_is_not_used(self, kind, tmp_path):
        import hashlib

        store = fresh(tmp_path)
        store.folder.mkdir()
        content = b"hello"
        if kind == "other columns":
            sink = pa.BufferOutputStream()
            schema = pa.schema([("digest", pa.int64())]).with_metadata({"reference": store._metadata})
            with pa.ipc.new_file(sink, schema) as writer:
                writer.write_table(pa.table({"digest": [1]}, schema=schema))
            content = sink.getvalue().to_pybytes()
        (store.folder / f"00000001-{hashlib.sha256(content).hexdigest()}.arrow").write_bytes(content)
        assert len(store.read(in_order(some(3)[0])).keys) == 0
        expected = "is not a valid Arrow file" if kind == "no arrow" else "has unexpected columns"
        assert expected in store.complaints()[0]

    def test_leftovers_of_a_killed_writer_are_ignored(self, tmp_path):
        digests, values = some(5)
        store = fresh(tmp_path)
        path = store.append(digests, values)
        path.rename(path.with_name(f".{path.name}.123.tmp"))
        assert len(fresh(tmp_path).read(in_order(digests)).keys) == 0 and fresh(tmp_path).complaints() == []

    def test_file_in_place_of_the_folder_is_an_error(self, tmp_path):
        (tmp_path / NUMERICS.folder).write_text("")
        with pytest.raises(
            DataError, match=r"a+-float32-native: cannot be read .*; fix this, or set another reference\.store"
        ):
            fresh(tmp_path).append(*some(2))

    def test_full_disk_is_an_error(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(DataError, match=r"cannot be written to \(No space left on device\).*reference\.store"):
            fresh(tmp_path).append(*some(2))
        assert list((tmp_path / NUMERICS.folder).iterdir()) == [], "no partial file may remain"

    def test_non_finite_values_are_not_used(self, tmp_path):
        digests, values = some(3)
        values[1, 0] = np.inf
        fresh(tmp_path).append(digests, values)
        store = fresh(tmp_path)
        assert not len(store.read(in_order(digests)).keys)
        (line,) = store.complaints()
        assert "contains values that are not finite; its rows are not used" in line
