"""Decode the picture on standard input: prints the bytes its header promised and those it took.

python tests/peak_memory.py < picture.jpg
"""

import sys
from pathlib import Path

from pictures import encoded, noise

from model_store.decoding import ImageLimits, decode_image, open_image

STATUS = Path("/proc/self/status")


def resident_bytes(field: str) -> int:
    """`VmRSS` now, or `VmHWM` at its highest."""
    line = next(one for one in STATUS.read_text().splitlines() if one.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    data = sys.stdin.buffer.read()
    decode_image(encoded(noise(size=(16, 16))), ImageLimits())  # what the first picture loads is no picture's
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = resident_bytes("VmRSS")
    opened = open_image(data, ImageLimits())
    opened.decode()
    print(opened.peak_bytes, resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
