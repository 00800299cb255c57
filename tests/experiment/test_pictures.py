"""Pictures to begin from and pictures of how sampling works: what they hold, and that what cannot be is refused at once."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_tf import images
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.experiment import Edit, Show, sample_images, show_pictures
from ddpm_tf.experiment.inference import load_sampler
from ddpm_tf.samplers import from_image, guided_by, interpolate, make_sampler, sample
from ddpm_tf.samplers.inversion import encode
from tests.experiment.conftest import CHAIN, STEPS
from tests.samplers.analytic import Analytic, LinearClassifier

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # among them those that truncation makes darker
LOWER = np.repeat(np.array([0, 255], np.uint8), 32).reshape(8, 8)


def npz(*arrays, **named):
    buffer = io.BytesIO()
    np.savez(buffer, *arrays, **named)
    return buffer.getvalue()


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def header_of(shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


MANY = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (5, 8, 8, 1), np.uint8)
FILES = {
    "image.png": png(PIXELS),
    "larger.png": png(np.zeros((9, 8), np.uint8)),
    "alpha.png": png(
        np.dstack([np.zeros((8, 8, 3), np.uint8), LOWER])
    ),  # black above, on white where it is opaque: below
    "deep.png": png(PIXELS.astype(np.uint16) * 257),
    "lower.png": png(LOWER),
    "black.png": png(LOWER * 0),
    "text.png": b"hello",
    "empty.png": b"",
    "many.npz": npz(images=MANY),
    "larger.npz": npz(images=np.zeros((2, 9, 8, 1), np.uint8)),
    "floats.npz": npz(images=np.zeros((2, 8, 8, 1))),
    "none.npz": npz(images=np.zeros((0, 8, 8, 1), np.uint8)),
    "scalar.npz": npz(images=np.uint8(3)),
    "nokey.npz": npz(x=np.zeros(3)),
    "pickled.npz": npz(images=np.array([{}], object)),
    "text.npz": b"hello",
    "empty.npz": b"",
    "npy.npz": npy(MANY),
    "cut.npz": npz(images=MANY)[:200],
    "huge.npz": zipped("images.npy", header_of((10**14, 8, 8, 1))),
    "headless.npz": zipped("images.npy", b"hello"),
    "bare.npz": zipped("images", b"hello"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files above, a folder and a named pipe; not to be written to."""
    path = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    (path / "folder").mkdir()
    os.mkfifo(path / "pipe")
    return path


def edit_of(folder, **given):
    return Edit(**{k: str(folder / v) if k != "strength" else v for k, v in given.items()})


