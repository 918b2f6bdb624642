"""The records of VTAB-1k's specialized tasks: images of medicine and of the Earth from above."""

from functools import partial

from visprompt.data.catalog.class_names import class_names
from visprompt.data.catalog.task import Cut, Golden, SourceFile
from visprompt.data.catalog.vtab_task import vtab

_specialized = partial(vtab, group="specialized")


def _pcam(part: str, size: int, sha256: str) -> SourceFile:
    name = f"camelyonpatch_level_2_split_{part}.h5.gz"
    url = f"https://zenodo.org/record/2546921/files/{name}"
    return SourceFile(name=name, urls=(url,), size=size, sha256=sha256)


_PCAM = _specialized(
    "patch_camelyon",
    aliases=("camelyon", "pcam", "patchcamelyon"),
    num_classes=2,
    class_names=("normal", "tumor"),
    official={"train": 262_144, "validation": 32_768, "test": 32_768},
    label_rule="1 if the middle 32 x 32 pixels hold at least one pixel of tumor tissue",
    native=96,
    files=(
        _pcam("train_x", 6_421_353_462, "d619e741468a7ab35c7e4a75e6821b7e7e6c9411705d45708f2a0efc8960656c"),
        _pcam("train_y", 21_378, "b74126d2c01b20d3661f9b46765d29cf4e4fba6faba29c8e0d09d406331ab75a"),
        _pcam("valid_x", 805_965_320, "f82ee1670d027b4ec388048d9eabc2186b77c009655dae76d624c0ecb053ccb2"),
        _pcam("valid_y", 3_038, "ce1ae30f08feb468447971cfd0472e7becd0ad96d877c64120c72571439ae48c"),
        _pcam("test_x", 800_875_929, "79174c2201ad521602a5888be8f36ee10875f37403dd3f2086caf2182ef87245"),
        _pcam("test_y", 3_040, "0a522005fccc8bbd04c5a117bfaf81d8da2676f03a29d7499f71d0a0bd6068ef"),
    ),
    golden={"train800": Golden(keys=("train_251464",)), "val200": Golden(keys=("valid_3270",))},
    source="PatchCamelyon: 327,680 patches of 96 x 96 pixels of the Camelyon16 slides",
    licence="CC0 1.0 (as stated by its authors)",
    homepage="https://github.com/basveeling/pcam",
    citation="B. S. Veeling, J. Linmans, J. Winkens, T. Cohen and M. Welling, Rotation Equivariant CNNs for "
    "Digital Pathology, MICCAI, 2018",
    description="A stained patch of a lymph node: is there tumor tissue in its middle?",
)

