"""The records of VTAB-1k's structured tasks: counts, distances, places and orientations of things."""

from functools import partial
from itertools import pairwise
from math import ceil

from visprompt.data.catalog.task import Cut, Golden, Mirror, SourceFile
from visprompt.data.catalog.vtab_task import vtab

_structured = partial(vtab, group="structured")

_clevr = partial(
    _structured,
    dataset="clevr",
    official={"train": 70_000, "validation": 15_000},
    val=Cut("train", 63_000, 63_200),
    test=Cut("validation"),
    notes="The test images are CLEVR's validation images: its own test images come without scenes.",
    files=(
        SourceFile(
            name="CLEVR_v1.0.zip",
            urls=("https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip",),
            size=19_021_600_724,
            sha256="5cd61cf1096ed20944df93c9adb31e74d189b8459a94f54ba00090e5c59936d1",
            md5="b11922020e72d0cd9154779b2d3d07d2",
        ),
    ),
    golden={
        "train800": Golden(keys=("CLEVR_train_043876.png", "CLEVR_train_033421.png")),
        "val200": Golden(keys=("CLEVR_train_035084.png",)),
    },
    source="CLEVR v1.0: 85,000 rendered images of 480 x 320 pixels with their scenes",
    licence="CC BY 4.0 (as stated by its authors)",
    homepage="https://cs.stanford.edu/people/jcjohns/clevr/",
    citation="J. Johnson, B. Hariharan, L. van der Maaten, L. Fei-Fei, C. L. Zitnick and R. Girshick, CLEVR: "
    "A Diagnostic Dataset for Compositional Language and Elementary Visual Reasoning, CVPR, 2017",
)

_CLEVR_COUNT = _clevr(
    "clevr_count",
    aliases=("clevr-count", "clevr_counting", "clevr_count_all"),
    num_classes=8,
    class_names=tuple(f"{count} objects" for count in range(3, 11)),
    label_rule="number of objects of the scene - 3",
    description="Cubes, spheres and cylinders on a grey table: how many, 3 to 10?",
)

_DEPTHS = ("0", "8", "8.5", "9", "9.5", "10", "100")

_CLEVR_DIST = _clevr(
    "clevr_dist",
    aliases=("clevr-dist", "clevr_distance", "clevr_closest_object_distance"),
    num_classes=6,
    class_names=tuple(f"depth {near} to {far}" for near, far in pairwise(_DEPTHS)),
    label_rule="the smallest depth of the scene's objects (third of pixel_coords, as float32): the last of "
    "the thresholds 0, 8, 8.5, 9, 9.5, 10 that is below it",
    description="Cubes, spheres and cylinders on a grey table: how far from the camera is the nearest, in 6 "
    "steps?",
)

_DMLAB = _structured(
    "dmlab",
    aliases=("dmlab_frames",),
    num_classes=6,
    # the authors name the six, {close, far, very far} x {positive, negative reward}, but not in which order
    class_names=tuple(f"class {label}" for label in range(6)),
    official={"train": 65_550, "validation": 22_628, "test": 22_735},
    label_rule="the field `label` of each record",
    notes="The classes are {close, far, very far} x {positive reward, negative reward}; which number is "
    "which is not stated.",
    files=(
        SourceFile(
            name="dmlab.tar.gz",
            urls=("https://storage.googleapis.com/dmlab-vtab/dmlab.tar.gz",),
            size=3_017_022_789,
            sha256="638b18fa69a5d61bbc310cd0b87ac603a39f41de0fdb07b6e77de274a24480a4",
        ),
    ),
    source="frames of DeepMind Lab made for VTAB: 110,913 JPEG images of 480 x 360 pixels in TFRecords",
    licence="not stated; published by the authors of VTAB, whose code is Apache-2.0",
    homepage="https://github.com/google-research/task_adaptation",
    citation="X. Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation "
    "Benchmark, arXiv:1910.04867, 2019; C. Beattie et al., DeepMind Lab, arXiv:1612.03801, 2016",
    description="What an agent sees in a 3D maze: how far is the object, and is it a good or a bad one?",
)

