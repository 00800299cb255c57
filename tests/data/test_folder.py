import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm_tf.data import check, make_dataset, manifest
from ddpm_tf.data.index import NAME
from ddpm_tf.data.sources import ArraySource, FolderSource, load_source
from ddpm_tf.errors import DataNotFoundError, InputError
from tests.data import zoo

SHAPE = (8, 8, 3)


def read(source, *indices):
    return source.read(np.array(indices))["image"].numpy()


def save(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def load(folder, shape=SHAPE, **settings):
    return load_source(f"folder:{folder}", image_shape=shape, **settings)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    zoo.write(folder, zoo.GOOD)
    for name in zoo.LITTER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def bad(tmp_path):
    """The whole zoo: every file that can be used, and every one that cannot."""
    zoo.write(tmp_path, zoo.GOOD)
    zoo.write(tmp_path, zoo.BAD)
    kinds = {name: kind for name, (_, kind) in zoo.BAD.items()} | zoo.add_things(tmp_path)
    return tmp_path, kinds


def test_a_folder_is_read_in_byte_order_hidden_files_left_out(tmp_path):
    for k, name in enumerate(("b.png", "a é.png", "sub/c.PNG", "x.png/d.png")):
        save(tmp_path / name, k)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    source = load(tmp_path)
    assert isinstance(source, ArraySource) and "label" not in source.tensors  # some lie in no subfolder
    np.testing.assert_array_equal(read(source, 0, 1, 2, 3)[:, 0, 0, 0], [1, 0, 2, 3])


@pytest.mark.parametrize("in_memory_mb", [4096, 0])
def test_the_good_part_of_the_zoo_is_a_data_set(good, in_memory_mb):
    source = load(good, (zoo.SIZE, zoo.SIZE, 3), in_memory_mb=in_memory_mb)
    assert isinstance(source, ArraySource if in_memory_mb else FolderSource)
    names = sorted(map(os.fsencode, zoo.GOOD))
    assert [os.fsencode(name) for name, _ in source.files] == names
    for k, name in enumerate(names):
        expected = (zoo.GOOD[name] if name in zoo.GOOD else zoo.GOOD[os.fsdecode(name)])[1]()
        assert np.abs(read(source, k)[0].astype(int) - expected).max() <= 2, name
    batch = next(iter(make_dataset(source, batch_size=7, seed=0)))
    assert batch["image"].shape == (7, zoo.SIZE, zoo.SIZE, 3)
    json.dumps(manifest(source))
    if in_memory_mb:
        notes = manifest(source)["notes"]
        assert notes["ICC profile, to sRGB"] == 5 and notes["turned upright"] > 10 and notes["CMYK"] == 2


def test_one_start_lists_all_problems_by_kind(bad):
    folder, kinds = bad
    for in_memory_mb in (4096, 0):
        with pytest.raises(InputError) as e:
            load(folder, (zoo.SIZE, zoo.SIZE, 3), in_memory_mb=in_memory_mb)
        message = str(e.value)
        # Without their pixels, files that break in the middle look whole.
        expected = len(kinds) if in_memory_mb else sum(not name.startswith("half") for name in kinds)
        assert int(message.partition(" of ")[0]) >= expected
        for said in (
            "animated=first",
            "a link to a file that does not exist",
            "not a regular file",
            "HTML",
            "small=enlarge",
        ):
            assert said in message


def test_bad_files_are_left_out_if_asked_and_named_in_the_manifest(bad, caplog):
    folder, kinds = bad
    with pytest.raises(InputError, match="data.bad_limit"):
        load(folder, (zoo.SIZE, zoo.SIZE, 3), bad="skip")
    for in_memory_mb in (4096, 0):
        source = load(folder, (zoo.SIZE, zoo.SIZE, 3), bad="skip", bad_limit=0.5, in_memory_mb=in_memory_mb)
        assert source.num_examples == len(zoo.GOOD)
        assert {name: kind for name, kind, _ in manifest(source)["left_out"]} == kinds


def test_small_pictures_are_left_out_without_counting_as_bad(tmp_path):
    for k, size in enumerate(((8, 8), (4, 9), (16, 16))):
        save(tmp_path / f"{k}.png", k, size)
    with pytest.raises(InputError, match="(?s)4x9 pixels, expected at least 8x8.*data.image_size"):
        load(tmp_path)
    source = load(tmp_path, small="skip")
    np.testing.assert_array_equal(read(source, 0, 1)[:, 0, 0, 0], [0, 2])
    assert manifest(source)["left_out"] == [["1.png", "small", "4x9 pixels, expected at least 8x8"]]
    assert load(tmp_path, small="enlarge").num_examples == 3
    with pytest.raises(InputError, match="no picture that can be used"):
        load(tmp_path, (32, 32, 3), small="skip")


def test_links_are_followed_once_and_loops_are_named(tmp_path, caplog):
    data, disk = tmp_path / "data", tmp_path / "disk"
    save(data / "cats/1.png", 1)
    save(disk / "dogs/2.png", 2)
    (data / "dogs").symlink_to(disk / "dogs")
    (data / "again").symlink_to(data / "cats")
    (data / "cats/up").symlink_to(data)
    (disk / "dogs/other").symlink_to(disk / "dogs")
    (data / "one.png").symlink_to(disk / "dogs/2.png")  # a link to a file is a picture of its own
    source = load(data)
    assert [name for name, _ in source.files] == ["cats/1.png", "dogs/2.png", "one.png"]
    assert caplog.text.count("is read already") == 3 and "cats/up" in caplog.text


def test_a_folder_that_cannot_be_read_is_an_error_even_with_skip(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / name)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(path) if not str(path).endswith("b") else _refuse())
    for bad in ("error", "skip"):
        with pytest.raises(InputError, match="(?s)folder that cannot be read.*/b .Permission denied"):
            load(tmp_path, bad=bad, bad_limit=1.0)