def refused(tmp_path, job, message):
    with pytest.raises(InputError, match=f"(?s)^{message}") as e:
        job()
    assert e.value.exit_code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"init_image": "missing.png"}, {}, "--init_image=.*missing.png does not exist"),
        ({"init_image": "folder"}, {}, "--init_image=.*folder is a folder; expected a regular file"),
        ({"init_image": "pipe"}, {}, "--init_image=.*pipe is a named pipe; expected a regular file"),
        ({"init_image": "text.png"}, {}, "--init_image=.*text.png cannot be used: .*not a picture"),
        ({"init_image": "empty.png"}, {}, r"--init_image=.*empty.png cannot be used: .*damaged \(empty, 0 bytes\)"),
        ({"init_image": "larger.png"}, {}, "--init_image=.*larger.png is 9x8 pixels, and the network draws 8x8"),
        ({"init_image": "image.png", "mask": "missing.png"}, {}, "--mask=.*missing.png does not exist"),
        ({"init_image": "image.png", "mask": "pipe"}, {}, "--mask=.*pipe is a named pipe"),
        ({"init_image": "image.png", "mask": "text.png"}, {}, "--mask=.*text.png cannot be used"),
        ({"init_image": "image.png", "mask": "larger.png"}, {}, "--mask=.*larger.png is 9x8 pixels"),
        ({"init_image": "image.png", "mask": "black.png"}, {}, "--mask=.*black.png is black everywhere"),
        ({"mask": "lower.png"}, {}, "--mask=.* was given without --init_image"),
        ({"strength": 0.5}, {}, "--strength=0.5 was given without --init_image"),
        ({"init_image": "image.png", "strength": 0.0}, {}, "--strength must be above 0 and at most 1, found 0.0"),
        ({"init_image": "image.png", "strength": 2.0}, {}, "--strength must be above 0 and at most 1, found 2.0"),
        ({"init_image": "image.png", "strength": float("nan")}, {}, "--strength must be .*found nan"),
        ({"init_image": "image.png", "mask": "lower.png", "strength": 0.5}, {}, "--mask and --strength exclude"),
        ({"init_image": "image.png", "mask": "lower.png"}, {"sampler": "ddim"}, "--mask is filled in by --sampler=repaint"),
        ({"init_image": "image.png", "mask": "lower.png"}, {"eta": 0.5}, "--eta=0.5 .*the sampler repaint has no such"),
        ({"init_image": "image.png"}, {"sampler": "repaint"}, "--sampler=repaint with --init_image needs --mask"),
    ],
)  # fmt: skip
def test_an_edit_that_cannot_be_is_refused_before_anything_is_compiled(
    workdirs, folder, tmp_path, nothing_is_drawn, given, settings, message
):
    edit = edit_of(folder, **given)
    refused(
        tmp_path,
        lambda: sample_images(workdirs("plain"), out=str(tmp_path / "out"), edit=edit, settings=settings),
        message,
    )


