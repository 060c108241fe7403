"""Compares two files of `baton logits`: largest difference in standard deviations of the first. Needs nothing but Python."""
import json
import struct
import sys


def load(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    out = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        out[name] = struct.unpack(f"<{(end - begin) // 4}f", data[begin:end])
    return out


def main():
    case, dtype, want, got = sys.argv[1:]
    limit = 2e-4 if dtype == "f32" else 0.5
    want, got = load(want), load(got)
    worst = 0.0
    for name, x in want.items():
        y = got[name]
        assert len(x) == len(y), name
        mean = sum(x) / len(x)
        deviation = (sum((v - mean) ** 2 for v in x) / len(x)) ** 0.5
        worst = max(worst, max(abs(a - b) for a, b in zip(x, y)) / deviation)
    verdict = "ok" if worst <= limit else "FAIL"
    print(f"{verdict} {case} {dtype}: largest difference {worst:.1e} standard deviations (limit {limit})")
    sys.exit(worst > limit)


main()
