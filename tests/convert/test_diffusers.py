"""UNet2DModel folders: small ones made by diffusers itself (tools/diffusers_reference.py), and damaged ones."""

import functools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ddpm_tf import experiment
from ddpm_tf.convert.diffusers import diffusers_name, load_diffusers, save_diffusers
from ddpm_tf.convert.diffusers_config import read_architecture
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from tests.conftest import DATA, drawn_weight

SMALL = Path(DATA) / "diffusers_small"
COND = Path(DATA) / "diffusers_cond"  # 5 rows of classes, each in its output.npz
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEY = "conv_in.weight"
OLD_KEYS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def output(network, origin=SMALL):
    with np.load(origin / "output.npz") as arrays:
        inputs = {key: arrays[key].astype(np.int32) for key in ("t", "labels") if key in arrays}
        return network({"x_t": arrays["x_t"], **inputs}).numpy(), arrays["output"]


def copied(origin, path):
    path.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(origin / name, path / name)
    return path


@pytest.fixture
def folder(tmp_path):
    return copied(SMALL, tmp_path / "in")


@pytest.fixture
def conditional(tmp_path):
    return copied(COND, tmp_path / "in")


def rename_to_old_keys(folder):
    arrays = {}
    for key, array in load_file(folder / WEIGHTS).items():
        for new, old in OLD_KEYS.items():
            key = key.replace(f".{new}.", f".{old}.")
        arrays[key] = array
    assert any(".query." in key for key in arrays)
    save_file(arrays, folder / WEIGHTS)


def test_the_output_is_that_of_diffusers():
    ours, theirs = output(load_diffusers(SMALL))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_output_for_every_label_is_that_of_diffusers(caplog):
    network = load_diffusers(COND)
    ours, theirs = output(network, COND)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert network.num_classes == 4 and "label 4, is taken for the null class" in caplog.text
    with np.load(COND / "output.npz") as arrays:
        others = {"t": arrays["t"].astype(np.int32), "labels": np.roll(arrays["labels"], 1).astype(np.int32)}
        changed = network({"x_t": arrays["x_t"], **others}).numpy()
    assert (np.abs(changed - theirs).max((1, 2, 3)) > 0.1).all()  # the labels matter


def test_old_attention_keys_and_a_file_instead_of_a_folder(folder):
    rename_to_old_keys(folder)
    ours, theirs = output(load_diffusers(folder / WEIGHTS))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("num_classes", "ch_mult"), [(None, (1, 2)), (127, (1,))])  # a table of 128 rows is square