def _refuse():
    raise PermissionError(13, "Permission denied")


def test_subfolders_are_classes(tmp_path):
    for k, name in enumerate(("cat/1.png", "cat/more/2.png", "ant/3.png")):
        save(tmp_path / name, k)
    for in_memory_mb in (4096, 0):
        source = load(tmp_path, in_memory_mb=in_memory_mb)
        assert source.details.class_names == ["ant", "cat"]
        np.testing.assert_array_equal(source.read(np.array([2, 0]))["label"], [1, 0])
        assert "label" not in load(tmp_path, labels="none", in_memory_mb=in_memory_mb).read(np.array([0]))
    save(tmp_path / "4.png")
    assert "label" not in load(tmp_path).read(np.array([0]))
    with pytest.raises(InputError, match="1 pictures .* in no subfolder, such as 4.png"):
        load(tmp_path, labels="folder")


def test_numbered_subfolders_keep_their_numbers(tmp_path):
    for k in range(11):
        save(tmp_path / f"{k}/x.png", k)
    source = load(tmp_path)
    np.testing.assert_array_equal(source.tensors["label"], source.tensors["image"][:, 0, 0, 0])
    assert source.details.class_names == [str(k) for k in range(11)]


def test_a_table_beside_the_pictures_labels_them(tmp_path):
    for k in range(3):
        save(tmp_path / f"sub/{k}.png", k)
    table = tmp_path / "labels.csv"
    table.write_text("\ufefffile,label,other\nsub/2.png,red,x\n./sub/0.png,blue,\nsub/1.png,red,\n")
    source = load(tmp_path)
    np.testing.assert_array_equal(source.tensors["label"], [0, 1, 1])
    assert source.details.class_names == ["blue", "red"]
    for content, message in (
        ("file,label\nsub/0.png,a\n", "2 pictures have no label .such as sub/1.png"),
        ("name,label\nx,y\n", "expected 'file' and 'label'"),
        ("file,label\nsub/0.png,a\nsub/1.png,a\nsub/2.png,a\nsub/9.png,b\n", "1 names are of no picture"),
        ("file,label\nsub/0.png,a\nsub/0.png,b\nsub/1.png,a\nsub/2.png,a\n", "1 names stand there more than once"),
    ):
        table.write_text(content)
        with pytest.raises(InputError, match=message):
            load(tmp_path)
    assert "label" not in load(tmp_path, labels="none").tensors


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        load(tmp_path)
    with pytest.raises(DataNotFoundError, match="does not exist"):
        load(tmp_path / "none")
    save(tmp_path / "x.png")
    with pytest.raises(DataNotFoundError, match="is a file"):
        load(tmp_path / "x.png")


