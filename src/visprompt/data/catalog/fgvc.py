"""The records of the five fine-grained datasets (FGVC), with the splits of the Visual Prompt Tuning paper."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from visprompt.data.catalog.class_names import class_names
from visprompt.data.catalog.task import SourceFile, TaskSpec
from visprompt.data.catalog.vtab_natural import RECORDS as NATURAL

_VTAB_FLOWERS = next(spec for spec in NATURAL if spec.id == "oxford_flowers102")
_HUB = "https://huggingface.co/datasets/XiN0919/FGVC/resolve/main"
_DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs"
_JSON = (
    "The splits are those of train.json, val.json and test.json where these lie in the dataset's folder "
    "(the Visual Prompt Tuning authors' files; json.zip of the Hugging Face dataset XiN0919/FGVC has them)."
)
_HELD_OUT = f"{_JSON} Where they do not: the official lists, and a tenth of each class of train becomes val."


def _fgvc(
    task: str, sizes: tuple[int, int, int], official: Mapping[str, int], notes: str, **facts: Any
) -> TaskSpec:
    return TaskSpec(
        **{"dataset": task, **facts},
        id=task,
        group="fine-grained",
        family="fgvc",
        split_sizes=dict(zip(("train", "val", "test"), sizes, strict=True)),
        official_sizes=official,
        notes=notes,
    )


_CUB = _fgvc(
    "cub200",
    (5_394, 600, 5_794),
    {"train": 5_994, "test": 5_794},
    _HELD_OUT,
    aliases=("cub", "CUB", "cub-200", "cub_200", "cub_200_2011", "CUB_200_2011", "caltech_birds2011"),
    num_classes=200,
    label_rule="the class of image_class_labels.txt - 1",
    files=(
        SourceFile(
            name="CUB_200_2011.tgz",
            urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",),
            size=1_150_585_339,
            sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
            md5="97eceeb196236b17998738112f37df78",
        ),
    ),
    source="Caltech-UCSD Birds-200-2011: 11,788 photographs",
    licence="not stated in its files; used for non-commercial research; the photographs are Flickr users' "
    "own",
    homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    citation="C. Wah, S. Branson, P. Welinder, P. Perona and S. Belongie, The Caltech-UCSD Birds-200-2011 "
    "Dataset, technical report CNS-TR-2011-001, California Institute of Technology, 2011",
    description="A bird: which of 200 species, most of them North American, is it?",
)

_NABIRDS = _fgvc(
    "nabirds",
    (21_536, 2_393, 24_633),
    {"train": 23_929, "test": 24_633},
    _HELD_OUT,
    aliases=("NABirds", "nabird", "na_birds"),
    num_classes=555,
    label_rule="the position of the image's class number among those that occur, in ascending order",
    files=(
        SourceFile(name="nabirds.tar.gz", roughly=10_000_000_000, md5="df21a9e4db349a14e2b08adfd45873bd"),
    ),
    source="NABirds V1: 48,562 photographs, about 10 GB",
    licence="the Cornell Lab's terms of use, to be accepted on its page",
    homepage="https://dl.allaboutbirds.org/nabirds",
    citation="G. Van Horn, S. Branson, R. Farrell, S. Haber, J. Barry, P. Ipeirotis, P. Perona and S. "
    "Belongie, Building a Bird Recognition App and Large Scale Dataset with Citizen Scientists, CVPR, 2015",
    description="A North American bird: which of 555 species, sexes and ages is it?",
    how_to_get="NABirds wants its terms accepted by a person: give your name and address at "
    "https://dl.allaboutbirds.org/nabirds, accept the terms, download nabirds.tar.gz, put it into the raw "
    "folder of nabirds, and run the same command again.",
)

_FLOWERS = replace(
    _VTAB_FLOWERS,
    id="oxford_flowers",
    group="fine-grained",
    family="fgvc",
    aliases=("fgvc_flowers", "OxfordFlowers", "oxford-flowers"),
    split_sizes={"train": 1_020, "val": 1_020, "test": 6_149},
    cuts={},
    golden={},
    notes=f"{_JSON} Where they do not: the official lists, which are the same split.",
)

_DOGS_TASK = _fgvc(
    "stanford_dogs",
    (10_800, 1_200, 8_580),
    {"train": 12_000, "test": 8_580},
    _HELD_OUT,
    aliases=("dogs", "stanford-dogs", "StanfordDogs"),
    num_classes=120,
    label_rule="the label of train_list.mat and test_list.mat - 1",
    files=(
        SourceFile(
            name="images.tar",
            urls=(f"{_DOGS}/images.tar",),
            size=793_579_520,
            sha256="a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
        ),
        SourceFile(
            name="lists.tar",
            urls=(f"{_DOGS}/lists.tar",),
            size=481_280,
            sha256="34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c",
        ),
    ),
    source="Stanford Dogs, photographs of ImageNet: 20,580",
    licence="not stated; ImageNet's photographs, non-commercial research and education (ImageNet's terms)",
    homepage=f"{_DOGS}/",
    citation="A. Khosla, N. Jayadevaprakash, B. Yao and L. Fei-Fei, Novel Dataset for Fine-Grained Image "
    "Categorization, CVPR workshop on fine-grained visual categorization, 2011",
    description="A dog: which of 120 breeds is it?",
)

_CARS = _fgvc(
    "stanford_cars",
    (7_329, 815, 8_041),
    {"train": 8_144, "test": 8_041},
    f"{_HELD_OUT} The official host (ai.stanford.edu/~jkrause/cars) answers 404, so the same files come "
    "from a copy; "
    "their checksums are those that others recorded of it. The other official layout is read as well "
    "(cars_train.tgz, "
    "cars_test.tgz, car_devkit.tgz, cars_test_annos_withlabels.mat): its numbers of images are not the same "
    "ones.",
    aliases=("cars", "cars196", "stanford-cars", "StanfordCars"),
    num_classes=196,
    class_names=class_names("stanford_cars"),
    label_rule="the class of cars_annos.mat - 1",
    files=(
        SourceFile(
            name="car_ims.tgz",
            urls=(f"{_HUB}/car_ims.tgz",),
            size=1_956_628_579,
            md5="d5c8f0aa497503f355e17dc7886c3f14",
        ),
        SourceFile(
            name="cars_annos.mat",
            roughly=394_000,
            urls=(f"{_HUB}/cars_annos.mat",),
            md5="b407c6086d669747186bd1d764ff9dbc",
        ),
    ),
    source="Stanford Cars: 16,185 photographs",
    licence="not stated; ImageNet's terms: non-commercial research and education",
    homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    citation="J. Krause, M. Stark, J. Deng and L. Fei-Fei, 3D Object Representations for Fine-Grained "
    "Categorization, ICCV workshop on 3D representation and recognition, 2013",
    description="A car: which of 196 makes, models and years is it?",
)

RECORDS = (_CUB, _NABIRDS, _FLOWERS, _DOGS_TASK, _CARS)
