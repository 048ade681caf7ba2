"""General-purpose compressors: a scale for bits per byte."""

import bz2
import lzma


def bits_per_byte(text: str) -> dict[str, float]:
    """lzma and bz2 at their strongest settings on the UTF-8 bytes of `text`, which must not be empty; no prior."""
    data = text.encode()
    sizes = {"lzma": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), "bz2": bz2.compress(data, 9)}
    return {name: 8 * len(packed) / len(data) for name, packed in sizes.items()}
