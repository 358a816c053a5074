import pytest

from feature_repo.errors import LongtrailError
from training.overrides import override
from training.recipes import RECIPES


def test_values_are_read_as_the_field_says():
    base = RECIPES["bahe_base"]()
    changed = override(
        base,
        [
            "training.epochs=9",
            "training.average_decay=none",
            "training.patience=3",
            "training.learning_rate=2e-3",
            "training.deterministic=true",
            "model.hidden=64, 32",
            "model.num_deep_layers=2",
            "model.num_trained_layers=1",
            "model.id_width=8",
            "model.attention_over=states",
            "model.use_age=false",
            "sequence_length=7",
            "training.epochs=4",  # the last one counts
        ],
    )
    assert (changed.training.epochs, changed.training.patience) == (4, 3)
    assert changed.training.average_decay is None
    assert changed.training.learning_rate == 2e-3
    assert changed.training.deterministic is True
    assert changed.model.hidden == (64, 32)
    assert changed.model.num_deep_layers == 2
    assert changed.model.num_trained_layers == 1
    assert changed.model.id_width == 8
    assert changed.model.attention_over == "states"
    assert changed.model.use_age is False
    assert changed.sequence_length == 7
    assert base == RECIPES["bahe_base"]()
    assert override(base, []) == base


def test_a_dataclass_sees_all_its_changes_at_once():
    settings = ["training.learning_rate=0.5", "training.clip_norm=0.25", "name=mine"]
    changed = override(RECIPES["bahe_small"](), settings)
    assert (changed.name, changed.training.learning_rate, changed.training.clip_norm) == (
        "mine",
        0.5,
        0.25,
    )


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("training.epochs", "takes NAME=VALUE"),
        ("training.epoch=3", "TrainingConfig has no field 'epoch'; did you mean epochs"),
        ("zzz=3", "Recipe has no field 'zzz'; it has name, model, training"),
        ("model=3", "is a group of fields: set one of model.use_text"),
        ("training.epochs.more=3", "epochs has no fields"),
        ("training.epochs=many", "training.epochs takes int, got 'many'"),
        ("training.epochs=none", "training.epochs takes int, got 'none'"),
        ("model.hidden=1,x", "model.hidden takes"),
        ("training.learning_rate=-1", "learning_rate must be above 0, got -1.0"),
        ("model.dropout=1.5", "dropout must be in"),
    ],
)
def test_a_wrong_setting_is_one_sentence(setting, sentence):
    with pytest.raises(LongtrailError, match=sentence):
        override(RECIPES["bahe_small"](), [setting])