@pytest.mark.parametrize(
    ("show", "settings", "message"),
    [
        ({"trace": -1}, {}, "--trace must be at least 1, .*found -1"),
        ({"shared_noise_steps": -2}, {}, "--shared_noise_steps must be at least 0, found -2"),
        ({"shared_noise_steps": 5}, {}, r"--shared_noise_steps must be within 0\.\.4, .*found 5"),
        ({"shared_noise_steps": 8}, {"sampler": "heun"}, r"--shared_noise_steps must be within 0\.\.7"),
        ({"trace": 1}, {"num_images": 257}, "--num_images=257 is more than one picture shows; choose at most 256"),
        (
            {"trace": 1}, {"sampler": "repaint", "jump_length": 1, "num_resamples": 5000},
            "--trace=1 of 29998 moves makes 29,999 frames; choose at least 31, for at most 1,000 frames",
        ),
        ({"trace": 1, "interpolate": "1,2"}, {}, "--trace and --interpolate exclude each other"),
        ({"interpolate": "1"}, {}, "--interpolate must be two seeds with a comma, such as 3,7; found 1"),
        ({"interpolate": "a,b"}, {}, "--interpolate must be two seeds"),
        ({"interpolate": "1,2,3"}, {}, "--interpolate must be two seeds"),
        ({"interpolate": "1.5,2"}, {}, "--interpolate must be two seeds"),
        ({"interpolate": ","}, {}, "--interpolate must be two seeds"),
        ({"interpolate": "9223372036854775808,1"}, {}, "--interpolate=9223372036854775808,1: a seed is an integer of 64"),
        ({"interpolate": "1,2"}, {"num_images": 1}, "--num_images=1 is too few for --interpolate"),
        ({"interpolate": "1,2"}, {"labels": "0,1"}, "--labels=0,1 names several classes"),
        ({"interpolate_at": 0.5}, {}, "--interpolate_at was given without --interpolate"),
        *(({"interpolate": "1,2", "interpolate_at": at}, {}, "--interpolate_at must be above 0 and at most 1, found")
          for at in (0.0, -1.0, 1.5, float("nan"))),
        ({"encode": "many.npz"}, {"sampler": "ddpm"}, "Images are encoded by .* ddim with eta 0.*Give --sampler=ddim"),
        ({"encode": "many.npz"}, {"sampler": "heun"}, "Images are encoded by .* ddim with eta 0"),
        ({"encode": "many.npz"}, {"eta": 0.5}, "Images are encoded by .* ddim with eta 0"),
        ({"encode": "many.npz"}, {"labels": "0,1"}, "--labels=0,1 names several classes"),
        ({"encode": "missing.npz"}, {}, "--encode=.*missing.npz does not exist"),
        ({"encode": "folder"}, {}, "--encode=.*folder is a folder"),
        ({"encode": "pipe"}, {}, "--encode=.*pipe is a named pipe"),
        ({"encode": "text.png"}, {}, "--encode=.*text.png cannot be used"),
        ({"encode": "larger.png"}, {}, "--encode=.*larger.png is 9x8 pixels"),
        ({"encode": "larger.npz"}, {}, r"--encode=.*larger.npz has images uint8 \[2, 9, 8, 1\]; expected .*\[8, 8, 1\]"),
        *(({"encode": f"{name}.npz"}, {}, f"--encode=.*{name}.npz cannot be used: .*Expected images, uint8")
          for name in ("floats", "none", "scalar", "nokey", "pickled", "text", "empty", "npy", "cut", "huge", "headless",
                       "bare")),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_are_refused_before_anything_is_compiled(
    workdirs, folder, tmp_path, nothing_is_drawn, show, settings, message
):
    show = Show(**{k: str(folder / v) if k == "encode" else v for k, v in show.items()})
    refused(
        tmp_path,
        lambda: show_pictures(workdirs("classes"), show, out=str(tmp_path / "out"), settings=settings),
        message,
    )


def test_a_folder_that_holds_something_is_not_written_over(workdirs, tmp_path, nothing_is_drawn):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="--out=.* exists"):
        show_pictures(workdirs("plain"), Show(trace=1), out=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_small_strength_stays_near_the_image_and_the_whole_strength_does_not(workdirs, folder, tmp_path):
    def changed(strength):
        out = sample_images(
            workdirs("plain"),
            out=str(tmp_path / str(strength)),
            edit=edit_of(folder, init_image="image.png", strength=strength),
            settings={"num_steps": CHAIN, "num_images": 2},
        )
        with np.load(f"{out}/samples.npz") as arrays:
            return np.abs(arrays["images"][..., 0].astype(int) - PIXELS).mean()

    # beta is 1e-4 at the first timestep: 0.01 of noise, that is a grey level, times what the drawn weights answer to it.
    assert changed(0.01) < 10 < changed(1.0)
    record = json.loads((tmp_path / "1.0" / "sampling.json").read_text())
    assert record["strength"] == 1.0 and len(record["init_image_sha256"]) == 64


def test_a_strength_is_the_share_of_the_steps_that_are_made():
    sampler = make_sampler("ddim", GaussianDiffusion(Schedule(make_betas("linear", 100))))
    made = [from_image(sampler, np.zeros((2, 2, 1)), strength=k / 100).plan.num_moves for k in range(1, 101)]
    assert made == list(range(1, 101))
    assert from_image(sampler, np.zeros((2, 2, 1)), strength=0.071).plan.num_moves == 8
    assert from_image(sampler, np.zeros((2, 2, 1)), strength=1e-9).plan.num_moves == 1


def test_what_is_black_in_a_mask_is_kept_in_float_and_in_the_files(workdirs, folder, tmp_path):
    edit = edit_of(folder, init_image="image.png", mask="lower.png")
    settings = {"jump_length": 2, "num_resamples": 2, "num_images": 2, "clip": False}
    is_known = LOWER == 0
    out = sample_images(workdirs("plain"), out=str(tmp_path / "out"), edit=edit, settings=dict(settings))
    with np.load(f"{out}/samples.npz") as arrays:
        drawn = arrays["images"][..., 0]
    for k in range(2):
        written = np.asarray(Image.open(f"{out}/images/seed_{k:06d}.png"))
        np.testing.assert_array_equal(written, drawn[k])
        np.testing.assert_array_equal(written[is_known], PIXELS[is_known])
        assert np.abs(written[~is_known].astype(int) - PIXELS[~is_known]).mean() > 10
    inference, sampler = load_sampler(workdirs("plain"), settings=edit.settings(settings))
    images_ = sample(inference.network, edit.apply(sampler, (8, 8, 1)), [0, 1]).images[..., 0]
    known = np.broadcast_to(PIXELS / 127.5 - 1, (2, 8, 8))
    np.testing.assert_allclose(images_[:, is_known], known[:, is_known], atol=1e-6)


def test_every_grey_level_is_kept(workdirs, tmp_path):
    for first in range(0, 256, 64):
        Image.fromarray(np.arange(first, first + 64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "image.png")
        (tmp_path / "mask.png").write_bytes(FILES["lower.png"])
        edit = edit_of(tmp_path, init_image="image.png", mask="mask.png")
        _, sampler = load_sampler(workdirs("plain"), settings=edit.settings({}))
        known = edit.apply(sampler, (8, 8, 1)).known
        np.testing.assert_array_equal(images.to_uint8(known).ravel(), np.arange(first, first + 64))


def test_a_transparent_part_of_a_mask_is_white(workdirs, folder):
    edit = edit_of(folder, init_image="image.png", mask="alpha.png")
    _, sampler = load_sampler(workdirs("plain"), settings=edit.settings({}))
    np.testing.assert_array_equal(edit.apply(sampler, (8, 8, 1)).mask[..., 0], LOWER == 255)


def test_pictures_of_16_bits_are_those_of_8(workdirs, folder):
    shape = (8, 8, 1)
    _, sampler = load_sampler(workdirs("plain"))
    deep, plain = (edit_of(folder, init_image=name).apply(sampler, shape).origin for name in ("deep.png", "image.png"))
    np.testing.assert_array_equal(deep, plain)


def test_repaint_says_where_no_jump_fits(caplog):
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 100)))
    make_sampler("repaint", diffusion, num_steps=11, jump_length=10)
    make_sampler("repaint", diffusion, num_steps=10, jump_length=10, num_resamples=1)
    assert "jump" not in caplog.text
    sampler = make_sampler("repaint", diffusion, num_steps=10, jump_length=10)
    assert sampler.plan.num_moves == 10 and "jump_length=10 levels fits into 10 sampling steps" in caplog.text


