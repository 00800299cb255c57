"""Labels, guidance, classifiers and settings of samplers: what they draw, and that what cannot be is refused at once."""

import itertools
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from ddpm_tf import images
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import TIMESTEP_SPACINGS, Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.experiment import sample_images
from ddpm_tf.experiment import sampling as sampling_job
from ddpm_tf.experiment.conditions import parse_labels
from ddpm_tf.experiment.inference import load_sampler
from ddpm_tf.samplers import SAMPLERS, make_sampler, sample
from tests.experiment.conftest import CHAIN, CLASS_NAMES, STEPS

SCALED = 64 + 1  # pixels between two images of a grid


def draw(workdir, out, **kwargs):
    """The arrays of samples.npz."""
    settings = {
        name: kwargs.pop(name) for name in list(kwargs) if name not in ("classifier", "classifier_scale", "edit")
    }
    with np.load(f"{sample_images(workdir, out=str(out), settings=settings, **kwargs)}/samples.npz") as arrays:
        return dict(arrays)


def grey(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("all", [0, 1, 2]),
        (" all ", [0, 1, 2]),
        ("zero", [0]),
        ("cat, tabby", [1]),  # a name with a comma
        ("2,cat, tabby,zero", [2, 1, 0]),
        ("0", [2]),  # the name of class 2 comes before the number of class 0
        ("1, 1 ,1", [1, 1, 1]),
        ("3", [3]),  # the null class
    ],
)
def test_labels_are_names_or_numbers(labels, expected):
    assert parse_labels(labels, 3, CLASS_NAMES).tolist() == expected


