from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from encoders.loaded_artifact import read_program
from feature_repo.artifact import PROGRAM_INPUTS
from tests.training.world import (
    LENGTH,
    SCENES,
    WIDTH,
    random_inputs,
    small_bahe,
    small_deep_half,
    small_schema,
)
from training.build import build_model
from training.candidates import FlatCandidates
from training.config import (
    BaheConfig,
    DinTextConfig,
    ItemOnlyConfig,
    MeanPoolingConfig,
    PopularityConfig,
    RepeatCountConfig,
)
from training.item_ids import ItemEmbedding
from training.program import save_program
from training.program_inputs import ProgramInputs
from training.schema import InputSchema

CONFIGS = [
    small_bahe(),
    small_bahe(use_deep_half=False, use_age=False),
    small_bahe(use_exact_evidence=False, use_text_evidence=False, deep_length=3),
    small_bahe(share_scenes=False, num_members=1, next_behavior_weight=0.5),
    small_bahe(attention_over="states", deep_length=5, text_length=3),
    small_bahe(attention_over="states", share_scenes=False, use_text_evidence=False),
    small_bahe(id_width=3, use_deep_half=False),
    small_bahe(
        use_text=False,
        use_deep_half=False,
        use_text_evidence=False,
        use_target_attention=False,
        next_behavior_weight=0.0,
    ),
    PopularityConfig(),
    RepeatCountConfig(),
    MeanPoolingConfig(output_width=4, hidden=(8,)),
    DinTextConfig(output_width=4, attention_hidden=4, hidden=(8,)),
    ItemOnlyConfig(num_bins=4, numeric_width=2, hidden=(8,)),
]
every_model = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)


def make(config, schema=None):
    torch.manual_seed(0)
    deep = None
    if isinstance(config, BaheConfig) and config.use_deep_half:
        deep = small_deep_half(config.num_deep_layers)
    model = build_model(config, schema or small_schema(), deep).eval()
    if isinstance(config, BaheConfig) and config.id_width is not None:
        model.ids.set_vocabulary([np.arange(0, 40, 2) * 11])
    with torch.no_grad():  # no parameter may hide behind a zero
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, ItemEmbedding):  # "no item" is zeros, and learns nothing
                module.table.weight[0] = 0
    return model


@every_model
def test_logits_are_finite_and_of_the_right_shape(config):
    model = make(config)
    logits = model(*random_inputs(5, 3, 40))
    assert logits.shape == (5, 3)
    assert torch.isfinite(logits).all()


@every_model
def test_gradients_are_finite_with_empty_histories_and_missing_values(config):
    model = make(config).train()
    loss = model(*random_inputs(5, 3, 40)).sum()
    auxiliary = model.auxiliary_loss((torch.arange(15) % 4 == 0).float())
    (loss if auxiliary is None else loss + auxiliary).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name


