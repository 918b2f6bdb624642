"""The records of datasets for segmentation."""

from visprompt.data.catalog.class_names import class_names
from visprompt.data.catalog.task import Cut, SourceFile, TaskSpec

RECORDS = (
    TaskSpec(
        id="ade20k",
        aliases=("ADE20K", "ade20k-150", "ADEChallengeData2016", "scene_parse_150"),
        dataset="ade20k",
        group="dense",
        kind="segmentation",
        family="segmentation",
        num_classes=150,
        class_names=class_names("ade20k"),
        split_sizes={"train": 19_210, "val": 1_000, "test": 2_000},
        official_sizes={"training": 20_210, "validation": 2_000},
        cuts={
            "train": Cut("training", 0, 19_210),
            "val": Cut("training", 19_210),
            "test": Cut("validation"),
        },
        label_rule="the number of the annotation - 1; pixels of number 0 are ignored",
        notes="The papers score the official validation set, and it is the test set here. So that nothing "
        "is chosen on it, split=tune scores 1,000 of the official training images; split=final trains on all "
        "20,210, as the papers do. The full dataset of ADE20K's own page is another one. A class has the "
        "first of its names in objectInfo150.txt.",
        decode="upright",
        files=(
            SourceFile(
                name="ADEChallengeData2016.zip",
                urls=("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",),
                roughly=967_000_000,
                sha1="219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            ),
        ),
        source="the MIT scene parsing benchmark, made of ADE20K: 22,210 photographs",
        licence="annotations: BSD 3-clause (MIT CSAIL); photographs: their owners', for non-commercial "
        "research and education (ADE20K's terms)",
        homepage="http://sceneparsing.csail.mit.edu/",
        citation="B. Zhou, H. Zhao, X. Puig, S. Fidler, A. Barriuso and A. Torralba, Scene Parsing through "
        "ADE20K Dataset, CVPR, 2017",
        description="A photograph of an indoor or outdoor scene: to which of 150 kinds of objects and "
        "surfaces does each pixel belong?",
        how_to_get="Its host is down at times: get ADEChallengeData2016.zip from anywhere (the checksum says "
        "whether it is the right one) and put it into the raw folder of ade20k, or unpack it there.",
    ),
)
