"""The papers' figures: what is found, what is not, and that lists agree with the papers' own means."""

from pathlib import Path
from statistics import fmean

import pytest
from omegaconf import OmegaConf

from visprompt.data.catalog import SUITES, TASKS
from visprompt.models.methods import METHODS
from visprompt.reports.published import GROUPS, all_published, contents, published

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_pair_is_found_by_config_or_by_weights_with_its_source():
    found = published("vpt_deep", "vit_b16_in21k")
    assert found is published("vpt_deep", "vit_base_patch16_224.orig_in21k")
    assert found.source == "Jia et al., Visual Prompt Tuning, ECCV 2022"
    assert (found.params, found.means["vtab_structured"], found.means["fgvc"]) == (1.18, 54.98, 89.11)
    assert (found.tasks["cifar"], found.tasks["smallnorb_ele"], found.tasks["stanford_cars"]) == (
        78.8,
        37.8,
        83.6,
    )
    assert found.mean_of_groups == pytest.approx((78.48 + 82.43 + 54.98) / 3)
    assert found.caution == ""


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("partial", "partial_1", {"num_blocks": 1}),
        ("mlp", "mlp_3", {"num_layers": 3}),
        ("bias", "bias", {"relative_positions": True}),
    ],
)
def test_methods_have_our_names_and_the_papers_options(method, name, options):
    found = published(method, "swin_b")
    assert (found.name, dict(found.options)) == (name, options)
    assert published(name, "swin_b") is (found if name == method else None)


def test_an_unknown_pair_has_no_figures():
    assert published("lora", "swin_b") is None
    assert published("vpt_deep", "vit_base_patch16_224.augreg_in21k") is None
    assert published("vpt_deep", "moco_v3_b16", paper="e2vpt") is None


def test_a_paper_can_be_named():
    assert published("vpt_deep", "vit_b16_in21k", paper="one_protocol").mean_of_groups == 73.4
    assert published("bias", "vit_b16_in21k", paper="one_protocol").name == "bitfit"
    assert published("fact", "vit_b16_in21k", options={"form": "tk"}).name == "fact_tk"


def test_a_run_that_contradicts_the_papers_options_is_another_method():
    assert published("partial", "vit_b16_in21k", options={"num_blocks": 2}) is None
    assert published("vpt_deep", "vit_b16_in21k", options={"depth": 3, "location": "prepend"}) is None
    # unrecorded ones fit
    assert published("vpt_deep", "vit_b16_in21k", options={"num_tokens": 5}) is not None
    assert published("vpt_shallow", "resnet50", options={"location": "pad"}).name == "vpt_pad"
    assert published("vpt_shallow", "swin_b", options={"location": "pad"}) is None


@pytest.mark.parametrize(
    ("method", "options", "other"),
    [
        ("sidetune", {"weights": "alexnet.pth"}, {"weights": "random"}),
        ("vpt_deep", {"pool": "cls"}, {"pool": "prompt"}),
        ("vpt_shallow", {"pool": None}, {"pool": "image_prompt"}),
        ("e2vpt", {"pool": "cls"}, {"pool": "image_prompt"}),
        ("vpt_deep", {"depth": 12}, {"depth": 24}),
        ("vfpt", {"depth": None}, {"depth": 1}),
        ("vfpt", {"fourier_share": 0.5}, {"fourier_share": 0.0}),
        ("e2vpt", {"num_tokens": 5, "num_kv_tokens": 5}, {"num_kv_tokens": 0}),
        ("e2vpt", {"pool": None}, {"num_tokens": 0}),
        ("e2vpt", {"kv_blocks": "all"}, {"kv_blocks": "last_half"}),
        ("e2vpt", {"share_kv": True}, {"share_kv": False}),
    ],
)
def test_what_a_paper_did_not_do_has_none_of_its_figures(method, options, other):
    assert published(method, "vit_b16_in21k", options=options).method == method
    assert published(method, "vit_b16_in21k", options=other) is None


@pytest.mark.parametrize(
    ("backbone", "pools"),
    [
        ("vit_b16_in21k", {None, "cls"}),
        ("moco_v3_b16", {None, "cls"}),
        ("mae_b16", {"image_prompt"}),
        ("swin_b", {None, "image_prompt"}),
    ],
)
@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep", "e2vpt"])
def test_a_papers_pooling_is_that_of_the_backbone(method, backbone, pools):
    words = (None, "cls", "image", "prompt", "image_prompt")
    assert {word for word in words if published(method, backbone, options={"pool": word})} == pools


