import numpy as np
import pytest
from PIL import Image

from visprompt.data.folder import BadImage, decode, find
from visprompt.data.synthetic import write_folder
from visprompt.errors import UserError


def gradient(height=20, width=30):
    """A picture whose top left corner is dark and whose red grows to the right, green downwards."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 240, width)
    image[..., 1] = np.linspace(0, 240, height)[:, None]
    return image


def test_class_folders_are_cut_80_10_10(tmp_path):
    folder = find(write_folder(tmp_path / "pets", ("dog", "cat"), 20))
    assert folder.class_names == ("cat", "dog")
    assert [item.key for item in folder.items][:2] == ["cat/0000.png", "cat/0001.png"]
    assert folder.items[0].label == 0
    counts = [sum(item.split == split for item in folder.items) for split in ("train", "val", "test")]
    assert counts == [32, 4, 4]


def test_given_split_folders_are_taken_as_they_are(tmp_path):
    folder = find(write_folder(tmp_path, ("a", "b"), 2, splits=("train", "test")))
    assert {item.split for item in folder.items} == {"train", "test"}
    assert folder.items[-1].key == "train/b/0001.png"
    assert folder.items[-1].split == "train"


def test_a_class_may_be_called_train(tmp_path):
    assert find(write_folder(tmp_path, ("car", "train"), 3)).class_names == ("car", "train")


def test_nested_hidden_and_linked_files(tmp_path):
    root = write_folder(tmp_path / "root", ("a", "b"), 3)
    write_folder(root / "a", ("deep",), 1)
    write_folder(root, (".cache",), 1)
    (root / "a" / ".DS_Store").write_bytes(b"x")
    (root / "b" / "Thumbs.db").write_bytes(b"x")
    (root / "c").symlink_to(write_folder(tmp_path / "elsewhere", ("c",), 3) / "c")
    folder = find(root)
    assert folder.class_names == ("a", "b", "c")
    assert len(folder.items) == 10
    assert "a/deep/0000.png" in [item.key for item in folder.items]


def test_the_fingerprint_holds_names_sizes_labels_and_splits_but_not_the_place(tmp_path):
    here = write_folder(tmp_path / "here", ("a", "b"), 4)
    there = write_folder(tmp_path / "there", ("a", "b"), 4)
    first = find(here).fingerprint
    assert first == find(there).fingerprint
    assert len(first) == 64
    image = there / "a" / "0000.png"
    content = image.read_bytes()
    image.write_bytes(content + b" ")
    assert find(there).fingerprint != first
    image.write_bytes(content)
    assert find(there).fingerprint == first
    image.rename(there / "b" / "0004.png")
    assert find(there).fingerprint != first


def table(tmp_path, text, name="images.csv"):
    root = tmp_path / "root"
    if not root.exists():
        write_folder(root, ("x", "y"), 3)
    (root / name).write_text(text, encoding="utf-8-sig")
    return root


def test_a_csv_with_splits(tmp_path):
    rows = "path,label,split\nx/0000.png,up,train\nx/0001.png,down,train\ny/0000.png,up,test\n"
    folder = find(table(tmp_path, rows), "images.csv")
    assert folder.class_names == ("down", "up")
    assert [(item.key, item.label, item.split) for item in folder.items] == [
        ("x/0000.png", 1, "train"),
        ("x/0001.png", 0, "train"),
        ("y/0000.png", 1, "test"),
    ]


def test_a_csv_without_splits_elsewhere(tmp_path):
    root = table(tmp_path, "")
    rows = [f"root/{name}/{number:04d}.png,{name}" for name in "xy" for number in range(3)]
    (tmp_path / "beside.csv").write_text("path,label\n" + "\n".join(rows))
    folder = find(root, tmp_path / "beside.csv")
    assert sorted(item.split for item in folder.items) == ["test"] * 2 + ["train"] * 2 + ["val"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images: its first line is path,label"),
        ("file,class\nx/0000.png,a\n", "has no columns named path and label"),
        ("path,label\nx/0000.png,\n", "line 2: the path or the label is empty"),
        ("path,label\nx/9.png,a\n", "line 2: there is no file x/9.png"),
        ("path,label\nx/0000.png,a\nx/0000.png,b\n", "line 3: x/0000.png is listed twice"),
        ("path,label,split\nx/0000.png,a,trian\n", "line 2: unknown split 'trian': did you mean train"),
        ("path,label,split\nx/0000.png,a,train\nx/0001.png,b,\n", "line 3: give a split for all images or for none"),
        ("path,label\nx/0000.png,a\nx/0001.png,a\n", r"has only one class \('a'\)"),
        ("path,label,split\nx/0000.png,a,train\nx/0001.png,b,test\n", "class 'b' .* has no training image"),
    ],
)
def test_a_faulty_csv_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        find(table(tmp_path, text), "images.csv")


def test_a_csv_that_is_none(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(UserError, match=r"list.csv is not a CSV in UTF-8 \(.*\): save it as one"):
        find(tmp_path, "list.csv")


def test_a_missing_csv(tmp_path):
    with pytest.raises(UserError, match=r"data.csv=.*list.csv is not a file"):
        find(tmp_path, "list.csv")


def test_folders_that_hold_no_task_are_one_sentence_each(tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*gone is not a folder"):
        find(tmp_path / "gone")
    with pytest.raises(UserError, match="is empty: put the images of each class"):
        find(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds files but no class folders"):
        find(tmp_path)
    write_folder(tmp_path, ("cat",), 3)
    with pytest.raises(UserError, match=r"has only one class \('cat'\)"):
        find(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*dog is empty"):
        find(tmp_path)


def test_a_class_that_is_only_tested(tmp_path):
    write_folder(tmp_path, ("a", "b"), 3, splits=("train", "test"))
    write_folder(tmp_path, ("c",), 3, splits=("test",))
    with pytest.raises(UserError, match=r"class 'c' in .* has no training image"):
        find(tmp_path)


def test_unsupported_files_are_named_or_left_out(tmp_path, caplog):
    write_folder(tmp_path, ("a", "b"), 3)
    for number in range(6):
        (tmp_path / "a" / f"{number}.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"6 file\(s\) .* \(a/0.heic, .*a/4.heic, \.\.\.; supported: .bmp .gif"):
        find(tmp_path)
    assert len(find(tmp_path, skip_bad=True).items) == 6
    assert "6 file(s) left out, no supported images: a/0.heic, " in caplog.text


def test_a_dead_link_is_listed_for_decoding_to_name(tmp_path):
    root = write_folder(tmp_path, ("a", "b"), 3)
    (root / "a" / "dead.png").symlink_to(tmp_path / "gone.png")
    folder = find(root)
    assert len(folder.items) == 7
    assert len(folder.fingerprint) == 64


def test_grey_is_repeated_and_16_bits_are_scaled(tmp_path):
    Image.fromarray(gradient()[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(decode(tmp_path / "grey.png"), np.repeat(gradient()[..., :1], 3, axis=2))
    deep = gradient()[..., 0].astype(np.uint16) * 257
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(decode(tmp_path / name), np.repeat(gradient()[..., :1], 3, axis=2))


def test_one_bit(tmp_path):
    Image.fromarray(gradient()[..., 0] > 100).save(tmp_path / "bit.png")
    assert np.array_equal(decode(tmp_path / "bit.png")[..., 1], np.where(gradient()[..., 0] > 100, 255, 0))


def test_transparency_lies_over_white(tmp_path):
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:10] = 0
    expected = np.where(alpha == 0, 255, gradient())
    image = Image.fromarray(np.concatenate([gradient(), alpha], axis=2))
    image.save(tmp_path / "alpha.PNG")
    assert np.array_equal(decode(tmp_path / "alpha.PNG"), expected)
    image.convert("LA").save(tmp_path / "la.png")
    assert (decode(tmp_path / "la.png")[:10] == 255).all()
    palette = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8)[:, None], 20, axis=1).repeat(10, axis=0))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=0)
    pixels = decode(tmp_path / "palette.png")
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[19, 0].tolist() == [0, 0, 255]


def test_cmyk(tmp_path):
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    assert np.abs(decode(tmp_path / "print.jpg").astype(int) - gradient()).max() < 12


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "turned.png"), np.rot90(gradient(), -1))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(tmp_path / name)[5, 5, 2] < 5 < 250 < decode(tmp_path / name)[5, 5, 0]


def test_files_that_are_no_images_say_why(tmp_path):
    write_folder(tmp_path, ("a",), 1, size=(40, 15))
    with pytest.raises(BadImage, match=r"^is 40 x 15 pixels, less than 16 on the short side$"):
        decode(tmp_path / "a" / "0000.png")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(BadImage, match=r"^cannot be decoded \(not an image of a known format\)$"):
        decode(tmp_path / "text.jpg")
    Image.fromarray(gradient(200, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    with pytest.raises(BadImage, match=r"cannot be decoded .*truncated"):
        decode(tmp_path / "cut.jpg")
    Image.fromarray(gradient()[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadImage, match="floating-point"):
        decode(tmp_path / "float.tif")
    Image.fromarray(gradient()[..., 0].astype(np.int32) * 1000).save(tmp_path / "wide.tif")
    with pytest.raises(BadImage, match=r"outside 0\.\.65535"):
        decode(tmp_path / "wide.tif")
    with pytest.raises(BadImage, match=r"^cannot be decoded \(No such file or directory\)$"):
        decode(tmp_path / "gone.png")