def test_out_and_back_is_the_identity(tmp_path, num_classes, ch_mult):
    size = {"ch": 32, "ch_mult": ch_mult, "num_res_blocks": 1, "attn_resolutions": (8,)}
    network = UNet((8, 16, 1), **size, out_channels=2, dropout=0.1, num_classes=num_classes)
    for v in network.variables:
        v.assign(drawn_weight(v.path, v.shape, 0))
    save_diffusers(network, tmp_path / "out")
    back = load_diffusers(tmp_path / "out")
    for a, b in zip(network.variables, back.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    ours, theirs = network.get_config(), back.get_config()
    assert ours == theirs
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == expected_keys(network)
    with pytest.raises(InputError, match="not an empty folder"):
        save_diffusers(network, tmp_path / "out")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    network = load_diffusers(SMALL)
    (tmp_path / "empty").mkdir()
    save_diffusers(network, tmp_path / "empty")
    save_diffusers(network, tmp_path / "a" / "b")  # the parents are made
    assert {p.name for p in (tmp_path / "empty").iterdir()} == {WEIGHTS, "config.json"}

    def no_space(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(json, "dump", no_space)
    with pytest.raises(OSError, match="no space"):
        save_diffusers(network, tmp_path / "c")
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "a"}


def shard(folder, number=2, *, half=False):
    """The folder's weights in several files, as diffusers names them, with their index."""
    arrays = load_file(folder / WEIGHTS)
    names = [f"diffusion_pytorch_model-{k + 1:05}-of-{number:05}.safetensors" for k in range(number)]
    where = {key: names[k % number] for k, key in enumerate(sorted(arrays))}
    for name in names:
        save_file({key: arrays[key] for key in arrays if where[key] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    return names


@pytest.mark.parametrize("start", ["", "diffusion_pytorch_model-00002-of-00002.safetensors", f"{WEIGHTS}.index.json"])
def test_sharded_weights_are_read_whole(folder, start):
    shard(folder)
    ours, theirs = output(load_diffusers(folder / start))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_half_precision_under_its_own_name_is_read_exactly(folder):
    arrays = {key: array.astype(np.float16) for key, array in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(arrays, folder / "diffusion_pytorch_model.fp16.safetensors")
    network = load_diffusers(folder)
    bias = network.get_layer("conv_out").get_weights()[1]
    np.testing.assert_array_equal(bias, arrays["conv_out.bias"].astype(np.float32))


def damaged_shards(change):
    def damage(folder):
        names = shard(folder)
        path = folder / f"{WEIGHTS}.index.json"
        index = json.loads(path.read_text())
        change(folder, names, index)
        if path.exists():
            path.write_text(json.dumps(index))

    return damage


def twice(folder, names, index):
    first, second = (load_file(folder / name) for name in names)
    save_file({**second, KEY: {**first, **second}[KEY]}, folder / names[1])
    save_file({**first, KEY: {**first, **second}[KEY]}, folder / names[0])


SHARDS = {
    "no index": (lambda f, n, i: (f / f"{WEIGHTS}.index.json").unlink(), "without their index"),
    "one missing": (lambda f, n, i: (f / n[1]).unlink(), "copy all 2 shards"),
    "an index without a map": (lambda f, n, i: i.pop("weight_map"), "weight_map is None"),
    "an index that leaves the folder": (
        lambda f, n, i: i["weight_map"].update({KEY: "../x.safetensors"}),
        "beside the index",
    ),
    "an index that names a pickle": (
        lambda f, n, i: i["weight_map"].update({KEY: "x.bin"}),
        "expected a .safetensors file",
    ),
    "an index of numbers": (lambda f, n, i: i["weight_map"].update({KEY: 3}), "weight_map names 3"),
    "a weight in both": (twice, "a second time"),
    "one cut": (lambda f, n, i: (f / n[0]).write_bytes((f / n[0]).read_bytes()[:-40]), "damaged"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_damaged_shards_are_refused(folder, name):
    change, message = SHARDS[name]
    damaged_shards(change)(folder)
    with pytest.raises(InputError, match=message):
        load_diffusers(folder)


def test_several_variants_ask_for_the_path_of_one(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(folder / "diffusion_pytorch_model.fp16.safetensors", folder / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(InputError, match="2 sets of weights .*give the path of the one to read"):
        load_diffusers(folder)
    load_diffusers(folder / "diffusion_pytorch_model.ema.safetensors")


def test_a_folder_above_the_models_is_answered_with_the_models(folder):
    with pytest.raises(InputError, match=f"Did you mean {folder}"):
        load_diffusers(folder.parent)


@pytest.mark.parametrize("groups", [16, 4])
def test_the_number_of_groups_goes_both_ways(tmp_path, groups):
    network = UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=groups)
    save_diffusers(network, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["norm_num_groups"] == groups and written["attn_norm_num_groups"] is None
    (tmp_path / "out" / "config.json").write_text(json.dumps({**written, "attn_norm_num_groups": groups}))
    assert read_architecture(str(tmp_path / "out" / "config.json"))["num_groups"] == groups
    (tmp_path / "out" / "config.json").write_text(json.dumps({**written, "attn_norm_num_groups": 32}))
    with pytest.raises(InputError, match=f"attn_norm_num_groups is 32, expected null or norm_num_groups={groups}"):
        read_architecture(str(tmp_path / "out" / "config.json"))


def expected_keys(network):
    return {diffusers_name(v.path, len(network.ch_mult)) for v in network.variables}


@pytest.mark.parametrize("origin", [SMALL, COND], ids=["small", "cond"])
def test_keys_and_config_written_are_those_of_diffusers(tmp_path, origin):
    save_diffusers(load_diffusers(origin), tmp_path / "out")
    theirs, ours = load_file(origin / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(array, ours[key], err_msg=key)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((origin / "config.json").read_text())
    assert {k: v for k, v in config.items() if not k.startswith("_")}.items() <= original.items()


@pytest.mark.slow
def test_a_workdir_that_samples(folder, tmp_path):
    report = experiment.import_diffusers(str(folder), str(tmp_path / "w"), reference=str(SMALL / "output.npz"))
    assert "Largest difference to the reference output" in report and "run_sample.py --workdir=" in report
    out = experiment.sample_images(str(tmp_path / "w"), settings={"sampler": "ddim", "num_steps": 2, "num_images": 1})
    assert (Path(out) / "samples.npz").exists()


@pytest.mark.slow
def test_a_learned_variance_comes_back(tmp_path):
    network = UNet((8, 8, 1), ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(8, 4), out_channels=2)
    save_diffusers(network, tmp_path / "out")
    experiment.import_diffusers(str(tmp_path / "out"), str(tmp_path / "w"))
    inference = experiment.load_for_inference(str(tmp_path / "w"))
    assert inference.diffusion.variance == "learned_range" and inference.network.out_channels == 2
    config = inference.config
    config.data.image_width = 8  # the same as 0
    config.network.attn_resolutions = (4, 8)  # the same as (8, 4)
    experiment.import_diffusers(str(tmp_path / "out"), str(tmp_path / "again"), config=config)
    config.diffusion.variance, config.train.loss = "fixed_large", "simple"
    with pytest.raises(
        InputError, match="2 output channels for images of 1, which does not fit variance 'fixed_large'"
    ):
        experiment.import_diffusers(str(tmp_path / "out"), str(tmp_path / "third"), config=config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"block_size": 2, "attn_resolutions": (4,)}, "block_size=2"),
     ({"resamp_with_conv": False}, "resamp_with_conv=False"), ({"theta": 5e3}, "theta=5000.0 cannot .* only theta=10000")],
)  # fmt: skip
def test_networks_that_diffusers_has_no_place_for(tmp_path, arguments, message):
    network = UNet(
        (8, 8, 1), **{"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (8,), **arguments}
    )
    with pytest.raises(InputError, match=message):
        save_diffusers(network, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def weights(change):
    def damage(folder):
        arrays = load_file(folder / WEIGHTS)
        change(arrays)
        save_file(arrays, folder / WEIGHTS)

    return damage


def header(change):
    """Rewrite the file's JSON header, leaving the data."""

    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        parsed = json.loads(data[8 : 8 + length])
        change(parsed)
        text = json.dumps(parsed).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def raw(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def config(**values):
    def damage(folder):
        parsed = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**parsed, **values}))

    return damage


def pickled(folder):
    import pickle

    (folder / WEIGHTS).write_bytes(pickle.dumps({"conv_in.weight": [1.0]}))


Q = "mid_block.attentions.0.to_q.weight"
DAMAGES = {
    "cut in half": (raw(lambda d: d[: len(d) // 2]), "damaged"),
    "cut in the header": (raw(lambda d: d[:100]), "of more than [0-9,]+ bytes"),
    "empty": (raw(lambda d: b""), "has 0: the weights are truncated"),
    "bytes appended": (raw(lambda d: d + b"x" * 8), "damaged"),
    "header length of 2^63": (raw(lambda d: struct.pack("<Q", 2**63) + d[8:]), "its header claims 9,223"),
    "header length 0": (raw(lambda d: bytes(8) + d[8:]), "its header claims 0"),
    "header of another encoding": (raw(lambda d: d[:8] + b"\xff" * 20 + d[28:]), "damaged"),
    "an offset past the end": (header(lambda h: h[KEY].update(data_offsets=[0, 2**40])), "damaged"),
    "a shape that lies": (header(lambda h: h[KEY].update(shape=[2**20, 2**20])), "damaged"),
    "an overlap": (header(lambda h: h[KEY].update(data_offsets=h[Q]["data_offsets"])), "damaged"),
    "another dtype": (header(lambda h: h[KEY].update(dtype="I32")), "I32, expected F32 or F16"),
    "bfloat16": (
        weights(lambda a: a.update({key: array.astype("bfloat16") for key, array in a.items()})), "BF16, expected F32 or F16",
    ),
    "a pickle with this suffix": (pickled, "its header claims|damaged"),
    "a missing weight": (weights(lambda a: a.pop(KEY)), f"{KEY} +missing in the file"),
    "an extra weight": (weights(lambda a: a.update(extra=np.zeros(3, np.float32))), "extra .*no such weight here"),
    "a transposed weight": (
        weights(lambda a: a.update({KEY: a[KEY].transpose(1, 0, 2, 3).copy()})), r"\[3, 32, 3, 3\] in the file",
    ),
    "both key styles": (
        weights(lambda a: a.update({Q.replace("to_q", "query"): a[Q]})), "under its old and its new key",
    ),
    "a NaN": (weights(lambda a: a[KEY].__setitem__((0, 0, 0, 0), np.nan)), "not finite"),
    "another architecture": (config(layers_per_block=2, block_out_channels=[32, 32]), "more than|names disagree"),
    "an architecture of gigabytes": (config(block_out_channels=[1024, 2048]), "of more than [0-9,]+ bytes"),
    "one size in a list": (config(sample_size=[32]), "expected one number or two"),
    "three sizes": (config(sample_size=[8, 8, 8]), "expected one number or two"),
    "a dropout that is no number": (config(dropout="abc"), "dropout is 'abc'"),
    "a dropout of null": (config(dropout=None), "dropout is None"),
    "block types in lists": (config(down_block_types=[["a"], ["a"]]), "down_block_types"),
    "padding of another network": (config(downsample_padding=1), "downsample_padding is 1"),
    "another epsilon": (config(norm_eps=1e-5), "norm_eps is 1e-05"),
    "another class": (config(_class_name="UNet2DConditionModel"), "expected a UNet2DModel"),
    "block types of another kind": (config(down_block_types=["A", "B"]), "down_block_types"),
    "channels that are no numbers": (config(block_out_channels="many"), "block_out_channels is 'many'"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as a diffusers config"),
    "a byte order mark of UTF-16": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text(), encoding="utf-16"), "cannot be read as",
    ),
    "a key twice": (
        lambda f: (f / "config.json").write_text('{"dropout": 0, "dropout": 0.5}'), "the key 'dropout' is there twice",
    ),
    "deep nesting": (lambda f: (f / "config.json").write_text("[" * 10**6), "nested too deeply"),
    "a number of many digits": (lambda f: (f / "config.json").write_text('{"dropout": 1' + "0" * 5000 + "}"), "cannot be read"),
    "a huge epsilon": (config(norm_eps=10**400), "norm_eps is 1000"),
    "a config that is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "does not exist|not a regular file",
    ),
    "another middle": (config(mid_block_type=None), "mid_block_type is None"),
    "no config": (lambda f: (f / "config.json").unlink(), "does not exist; the architecture"),
    "only a pickle": (lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"), "can run code"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_and_nothing_is_written(folder, tmp_path, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(InputError, match=message):
        experiment.import_diffusers(str(folder), str(tmp_path / "w"))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


made = functools.cache(UNet)  # Keras needs seconds for one
ROWS = "class_embedding.weight"
CLASSES = {
    "no table": (weights(lambda a: a.pop(ROWS)), rf"1 of \d+ names disagree.\n.*{ROWS} +missing in the file"),
    "a row less": (
        weights(lambda a: a.update({ROWS: a[ROWS][:4].copy()})), rf"{ROWS} +\[4, 64\] in the file, \[5, 64\] here",
    ),
    "a transposed table": (
        weights(lambda a: a.update({ROWS: a[ROWS].T.copy()})), rf"{ROWS} +\[64, 5\] in the file, \[5, 64\] here",
    ),
    "a table without num_class_embeds": (
        config(num_class_embeds=None), rf"1 of \d+ names disagree.\n.*{ROWS} +\[5, 64\], no such weight here",
    ),
    "a NaN in the table": (weights(lambda a: a[ROWS].__setitem__((4, 0), np.nan)), f"{ROWS} has values that are not finite"),
    "labels as timesteps": (config(class_embed_type="timestep"), "is 'timestep', expected null.*a learned table"),
    "labels as embeddings": (config(class_embed_type="identity"), "class_embed_type is 'identity', expected null"),
    "another kind without a number": (config(class_embed_type="identity", num_class_embeds=None), "class_embed_type is 'id"),
    "one row": (config(num_class_embeds=1), r"num_class_embeds is 1, expected null or an integer within 2\.\..*null class"),
    "no row": (config(num_class_embeds=0), "num_class_embeds is 0, expected"),
    "a number of rows that is none": (config(num_class_embeds=True), "num_class_embeds is True, expected"),
    "a fraction of rows": (config(num_class_embeds=5.0), "num_class_embeds is 5.0, expected"),
    "rows without end": (config(num_class_embeds=10**400), "num_class_embeds is 1000"),
    "rows of gigabytes": (config(num_class_embeds=10**5), "of more than [0-9,]+ bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_damaged_classes_are_refused_and_nothing_is_written(conditional, tmp_path, monkeypatch, name):
    monkeypatch.setattr("ddpm_tf.convert.diffusers.UNet", made)
    damage, message = CLASSES[name]
    damage(conditional)
    with pytest.raises(InputError, match=message):
        experiment.import_diffusers(str(conditional), str(tmp_path / "w"))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".h5", ".keras", ".pkl"])
def test_formats_that_can_run_code_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="can run code"):
        load_diffusers(path)


def test_the_architecture_of_ddpm_cifar10_32_is_the_papers(tmp_path):
    """google/ddpm-cifar10-32's config.json, as facts."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "_class_name": "UNet2DModel",
                "act_fn": "silu",
                "attention_head_dim": None,
                "block_out_channels": [128, 256, 256, 256],
                "center_input_sample": False,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "in_channels": 3,
                "layers_per_block": 2,
                "mid_block_scale_factor": 1,
                "norm_eps": 1e-06,
                "norm_num_groups": 32,
                "out_channels": 3,
                "sample_size": 32,
                "time_embedding_type": "positional",
                "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            }
        )
    )
    arguments = read_architecture(tmp_path / "config.json")
    assert arguments["ch"] == 128 and arguments["ch_mult"] == (1, 2, 2, 2) and arguments["attn_resolutions"] == (16,)
    assert arguments["image_shape"] == (32, 32, 3) and arguments["num_res_blocks"] == 2


@pytest.mark.peers
@pytest.mark.parametrize("shape", ["CIFAR10", "CHURCH", "COND"])
def test_against_diffusers_itself(tmp_path, shape):
    pytest.importorskip("torch", reason="the comparison needs torch, which is not installed")
    diffusers = pytest.importorskip("diffusers", reason="the comparison needs diffusers, which is not installed")
    from tools import diffusers_reference

    model = diffusers_reference.make(getattr(diffusers_reference, shape))
    arrays = diffusers_reference.inputs(model)
    expected = diffusers_reference.run(model, **arrays)
    model.save_pretrained(tmp_path / "in")
    network = load_diffusers(tmp_path / "in")
    ours = network({key: a if key == "x_t" else a.astype(np.int32) for key, a in arrays.items()}).numpy()
    print(f"\n{shape}: largest difference {np.abs(ours - expected).max():.3g}")
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    rename_to_old_keys(tmp_path / "in")
    for a, b in zip(load_diffusers(tmp_path / "in").get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    save_diffusers(network, tmp_path / "out")
    back, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(diffusers_reference.run(back.eval(), **arrays), expected, atol=1e-4)
