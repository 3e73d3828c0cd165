"""What differs between two documents, in words."""

from __future__ import annotations

from segkd.storage.differences import difference, differing


def test_leaves_are_named_with_both_values() -> None:
    before = {"a": 1, "b": {"c": [1.0], "d": "x"}, "gone": None, "left": 0}
    after = {"a": 1, "b": {"c": [2.0], "d": "x"}, "new": True, "gone": None}
    assert differing(before, after) == ["b.c ([1.0], now [2.0])", "left (0, now None)", "new (None, now True)"]
    assert differing(before, before) == []


def test_long_values_are_told_by_what_differs_in_them() -> None:
    names = [f"class {number}" for number in range(100)]
    others = [*names[:7], "other", *names[8:]]
    assert difference("classes", names, others) == "classes[7] ('class 7', now 'other')"
    assert difference("classes", names, names[:-1]) == "classes (100 values, now 99)"
    assert difference("key", "x" * 100, None) == f"key ('{'x' * 56}..., now None)"


def test_a_files_digest_is_for_machines() -> None:
    one, other = (f"sha256:{digit * 64}" for digit in "ab")
    assert difference("weights", f"a.pth {one}", f"a.pth {other}") == "weights (the content of a.pth)"
    assert difference("weights", f"a.pth {one}", f"b.pth {other}") == "weights ('a.pth', now 'b.pth')"