_EUROSAT = _specialized(
    "eurosat",
    aliases=("euro_sat", "eurosat_rgb"),
    num_classes=10,
    class_names=class_names("eurosat"),
    official={"train": 27_000},
    val=Cut("train", 16_200, 16_400),
    test=Cut("train", 21_600),
    label_rule="the folder's name, in the order of the class names",
    exact=False,
    notes="Not identical to the prepared folder: the keys that order the images were local paths when it "
    "was made. "
    "Here they are those of TensorFlow Datasets since 4.2, class and file name (Forest_Forest_687.jpg), and "
    "the slices are the task's.",
    native=64,
    files=(
        SourceFile(
            name="EuroSAT.zip",
            urls=(
                "http://madm.dfki.de/files/sentinel/EuroSAT.zip",
                "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
                "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            ),
            size=94_280_567,
            sha256="8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
            md5="c8fa014336c82ac7804f0398fcb19387",
        ),
    ),
    source="EuroSAT, RGB version: 27,000 JPEG images of 64 x 64 pixels from Sentinel-2",
    licence="MIT (as stated by its authors); contains Copernicus Sentinel data",
    homepage="https://github.com/phelber/EuroSAT",
    citation="P. Helber, B. Bischke, A. Dengel and D. Borth, EuroSAT: A Novel Dataset and Deep Learning "
    "Benchmark for Land Use and Land Cover Classification, IEEE J-STARS, 2019",
    description="640 m of Europe from a satellite: which of 10 kinds of land use is it?",
)

_RESISC45 = _specialized(
    "resisc45",
    aliases=("resisc", "nwpu_resisc45", "NWPU-RESISC45"),
    num_classes=45,
    class_names=class_names("resisc45"),
    official={"train": 31_500},
    val=Cut("train", 18_900, 19_100),
    test=Cut("train", 25_200),
    label_rule="the folder's name, in the order of the class names",
    exact=False,
    notes="Not identical to the prepared folder: the keys that order the images were local paths when it "
    "was made. "
    "Here they are those of TensorFlow Datasets since 4.2, class and file name (airplane_airplane_001.jpg), "
    "and the "
    "slices are the task's. The authors distribute the images from a cloud folder as a .rar; the .zip of "
    "the same images that TorchGeo hosts is read.",
    files=(
        SourceFile(
            name="NWPU-RESISC45.zip",
            urls=(
                "https://huggingface.co/datasets/torchgeo/resisc45/resolve/"
                "a826b44d938a883185f11ebe3d512d38b464312f/NWPU-RESISC45.zip",
            ),
            size=427_389_445,
            sha256="beeecd0b63656290ae6d65cf7763185b0c1c4c54a753ef8088d6fba3faaf1f53",
            md5="75206b2e16446591afa88e2628744886",
        ),
    ),
    source="NWPU-RESISC45: 31,500 aerial images of 256 x 256 pixels, 0.2 to 30 m per pixel",
    licence="CC BY-NC 4.0 (as stated by TorchGeo's copy; its authors name no licence)",
    homepage="https://gcheng-nwpu.github.io/",
    citation="G. Cheng, J. Han and X. Lu, Remote Sensing Image Scene Classification: Benchmark and State of "
    "the Art, Proceedings of the IEEE, 2017",
    description="A scene on the ground from above: which of 45 kinds (airport, bridge, forest ...) is it?",
)

_RETINOPATHY = _specialized(
    "diabetic_retinopathy",
    decode="retina",
    aliases=("retinopathy", "diabetic_retinopathy_detection", "dr"),
    num_classes=5,
    class_names=("no DR", "mild", "moderate", "severe", "proliferative DR"),
    official={"train": 35_126, "validation": 10_906, "test": 42_670},
    label_rule="the grade; of the competition's test images, those of Usage Public are validation, Private "
    "is test",
    notes="The official task itself is lossy, and so is this one: the eye's radius is scaled to 300 pixels, "
    "local "
    "colour is subtracted (4 x image - 4 x Gaussian blur with sigma 10 + 128), all beyond 0.9 of the radius "
    "is set to 128, and the result is re-encoded as JPEG of quality 72.",
    files=(
        SourceFile(name="train.zip", roughly=35_000_000_000),
        SourceFile(name="test.zip", roughly=53_000_000_000),
        SourceFile(name="trainLabels.csv"),
        SourceFile(
            name="retinopathy_solution.csv",
            urls=(
                "https://storage.googleapis.com/kaggle-forum-message-attachments/90528/2877/retinopathy_solution.csv",
            ),
            size=1_181_257,
            sha256="a6af3d66804e81887da89b9261bcfb7da4f5bacedb070f1b5db83fa879ab60c9",
        ),
    ),
    source="Kaggle Diabetic Retinopathy Detection (EyePACS): 88,702 photographs of retinas, about 88 GB",
    licence="the rules of the Kaggle competition, to be accepted there",
    homepage="https://www.kaggle.com/c/diabetic-retinopathy-detection",
    citation="Kaggle and EyePACS, Kaggle Diabetic Retinopathy Detection, 2015; preprocessing by B. Graham, "
    "Kaggle diabetic retinopathy detection competition report, University of Warwick, 2015",
    description="The retina of an eye: how far has diabetic retinopathy gone, on a scale of 5?",
    how_to_get="Kaggle wants a login. 1. Accept the rules at "
    "https://www.kaggle.com/c/diabetic-retinopathy-detection. "
    "2. pip install kaggle, and put your API token where its documentation says. 3. In the raw folder of "
    "diabetic_retinopathy run: kaggle competitions download -c diabetic-retinopathy-detection && "
    "unzip diabetic-retinopathy-detection.zip && unzip trainLabels.csv.zip && cat train.zip.* > train.zip && "
    "cat test.zip.* > test.zip. 4. Run the same command again; retinopathy_solution.csv is fetched without "
    "a login.",
)

RECORDS = (_PCAM, _EUROSAT, _RESISC45, _RETINOPATHY)
