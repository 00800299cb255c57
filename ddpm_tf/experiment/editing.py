"""Images that sampling begins from: image to image, and filling in."""

import os
from typing import Any, NamedTuple

import numpy as np

from ddpm_tf import files, images
from ddpm_tf.data.picture import PictureError, PictureOptions, decode_image, examine
from ddpm_tf.errors import InputError
from ddpm_tf.paths import check_kind, check_local
from ddpm_tf.samplers import from_image
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.repaint import RePaintSampler


class Edit(NamedTuple):
    """An image that is changed (with `strength`) or completed (with `mask`); without `init_image`, nothing.

    init_image: a picture of the images' size.
    mask: a picture of that size; what is white in it is filled in, and what is black is kept.
    strength: the share of the sampling steps that are made, above 0, at most 1; None: 0.5.
    """

    init_image: str = ""
    mask: str = ""
    strength: float | None = None

    def settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The sampling settings of a command: a mask is filled in by repaint.

        Raises:
            InputError: flags that do not go together.
        """
        for flag, value in (("--mask", self.mask), ("--strength", self.strength)):
            if value not in ("", None) and not self.init_image:
                raise InputError(f"{flag}={value} was given without --init_image=FILE, the picture to edit.")
        if self.mask and self.strength is not None:
            raise InputError(
                "--mask and --strength exclude each other: a mask fills in a part of the picture, a strength changes all of it."
            )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"--strength must be above 0 and at most 1, found {self.strength}.")
        if self.mask:
            if settings.get("sampler", "repaint") != "repaint":
                raise InputError(
                    f"--mask is filled in by --sampler=repaint, and --sampler={settings['sampler']} was given. Leave it out."
                )
            settings["sampler"] = "repaint"
        for flag, path in (("--init_image", self.init_image), ("--mask", self.mask)):
            if path:
                check_local(path, flag)
                check_kind(path, f"{flag}={path}", is_folder=False)
                if not os.path.exists(path):
                    raise InputError(f"{flag}={path} does not exist.")
        return settings

    def apply(self, sampler: Sampler, image_shape: tuple[int, int, int]) -> Sampler:
        """The sampler, made to begin from the image or to fill it in.

        Raises:
            InputError: a file that is no picture of the images' size.
        """
        if not self.init_image:
            return sampler
        image = images.from_uint8(read_picture(self.init_image, image_shape, "--init_image").astype(np.float32))
        if self.mask:
            is_filled_in = read_picture(self.mask, (*image_shape[:2], 1), "--mask")[..., 0] >= 128
            if not is_filled_in.any():
                raise InputError(
                    f"--mask={self.mask} is black everywhere: nothing is to be filled in. Paint that white."
                )
            assert isinstance(sampler, RePaintSampler)
            # The next float32 above, since `to_uint8` truncates and would make 63 of the grey levels one darker.
            return sampler.with_known(np.nextafter(image, np.float32(2)), ~is_filled_in)
        if isinstance(sampler, RePaintSampler):
            raise InputError(
                "--sampler=repaint with --init_image needs --mask=FILE, white where it is to be filled in. Add it, or choose "
                "another --sampler."
            )
        return from_image(sampler, image, strength=0.5 if self.strength is None else self.strength)

    def record(self) -> dict[str, Any]:
        """What the images depend on, as JSON can hold it; empty without an image."""
        paths = {"init_image": self.init_image, "mask": self.mask}
        digests = {f"{name}_sha256": files.sha256(path) for name, path in paths.items() if path}
        return {**digests, "strength": self.strength} if digests else {}


def read_picture(path: str, image_shape: tuple[int, int, int], flag: str) -> np.ndarray:
    """A picture file as uint8 [H, W, C], of exactly that size.

    Raises:
        InputError: no picture, or one of another size.
    """
    options = PictureOptions(image_shape, small="enlarge")  # its size is checked here
    try:
        header = examine(path, options)
    except PictureError as e:
        raise InputError(f"{flag}={path} cannot be used: {e}") from e
    height, width, _ = image_shape
    if (header.height, header.width) != (height, width):
        raise InputError(
            f"{flag}={path} is {header.height}x{header.width} pixels, and the network draws {height}x{width} (height x width). "
            "Scale it first."
        )
    return decode_image(path, options)