@every_model
def test_shorter_padding_gives_the_same_logits(config):
    model, inputs = make(config), random_inputs(5, 3, 40)
    for place in (1, 2, 3):
        inputs[place][..., : LENGTH // 2] = 0
    shorter = list(inputs)
    for place in (1, 2, 3):
        shorter[place] = inputs[place][..., LENGTH // 2 :]
    torch.testing.assert_close(model(*shorter), model(*inputs), atol=1e-5, rtol=1e-5)


@every_model
def test_a_candidates_logit_does_not_depend_on_the_others(config):
    model, inputs = make(config), random_inputs(5, 4, 40)
    whole = model(*inputs)
    for candidate in range(4):
        alone = [
            t[:, candidate : candidate + 1]
            if name.startswith("candidate") or name in ("context", "evidence")
            else t
            for name, t in zip(PROGRAM_INPUTS, inputs, strict=True)
        ]
        torch.testing.assert_close(model(*alone)[:, 0], whole[:, candidate], atol=1e-5, rtol=1e-5)


@every_model
def test_a_contexts_logits_do_not_depend_on_the_others(config):
    model, inputs = make(config), random_inputs(5, 3, 40)
    whole = model(*inputs)
    for context in range(5):
        alone = [inputs[0], *(t[context : context + 1] for t in inputs[1:])]
        torch.testing.assert_close(model(*alone)[0], whole[context], atol=1e-5, rtol=1e-5)


@every_model
def test_padded_candidates_change_nothing(config):
    model, inputs = make(config), random_inputs(4, 5, 40)
    whole = model(*inputs)
    inputs[7][1, 2:] = 0
    kept = inputs[7] != 0
    torch.testing.assert_close(model(*inputs)[kept], whole[kept], atol=1e-5, rtol=1e-5)


@every_model
def test_exported_program_equals_the_eager_model_for_other_sizes(config, tmp_path):
    model = make(config)
    save_program(model, small_schema(), tmp_path / "score.pt2")
    program = read_program(tmp_path / "score.pt2").module()
    for sizes in ((1, 1, 2), (1, 7, 30), (6, 1, 9), (7, 12, 100)):
        inputs = random_inputs(*sizes, seed=sum(sizes))
        torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)


def test_export_works_with_one_scene_and_no_features_at_all(tmp_path):
    schema = InputSchema(("view",), 3, WIDTH, (), (), (), (), {})
    model = make(small_bahe(), schema)
    save_program(model, schema, tmp_path / "score.pt2")
    inputs = random_inputs(4, 3, 20)
    inputs[1:4] = [t[:, :1, -3:] for t in inputs[1:4]]
    inputs[4] = inputs[4][:, :1]
    inputs[5] = inputs[5][:, :0]
    for place in (8, 9, 10, 11):
        inputs[place] = inputs[place][..., :0]
    program = read_program(tmp_path / "score.pt2").module()
    torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)


def test_user_side_is_computed_without_candidates_and_from_the_newest_behaviours():
    model = make(small_bahe(deep_length=3))
    table, rows, _, ages = random_inputs(6, 2, 40)[:4]
    rows[:, :, -1] = 5
    users = model.user_vectors(table, rows, ages)
    assert users.shape == (6, len(SCENES), 8)
    older, newer = rows.clone(), rows.clone()
    older[..., :-3] = 1
    newer[..., -2] = 7
    assert torch.equal(model.user_vectors(table, older, ages), users)
    assert not torch.isclose(model.user_vectors(table, newer, ages), users).all()


def test_order_and_age_of_behaviours_matter():
    model = make(small_bahe())
    table, rows, _, ages = random_inputs(2, 1, 40)[:4]
    rows[:] = torch.arange(1, LENGTH + 1)
    users = model.user_vectors(table, rows, ages)
    assert (model.user_vectors(table, rows.flip(-1), ages) - users).abs().max() > 1e-4
    assert (model.user_vectors(table, rows, ages + 1e8) - users).abs().max() > 1e-4


def test_scenes_share_the_deep_half():
    model = make(small_bahe())
    table, rows, _, ages = random_inputs(4, 1, 40)[:4]
    users = model.user_vectors(table, rows, ages)
    swapped = model.user_vectors(table, rows.flip(1), ages.flip(1))
    torch.testing.assert_close(swapped, users.flip(1), atol=1e-6, rtol=1e-5)


def test_empty_history_gets_the_learned_vector():
    model = make(small_bahe())
    table, rows, _, ages = random_inputs(3, 1, 40)[:4]
    users = model.user_vectors(table, torch.zeros_like(rows), ages)
    torch.testing.assert_close(users, model.tower.empty.expand_as(users))


def test_exact_evidence_sees_the_candidates_own_key():
    model = make(small_bahe())
    inputs = random_inputs(2, 1, 40)
    inputs[1][:] = 1
    inputs[2][:] = 99
    without = model(*inputs)
    inputs[2][1, 0, -1] = inputs[7][1, 0]
    changed = model(*inputs) != without
    assert changed.tolist() == [[False], [True]]


