import json
import pickle

import numpy as np
import psutil
import pytest
from hypothesis import given
from torch.utils.data import DataLoader

from helpers.damage import bounded, damages, outcome, spoil
from helpers.miniatures.natural import encoded
from visprompt.data.datasets import SquareDataset, Ticket, as_is
from visprompt.data.sources.content import Content, Found
from visprompt.data.sources.images import BadImage
from visprompt.data.stores import mapped
from visprompt.data.stores.square import SCHEMA, Selection, read_square, write_square
from visprompt.errors import UserError

KEYS = [("train", "b"), ("train", "a"), ("train", "c"), ("test", "a"), ("test", "d")]


def pictures(channels=3, keys=KEYS):
    draw = np.random.default_rng(0)
    return {key: draw.integers(0, 256, (4, 6, channels)).astype(np.uint8) for key in keys}


def content(images, order=None):
    """Yields the images (official split and key -> image) in some order, as an archive does."""

    def read(wanted):
        for split, key in order or images:
            if key in wanted.get(split, ()):
                yield Found(split, key, images[split, key])

    return Content({}, read)


def selections():
    """Three split sets of two tasks; the key "a" is an image of train and another one of test."""

    def labels(*values):
        return {"kind": np.array(values), "place": 10 - np.array(values)}

    return {
        "train800": Selection("train", ["b", "a"], labels(0, 1)),
        "val200": Selection("train", ["c"], labels(2)),
        "test": Selection("test", ["a", "d"], labels(1, 0)),
    }


def planes(image):
    return image.transpose(2, 0, 1)


def write(folder, given, chosen=None, convert=planes):
    folder.mkdir(parents=True)
    record = {"source": "raw", "form": "lossless"}
    write_square(folder, given, chosen or selections(), convert, record, lambda images: images, "dtd/raw")
    store = read_square(folder)
    assert store is not None
    return store


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "store", content(pictures()))


def test_arrays_come_back(store):
    images = pictures()
    assert store.shape == (5, 3, 4, 6)
    assert store.sets == {"train800": (0, 2), "val200": (2, 3), "test": (3, 5)}
    assert store.keys == ("train/b", "train/a", "train/c", "test/a", "test/d")
    assert {task: labels.tolist() for task, labels in store.labels.items()} == {
        "kind": [0, 1, 2, 1, 0],
        "place": [10, 9, 8, 9, 10],
    }
    assert all(labels.dtype == np.int64 for labels in store.labels.values())
    assert store.record == {"source": "raw", "form": "lossless"}
    for row, key in enumerate(KEYS):
        assert np.array_equal(store.take([row])[0], planes(images[key]))
    assert sorted(path.name for path in store.folder.iterdir()) == ["manifest.json", "pixels.bin"]


def test_encoded_images_come_back(tmp_path):
    images = pictures()
    store = write(tmp_path / "store", content({key: encoded(image, "PNG") for key, image in images.items()}))
    assert np.array_equal(store.take(np.arange(5)), np.stack([planes(image) for image in images.values()]))


def test_one_channel_stays_one(tmp_path):
    images = pictures(channels=1)
    store = write(tmp_path / "store", content(images))
    assert store.shape == (5, 1, 4, 6)
    assert np.array_equal(
        store.take([4, 0])[:, 0], np.stack([images["test", "d"], images["train", "b"]])[..., 0]
    )


def test_encoded_images_and_arrays_are_decoded_by_the_content(tmp_path):
    images = {key: bytes([number]) for number, key in enumerate(KEYS)}
    given = content(images)
    given = Content(given.parts, given.read, decode=lambda data: np.full((2, 2, 3), data[0], np.uint8))
    assert write(tmp_path / "store", given).take(range(5))[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_rows_of_several_sets_are_in_the_order_asked_for(store):
    assert store.rows(("train800", "val200")).tolist() == [0, 1, 2]
    assert store.rows(("test", "train800")).tolist() == [3, 4, 0, 1]
    assert store.rows(("val200",)).dtype == np.int64


def test_taken_images_are_copies(store):
    first = store.take([1, 1, 0])
    before = first.copy()
    assert not np.shares_memory(first, store.pixels.bytes)
    first[:] = 7
    assert np.array_equal(store.take([1, 1, 0]), before)
    assert store.take([]).shape == (0, 3, 4, 6)


def test_a_worker_gets_a_store_without_its_pixels(tmp_path):
    keys = [("train", str(number)) for number in range(200)]
    chosen = {"train800": Selection("train", [key for _, key in keys], {"kind": np.arange(200)})}
    store = write(tmp_path / "store", content(pictures(keys=keys)), chosen)
    first = store.take([0, 199])
    data = pickle.dumps(store)
    assert len(data) < 6000 < (store.folder / "pixels.bin").stat().st_size
    assert np.array_equal(pickle.loads(data).take([0, 199]), first)
    assert np.array_equal(pickle.loads(data).labels["kind"], np.arange(200))


def change(folder, **entries):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | entries))