def gif_frames(path):
    with Image.open(path) as film:
        frames = []
        for k in range(film.n_frames):
            film.seek(k)
            frames.append(np.asarray(film.convert("L")))
        return frames


@pytest.mark.parametrize(("sampler", "trace", "frames"), [("ddpm", 1, 5), ("heun", 3, 4)])
def test_a_trace_ends_in_the_images_and_its_films_have_its_states(workdirs, tmp_path, sampler, trace, frames):
    settings = {"sampler": sampler, "num_images": 3}
    report = show_pictures(workdirs("classes"), Show(trace=trace), out=str(tmp_path / "out"), settings=settings)
    assert f"3 images, {frames} states each" in report
    inference, made = load_sampler(workdirs("classes"), settings=settings)
    expected = images.to_uint8(sample(inference.network, made, range(3), labels=[0, 1, 2]).images)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["labels"].tolist() == [0, 1, 2]
        drawn = arrays["images"]
    assert (
        np.abs(drawn.astype(int) - expected).max() <= 1
    )  # the loop is cut into pieces, which XLA and Eigen may round otherwise
    grid = images.picture(drawn, columns=3)[..., 0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "grid.png")), grid)
    for name, count in (("x_t", frames), ("x_0", frames - 1)):
        strip = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert strip.shape == (3 * 65 - 1, count * 65 - 1)
        film = gif_frames(tmp_path / "out" / f"{name}.gif")
        assert len(film) == count and film[0].shape == grid.shape
        for k in range(3):  # row k of the strip is image k, from noise on; the film shows the same states
            for j in (0, count - 1):
                state = strip[k * 65 : k * 65 + 64, j * 65 : j * 65 + 64]
                np.testing.assert_array_equal(film[j][:, k * 65 : k * 65 + 64], state)
                if (name, j) == ("x_t", count - 1):
                    np.testing.assert_array_equal(state[::8, ::8], drawn[k, ..., 0])