def test_without_age_no_logit_depends_on_ages():
    inputs = random_inputs(5, 3, 40)
    older = list(inputs)
    older[3] = inputs[3] * 3 + 1e6
    for changes in ({}, {"use_deep_half": False}, {"attention_over": "states"}):
        for use_age in (True, False):
            model = make(small_bahe(use_age=use_age, **changes))
            same = torch.equal(model(*older), model(*inputs))
            assert same is not use_age
    attention_alone = small_bahe(use_text_evidence=False, next_behavior_weight=0.0)
    evidence_alone = replace(attention_alone, use_text_evidence=True, use_target_attention=False)
    for config in (attention_alone, evidence_alone):
        model = make(config)
        model.tower.age = None  # so that what is left of the age comes from the one part
        assert not torch.equal(model(*older), model(*inputs))


@pytest.mark.parametrize("attention_over", ["texts", "states"])
def test_without_exact_evidence_attention_is_not_told_what_is_the_candidate(attention_over):
    inputs = random_inputs(4, 3, 40)
    inputs[2][:] = 5  # another item than any candidate
    own = list(inputs)
    own[2] = inputs[2].clone()
    own[2][:, :, -1] = inputs[7][:, :1]
    there = inputs[1][:, :, -1] != 0  # [B, S]
    assert there.any()
    for use_exact_evidence in (True, False):
        model = make(
            small_bahe(
                use_text_evidence=False,
                use_exact_evidence=use_exact_evidence,
                attention_over=attention_over,
            )
        )
        changed = model(*own) != model(*inputs)
        expected = there.any(1, keepdim=True) & (inputs[7] == inputs[7][:, :1])
        assert torch.equal(changed, expected & use_exact_evidence)


def test_text_evidence_leaves_the_candidates_own_behaviours_out_without_exact_evidence():
    model = make(small_bahe(use_exact_evidence=False, use_target_attention=False))
    inputs = random_inputs(3, 1, 40)
    inputs[2][1, 0, -1] = inputs[7][1, 0]  # the candidate itself, with any text
    inputs[1][1, 0, -1] = 3
    before = model(*inputs)
    flat = FlatCandidates(inputs[7])
    evidence, _ = model.text_values(flat, ProgramInputs(*inputs))
    inputs[1][1, 0, -1] = 4  # the deep half sees another text, text evidence none
    other, _ = model.text_values(flat, ProgramInputs(*inputs))
    assert all(map(torch.equal, evidence, other))
    assert model(*inputs)[1, 0] != before[1, 0]


def test_vectors_of_ids_by_hand():
    model = make(small_bahe(id_width=3))
    inputs = ProgramInputs(*random_inputs(4, 3, 40))
    (found,) = model.id_values(FlatCandidates(inputs.candidate_item_keys), inputs)
    assert found.shape == (12, model.input_widths[-1])

    def vector(key):
        place = (model.ids.keys == key).nonzero()
        return model.ids.table.weight[place[0, 0]] if key and len(place) else None

    for row, key in enumerate(inputs.candidate_item_keys.flatten().tolist()):
        item = torch.zeros(3) if vector(key) is None else vector(key)
        means = []
        for keys in inputs.history_item_keys[row // 3].tolist():
            known = [vector(k) for k in keys if vector(k) is not None]
            means.append(torch.stack(known).mean(0) if known else torch.zeros(3))
        products = [mean * item for mean in means]
        similar = torch.stack([product.sum() / 3**0.5 for product in products])
        expected = torch.cat([*means, item, *products, similar])
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-5)


def test_ids_are_learned_and_weights_with_them_can_be_loaded():
    model, inputs = make(small_bahe(id_width=3)), random_inputs(4, 3, 40)
    fresh = build_model(model.config, small_schema(), small_deep_half()).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(*inputs), model(*inputs))
    model.train()(*inputs).sum().backward()
    asked = set(inputs[7].flatten().tolist()) | set(inputs[2].flatten().tolist())
    moved = model.ids.keys[(model.ids.table.weight.grad != 0).any(1)].tolist()
    assert set(moved) == (asked & set(model.ids.keys.tolist())) - {0}


def test_an_unknown_candidates_id_tells_nothing_but_that():
    model, inputs = make(small_bahe(id_width=3)), random_inputs(4, 3, 40)
    inputs[2][:] = 9  # no candidate is in its own history
    inputs[7][:] = 1001
    other = list(inputs)
    other[7] = torch.full_like(inputs[7], 2001)
    assert torch.equal(model(*other), model(*inputs))
    other[7] = torch.full_like(inputs[7], 22)
    assert (model(*other) != model(*inputs)).all()