def cut_pixels(folder):
    with (folder / "pixels.bin").open("r+b") as file:
        file.truncate(100)


def one_byte_more(folder):
    with (folder / "pixels.bin").open("ab") as file:
        file.write(b"x")


def no_pixels(folder):
    (folder / "pixels.bin").unlink()


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def empty_manifest(folder):
    (folder / "manifest.json").write_bytes(b"")


def cut_manifest(folder):
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:200])


def manifest_of_other_bytes(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")


def list_for_manifest(folder):
    (folder / "manifest.json").write_text("[1, 2]")


def other_schema(folder):
    change(folder, schema=SCHEMA + 1)


def shape_of_three(folder):
    change(folder, shape=[5, 3, 24])


def nothing_for_labels(folder):
    change(folder, labels=None)


def text_for_a_label(folder):
    change(folder, labels={"kind": ["cat"] * 5})


def key_lost(folder):
    change(folder, keys=["train/b"])


def label_lost(folder):
    change(folder, labels={"kind": [0, 1, 2, 1]})


DAMAGES = [
    cut_pixels,
    one_byte_more,
    no_pixels,
    no_manifest,
    empty_manifest,
    cut_manifest,
    manifest_of_other_bytes,
    list_for_manifest,
    other_schema,
    shape_of_three,
    nothing_for_labels,
    text_for_a_label,
    key_lost,
    label_lost,
]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_never_read(store, damage, old):
    if old:
        outdated(store.folder)
    damage(store.folder)
    found, sentence = outcome(read_square, store.folder)
    assert found is None
    absent = damage is no_manifest or (old and damage is other_schema)
    assert sentence.startswith("" if absent else f"{store.folder}/")
    assert bool(sentence) is not absent


def outdated(folder):
    """Turns a store into one of an older version: without checksums and digest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = {name: value for name, value in manifest.items() if name not in ("digest", "chunks", "made_for")}
    (folder / "manifest.json").write_text(json.dumps(kept))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def damaged(folder):
    return (
        f"the store {folder} is damaged, pixels.bin is not what its checksums say: delete that folder and "
        "run the same command, which writes it again from the original files"
    )


def test_changed_pixels_are_refused_where_they_are_first_read(tmp_path, monkeypatch):
    """72 bytes an image, chunks of 100: images 0 and 1 lie in the first two, image 4 in the last two."""
    monkeypatch.setattr(mapped, "CHUNK", 100)
    store = write(tmp_path / "store", content(pictures()))
    assert len(store.chunks) == 4
    flip(store.folder / "pixels.bin", 359)
    again = read_square(store.folder)
    assert again.take([0, 1]).shape == (2, 3, 4, 6)
    with pytest.raises(UserError) as error:
        again.take([0, 4])
    assert str(error.value) == damaged(store.folder)
    assert again.pixels.damaged() == 1


def test_zeroed_pixels_are_refused(store):
    path = store.folder / "pixels.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError) as error:
        read_square(store.folder).take([0])
    assert str(error.value) == damaged(store.folder)


def test_a_chunk_is_compared_once_in_a_process(store, monkeypatch):
    store.take([0])
    monkeypatch.setattr(mapped, "sha256", None)  # would fail
    store.take([3, 4])
    read_square(store.folder).take(range(5))


def test_a_store_that_changed_meanwhile_is_compared_again(store):
    store.take([0])
    flip(store.folder / "pixels.bin", 0)
    with pytest.raises(UserError, match=r"is damaged, pixels\.bin is not what its checksums say"):
        read_square(store.folder).take([0])


def test_a_process_that_loads_data_says_the_same_sentence(store):
    flip(store.folder / "pixels.bin", 7)
    dataset = SquareDataset(store, store.rows(("test",)), "kind")
    loader = DataLoader(dataset, batch_sampler=[[Ticket(0, None, 1.0)]], collate_fn=as_is, num_workers=1)
    with pytest.raises(UserError) as error:
        next(iter(loader))
    assert str(error.value) == damaged(store.folder)


def test_a_store_of_an_older_version_is_read_unchecked(store):
    outdated(store.folder)
    old = read_square(store.folder)
    assert (old.chunks, old.made_for, old.pixels.damaged()) == (None, None, 0)
    assert np.array_equal(old.take([4, 0]), store.take([4, 0]))


@bounded
@given(damage=damages())
def test_a_flipped_bit_or_a_cut_of_a_manifest_is_never_another_store(tmp_path, damage):
    store = made_once(tmp_path)
    path = store.folder / "manifest.json"
    whole = path.read_bytes()
    spoil(path, damage, whole)
    found, sentence = outcome(read_square, store.folder)
    path.write_bytes(whole)
    assert sentence.startswith(str(path)) or same(found, store)


@bounded
@given(damage=damages())
def test_a_flipped_bit_or_a_cut_of_pixels_is_never_another_image(tmp_path, damage):
    store = made_once(tmp_path)
    path = store.folder / "pixels.bin"
    whole = path.read_bytes()
    spoil(path, damage, whole)
    found, sentence = outcome(lambda: read_square(store.folder).take(range(5)))
    path.write_bytes(whole)
    assert found is None
    assert sentence.startswith((str(path), f"the store {store.folder} is damaged"))


def made_once(tmp_path):
    """A store that is made once for a test's examples."""
    folder = tmp_path / "store"
    return read_square(folder) or write(folder, content(pictures()))


def same(one, other):
    names = ("shape", "sets", "keys", "images", "record", "chunks", "made_for")
    labels = ({task: values.tolist() for task, values in each.labels.items()} for each in (one, other))
    return all(getattr(one, name) == getattr(other, name) for name in names) and next(labels) == next(labels)


def test_where_nothing_is_there_is_no_store(tmp_path):
    assert read_square(tmp_path / "nowhere") is None


@pytest.mark.parametrize("seed", range(3))
def test_images_land_at_their_rows_in_whatever_order_they_come(tmp_path, seed):
    """200 images are more than are decoded at a time."""
    keys = [("train", str(number)) for number in range(200)]
    images = {key: np.full((2, 2, 3), number, np.uint8) for number, key in enumerate(keys)}
    order = [keys[number] for number in np.random.default_rng(seed).permutation(200)]
    names = [key for _, key in keys]
    chosen = {
        "train800": Selection("train", names[:150], {"kind": np.arange(150)}),
        "test": Selection("train", names[150:], {"kind": np.arange(50)}),
    }
    store = write(tmp_path / "store", content(images, order), chosen)
    assert store.take(range(200))[:, 0, 0, 0].tolist() == list(range(200))
    assert store.images == write(tmp_path / "other", content(images), chosen).images


def test_images_that_are_missing_are_counted(tmp_path):
    images = pictures()
    order = [key for key in KEYS if key not in (("train", "c"), ("test", "d"))]
    message = r"2 of 5 images that the lists name are not in the files, the first is d \(test\): the files are incomplete"
    with pytest.raises(UserError, match=message):
        write(tmp_path / "store", content(images, order))
    with pytest.raises(UserError, match=r"5 of 5 images that the lists name are not in the files"):
        write(tmp_path / "none", content({}))


def test_an_image_that_comes_twice_is_the_same_store(store, tmp_path):
    again = write(tmp_path / "again", content(pictures(), [*KEYS, KEYS[0], KEYS[4]]))
    assert np.array_equal(again.take(range(5)), store.take(range(5)))
    assert again.images == store.images


def test_an_image_that_comes_twice_does_not_stand_for_another(tmp_path):
    with pytest.raises(UserError, match=r"1 of 5 images .* the first is d \(test\)"):
        write(tmp_path / "store", content(pictures(), [*KEYS[:4], KEYS[0]]))


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 6, 1)])
def test_an_image_of_another_shape_is_refused(tmp_path, shape):
    images = pictures() | {("test", "a"): np.zeros(shape, np.uint8)}
    height, width, channels = shape
    message = (
        rf"image a \(test\) has the shape \({channels}, {height}, {width}\), others \(3, 4, 6\): the files "
        rf"are not the "
        "right ones, get them again"
    )
    with pytest.raises(UserError, match=message):
        write(tmp_path / "store", content(images))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", "not an image of a known format"),
        (b"", "not an image of a known format"),
        (encoded(np.zeros((64, 64, 3), np.uint8), "PNG")[:60], ".+"),
    ],
)
def test_bytes_that_do_not_decode_name_key_and_split(tmp_path, data, reason):
    images = pictures() | {("train", "c"): data}
    message = (
        rf"image c \(train\) cannot be decoded \({reason}\): the file that holds it is damaged, get it again$"
    )
    with pytest.raises(UserError, match=message):
        write(tmp_path / "store", content(images))