def test_a_picture_that_breaks_later_is_named_on_one_line(tmp_path):
    for name in ("a.png", "new\nline.png"):
        save(tmp_path / name)
    source = load(tmp_path, in_memory_mb=0)
    (tmp_path / "new\nline.png").write_bytes(b"\x89PNG\r\n\x1a\nnot any more")
    with pytest.raises(Exception, match=r"'\S*new\\nline.png': damaged .*repair or remove it"):
        source.read(np.array([0, 1]))


def run_check(capsys, *arguments):
    code = check.main([*map(str, arguments), "--image_size=8"])
    return code, *capsys.readouterr()


def test_the_checker_reports_and_changes_nothing(bad, capsys):
    folder, kinds = bad
    before = sorted(os.listdir(folder))
    code, out, err = run_check(capsys, f"folder:{folder}")
    assert code == 2 and "turned upright" in out and "cannot be used" in err and sorted(os.listdir(folder)) == before
    code, out, err = run_check(capsys, f"folder:{folder}", "--bad=skip", "--bad_limit=0.5", "--small=enlarge")
    assert code == 0 and f"{len(zoo.GOOD) + 2} pictures can be used" in out
    assert run_check(capsys, "folder:/nonexistent")[0] == 2
    code, out, _ = run_check(capsys, "digits", "--channels=1")
    assert code == 0 and out == "1,797 images of [8, 8, 1], classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"


def test_the_index_makes_the_next_start_fast_and_finds_changed_bytes(tmp_path, capsys, monkeypatch):
    for k in range(5):
        save(tmp_path / f"{k % 2}/{k}.png", k)
    assert run_check(capsys, f"folder:{tmp_path}", "--verify")[0] == 2  # no index yet
    code, out, _ = run_check(capsys, f"folder:{tmp_path}", "--write_index")
    assert code == 0 and (tmp_path / NAME).exists() and run_check(capsys, f"folder:{tmp_path}", "--verify")[0] == 0
    opened = []
    monkeypatch.setattr("ddpm_tf.data.folder.examine", lambda path, how: opened.append(os.path.basename(path)))
    load(tmp_path, in_memory_mb=0)
    assert opened == []
    save(tmp_path / "0/2.png", 77)
    load(tmp_path, in_memory_mb=0)
    load(tmp_path, in_memory_mb=0, small="enlarge")  # other options: all are looked at
    assert opened[0] == "2.png" and len(opened) == 6
    save(tmp_path / "9.png")
    (tmp_path / "1/3.png").unlink()
    code, _, err = run_check(capsys, f"folder:{tmp_path}", "--verify")
    assert code == 2 and "changed: 0/2.png" in err and "gone: 1/3.png" in err and "new: 9.png" in err
    (tmp_path / NAME).write_text("junk\n")
    assert load(tmp_path, in_memory_mb=0).num_examples == 5


@pytest.mark.slow
def test_the_checker_is_a_command(tmp_path):
    save(tmp_path / "x.png")
    command = [sys.executable, "-m", "ddpm_tf.data.check", f"folder:{tmp_path}", "--image_size=8"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "1 pictures can be used" in result.stdout