def test_of_names_that_begin_alike_the_longest_counts():
    assert parse_labels("a,b,c,a", 4, ["a", "a,b", "b", "c"]).tolist() == [1, 3, 0]
    assert parse_labels("a,c,b", 4, ["a", "a,b", "b", "c"]).tolist() == [0, 3, 2]


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ("", "''"), ("-1", "'-1'"), ("4", "'4'"), ("9" * 5000, "'9"), ("zero,", "''"), (",", "''"), ("all,zero", "'all'"),
        ("Zero", "'Zero'"), ("1.0", r"'1\.0'"), ("1e0", "'1e0'"), ("٣", "'٣'"), ("²", "'²'"), ("日本語", "'日本語'"),
        ("cat", "'cat'"), ("cat,tabby", "'cat'"), ("1,2,dog", "'dog'"), ("a\nb", r"'a\\nb'"),
    ],
)  # fmt: skip
def test_what_is_no_class_is_refused_with_the_names(labels, word):
    with pytest.raises(
        InputError, match=f"(?s)^--labels=.*: {word}.* is no class.*0..3 .*names: zero, cat, tabby, 0"
    ) as e:
        parse_labels(labels, 3, CLASS_NAMES)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("classes", {"labels": "4"}, "--labels=4: '4' is no class"),
        ("plain", {"labels": "0"}, "--labels=0 was given, but the network is unconditional"),
        ("plain", {"guidance": 2.0}, "--guidance=2 was given, but the network is unconditional"),
        ("classes", {"guidance": float("nan")}, "sample.guidance must be 0 or a number between .*, found nan"),
        ("classes", {"guidance": float("inf")}, "sample.guidance must be 0 or a number between .*, found inf"),
        ("classes", {"guidance": 1e300}, "sample.guidance must be 0 or a number between"),
        ("classes", {"guidance": 1e7}, "sample.guidance must be within -1e6..1e6, found 10000000.0"),
        ("classes", {"guidance_first": 2}, "--guidance_first=2 and --guidance_last=0 have no effect, since there"),
        ("classes", {"guidance": 2.0, "guidance_first": 0}, "guidance_first must be at least 1, found 0"),
        ("classes", {"guidance": 2.0, "guidance_first": 5}, "guidance_first=5 and guidance_last=4 must lie within .* 1..4"),
        ("classes", {"guidance": 2.0, "guidance_last": 5}, "guidance_first=1 and guidance_last=5 must lie within .* 1..4"),
        ("classes", {"guidance": 2.0, "guidance_first": 3, "guidance_last": 2}, "must lie within .* in this order"),
        ("classes", {"guidance": 2.0, "guidance_rescale": 1.5}, "guidance_rescale must be within 0..1, found 1.5"),
        ("classes", {"guidance_rescale": 0.5}, "--guidance_rescale=0.5 has no effect, since there is no guidance"),
        ("plain", {"classifier_scale": 1.0}, "--classifier_scale=1 was given without a classifier"),
        ("plain", {"classifier": "classifier", "classifier_scale": float("nan")}, "--classifier_scale must be within"),
        ("plain", {"classifier": "classifier", "labels": "7"}, "--labels=7: '7' is no class"),
        ("plain", {"classifier": "classifier", "guidance": 2.0}, "--guidance=2 was given, but the network is uncond"),
        ("plain", {"classifier": "plain"}, r"--classifier=.* holds no classifier \(network.name=unet\)"),
        ("plain", {"classifier": "classifier_16"}, r"--classifier=.* images of \[16, 16, 1\], .* draws \[8, 8, 1\]"),
        ("plain", {"classifier": "classifier_cosine"}, "--classifier=.* another chain"),
        ("classifier", {}, "--workdir=.* holds a classifier"),
        ("zero_snr", {"classifier": "classifier_zero_snr", "spacing": "linspace"}, "ends at alphas_cumprod = 0.*Leave --cl"),
        ("plain", {"sampler": "heun", "eta": 0.5}, "--eta=0.5 was given, but the sampler heun has no such setting"),
        ("plain", {"churn": 1.0}, "--churn=1.0 was given, but the sampler ddim has no such setting"),
        ("plain", {"sampler": "ddpm", "jump_length": 3}, "--jump_length=3 was given, but the sampler ddpm has no"),
        ("plain", {"sigma_hat": True, "eta": 0.5}, "sigma_hat replaces eta, and eta=0.5 was given"),
        ("plain", {"sampler": "heun", "churn": -1.0}, "sample.churn must be at least 0, found -1.0"),
        ("plain", {"sampler": "nope"}, "Unknown sampler 'nope'; expected one of .*'repaint'"),
        ("plain", {"spacing": "nope"}, "Unknown timestep spacing 'nope'; expected one of .*'karras'"),
        ("plain", {"dynamic_threshold": 0.9, "clip": False}, "dynamic_threshold=0.9 is a way to clip x_0, and clip is off"),
        *(("plain", {"sampler": s, "num_steps": 0}, "num_steps must be within 1..T, .* found 0") for s in SAMPLERS),
        *(("plain", {"sampler": s, "num_steps": 21}, "num_steps must be within 1..20, found 21") for s in SAMPLERS),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_anything_is_compiled(
    workdirs, tmp_path, nothing_is_drawn, name, given, message
):
    given = dict(given)
    if "classifier" in given:
        given["classifier"] = workdirs(given["classifier"])
    with pytest.raises(InputError, match=f"(?s){message}") as e:
        draw(workdirs(name), tmp_path / "out", **given)
    assert e.value.exit_code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder"])
def test_a_path_that_is_no_classifiers_workdir_is_refused(workdirs, tmp_path, nothing_is_drawn, kind):
    path = tmp_path / "c"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty folder":
        path.mkdir()
    message = {
        "missing": "does not exist",
        "file": "is a file; expected a folder",
        "empty folder": "holds no config.json",
    }
    with pytest.raises(InputError, match=f"^--classifier={path} {message[kind]}"):
        draw(workdirs("plain"), tmp_path / "out", classifier=str(path))
    assert not (tmp_path / "out").exists()