_KITTI_AT = "https://s3.eu-central-1.amazonaws.com/avg-kitti"

_KITTI = _structured(
    "kitti",
    aliases=("kitti_dist", "kitti_distance", "kitti_closest_vehicle_distance"),
    num_classes=4,
    class_names=("vehicle within 8 m", "vehicle at 8 to 20 m", "vehicle beyond 20 m", "no vehicle"),
    official={"train": 6_347, "validation": 423, "test": 711},
    label_rule="the smallest forward distance (location z) of a Car, Van or Truck: up to 8 m, up to 20 m, "
    "beyond; 3 without a vehicle",
    notes="The 7,481 labelled images are split by video with the devkit's mapping, so that no video is in "
    "two splits.",
    files=(
        SourceFile(
            name="data_object_image_2.zip",
            urls=(f"{_KITTI_AT}/data_object_image_2.zip",),
            size=12_569_945_557,
            sha256="351c5a2aa0cd9238b50174a3a62b846bc5855da256b82a196431d60ff8d43617",
        ),
        SourceFile(
            name="data_object_label_2.zip",
            urls=(f"{_KITTI_AT}/data_object_label_2.zip",),
            size=5_601_213,
            sha256="4efc76220d867e1c31bb980bbf8cbc02599f02a9cb4350effa98dbb04aaed880",
        ),
        SourceFile(
            name="devkit_object.zip",
            urls=(f"{_KITTI_AT}/devkit_object.zip",),
            size=63_794,
            sha256="ce0b76b69c0c5f89690a0d65b7302bbbdb962a0c7e8aba6efc7050d1b04b4cf1",
        ),
    ),
    mirror=Mirror(
        repo="dpdl-benchmark/kitti",
        splits={"train": "train", "validation": "validation", "test": "test"},
        image="image",
        labels={"kitti": "label_distance"},
        key="image/file_name",
    ),
    source="KITTI 2D object detection, left colour images: 7,481 photographs of about 1242 x 375 pixels",
    licence="CC BY-NC-SA 3.0 (as stated on its page)",
    homepage="https://www.cvlibs.net/datasets/kitti/eval_object.php",
    citation="A. Geiger, P. Lenz and R. Urtasun, Are We Ready for Autonomous Driving? The KITTI Vision "
    "Benchmark Suite, CVPR, 2012",
    description="A street from a driving car: how far is the nearest car, van or truck?",
)

_SPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5"

_dsprites = partial(
    _structured,
    dataset="dsprites",
    num_classes=16,
    official={"train": 737_280},
    val=Cut("train", 589_824, 590_024),
    test=Cut("train", 663_552),
    native=64,
    files=(
        SourceFile(
            name=_SPRITES,
            urls=(f"https://github.com/deepmind/dsprites-dataset/blob/master/{_SPRITES}?raw=true",),
            size=28_024_106,
            sha256="729fa22e884c9c500e1f17415d580746b4c5894fbbb780a1319bbcfa39a745bb",
        ),
    ),
    source="dSprites: 737,280 drawn images of 64 x 64 pixels, every combination of 3 shapes, 6 scales, "
    "40 orientations, 32 x and 32 y positions once",
    licence="Apache-2.0 (as stated in its repository)",
    homepage="https://github.com/google-deepmind/dsprites-dataset",
    citation="L. Matthey, I. Higgins, D. Hassabis and A. Lerchner, dSprites: Disentanglement Testing "
    "Sprites Dataset, 2017",
)

_DSPRITES_LOC = _dsprites(
    "dsprites_loc",
    aliases=("dsprites_location", "dsprites_position", "dsprites_x_position", "dsprites_label_x_position"),
    class_names=tuple(f"x {2 * label} to {2 * label + 1} of 32" for label in range(16)),
    label_rule="index of the x position (0..31) // 2",
    golden={
        "train800": Golden(
            labels=(0, 0, 7, 6, 7, 11, 7, 5, 6, 14),
            histogram=(54, 42, 45, 45, 48, 54, 49, 48, 62, 51, 50, 60, 50, 47, 53, 42),
        )
    },
    description="A white square, ellipse or heart on black: in which of 16 columns is it?",
)