def test_shared_noise_makes_images_alike_until_they_part(workdirs, tmp_path):
    def drawn(steps):
        out = tmp_path / str(steps)
        settings = {"sampler": "ddpm", "labels": "1", "num_images": 3}
        show_pictures(workdirs("classes"), Show(shared_noise_steps=steps), out=str(out), settings=settings)
        with np.load(out / "samples.npz") as arrays:
            return arrays["images"].astype(int)

    whole, half = drawn(STEPS), drawn(2)
    assert np.abs(whole - whole[:1]).max() <= 1 < np.abs(half - half[:1]).max()
    assert np.abs(half[0] - whole[0]).max() <= 1  # the first image is that of its own noise


@pytest.mark.parametrize("seeds", ["-5,9223372036854775807", "3,3"])
def test_the_ends_of_an_interpolation_are_the_images_of_the_two_seeds(workdirs, tmp_path, seeds):
    show_pictures(
        workdirs("classes"),
        Show(interpolate=seeds),
        out=str(tmp_path / "out"),
        settings={"num_images": 5, "labels": "2", "guidance": 2.0},
    )
    inference, sampler = load_sampler(workdirs("classes"))
    ends = [int(seed) for seed in seeds.split(",")]
    expected = images.to_uint8(sample(inference.network, sampler, ends, labels=2, guidance=2.0).images)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        strip = arrays["images"]
        np.testing.assert_allclose(arrays["lambdas"], [0, 0.25, 0.5, 0.75, 1])
    assert np.abs(strip[[0, -1]].astype(int) - expected).max() <= 1
    assert Image.open(tmp_path / "out" / "strip.png").size == (5 * 65 - 1, 64)
    frames = gif_frames(tmp_path / "out" / "strip.gif")
    if seeds == "3,3":
        assert (strip == strip[0]).all() and len(frames) == 1  # Pillow writes equal frames as one
    else:
        assert len(frames) == 5 and np.abs(strip[2].astype(int) - expected).max() > 10


@pytest.mark.parametrize(("sampler", "at"), [("ddpm", None), ("ddim", 0.5)])
def test_images_are_mixed_in_x_t_if_asked_for_or_if_the_sampler_draws_noise(workdirs, tmp_path, sampler, at):
    settings = {"num_images": 3, "sampler": sampler}
    report = show_pictures(
        workdirs("classes"), Show(interpolate="3,7", interpolate_at=at), out=str(tmp_path / "out"), settings=settings
    )
    assert "3 images between the seeds 3 and 7, mixed linearly after 2 of 4 steps" in report
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert len(np.unique(arrays["images"].reshape(3, -1), axis=0)) == 3


@pytest.mark.parametrize(
    ("name", "settings"),
    [("heun", {"churn": 1e6}), ("repaint", {"jump_length": 1, "num_resamples": 4}), ("ddim", {})],
)
def test_images_are_mixed_at_the_noise_level_that_the_sampler_begins_at(monkeypatch, name, settings):
    """Step t + 1 from the end begins at another level than t + 1 where churn adds timesteps, or where there are jumps."""
    schedule = Schedule(make_betas("linear", CHAIN, beta_end=0.4))
    network = Analytic(schedule, np.full(3, 0.3), 1e-6 * np.eye(3))
    sampler = make_sampler(name, GaussianDiffusion(schedule), num_steps=10, clip=False, **settings)
    x, levels, diffuse = np.full((1, 3, 1), 0.3, np.float32), [], GaussianDiffusion.q_sample

    def spy(self, x_0, index, eps):
        levels.append(int(index[0]) + 1)
        return diffuse(self, x_0, index, eps)

    monkeypatch.setattr(GaussianDiffusion, "q_sample", spy)
    for t in (0, 4, 9):
        mixed = interpolate(network, sampler, x, x, t=t, lambdas=[0.0, 1.0])
        np.testing.assert_allclose(mixed, np.broadcast_to(x, mixed.shape), atol=0.02)
    assert levels[::2] == levels[1::2] == [sampler.plan.last_steps(t + 1).start[0] for t in (0, 4, 9)]


