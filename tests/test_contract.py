"""The contract that ties the five methods to the rest (README: eight names), one test for all of them."""
import dataclasses
import math

import pytest
import torch
from PIL import Image
from torch import nn

import common
import dcal
import m2former
import tdsa
import tnet
import vit_fgvc

METHODS = {"m2former": m2former, "dcal": dcal, "tnet": tnet, "vit_fgvc": vit_fgvc, "tdsa": tdsa}
each_method = pytest.mark.parametrize("name", METHODS)
CLASSES = 3


def toy(name, **changes):
    """The method's toy recipe from random weights."""
    return dataclasses.replace(METHODS[name].RECIPES["toy"], weights="none", **changes)


def built(name, **changes):
    """A small model of a method and three normalised images of its size."""
    recipe = toy(name, **changes)
    return METHODS[name].build(recipe, CLASSES), torch.randn(3, 3, *recipe.image_size)


def trained_step(model, images):
    """Backward of one training loss -> loss, terms."""
    loss, terms = model.train()(images, torch.arange(len(images)) % CLASSES)
    loss.backward()
    return loss, terms


@each_method
def test_a_method_has_a_toy_and_a_folder_recipe_and_tables_of_its_papers_datasets(name):
    method = METHODS[name]
    assert {"toy", "folder"} <= set(method.RECIPES) and "baseline" in method.TABLES
    assert all(type(recipe) is method.Recipe for recipe in method.RECIPES.values())
    for table in method.TABLES.values():
        assert table.data in method.RECIPES and len({row[0] for row in table.rows}) == len(table.rows)


@each_method
def test_logits_do_not_depend_on_the_other_images_of_a_batch_and_repeat_exactly(name):
    model, images = built(name)
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, CLASSES) and torch.equal(logits, model(images))
        torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=0, atol=1e-4)


@each_method
def test_a_training_forward_gives_a_scalar_to_minimise_and_detached_terms(name):
    model, images = built(name)
    loss, terms = trained_step(model, images)
    assert loss.shape == () and loss.isfinite() and "top1" in terms
    assert all(t.shape == () and not t.requires_grad and t.isfinite() for t in terms.values())


@each_method
def test_every_parameter_gets_a_gradient(name):
    model, images = built(name, **({"drop_path": 0.0} if name != "tnet" else {}))
    for _ in range(3):  # random choices reach everything in a few steps
        trained_step(model, images)
    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n, p in learning if p.grad is None or not p.grad.any()]


@each_method
def test_the_groups_of_the_optimizer_are_a_partition_of_the_parameters(name):
    for data in ("toy", "folder", "cub"):
        recipe = METHODS[name].RECIPES[data]
        with torch.device("meta"):
            model = METHODS[name].build(dataclasses.replace(recipe, weights="none"), CLASSES)
        groups = METHODS[name].param_groups(model, recipe)
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad), data


@each_method
def test_where_gives_boxes_in_the_image_best_first_and_repeats_exactly(name):
    model, images = built(name)
    model.eval()
    with torch.no_grad():
        boxes, scores = model.where(images)
        again, _ = model.where(images)
    n, (H, W) = boxes.shape[1], images.shape[2:]
    assert boxes.shape == (3, n, 4) and scores.shape == (3, n) and n > 0 and torch.equal(boxes, again)
    assert (boxes[..., 2:] > boxes[..., :2]).all() and scores.isfinite().all()
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert ((centres >= 0) & (centres <= torch.tensor([W, H]))).all()


@each_method
def test_figure_draws_one_picture_an_image_and_heads_are_classifiers(name):
    model, images = built(name)
    model.eval()
    with torch.no_grad():
        pages, heads = model.figure(images[:2]), model.heads(images)
    assert len(pages) == 2 and all(isinstance(page, Image.Image) and min(page.size) > 60 for page in pages)
    assert heads and all(logits.shape == (3, CLASSES) for logits in heads.values())


@each_method
def test_bf16_trains_and_answers_in_finite_numbers(name):
    model, images = built(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = trained_step(model, images)
        with torch.no_grad():
            logits, (boxes, _) = model.eval()(images), model.where(images)
    assert loss.isfinite() and logits.float().isfinite().all() and boxes.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@each_method
def test_the_weights_of_a_run_start_another_with_more_classes(name, tmp_path):
    first, images = built(name)
    trained_step(first, images)
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.add_(0.01) if tensor.is_floating_point() else None
    state = {"model": first.state_dict(), "recipe": dataclasses.asdict(first.recipe)}
    common.save_checkpoint(tmp_path / "last.pt", state)
    again = METHODS[name].build(dataclasses.replace(first.recipe, weights=str(tmp_path)), CLASSES + 2)
    own, old = again.state_dict(), first.state_dict()
    learned = [n for n, p in first.named_parameters() if p.shape == own[n].shape and p.ndim > 1]
    kept = [n for n in learned if torch.equal(own[n], old[n])]
    assert len(kept) > 0.8 * len(learned) and again.eval()(images).shape == (3, CLASSES + 2)


@each_method
def test_a_value_outside_a_fields_declared_range_is_refused_with_its_flag(name):
    recipe = METHODS[name].RECIPES["toy"]
    for f in dataclasses.fields(recipe):
        value, rule = getattr(recipe, f.name), f.metadata
        kind = type(value[0] if isinstance(value, tuple) and value else value)
        bad = [rule["least"] - 1, rule["most"] + 1, math.nan] if kind in (int, float) else []
        bad += ["no such"] if rule["choices"] else []
        for v in bad:
            with pytest.raises(ValueError, match=common.flag(f)):
                dataclasses.replace(recipe, **{f.name: (v,) * len(value) if isinstance(value, tuple) else v})


@each_method
def test_every_row_of_every_table_is_a_recipe_and_has_a_value_for_each_metric(name):
    method, models = METHODS[name], {}
    for key, table in method.TABLES.items():
        names, metrics = {row[0] for row in table.rows}, len(table.metric.split())
        for row, overrides, paper in table.rows:
            training, evaluation, start = common.split_row(overrides)
            assert start in names | {None}, (key, row)
            assert paper is None or metrics == (len(paper) if isinstance(paper, tuple) else 1), (key, row)
            recipe = dataclasses.replace(method.RECIPES[table.data], **training | evaluation)
            models[recipe.backbone] = dataclasses.replace(recipe, weights="none")
    for recipe in models.values():  # the last row of each
        with torch.device("meta"):
            assert sum(p.numel() for p in method.build(recipe, 7).parameters()) > 1000


@each_method
def test_wrong_use_says_what_is_wanted(name):
    method = METHODS[name]
    with pytest.raises(ValueError, match=f"build wants a {name}.Recipe"):
        method.build("toy", CLASSES)
    with pytest.raises(ValueError, match="at least 2 classes"):
        method.build(toy(name), 1)
    model, images = built(name)
    any_size = name in ("tnet", "vit_fgvc")  # both scale what they look at to the size of their backbone
    for wrong in (images[0], images.byte()) + (() if any_size else (images[..., :-3],)):
        with pytest.raises(ValueError, match="wanted are normalised floats"):
            model.eval().where(wrong)


def test_nothing_but_the_papers_dropout_and_stochastic_depth_is_random_in_training():
    for name, method in METHODS.items():
        layers = method.build(toy(name), CLASSES).modules()
        dropped = [m for m in layers if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
        assert not dropped or name == "tnet", f"{name} has dropout that its paper does not have"
