"""The records of VTAB-1k's natural tasks: photographs of things, textures, digits and places."""

from functools import partial

from visprompt.data.catalog.class_names import class_names
from visprompt.data.catalog.task import Cut, Golden, Mirror, SourceFile
from visprompt.data.catalog.vtab_task import vtab

_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_SVHN = "http://ufldl.stanford.edu/housenumbers"

_natural = partial(vtab, group="natural")

_CIFAR = _natural(
    "cifar",
    aliases=("cifar100", "cifar-100", "cifar_100"),
    num_classes=100,
    class_names=class_names("cifar"),
    official={"train": 50_000, "test": 10_000},
    val=Cut("train", 45_000, 45_200),
    label_rule="the fine label",
    notes="The archive with the binary files is read: the one with the Python files holds pickles.",
    native=32,
    files=(
        SourceFile(
            name="cifar-100-binary.tar.gz",
            urls=("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
            size=168_513_733,
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            md5="03b5dce01913d631647c71ecec9e9cb8",
        ),
    ),
    mirror=Mirror(
        repo="uoft-cs/cifar100",
        revision="aadb3af77e9048adbea6b47c21a81e47dd092ae5",
        splits={"train": "train", "test": "test"},
        image="img",
        labels={"cifar": "fine_label"},
    ),
    golden={
        "train800": Golden(keys=("16399", "1680", "47917", "17307", "27051")),
        "val200": Golden(keys=("13431", "9237", "17462")),
    },
    source="CIFAR-100, the authors' binary archive: 60,000 images of 32 x 32 pixels",
    licence="not stated by its authors, who ask to be cited; drawn from the withdrawn 80 Million Tiny Images",
    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    citation="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, "
    "University of Toronto, 2009",
    description="A tiny photograph of an animal, a plant, a person, a thing or a scene: which of 100 kinds "
    "is it?",
)

_CALTECH101 = _natural(
    "caltech101",
    aliases=("caltech-101", "caltech_101", "caltech"),
    num_classes=102,
    class_names=class_names("caltech101"),
    official={"train": 3_060, "test": 6_084},
    val=Cut("train", 2_754, 2_954),
    label_rule="the folder's name in lower case, in alphabetical order; background_google is a class, "
    "number 5",
    exact=False,
    notes="Not identical to the prepared folder: the task draws 30 training images per class from a listing "
    "of the "
    "folders in no stated order (seed 1234), so which images they are depends on the file system of the "
    "machine that "
    "drew them. Here folders and files are listed in alphabetical order; the rest is the same rule. All "
    "other images "
    "are test. A prepared folder with a test set of 1,046 images is in circulation: it is truncated.",
    files=(
        SourceFile(
            name="caltech-101.zip",
            urls=("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1",),
            size=137_414_764,
            sha256="331234750fc7f77520e50d9565e8b6907b03565e30320da1401130db08c61f91",
            md5="3138e1922a9193bfa496528edbbc45d0",
        ),
    ),
    source="Caltech 101, CaltechDATA's archive: 9,144 photographs, typically 300 x 200 pixels",
    licence="CC BY 4.0 (as stated by CaltechDATA)",
    homepage="https://data.caltech.edu/records/mzrjq-6wc02",
    citation="L. Fei-Fei, R. Fergus and P. Perona, Learning Generative Visual Models from Few Training "
    "Examples: An Incremental Bayesian Approach Tested on 101 Object Categories, CVPR workshop, 2004",
    description="A thing, an animal or a face in the middle of a picture, or none: which of 101 kinds is it?",
)

_DTD = _natural(
    "dtd",
    aliases=("describable_textures",),
    num_classes=47,
    class_names=class_names("dtd"),
    official={"train": 1_880, "validation": 1_880, "test": 1_880},
    label_rule="the folder's name in alphabetical order (each image's main attribute); first of the ten "
    "folds",
    files=(
        SourceFile(
            name="dtd-r1.0.1.tar.gz",
            urls=(f"{_OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",),
            size=625_239_812,
            sha256="e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
            md5="fff73e5086ae6bdbea199a49dfb8a4c1",
        ),
    ),
    source="Describable Textures Dataset, release 1.0.1: 5,640 photographs",
    licence="for research purposes (as stated on its page)",
    homepage=f"{_OXFORD}/dtd/",
    citation="M. Cimpoi, S. Maji, I. Kokkinos, S. Mohamed and A. Vedaldi, Describing Textures in the Wild, "
    "CVPR, 2014",
    description="A texture that fills the picture: which of 47 adjectives (banded, dotted, woven ...) "
    "describes it?",
)

_FLOWERS = _natural(
    "oxford_flowers102",
    aliases=("flowers102", "oxford-flowers102", "vtab_flowers"),
    num_classes=102,
    class_names=class_names("oxford_flowers102"),
    official={"train": 1_020, "validation": 1_020, "test": 6_149},
    label_rule="the class of imagelabels.mat - 1; test is `tstid`, the larger part",
    files=(
        SourceFile(
            name="102flowers.tgz",
            urls=(f"{_OXFORD}/flowers/102/102flowers.tgz",),
            size=344_862_509,
            sha256="2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246",
            md5="52808999861908f626f3c1f4e79d11fa",
        ),
        SourceFile(
            name="imagelabels.mat",
            urls=(f"{_OXFORD}/flowers/102/imagelabels.mat",),
            size=502,
            sha256="4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",
            md5="e0620be6f572b9609742df49c70aed4d",
        ),
        SourceFile(
            name="setid.mat",
            urls=(f"{_OXFORD}/flowers/102/setid.mat",),
            size=14_989,
            sha256="46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",
            md5="a5357ecc9cb78c4bef273ce3793fc85c",
        ),
    ),
    source="102 Category Flower Dataset: 8,189 photographs",
    licence="not stated; used for non-commercial research",
    homepage=f"{_OXFORD}/flowers/102/",
    citation="M.-E. Nilsback and A. Zisserman, Automated Flower Classification over a Large Number of "
    "Classes, ICVGIP, 2008",
    description="A flower common in the United Kingdom: which of 102 kinds is it?",
)

_PETS = _natural(
    "oxford_iiit_pet",
    aliases=("oxford_pet", "oxford_pets", "oxford-iiit-pet", "pets", "pet"),
    num_classes=37,
    class_names=class_names("oxford_iiit_pet"),
    official={"train": 3_680, "test": 3_669},
    val=Cut("train", 2_944, 3_144),
    label_rule="the second field of trainval.txt and test.txt - 1",
    notes="12 files whose names end in .jpg are other formats or damaged JPEGs: TensorFlow Datasets "
    "re-encodes them, here they are read as they are.",
    files=(
        SourceFile(
            name="images.tar.gz",
            urls=(
                "https://thor.robots.ox.ac.uk/~vgg/data/pets/images.tar.gz",
                f"{_OXFORD}/pets/data/images.tar.gz",
            ),
            size=791_918_971,
            sha256="67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
            md5="5c4f3ee8e5d25df40f4fd59a7f44e54c",
        ),
        SourceFile(
            name="annotations.tar.gz",
            urls=(
                "https://thor.robots.ox.ac.uk/~vgg/data/pets/annotations.tar.gz",
                f"{_OXFORD}/pets/data/annotations.tar.gz",
            ),
            size=19_173_078,
            sha256="52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
            md5="95a8c909bbe2e81eed6a22bccdf3f68f",
        ),
    ),
    source="Oxford-IIIT Pet: 7,349 photographs",
    licence="CC BY-SA 4.0 (as stated on its page)",
    homepage=f"{_OXFORD}/pets/",
    citation="O. M. Parkhi, A. Vedaldi, A. Zisserman and C. V. Jawahar, Cats and Dogs, CVPR, 2012",
    description="A cat or a dog: which of 37 breeds is it?",
)

_SVHN_TASK = _natural(
    "svhn",
    aliases=("svhn_cropped",),
    num_classes=10,
    class_names=tuple(str(digit) for digit in range(10)),
    official={"train": 73_257, "test": 26_032},
    val=Cut("train", 65_931, 66_131),
    label_rule="the digit; the original files write 10 for 0",
    notes="The 531,131 extra images are not used.",
    native=32,
    files=(
        SourceFile(
            name="train_32x32.mat",
            urls=(f"{_SVHN}/train_32x32.mat",),
            size=182_040_794,
            sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            md5="e26dedcc434d2e4c54c9b2d4a06d8373",
        ),
        SourceFile(
            name="test_32x32.mat",
            urls=(f"{_SVHN}/test_32x32.mat",),
            size=64_275_384,
            sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            md5="eb5a983be6a315427106f1b164d9cef3",
        ),
    ),
    mirror=Mirror(
        repo="ufldl-stanford/svhn",
        config="cropped_digits",
        splits={"train": "train", "test": "test"},
        image="image",
        labels={"svhn": "label"},
    ),
    golden={"val200": Golden(keys=("21145", "64736"))},
    source="Street View House Numbers, cropped digits (format 2): 99,289 images of 32 x 32 pixels",
    licence="for non-commercial use only (as stated on its page)",
    homepage="http://ufldl.stanford.edu/housenumbers/",
    citation="Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, Reading Digits in Natural "
    "Images with Unsupervised Feature Learning, NIPS workshop on deep learning, 2011",
    description="A digit of a house number, often between its neighbours: which digit is in the middle?",
)

_SUN397 = _natural(
    "sun397",
    decode="sun397",
    aliases=("sun", "sun-397"),
    num_classes=397,
    class_names=class_names("sun397"),
    official={"train": 800, "validation": 200, "test": 21_750},
    label_rule="the folder's path, in the order of the class names",
    notes="The official task itself is lossy, and so is this one: images are downscaled to at most 120,000 "
    "pixels with "
    "OpenCV and re-encoded as JPEG. Its split is a random one of TensorFlow Datasets (76,128 / 10,875 / "
    "21,750); the "
    "lists that ship with this package hold, in md5 order, the 800 + 200 + 21,750 keys that the task needs.",
    files=(
        SourceFile(
            name="SUN397.tar.gz",
            size=39_077_296_924,
            sha256="f404130965a7ad77bed5ececc71e720ab50f3cc1e1bb257257610d38f3b928ec",
            md5="8ca2778205c41d23104230ba66911c7a",
        ),
    ),
    golden={
        "train800": Golden(labels=(307, 358, 48), classes=309),
        "val200": Golden(labels=(54, 302, 236)),
        "train800val200": Golden(classes=325),
    },
    source="SUN397, the benchmark's 108,753 photographs; split lists of TensorFlow Datasets (Apache-2.0)",
    licence="not stated; the photographs are from the web and belong to their owners, used for "
    "non-commercial research",
    homepage="https://vision.princeton.edu/projects/2010/SUN/",
    citation="J. Xiao, J. Hays, K. A. Ehinger, A. Oliva and A. Torralba, SUN Database: Large-scale Scene "
    "Recognition from Abbey to Zoo, CVPR, 2010",
    description="A place, indoors or outdoors: which of 397 kinds of scene is it?",
    how_to_get="Its hosts are gone: vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz and MIT's copy "
    "answer 404. "
    "Get SUN397.tar.gz from a copy (OpenDataLab has one under OpenDataLab/SUN397, folder raw, after a "
    "login; web "
    "archives may have others), put it into the raw folder of sun397, and run the same command again: the "
    "file must have 39,077,296,924 bytes and md5 8ca2778205c41d23104230ba66911c7a.",
)

RECORDS = (_CIFAR, _CALTECH101, _DTD, _FLOWERS, _PETS, _SVHN_TASK, _SUN397)