def test_figures_of_another_set_up_than_a_run_s_are_not_found_or_carry_a_caution():
    """What the released codes do otherwise: docs/fidelity.md."""
    assert published("partial", "resnet50", options={"num_blocks": 1}) is None
    assert published("partial", "resnet50", options={"num_blocks": 3}).name == "partial_1"
    assert published("bias", "swin_b", options={"relative_positions": False}) is None
    for backbone in ("convnext_b_in21k", "resnet50"):
        assert "trains the head alone on conv nets" in published("bias", backbone).caution
    assert "could not be checked which of its variants" in published("vpt_low_rank", "vit_b16_in21k").caution
    norms = {found.backbone: found.final_norm for found in all_published()}
    assert norms == dict.fromkeys(contents()["backbones"], "trained") | {"mae_b16": "fresh"}


def test_the_pooling_of_every_shipped_backbone_is_the_papers():
    assert contents()["pooling"].keys() == contents()["backbones"].keys()
    for backbone, pooling in contents()["pooling"].items():
        config = OmegaConf.load(CONFIGS / "backbone" / f"{backbone}.yaml")
        assert config.get("global_pool") in pooling["global_pool"]
        assert config.get("final_norm", "trained") == pooling.get("final_norm", "trained")
    assert published("linear", "mae_b16").global_pools == ("avg",), "timm's own would be the class token"


def test_all_blocks_are_as_many_as_the_backbone_has():
    assert published("vpt_deep", "swin_b", options={"depth": 24}) is not None
    assert published("vpt_deep", "swin_b", options={"depth": 12}) is None


def test_e2vpts_19_tasks_have_the_mean_that_is_known_of_them():
    found = published("e2vpt", "vit_b16_in21k", options={"prune": True})
    assert found.flat_mean == pytest.approx(71.42, abs=0.005)
    assert published("vapt", "vit_b16_in21k").flat_mean is None


def test_what_is_unreliable_is_said_to_be_and_has_no_flat_mean():
    found = published("adapter", "vit_b16_in21k")
    assert (found.unreliable, found.flat_mean) == (GROUPS, None)
    assert "do not agree with its own means of vtab_natural, vtab_specialized" in found.caution
    assert "quoted by another paper" in published("cvpt", "vit_b16_in21k").caution
    assert "recalled" in (Path(__file__).parents[2] / "src/visprompt/reports/published.yaml").read_text()


def test_figures_of_others_say_whose_they_are():
    assert "quoted by another paper" in published("fact", "vit_b16_in21k", options={"form": "tt"}).caution
    assert "run by the authors of Convpass" in published("adaptformer", "vit_b16_in21k").caution
    assert "share one A" in published("lora", "vit_b16_in21k").caution
    assert "best epoch on test, with preprocessing=model" in published("ssf", "vit_b16_augreg").caution


@pytest.mark.parametrize(
    ("method", "backbone", "options", "name"),
    [
        ("lora", "vit_b16_in21k", {"rank": 8}, "noah"),
        ("lora", "vit_b16_in21k", {"rank": 4}, "one_protocol"),
        ("adaptformer", "vit_b16_in21k", {"bottleneck": 8}, "convpass"),
        ("adaptformer", "vit_b16_in21k", {"bottleneck": 64}, "one_protocol"),
        ("ssf", "vit_b16_augreg", {}, "ssf"),
        ("ssf", "vit_b16_in21k", {}, "one_protocol"),
        ("vpt_shallow", "mae_b16", {"init": "vipamin", "pool": "image_prompt"}, "vipamin"),
        ("vpt_shallow", "mae_b16", {"init": "random", "pool": "image_prompt"}, "vpt"),
    ],
)
def test_a_run_is_compared_with_figures_of_its_weights_and_options(method, backbone, options, name):
    assert published(method, backbone, options=options).paper == name


def test_da_vpt_s_figures_are_of_augreg_weights_with_and_without_biases():
    names = [published("da_vpt", "vit_b16_augreg", options={"bias": bias}).name for bias in (False, True)]
    assert names == ["da_vpt", "da_vpt_plus"]
    assert published("da_vpt", "vit_b16_in21k") is None


def rounded(*figures):
    """Half a unit of the last decimal of figures that are printed alike, where 79.1 may stand for 79.10."""
    return 0.5 * 10.0 ** -max(1, *(len(str(figure).partition(".")[2]) for figure in figures))


