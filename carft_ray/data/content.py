"""What the images of a set are, byte for byte: hashes of contents, which neither names nor dates can hide.

``Source.fingerprint`` is quick and trusts sizes and dates of files; these hashes read every file.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from carft_ray import environment
from carft_ray.data.source import PixelArray, Source

DIGEST_BYTES = 16


def reading_threads() -> int:
    """Returns the cores that this process may use, and at least 4: reading files waits for the disk."""
    return max(4, environment.usable_cores())


def image_digests(source: Source) -> list[bytes]:
    """Returns a hash per image, in order: of the file's bytes, or of the pixels where there is no file.

    Raises:
        DataError: A file cannot be read.
    """
    with ThreadPoolExecutor(reading_threads()) as pool:
        return list(pool.map(lambda index: image_digest(source.content(index)), range(len(source))))


def pixel_digest(pixels: PixelArray) -> bytes:
    """Returns the hash of an image that is no file: of its pixels, uint8 [H, W, 3]."""
    return image_digest(pixels.tobytes())


def set_digest(source: Source, digests: list[bytes] | None = None) -> str:
    """Returns one hash of a set: its sample ids, labels and contents, in any order of the images.

    Args:
        source: The set.
        digests: ``image_digests`` of it, where they are known.
    """
    digests = image_digests(source) if digests is None else digests
    rows = sorted(zip(source.sample_ids.tolist(), source.labels.tolist(), digests, strict=True))
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for sample_id, label, digest in rows:
        whole.update(f"{sample_id} {label} ".encode() + digest)
    return whole.hexdigest()


def image_digest(content: bytes) -> bytes:
    """Returns the hash of the content of an image."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