def test_attention_over_states_by_hand():
    model = make(small_bahe(attention_over="states", deep_length=5))
    inputs = ProgramInputs(*random_inputs(4, 3, 40))
    flat = FlatCandidates(inputs.candidate_item_keys)
    rows, ages, keys = (
        values[..., -5:]
        for values in (inputs.history_rows, inputs.history_ages, inputs.history_item_keys)
    )
    _, _, states = model._outputs_and_states(inputs, inputs.candidate_rows.flatten())
    found = model._attend_states(flat, inputs, states).reshape(4, 3, -1)
    for context in range(4):
        for scene in range(len(SCENES)):
            there = rows[context, scene] != 0
            # One context and scene alone, and only what is there.
            seen = [values[context, scene][there][None] for values in (rows, ages, keys)]
            expected = torch.zeros_like(found[context].unflatten(-1, (len(SCENES), -1))[:, scene])
            if there.any():
                vectors = inputs.table[seen[0]]
                keep = torch.ones_like(seen[0], dtype=torch.bool)
                history = model.tower.states(model.space(vectors), seen[1], keep)
                titles = inputs.table[inputs.candidate_rows[context]]
                items = model.tower.item_states(model.space(titles))
                directions = model.space.directions
                expected = model.attention.scene(
                    scene,
                    normalize(history, dim=-1),
                    seen[1],
                    keep,
                    normalize(items, dim=-1)[None],
                    directions(titles)[None] @ directions(vectors).transpose(1, 2),
                    inputs.candidate_item_keys[context][None, :, None] == seen[2][:, None],
                )[0]
            part = found[context].unflatten(-1, (len(SCENES), -1))[:, scene]
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-4)


def test_attention_over_states_trains_the_deep_half():
    inputs = random_inputs(4, 3, 40)
    inputs[2][:] = 5
    gradients = {}
    for attention_over in ("texts", "states"):
        model = make(small_bahe(attention_over=attention_over, next_behavior_weight=0.0))
        with torch.no_grad():
            model.tower.output.weight.zero_()  # the outputs say nothing: attention alone is left
        model.train()(*inputs).sum().backward()
        half = model.tower.deep_half.parameters()
        gradients[attention_over] = sum(float(p.grad.abs().sum()) for p in half)
    assert gradients["texts"] == 0
    assert gradients["states"] > 0


def test_deep_outputs_are_the_same_beside_states():
    plain, with_states = (make(small_bahe(attention_over=over)) for over in ("texts", "states"))
    with_states.load_state_dict(plain.state_dict())
    inputs = ProgramInputs(*random_inputs(4, 3, 40))
    rows = inputs.candidate_rows.flatten()
    users, items, states = with_states._outputs_and_states(inputs, rows)
    history = (inputs.history_rows, inputs.history_ages)
    assert torch.equal(users, plain.user_vectors(inputs.table, *history))
    assert torch.equal(items, plain.item_vectors(inputs.table, rows))
    assert states.history.shape == (4, len(SCENES), LENGTH, WIDTH)
    assert not torch.equal(plain(*inputs), with_states(*inputs))


def test_bfloat16_is_for_learning_only():
    models = [make(small_bahe(use_bfloat16=flag)) for flag in (False, True)]
    inputs = random_inputs(3, 2, 40)
    plain, mixed = (model(*inputs) for model in models)
    assert torch.equal(plain, mixed)
    plain, mixed = (model.train().user_vectors(inputs[0], inputs[1], inputs[3]) for model in models)
    assert mixed.dtype is torch.float32
    assert not torch.equal(plain, mixed)
    torch.testing.assert_close(plain, mixed, atol=0.1, rtol=0.1)


def test_inputs_by_name_are_those_of_the_program():
    assert ProgramInputs._fields == PROGRAM_INPUTS


