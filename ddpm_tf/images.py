"""Images between [-1, 1] and [0, 255], and on disk."""

import math
import os

import numpy as np
from PIL import Image


def from_uint8(images):
    """[0, 255] -> float32 [-1, 1]: x / 127.5 - 1 (section 3.3). numpy or tensor of numbers."""
    return images / 127.5 - 1.0


def to_uint8(images):
    """float [-1, 1] -> uint8 [0, 255], values outside clipped. Original: (x + 1) 127.5, truncated."""
    return np.clip((np.asarray(images) + 1.0) * 127.5, 0, 255).astype(np.uint8)


def make_grid(images, *, columns=None, scale=1):
    """uint8 [N, H, W, C] -> one uint8 picture, row by row, with a 1-pixel gap; a square unless `columns` is given.

    `scale` repeats every pixel, for images too small to look at.
    """
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    height, width = height * scale, width * scale
    grid = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), np.uint8)
    for k, image in enumerate(images.repeat(scale, 1).repeat(scale, 2)):
        top, left = k // columns * (height + 1), k % columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(path, image):
    """Write uint8 [H, W, C], C = 1 or 3, as a PNG; the file appears whole or not at all."""
    temporary = f"{path}.tmp"
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")
    os.replace(temporary, path)


def save_npz(path, images):
    """Write uint8 [N, H, W, C] as an .npz with one array, `images`; the file appears whole or not at all."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        np.savez(f, images=images)
    os.replace(temporary, path)


def grid_scale(height):
    """How much to enlarge images of this height in a picture for people: to about 32 pixels at least."""
    return max(1, 32 // height)
