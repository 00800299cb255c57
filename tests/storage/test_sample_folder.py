"""run_sample.py's folder: what it holds, and that a run which was stopped goes on to the same bytes."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_tf import files
from ddpm_tf.errors import InputError, StorageError, WorkdirError
from ddpm_tf.experiment import sample_images
from ddpm_tf.images import picture, png_bytes
from ddpm_tf.storage.sample_folder import open_folder

ROOT = Path(__file__).parent.parent.parent
SHAPE = (4, 6, 3)
PIXELS = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (10, *SHAPE), np.uint8)
LABELS = np.arange(10, dtype=np.int32) % 3


def settings(**changed):
    return {"num_images": 10, "batch_size": 4, "png": True} | changed


def write(path, *, until=10, labels=None, png=True, **changed):
    """Write the pixels from where the folder stands, batch by batch, and stop before image `until`."""
    with open_folder(str(path), settings(png=png, **changed), SHAPE) as folder:
        begun_at = folder.num_done
        for first in range(folder.num_done, until, 4):
            rows = slice(first, first + 4)
            folder.add(np.arange(10)[rows], PIXELS[rows])
        if until >= 10:
            folder.finish(labels)
    return begun_at


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("labels", [None, LABELS])
def test_its_npz_is_numpys_own_byte_for_byte(tmp_path, labels):
    write(tmp_path / "a", labels=labels)
    expected = io.BytesIO()
    np.savez(expected, images=PIXELS, **({} if labels is None else {"labels": labels}))
    assert (tmp_path / "a" / "samples.npz").read_bytes() == expected.getvalue()


def test_it_holds_images_apart_from_the_grid(tmp_path):
    write(tmp_path / "a")
    names = [*(f"images/seed_00000{k}.png" for k in range(10)), "grid.png", "samples.npz", "sampling.json"]
    assert sorted(contents(tmp_path / "a")) == sorted(names)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a" / "images" / "seed_000003.png")), PIXELS[3])
    write(tmp_path / "b", png=False)
    assert sorted(contents(tmp_path / "b")) == ["grid.png", "samples.npz", "sampling.json"]
    assert contents(tmp_path / "b")["samples.npz"] == contents(tmp_path / "a")["samples.npz"]


def test_stopped_anywhere_it_goes_on_from_the_last_whole_batch_to_the_same_bytes(tmp_path):
    write(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for until, then in ((4, 4), (8, 8)):
        path = tmp_path / f"stopped_{until}"
        write(path, until=until)
        with open(path / ".samples.part", "ab") as f:
            f.write(b"half an image")  # as a kill in the middle of a write leaves it
        (path / "images" / "seed_000009.png.tmp").write_bytes(b"x")
        assert write(path) == then
        assert contents(path) == expected
    assert write(tmp_path / "whole") == 10 and contents(tmp_path / "whole") == expected  # nothing to do


@pytest.mark.parametrize("lost", ["samples.npz", "grid.png"])
def test_stopped_while_it_finishes_it_finishes_again(tmp_path, lost):
    write(tmp_path / "a")
    expected = contents(tmp_path / "a")
    (tmp_path / "a" / ".samples.part").write_bytes(PIXELS.tobytes())
    (tmp_path / "a" / lost).unlink()
    assert write(tmp_path / "a") == 10
    assert contents(tmp_path / "a") == expected


def test_other_settings_are_refused_with_what_differs(tmp_path):
    write(tmp_path / "a", until=4, num_steps=50)
    before = contents(tmp_path / "a")
    with pytest.raises(InputError, match=r"(?s)begun with other settings:.*num_steps +50 +20\n.*new +None +1\n"):
        write(tmp_path / "a", num_steps=20, new=1)
    assert contents(tmp_path / "a") == before


def test_a_folder_of_something_else_and_a_busy_one_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        write(tmp_path)
    (tmp_path / "busy").mkdir()
    with (
        files.locked(str(tmp_path / "busy")),
        pytest.raises(WorkdirError, match="in use by another process: its name is unknown"),
    ):
        write(tmp_path / "busy")
    with pytest.raises(WorkdirError, match="cannot be written to"):
        write(tmp_path / "mine.txt" / "x")


def test_the_second_of_two_is_told_who_is_first_and_the_name_is_gone_afterwards(tmp_path):
    with open_folder(str(tmp_path / "a"), settings(), SHAPE):
        assert ".owner" in contents(tmp_path / "a")
        for changed in ({}, {"num_images": 3}):
            with pytest.raises(
                WorkdirError, match=f"in use by another process: host .*, process {os.getpid()}, started"
            ) as e:
                write(tmp_path / "a", **changed)
            assert e.value.exit_code == 73
    assert write(tmp_path / "a") == 0  # freed
    assert ".owner" not in contents(tmp_path / "a")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".owner").write_text("host gone")  # of a start that was killed before it wrote anything else
    write(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "a")


@pytest.mark.parametrize("name", ["sampling.json", ".samples.part", "samples.npz", "grid.png", "images"])
def test_a_pipe_in_the_place_of_a_file_is_an_error_before_work(tmp_path, name):
    write(tmp_path, until=4)
    if (tmp_path / name).is_dir():
        shutil.rmtree(tmp_path / name)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is a named pipe"):
        write(tmp_path)


def test_after_a_full_disk_the_same_settings_go_on(tmp_path, monkeypatch):
    write(tmp_path / "whole")
    real = os.replace

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left.*start again with the same command"):
        write(tmp_path / "a")
    monkeypatch.setattr(os, "replace", real)
    write(tmp_path / "a", until=4)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a")
    monkeypatch.setattr(os, "replace", real)
    assert write(tmp_path / "a") == 4
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_small_images_are_enlarged_for_people_to_64_pixels_at_least():
    for height, width, scale in ((8, 8, 8), (28, 28, 3), (32, 32, 2), (48, 16, 4), (64, 64, 1), (100, 63, 2)):
        grid = picture(np.zeros((2, height, width, 1), np.uint8))
        assert grid.shape == (height * scale, 2 * width * scale + 1, 1)
        Image.open(io.BytesIO(png_bytes(grid))).verify()


def sample_command(workdir, out, *flags):
    return [
        sys.executable,
        "run_sample.py",
        f"--workdir={workdir}",
        f"--out={out}",
        "--num_images=2000",
        "--batch_size=50",
        "--num_steps=2",
        *flags,
    ]


@pytest.mark.slow
def test_2000_images_killed_at_random_moments_end_as_the_same_files(workdir, tmp_path):
    def run(out, *flags):
        return subprocess.run(sample_command(workdir, out, *flags), cwd=ROOT, capture_output=True, text=True)

    assert run(tmp_path / "whole").returncode == 0
    random, part = np.random.Generator(np.random.PCG64(5)), tmp_path / "killed" / ".samples.part"
    sizes = []
    for _ in range(4):
        process = subprocess.Popen(sample_command(workdir, tmp_path / "killed"), cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and (part.stat().st_size if part.exists() else 0) <= max(sizes, default=0):
            time.sleep(0.002)  # until this start has drawn a batch
        time.sleep(random.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        sizes.append(part.stat().st_size if part.exists() else 2000 * 64)
    assert sizes[0] < 2000 * 64  # the first kill came in the middle
    result = run(tmp_path / "killed")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    refused = run(tmp_path / "killed", "--seed=7")
    assert refused.returncode == 2 and "seed" in refused.stderr and "Traceback" not in refused.stderr
    with np.load(tmp_path / "whole" / "samples.npz") as arrays:
        images = arrays["images"].astype(int)
    other = sample_images(
        str(workdir),
        out=str(tmp_path / "other"),
        png=False,
        settings={"num_images": 300, "batch_size": 64, "num_steps": 2},
    )
    with np.load(os.path.join(other, "samples.npz")) as arrays:
        assert np.abs(arrays["images"] - images[:300]).max() <= 1
    assert json.loads((tmp_path / "whole" / "sampling.json").read_text())["training_step"] == 4


MEMORY = """
import resource, sys
import numpy as np, tensorflow as tf
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.experiment.generating import generate
from ddpm_tf.storage.sample_folder import open_folder
from ddpm_tf.samplers import make_sampler

class Network:  # costs nothing
    image_shape, out_channels, num_classes = (64, 64, 3), 3, None
    def __call__(self, inputs, training=False):
        return inputs["x_t"]

count, out = int(sys.argv[1]), sys.argv[2]
sampler = make_sampler("ddim", GaussianDiffusion(Schedule(make_betas("linear", 1000))), num_steps=2)
with open_folder(out, {"num_images": count, "batch_size": 100, "png": False}, (64, 64, 3)) as folder:
    for batch in generate(Network(), sampler, num_images=count, batch_size=100):
        folder.add(batch.seeds, batch.images)
    folder.finish(None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_batch(tmp_path):
    """Peak memory in MiB of 500 and of 10,000 images of 64x64x3, which have 123 MB of pixels."""
    few, many = (
        float(
            subprocess.run(
                [sys.executable, "-c", MEMORY, str(n), str(tmp_path / str(n))],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for n in (500, 10_000)
    )
    print(f"\npeak of 500 images {few:.0f} MiB, of 10,000 {many:.0f} MiB")
    assert many < few + 100
