"""Damages a checkpoint as disks, downloads and editors do; test_damage.py tries every program."""

import json
import math
import shutil

VALUES = [None, True, -1, 0, 1, 3, 2**20, 2**63, 10**400, 10**9, 0.5, math.inf, math.nan, "", "x",
          "I64", "F8_E4M3", "9" * 5000, "\n\x1b", "\ud800", [], {}, [[1]], [1, -1], {"a": {}}]
TEXTS = [b"", b"[]", b"{", b"\xff\xfe", b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


def changed(value, r):
    """A value from JSON of which one part, at a random depth, is replaced, removed or added."""
    if isinstance(value, list) and value:
        return list(changed(dict(enumerate(value)), r).values())
    if not isinstance(value, dict) or not value:
        return r.choice(VALUES)
    name, kind = r.choice(list(value)), r.choice(["inside", "inside", "replace", "remove", "add"])
    if kind == "remove":
        return {other: value[other] for other in value if other != name}
    if kind == "add":
        name = r.choice(["", "a\nb", "quantization_config", "rope_parameters", "sliding_window"])
    return value | {name: changed(value[name], r) if kind == "inside" else r.choice(VALUES)}


def change_json(path, r):
    """Change a JSON file, or the header of a safetensors file and sometimes its stated length."""
    data = path.read_bytes()
    start, end = 0, len(data)
    if path.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(changed(json.loads(data[start:end]), r)).encode()
    text = r.choice(TEXTS) if r.random() < 0.1 else text
    length = r.choice([len(text)] * 4 + [0, len(text) + 8, 2**60, 2**64 - 1])
    path.write_bytes(length.to_bytes(8, "little")[:start] + text + data[end:])


def change_bytes(path, r):
    """Change, insert or delete a few bytes, most often near the two ends, or cut the rest off."""
    data = bytearray(path.read_bytes())
    at = r.choice([r.randrange(400), r.randrange(len(data)), len(data) - r.randint(1, 400)])
    old, new = r.choice([(1, 1), (1, 1), (1, 1), (8, 8), (0, 8), (8, 0), (len(data), 0)])
    data[at:at + old] = r.choice([r.randbytes(new), b"\xff" * new, b"\0" * new])
    path.write_bytes(data)


def remove(path, r):
    """Remove a file, or put a directory in its place."""
    path.unlink()
    if r.random() < 0.5:
        path.mkdir()


def damaged_copy(source, target, r, only_inside=False):
    """A copy of a directory in which one file is damaged. It replaces an older copy."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    path = r.choice(sorted(target.iterdir()))
    inside = change_json if path.suffix in (".json", ".safetensors") else change_bytes
    (inside if only_inside else r.choice([remove, *[change_bytes] * 4, *[inside] * 5]))(path, r)
    return target