def test_labels_go_in_turn_and_stand_in_the_file_and_a_grid_has_a_column_for_each_class(workdirs, tmp_path):
    arrays = draw(workdirs("classes"), tmp_path / "out")
    assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2] and arrays["labels"].dtype == np.int32
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert grid.shape == (2 * SCALED - 1, 3 * SCALED - 1)
    for k, image in enumerate(arrays["images"][..., 0]):
        top, left = k // 3 * SCALED, k % 3 * SCALED
        np.testing.assert_array_equal(grid[top : top + 64 : 8, left : left + 64 : 8], image)


def test_a_name_is_its_number_and_two_classes_make_two_columns(workdirs, tmp_path):
    by_name = draw(workdirs("classes"), tmp_path / "name", labels="cat, tabby,zero", num_images=4)
    by_number = draw(workdirs("classes"), tmp_path / "number", labels="1,zero", num_images=4)
    assert by_name["labels"].tolist() == [1, 0, 1, 0]
    np.testing.assert_array_equal(by_name["images"], by_number["images"])
    assert Image.open(tmp_path / "name" / "grid.png").size == (2 * SCALED - 1, 2 * SCALED - 1)


def test_a_seed_and_a_label_are_one_image_in_any_batch_and_through_sample(workdirs, tmp_path):
    given = {"guidance": 2.5, "guidance_first": 2, "guidance_last": 3, "guidance_rescale": 0.5, "seed": -3}
    arrays = draw(workdirs("classes"), tmp_path / "two", batch_size=2, **given)
    whole = draw(workdirs("classes"), tmp_path / "six", batch_size=6, **given)
    inference, sampler = load_sampler(workdirs("classes"), settings=given)
    labels = np.arange(6) % 3
    alone = [
        sample(inference.network, sampler, [seed], labels=[k], guidance=2.5).images
        for seed, k in zip(range(-3, 3), labels, strict=True)
    ]
    for same in (whole["images"], images.to_uint8(np.concatenate(alone))):
        assert grey(arrays["images"], same) <= 1  # a batch changes the order of sums, which may cross a grey level


def test_guidance_1_is_conditional_and_0_is_the_null_class(workdirs):
    inference, sampler = load_sampler(workdirs("classes"))
    labels = np.arange(6) % 3

    def drawn(**conditions):
        return sample(inference.network, sampler, np.arange(6), **conditions).images

    # In float32 unconditional + (conditional - unconditional) is conditional up to rounding.
    conditional = drawn(labels=labels)
    np.testing.assert_allclose(drawn(labels=labels, guidance=1.0), conditional, atol=1e-6)
    np.testing.assert_allclose(drawn(labels=labels, guidance=0.0), drawn(labels=3), atol=1e-6)
    assert np.abs(conditional - drawn(labels=3)).max() > 0.1  # the labels play a part


def test_a_classifier_of_scale_0_does_not_guide_and_its_folder_is_not_that_of_scale_1(workdirs, tmp_path):
    kwargs = {"classifier": workdirs("classifier"), "labels": "1", "num_images": 2}
    drawn = {
        scale: draw(workdirs("plain"), tmp_path / str(scale), classifier_scale=scale, **kwargs) for scale in (0.0, 50.0)
    }
    plain = draw(workdirs("plain"), tmp_path / "plain", num_images=2)["images"]
    assert grey(drawn[0.0]["images"], plain) <= 1 < grey(drawn[50.0]["images"], plain)
    assert drawn[0.0]["labels"].tolist() == [1, 1]
    recorded = [
        json.loads((tmp_path / str(scale) / "sampling.json").read_text())["classifier_scale"] for scale in drawn
    ]
    assert recorded == [0.0, 50.0]
    with pytest.raises(InputError, match=r"(?s)begun with other settings:.*classifier_scale +0\.0 +1\.0"):
        draw(workdirs("plain"), tmp_path / "0.0", **kwargs)