_DSPRITES_ORI = _dsprites(
    "dsprites_ori",
    aliases=("dsprites_orientation", "dsprites_label_orientation"),
    class_names=tuple(
        f"orientation {ceil(2.5 * label)} to {ceil(2.5 * label + 2.5) - 1} of 40" for label in range(16)
    ),
    label_rule="index of the orientation (0..39, from 0 to 2 pi) / 2.5, rounded down",
    golden={
        "train800": Golden(
            labels=(6, 8, 0, 7, 9, 12, 14, 1, 14, 15),
            histogram=(59, 43, 67, 50, 53, 45, 58, 43, 61, 38, 52, 42, 56, 35, 57, 41),
        )
    },
    description="A white square, ellipse or heart on black: in which of 16 directions is it turned?",
)


def _norb(part: str, size: int, sha256: str) -> SourceFile:
    toys = "46789" if part.startswith("training") else "01235"
    name = f"smallnorb-5x{toys}x9x18x6x2x96x96-{part}.mat.gz"
    url = f"https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/{name}"
    return SourceFile(name=name, urls=(url,), size=size, sha256=sha256)


_smallnorb = partial(
    _structured,
    dataset="smallnorb",
    official={"train": 24_300, "test": 24_300},
    val=Cut("test", 0, 200),
    test=Cut("test", 12_150),
    notes="The image of the left camera; the files with the categories are not needed. The 200 validation "
    "images are the first of the official test split, the test images its second half, as the task defines "
    "them.",
    native=96,
    files=(
        _norb(
            "training-dat", 131_896_188, "5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873"
        ),
        _norb("training-info", 71_052, "de7eb932ebe7a4ee16217fead60660d0eb3d23632c2f4d1c51f88c501c17bf32"),
        _norb("testing-dat", 130_799_817, "cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474"),
        _norb("testing-info", 10_428, "16adf314226327ee006d1a44db8cfef52773c06c829951d5653a9f6f310248a2"),
    ),
    golden={
        "train800": Golden(keys=("16399", "1680", "17307")),
        "val200": Golden(keys=("23018", "16932")),
    },
    source="small NORB v1.0: 48,600 pairs of grey images of 96 x 96 pixels of 50 toys",
    licence="for research purposes, not to be sold (as stated on its page)",
    homepage="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
    citation="Y. LeCun, F. J. Huang and L. Bottou, Learning Methods for Generic Object Recognition with "
    "Invariance to Pose and Lighting, CVPR, 2004",
)

_SMALLNORB_AZI = _smallnorb(
    "smallnorb_azi",
    aliases=("smallnorb_azimuth", "smallnorb_az", "smallnorb_label_azimuth"),
    num_classes=18,
    class_names=tuple(f"{20 * label} degrees" for label in range(18)),
    label_rule="the third field of the info file / 2",
    description="A grey toy animal, human, airplane, truck or car: from which of 18 sides is it seen?",
)

_SMALLNORB_ELE = _smallnorb(
    "smallnorb_ele",
    aliases=("smallnorb_elevation", "smallnorb_el", "smallnorb_label_elevation"),
    num_classes=9,
    class_names=tuple(f"{30 + 5 * label} degrees" for label in range(9)),
    label_rule="the second field of the info file",
    description="A grey toy animal, human, airplane, truck or car: from which of 9 heights is it seen?",
)

RECORDS = (
    _CLEVR_COUNT,
    _CLEVR_DIST,
    _DMLAB,
    _KITTI,
    _DSPRITES_LOC,
    _DSPRITES_ORI,
    _SMALLNORB_AZI,
    _SMALLNORB_ELE,
)