def group_mean(found, group):
    """The mean of a group's list; None where there is none."""
    known = all(task in found.tasks for task in SUITES[group])
    return fmean(found.tasks[task] for task in SUITES[group]) if known else None


def test_lists_of_accuracies_agree_with_the_papers_means_but_where_it_is_said():
    """A mean of rounded figures is known to half a unit of theirs, and the printed one to half a unit of its own."""
    checked = 0
    for found in all_published():
        for group in (*GROUPS, "fgvc"):
            mean = group_mean(found, group)
            if mean is not None and group in found.means:
                known = rounded(*(found.tasks[task] for task in SUITES[group])) + rounded(
                    *found.means.values()
                )
                checked += 1
                assert (abs(mean - found.means[group]) < known + 1e-3) == (group not in found.unreliable), (
                    found,
                    group,
                )
    assert checked == 77


def test_every_list_is_checked_by_a_mean_that_its_source_prints():
    """Where group means are not printed, by the mean over the groups or over all tasks."""
    unprinted = []
    for found in all_published():
        missing = [
            group for group in GROUPS if group_mean(found, group) is not None and group not in found.means
        ]
        if missing:
            unprinted.append((found.paper, found.name))
            if found.paper == "ship":  # its file of results has figures by task alone
                continue
            assert found.printed_mean is not None or found.printed_flat_mean is not None, found
        assert group_mean(found, "fgvc") is None or "fgvc" in found.means, found
    assert unprinted == [
        ("noah", "lora"),
        ("fact", "fact_tt"),
        ("fact", "fact_tk"),
        ("ssf", "ssf"),
        ("ship", "ship"),
    ]


def test_printed_means_over_groups_and_tasks_follow_from_the_lists_or_the_group_means():
    """To half a unit each of what is averaged and printed, and half a unit more.

    DA-VPT's 73.53 should be 73.52.
    """
    for found in all_published():
        listed = {group: group_mean(found, group) for group in GROUPS}
        if None in listed.values():
            listed = {group: found.means.get(group) for group in GROUPS}
        if None in listed.values():
            continue
        of_groups = fmean(listed.values())
        of_tasks = fmean(listed[group] for group in GROUPS for _ in SUITES[group])
        for mean, printed in ((of_groups, found.printed_mean), (of_tasks, found.printed_flat_mean)):
            if printed is not None:
                known = (0.05 if found.tasks.keys() >= set(SUITES["vtab_all"]) else 0.01) + rounded(printed)
                assert abs(mean - printed) < known, found


def test_prompt_lengths_give_the_shares_that_are_printed():
    """And of the lengths searched no other does, but on the four tasks that published.yaml names."""
    settings, order, backbone = contents()["settings"], contents()["order"], 85_798_656
    several = []
    for method, groups in settings["tuned_shares"].items():
        for group, shares in groups.items():
            for task, share, length in zip(
                order[group], shares, settings["lengths"][method][group], strict=True
            ):
                head = TASKS[task].num_classes * 769
                fit = []
                for searched in (1, 5, 10, 50, 100, 200):
                    tuned = searched * 768 * (12 if method == "vpt_deep" else 1) + head
                    if abs(100 * tuned / (backbone + tuned) - share) < 0.0051:
                        fit.append(searched)
                assert length in fit, (method, task)
                several += [(method, task)] if len(fit) > 1 else []
    names = ("caltech101", "sun397", "patch_camelyon", "diabetic_retinopathy")
    assert several == [("vpt_shallow", name) for name in names]


def test_tasks_methods_and_backbones_are_ours():
    order = contents()["order"]
    assert {group: tuple(tasks) for group, tasks in order.items()} == {
        group: SUITES[group] for group in order
    }
    assert {found.method for found in all_published()} <= {*METHODS, None}
    assert [found.name for found in all_published() if found.method is None] == ["ship", "houlsby"]
    for backbone, weights in contents()["backbones"].items():
        config = OmegaConf.load(CONFIGS / "backbone" / f"{backbone}.yaml")
        assert weights in (config.name, None), backbone


def test_what_has_no_lookup_is_kept_as_data():
    kept = contents()
    assert kept["settings"]["released"]["sun397"]["lr"] == 25.0
    assert len(kept["settings"]["lengths"]["vpt_deep"]["vtab_structured"]) == len(SUITES["vtab_structured"])
    assert set(kept["settings"]["released"]) <= set(TASKS)
    assert kept["cost"]["vpt_deep_p200"] == [360.1, 25.8, 140.8, 1.85]
    assert len(kept["cost"]["columns"]) == 4
