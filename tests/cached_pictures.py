"""Random pictures that are stored, and small entries of a cache that are made of them."""

import os

import numpy as np
import simplejpeg
from conftest import ArraySource

from carft_ray.data.cached_sets import Keeping, image_set
from carft_ray.data.decode_images import decode_image


class Pictures(ArraySource):
    """Random images that are stored: bytes of a JPEG each."""

    def __init__(self, log_path=None, num_images=12, side=8, number=0, name="train"):
        super().__init__(num_images, side, name=name)
        self.sample_ids += np.uint64(2**63)
        self.log_path, self.identity = log_path, f"pictures-1/{number}"

    def content(self, index):
        if self.log_path is not None:
            handle = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{os.getpid()} {index}\n".encode())
            os.close(handle)
        return simplejpeg.encode_jpeg(self.images[index])

    def decoded(self, content, index):
        return decode_image(content, self.place(index)), "RGB"

    def pixels(self, index):
        return self.decoded(self.content(index), index)[0]


def decoded(cache_dir, number, limit_gb=None):
    """Builds or opens a set of its own for each number; the entry is of about 4 kB."""
    return image_set(Pictures(number=number), None, "as-is", Keeping(cache_dir, limit_gb))