def test_what_the_converter_refuses_names_key_and_split(tmp_path):
    def refuse(image):
        raise BadImage("is 6 x 4 pixels, not 32 x 32")

    message = (
        r"image b \(train\) is 6 x 4 pixels, not 32 x 32: the file that holds it is damaged, get it again$"
    )
    with pytest.raises(UserError, match=message):
        write(tmp_path / "store", content(pictures()), convert=refuse)


def test_the_digest_is_of_the_bytes_of_the_source(store, tmp_path):
    images = pictures()
    images["test", "d"][3, 5, 2] ^= 1
    assert write(tmp_path / "changed", content(images)).images != store.images
    packed = {key: encoded(image, "PNG") for key, image in pictures().items()}
    first = write(tmp_path / "packed", content(packed))
    repacked = packed | {("train", "a"): packed["train", "a"] + b"\0"}  # the same pixels
    second = write(tmp_path / "repacked", content(repacked))
    assert np.array_equal(first.take(range(5)), second.take(range(5)))
    assert first.images != second.images


def test_the_digest_tells_where_an_image_is(store, tmp_path):
    images = pictures()
    images["test", "a"], images["test", "d"] = images["test", "d"], images["test", "a"]
    assert write(tmp_path / "swapped", content(images)).images != store.images


def test_digest_and_fingerprint_do_not_depend_on_the_size(store, tmp_path):
    small = write(tmp_path / "small", content(pictures()), convert=lambda image: planes(image)[:, :2, :2])
    assert small.shape == (5, 3, 2, 2)
    assert small.images == store.images
    assert small.fingerprint("kind") == store.fingerprint("kind")