def test_popularity_by_hand():
    inputs = random_inputs(1, 3, 10)
    inputs[8][0, :, 1] = torch.tensor([0.0, torch.nan, 7.0])
    model = build_model(PopularityConfig(), small_schema())
    expected = torch.log1p(torch.tensor([[0.0, 0.0, 7.0]]))
    torch.testing.assert_close(model(*inputs), expected)


def test_repeat_count_by_hand_with_popularity_below_one():
    inputs = random_inputs(2, 3, 10)
    names = small_schema().evidence_names
    inputs[11][:] = torch.nan  # of all that is kept, not only of what the model reads
    inputs[11][0, :, names.index("same_buy_count")] = torch.tensor([1.0, 2.0, torch.nan])
    inputs[11][0, 1, names.index("same_view_count")] = 1.0
    inputs[8][..., 1] = torch.tensor([0.0, 1e9, 1e9])
    model = build_model(RepeatCountConfig(), small_schema())
    logits = model(*inputs)
    whole, rest = logits.floor(), logits - logits.floor()
    assert whole.tolist() == [[1, 3, 0], [0, 0, 0]]
    popular = torch.log1p(torch.tensor(1e9))
    torch.testing.assert_close(rest[0, 1], popular / (1 + popular), atol=1e-6, rtol=1e-6)


def test_baseline_without_its_feature_says_so():
    schema = InputSchema(SCENES, 3, WIDTH, (), ("price",), (), (), {})
    with pytest.raises(ValueError, match=r"no item feature ends in '_count_90d'.*price"):
        build_model(PopularityConfig(), schema)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"deep_length": 0}, "deep_length must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_age_scales": 9}, r"num_age_scales must be in \[1, 6\], got 9"),
        ({"num_kernels": 1}, "num_kernels must be at least 2, got 1"),
        ({"input_scale": 0.0}, "input_scale must be above 0"),
        ({"num_deep_layers": 0}, "num_deep_layers must be at least 1"),
        ({"id_width": 0}, "id_width must be at least 1, got 0"),
        ({"attention_over": "items"}, "attention_over must be one of texts, states, got 'items'"),
    ],
)
def test_bad_config_says_what_is_allowed(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_bahe(**changes)


def test_the_next_behavior_loss_by_hand():
    model = make(small_bahe(next_behavior_weight=0.5)).train()
    inputs = random_inputs(4, 5, 40)
    inputs[7][1, 2:] = 0  # padding
    kept = inputs[7] != 0
    clicked = (torch.arange(20).reshape(4, 5) % 3 == 0)[kept].float()
    model(*inputs)
    found = model.auxiliary_loss(clicked)
    assert found is not None
    rows, owners = inputs[6][kept], torch.arange(4).unsqueeze(1).expand(4, 5)[kept]
    users = model.user_vectors(inputs[0], inputs[1], inputs[3]).sum(1)
    distinct = sorted(set(rows.tolist()))
    items = model.item_vectors(inputs[0], torch.tensor(distinct))
    scale = model.sharpness.exp() / model.config.output_width**0.5
    losses = []
    for place in torch.nonzero(clicked)[:, 0].tolist():
        owner, own = owners[place], rows[place]
        others = set(rows[(owners == owner) & (clicked > 0)].tolist()) - {int(own)}
        scores = {
            row: users[owner] @ items[i] * scale - torch.log((rows == row).float().mean())
            for i, row in enumerate(distinct)
            if row not in others
        }
        losses.append(torch.logsumexp(torch.stack(list(scores.values())), 0) - scores[int(own)])
    torch.testing.assert_close(found, 0.5 * torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)
    assert model.auxiliary_loss(torch.zeros_like(clicked)) is None


def test_members_learn_as_if_alone_and_score_together():
    model, inputs = make(small_bahe(num_members=4)), random_inputs(4, 5, 40)
    before = model(*inputs)
    with torch.no_grad():
        model.perceptron.bias[2] += 1.0
    torch.testing.assert_close(model(*inputs), before + 0.25)
    alone = model.train()(*inputs)
    assert alone.shape == (4, 5, 4)
    alone[..., 2].sum().backward()
    assert model.perceptron.bias.grad.tolist() == [0, 0, 20, 0]