@pytest.mark.parametrize("function", ["encode", "interpolate"])
def test_a_classifiers_scale_reaches_it(function):
    schedule = Schedule(make_betas("linear", CHAIN, beta_end=0.4))
    network = guided_by(Analytic(schedule, 0.0, 0.25), LinearClassifier(schedule, 0.5, 2.0))
    sampler = make_sampler("ddim", GaussianDiffusion(schedule), num_steps=10, clip=False)
    x = np.full((1, 1, 1), 0.3, np.float32)

    def drawn(scale):
        kwargs = {"labels": 0, "classifier_scale": scale}
        if function == "encode":
            return encode(network, sampler, x[None], **kwargs).x_T
        return interpolate(network, sampler, x, x, t=9, lambdas=[0.5], **kwargs)

    values = [float(drawn(scale).ravel()[0]) for scale in (0.0, 1.0, 2.0, None)]
    np.testing.assert_allclose(values[2] - values[1], values[1] - values[0], rtol=1e-3)  # all is linear
    assert abs(values[1] - values[0]) > 0.01 and values[3] == values[1]


def test_encoding_and_decoding_an_analytic_network_is_exact_up_to_the_steps():
    """DDIM's ODE, whose Euler steps up and down undo each other to first order: the error falls with the steps."""
    schedule = Schedule(make_betas("linear", 1000))
    network = Analytic(schedule, np.array([0.1, -0.2]), np.array([[0.3, 0.1], [0.1, 0.2]]))
    x = np.random.Generator(np.random.PCG64(1)).uniform(-1, 1, (7, 1, 2, 1)).astype(np.float32)
    errors, latents = [], []
    for steps in (50, 100, 200, 1000):
        sampler = make_sampler("ddim", GaussianDiffusion(schedule), num_steps=steps, spacing="trailing")
        encoded = encode(network, sampler, x, batch_size=3)
        assert encoded.x_T.shape == encoded.images.shape == x.shape
        errors.append(np.abs(encoded.images - x).max())
        latents.append(encoded.x_T)
    # First order, and no floor yet at 1000 steps: the error times the steps stays within a sixth of its mean.
    scaled = np.array(errors) * [50, 100, 200, 1000]
    np.testing.assert_allclose(scaled, scaled.mean(), rtol=1 / 6)
    assert errors[3] < 0.01
    # The exact flow of a Gaussian: x_T = mean + sqrt(covariance_T) inv(sqrt(covariance)) (x - mean)
    abar = schedule.alphas_cumprod[-1]
    values, vectors = np.linalg.eigh(network.covariance)
    scale = vectors @ np.diag(np.sqrt((abar * values + 1 - abar) / values)) @ vectors.T
    exact = np.sqrt(abar) * network.mean + (x[:, 0, :, 0] - network.mean) @ scale
    assert np.abs(latents[3][:, 0, :, 0] - exact).max() < 0.05


def test_encoded_files_are_written_with_what_they_decode_to(workdirs, folder, tmp_path):
    report = show_pictures(
        workdirs("classes"),
        Show(encode=str(folder / "many.npz")),
        out=str(tmp_path / "out"),
        settings={"num_steps": CHAIN, "batch_size": 2, "labels": "3"},
    )
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], MANY)
        error = np.mean((arrays["decoded"] / 255 - MANY / 255) ** 2)
        assert arrays["x_T"].shape == MANY.shape and arrays["x_T"].dtype == np.float32
    assert report.startswith("5 images, encoded and decoded in 20 steps each way: mean squared error ")
    stated = float(report.split("mean squared error ")[1].split()[0])
    assert abs(stated - error) < 0.01 * error + 1e-4  # of floats there, of grey levels here
    assert Image.open(tmp_path / "out" / "encoded.png").size == (5 * 65 - 1, 3 * 65 - 1)