def test_a_stopped_run_with_labels_goes_on_to_the_same_files(workdirs, tmp_path, monkeypatch):
    given = {"labels": "2,zero,3", "guidance": 2.0, "num_images": 7, "batch_size": 2}
    draw(workdirs("classes"), tmp_path / "whole", **given)
    generate = sampling_job.generate

    def stopped(*args, **kwargs):
        yield from itertools.islice(generate(*args, **kwargs), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling_job, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw(workdirs("classes"), tmp_path / "stopped", **given)
    assert not (tmp_path / "stopped" / "samples.npz").exists()
    drawn = []

    def counted(*args, **kwargs):
        for batch in generate(*args, **kwargs):
            drawn.append(batch.labels.tolist())
            yield batch

    monkeypatch.setattr(sampling_job, "generate", counted)
    arrays = draw(workdirs("classes"), tmp_path / "stopped", **given)
    assert drawn == [[0, 3], [2]]  # images 4, 5 and 6 of 2, 0, 3, 2, 0, 3, 2
    assert arrays["labels"].tolist() == [2, 0, 3, 2, 0, 3, 2]
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    with pytest.raises(InputError, match=r"(?s)begun with other settings:.*labels +2,zero,3 +all"):
        draw(workdirs("classes"), tmp_path / "stopped", **given | {"labels": "all"})
    shutil.rmtree(tmp_path / "stopped")


@pytest.mark.parametrize("error", [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "OOM")])
def test_a_batch_that_does_not_fit_in_memory_is_one_message(workdirs, tmp_path, monkeypatch, error):
    def too_large(*_, **__):
        raise error
        yield

    monkeypatch.setattr(sampling_job, "generate", too_large)
    with pytest.raises(InputError, match="^Out of memory while --batch_size=7 images .*: lower it") as e:
        draw(workdirs("plain"), tmp_path / "out", batch_size=7)
    assert e.value.exit_code == 2


def test_eps_cannot_be_predicted_on_a_chain_without_signal():
    with pytest.raises(InputError, match="alphas_cumprod = 0: prediction 'eps' cannot recover x_0 there.*'x_0' or 'v'"):
        GaussianDiffusion(Schedule(make_betas("linear_zero_snr", CHAIN)))


class Halving:
    """A network that costs nothing: the sampler's formulas are what could be infinite."""

    image_shape, out_channels, num_classes, variables = (2, 2, 1), 1, None, ()

    def __call__(self, inputs, training=False):
        return 0.5 * inputs["x_t"]


EVERYTHING = list(itertools.product(("v", "x_0"), TIMESTEP_SPACINGS, (1, 2, STEPS, CHAIN), (True, False)))
SOME = [
    ("v", "linspace", 1, False), ("v", "trailing", STEPS, True), ("v", "logsnr", CHAIN, True),
    ("x_0", "karras", 2, True), ("v", "karras", CHAIN, False),
]  # fmt: skip


@pytest.mark.parametrize("cases", [SOME, pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=["some", "everything"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_without_signal_at_its_end_is_sampled(name, cases):
    end = []
    for prediction, spacing, steps, clip in cases:
        diffusion = GaussianDiffusion(Schedule(make_betas("linear_zero_snr", CHAIN)), prediction=prediction)
        sampler = make_sampler(name, diffusion, num_steps=steps, spacing=spacing, clip=clip)
        end.append(sampler.diffusion.schedule.alphas_cumprod[-1])
        drawn = sample(Halving(), sampler, [0, 1]).images
        assert np.isfinite(drawn).all() and drawn.std() > 0, (prediction, spacing, steps, clip)
    assert end.count(0) >= 0.7 * len(end)  # uniform and quad do not visit the last timestep


@pytest.mark.slow
def test_the_whole_way_from_a_workdir_of_such_a_chain(workdirs, tmp_path):
    arrays = draw(
        workdirs("zero_snr"),
        tmp_path,
        sampler="heun",
        churn=2.0,
        spacing="trailing",
        guidance=3.0,
        guidance_rescale=0.7,
    )
    assert arrays["images"].std() > 1 and len(np.unique(arrays["images"].reshape(6, -1), axis=0)) == 6
