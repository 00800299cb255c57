"""Images between [-1, 1] and [0, 255], and as pictures for people."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def from_uint8(images: Any) -> Any:
    """[0, 255] -> float32 [-1, 1]: x / 127.5 - 1 (section 3.3). numpy or tensor of numbers."""
    return images / 127.5 - 1.0


def to_uint8(images: Any) -> np.ndarray:
    """float [-1, 1] -> uint8 [0, 255], values outside clipped. Original: (x + 1) 127.5, truncated."""
    return np.clip((np.asarray(images) + 1.0) * 127.5, 0, 255).astype(np.uint8)


def make_grid(images: np.ndarray, *, columns: int | None = None, scale: int = 1) -> np.ndarray:
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


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 [H, W, C], C = 1 or 3, as a PNG file's content."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def picture(images: np.ndarray, *, columns: int | None = None) -> np.ndarray:
    """uint8 [N, H, W, C] as one uint8 picture for people. Pixels of images below 64 pixels a side are repeated."""
    return make_grid(images, columns=columns, scale=max(1, -(-64 // min(images.shape[1:3]))))


def gif_bytes(frames: Sequence[np.ndarray], *, milliseconds: int = 80) -> bytes:
    """uint8 pictures [H, W, C] of one size as an animated GIF that repeats; the last frame stands for two seconds."""
    pictures = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()