def test_the_fingerprint_differs_by_labels_sets_and_keys(store, tmp_path):
    given = content(pictures())
    chosen = selections()
    prints = {store.fingerprint("kind"), store.fingerprint("place")}
    chosen["test"].labels["kind"][0] = 2
    relabelled = write(tmp_path / "relabelled", given, chosen)
    assert relabelled.fingerprint("place") == store.fingerprint("place"), "of another task's labels it is not"
    prints.add(relabelled.fingerprint("kind"))
    moved = {
        "train800": Selection("train", ["b"], {"kind": np.array([0])}),
        "val200": Selection("train", ["a", "c"], {"kind": np.array([1, 2])}),
        "test": Selection("test", ["a", "d"], {"kind": np.array([1, 0])}),
    }
    prints.add(write(tmp_path / "moved", given, moved).fingerprint("kind"))
    same = {key: np.zeros((4, 6, 3), np.uint8) for key in [*KEYS, ("test", "e")]}
    renamed = selections()
    one = write(tmp_path / "one", content(same), renamed)
    renamed["test"] = renamed["test"]._replace(keys=["a", "e"])
    two = write(tmp_path / "two", content(same), renamed)
    assert one.images == two.images
    prints |= {one.fingerprint("kind"), two.fingerprint("kind")}
    assert len(prints) == 6
    assert all(len(text) == 64 for text in prints)


def test_a_large_store_is_read_without_filling_the_memory(tmp_path):
    """A sparse file of 256 MB, whose bytes no disk holds."""
    count, shape = 1706, (3, 224, 224)
    size = count * 3 * 224 * 224
    with (tmp_path / "pixels.bin").open("wb") as file:
        file.truncate(size)
    manifest = {
        "schema": SCHEMA,
        "shape": [count, *shape],
        "sets": {"test": [0, count]},
        "keys": [f"test/{row}" for row in range(count)],
        "labels": {"kind": [0] * count},
        "images": "",
        "record": {},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    store = read_square(tmp_path)
    assert store is not None
    dataset = SquareDataset(store, store.rows(("test",)), "kind")
    tickets = [[Ticket(row, None, 1.0) for row in range(s, min(s + 32, count))] for s in range(0, count, 32)]
    loader = DataLoader(dataset, batch_sampler=tickets, collate_fn=as_is, num_workers=0)
    process = psutil.Process()
    next(iter(loader))  # what torch itself takes for the first batch
    before, most, seen = process.memory_info().rss, 0, 0
    for batch in loader:
        seen += len(batch.labels)
        most = max(most, process.memory_info().rss - before)
    assert size > 256e6 > seen == count
    assert most < 40e6
