"""The language model over the full text: packing against a slow reference, then the model."""

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from encoders.batches import TokenizedTexts
from encoders.config import EncoderConfig
from encoders.fingerprint import describe_encoder
from encoders.loaded_artifact import load_artifact, read_program
from encoders.pretrained import quiet_transformers
from encoders.table import EmbeddingTable
from feature_repo.artifact import PROGRAM_INPUTS, load_run_manifest
from feature_repo.errors import ArtifactError
from tests.training import world as small
from tests.training.world import LENGTH, SCENES, WIDTH, make_world
from training.artifact import _CONFIGS, load_model
from training.build import build_model, fit_inputs, pretrained_layers, texts_to_read
from training.config import FullTextConfig
from training.full_text import FullText
from training.optimization import make_optimizer
from training.program import save_program
from training.recipes import RECIPES, Recipe, TrainingConfig
from training.schema import InputSchema
from training.scoring import score
from training.text_tokens import BehaviorTokens, TextTokens, behavior_tokens
from training.train import read_splits, train

NUM_ROWS = 40
EVIDENCE = ("same_count_view", "near_basket_sum_view", "text_max_view")
SIZES = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_schema():
    return InputSchema(
        scenes=SCENES,
        sequence_length=LENGTH,
        vector_width=WIDTH,
        user_dense_names=("view_total",),
        item_dense_names=("price", "view_count_90d"),
        context_names=("hour",),
        evidence_names=EVIDENCE,
        category_vocabularies={"brand": ("a", "b")},
    )


def random_inputs(num_contexts, num_candidates, num_rows, *, seed=0):
    inputs = small.random_inputs(num_contexts, num_candidates, num_rows, seed=seed)[:11]
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.rand((num_contexts, num_candidates, len(EVIDENCE)), generator=generator)
    return [*inputs, evidence]


def language_model(kind="bert", *, hidden_size=12, vocab_size=30, window=32):
    torch.manual_seed(7)
    sizes = {
        **SIZES,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": window,
        "use_cache": False,
    }
    if kind == "llama":
        return LlamaModel(LlamaConfig(num_key_value_heads=1, **sizes))
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


def make_texts(num_texts, *, longest=6, shortest=1, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest + 1, num_texts)
    return TokenizedTexts(generator.integers(1, 30, lengths.sum()), lengths)


def small_config(**changes):
    values = {
        "num_tokens": 20,
        "max_tokens_per_behavior": 6,
        "use_bfloat16": False,
        "num_bins": 4,
        "numeric_width": 2,
        "output_width": 8,
        "cross_rank": 4,
        "hidden": (16,),
    }
    return FullTextConfig(**(values | changes))


def make(kind="bert", *, table, start=(1,), **changes):
    """A model that knows every text of ``table`` but the last two."""
    torch.manual_seed(0)
    model = build_model(small_config(**changes), small_schema(), language_model(kind))
    texts = make_texts(len(table) - 1)
    lengths = texts.lengths.copy()
    lengths[-2:] = 0
    texts = TokenizedTexts(texts.ids[: lengths.sum()], lengths)
    empty = [np.zeros((2, width), np.float32) for width in (1, 2, 1)]
    dense = (*empty, np.linspace([0, 0, 0], [1, 1, 1], 9, dtype=np.float32))
    fit_inputs(model, table.numpy(), dense, base_rate=0.2, behaviors=BehaviorTokens(start, texts))
    with torch.no_grad():  # no parameter may hide behind a zero
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), texts


every_kind = pytest.mark.parametrize(
    ("kind", "changes"),
    [("bert", {}), ("bert", {"use_numeric": True, "num_crosses": 0}), ("llama", {"start": ()})],
    ids=["bert", "bert_numeric", "llama"],
)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("num_tokens", [1, 5, 12, 40])
def test_packing_equals_joining_the_texts_and_keeping_the_newest_tokens(num_tokens):
    texts = make_texts(30, shortest=0)
    table = torch.randn(31, WIDTH)
    table[0] = 0
    store = TextTokens(WIDTH)
    store.set_tokens(table.numpy(), BehaviorTokens((), texts))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 31, (50, 9), generator=generator)
    rows[0] = 0  # no history
    rows[1, :-1] = 0  # one text
    rows[2, 0] = 0
    tokens, owners, keep = store.pack(store.places(table[rows]), num_tokens)
    assert tokens.shape == owners.shape == keep.shape == (50, num_tokens)
    totals = set()
    for context in range(50):
        joined = [
            (int(token), place)
            for place, row in enumerate(rows[context].tolist())
            if row
            for token in texts.ids[texts.starts[row - 1] :][: texts.lengths[row - 1]]
        ]
        totals.add(np.sign(len(joined) - num_tokens))
        expected = joined[-num_tokens:]
        there = keep[context]
        assert there.tolist() == [i < len(expected) for i in range(num_tokens)]
        found = zip(tokens[context][there].tolist(), owners[context][there].tolist(), strict=True)
        assert list(found) == expected
    assert totals >= ({-1, 1} if num_tokens < 40 else {-1})


def test_a_row_that_fits_exactly_is_kept_whole():
    texts = TokenizedTexts(np.arange(1, 8), np.array([3, 4]))
    table = np.array([[0, 0], [1, 2], [3, 4]], np.float32)
    store = TextTokens(2)
    store.set_tokens(table, BehaviorTokens((), texts))
    tokens, owners, keep = store.pack(store.places(torch.from_numpy(table[[[1, 2]]])), 7)
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert owners.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert keep.all()


def test_texts_are_found_when_the_tables_rows_have_moved():
    texts, table = make_texts(10), torch.randn(11, WIDTH)
    store = TextTokens(WIDTH)
    store.set_tokens(table.numpy(), BehaviorTokens((), texts))
    places = store.places(table[1:])
    grown = torch.cat([torch.zeros(1, WIDTH), torch.randn(3, WIDTH), table[1:].flip(0)])
    assert store.places(grown[4:]).flip(0).equal(places)
    assert store.lengths[store.places(grown[:4])].tolist() == [0, 0, 0, 0]
    assert store.lengths[places].tolist() == texts.lengths.tolist()


def test_two_texts_with_one_vector_are_refused():
    table = np.ones((3, WIDTH), np.float32)
    texts = TokenizedTexts(np.array([5, 6]), np.array([1, 1]))
    with pytest.raises(ArtifactError, match="two texts of different tokens have the same vector"):
        TextTokens(WIDTH).set_tokens(table, BehaviorTokens((), texts))
    same = TokenizedTexts(np.array([5, 5]), np.array([1, 1]))
    TextTokens(WIDTH).set_tokens(table, BehaviorTokens((), same))


# ---------------------------------------------------------------- the model


@every_kind
def test_the_contract_of_click_models(kind, changes):
    inputs = random_inputs(5, 4, NUM_ROWS)
    model, _ = make(kind, table=inputs[0], **changes)
    with torch.no_grad():
        whole = model(*inputs)
        assert whole.shape == (5, 4)
        assert torch.isfinite(whole).all()
        close = {"atol": 1e-5, "rtol": 1e-5}
        for context in range(5):
            alone = [inputs[0], *(t[context : context + 1] for t in inputs[1:])]
            torch.testing.assert_close(model(*alone)[0], whole[context], **close)
        alone = [
            t[:, 2:3] if name.startswith("candidate") or name in ("context", "evidence") else t
            for name, t in zip(PROGRAM_INPUTS, inputs, strict=True)
        ]
        torch.testing.assert_close(model(*alone)[:, 0], whole[:, 2], **close)
        padded = list(inputs)
        padded[7] = inputs[7].clone()
        padded[7][1, 2:] = 0
        kept = padded[7] != 0
        torch.testing.assert_close(model(*padded)[kept], whole[kept], **close)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("bert", {"use_numeric": True}), ("llama", {"start": ()})],
    ids=["bert_numeric", "llama"],
)
def test_exported_program_equals_the_eager_model_for_other_sizes(kind, changes, tmp_path):
    table = random_inputs(1, 1, NUM_ROWS)[0]
    model, _ = make(kind, table=table, **changes)
    save_program(model, small_schema(), tmp_path / "score.pt2")
    program = read_program(tmp_path / "score.pt2").module()
    for sizes in ((1, 1), (6, 3)):
        inputs = random_inputs(*sizes, NUM_ROWS, seed=sum(sizes))
        inputs[0] = torch.cat([table, torch.randn(5, WIDTH)])
        scores = program(*inputs)
        torch.testing.assert_close(scores, model(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_user_vector_by_hand_from_the_joined_text(kind):
    table, rows, _, ages = random_inputs(4, 1, NUM_ROWS)[:4]
    model, texts = make(kind, table=table)
    config, embed = model.config, model.deep_half.get_input_embeddings()
    with torch.no_grad():
        users = model.user_vectors(table, rows, ages)
        for context in range(4):
            events = [
                (-float(ages[context, s, m]), s, m)
                for s in range(len(SCENES))
                for m in range(LENGTH)
            ]
            text = [
                (int(token), s)
                for _, s, m in sorted(events)
                if (row := int(rows[context, s, m]))
                for token in texts.ids[texts.starts[row - 1] :][: texts.lengths[row - 1]]
            ][-(config.num_tokens - 1) :]
            if not text:
                torch.testing.assert_close(users[context], model.empty)
                continue
            tokens, scenes = (torch.tensor(part) for part in zip(*text, strict=True))
            x = torch.cat([embed(torch.tensor([1])), embed(tokens) + model.scene(scenes)])[None]
            states = model.deep_half(inputs_embeds=x).last_hidden_state[0]
            expected = model.output(model.output_norm(states).mean(0))
            torch.testing.assert_close(users[context], expected, atol=1e-5, rtol=1e-5)


def test_texts_that_came_after_training_count_as_empty():
    table, rows, _, ages = random_inputs(3, 1, NUM_ROWS)[:4]
    model, _ = make(table=table)
    unknown = torch.where(rows != 0, NUM_ROWS - 1, 0)
    with torch.no_grad():
        users = model.user_vectors(table, unknown, ages)
    torch.testing.assert_close(users, model.empty.expand_as(users))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_layers_learn_and_empty_histories_do_no_harm(checkpointing):
    inputs = random_inputs(5, 3, NUM_ROWS)
    model, _ = make(table=inputs[0], gradient_checkpointing=checkpointing, use_numeric=True)
    model.train()(*inputs).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    weights = [w for n, w in model.deep_half.named_parameters() if n.endswith("weight")]
    assert all(w.grad.abs().max() > 0 for w in weights)


def test_checkpointing_changes_no_gradient():
    inputs = random_inputs(4, 2, NUM_ROWS)
    gradients = []
    for checkpointing in (False, True):
        model, _ = make(
            table=inputs[0], gradient_checkpointing=checkpointing, dropout=0.0, input_dropout=0.0
        )
        model.train()(*inputs).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_bfloat16_is_for_learning_only():
    inputs = random_inputs(3, 2, NUM_ROWS)
    models = [make(table=inputs[0], use_bfloat16=flag)[0] for flag in (False, True)]
    with torch.no_grad():
        plain, mixed = (model(*inputs) for model in models)
        assert torch.equal(plain, mixed)
        args = inputs[0], inputs[1], inputs[3]
        plain, mixed = (model.train().user_vectors(*args) for model in models)
    assert mixed.dtype is torch.float32
    assert not torch.equal(plain, mixed)
    torch.testing.assert_close(plain, mixed, atol=0.1, rtol=0.1)


def test_weights_are_loaded_into_a_model_that_knows_no_texts_yet():
    inputs = random_inputs(4, 2, NUM_ROWS)
    model, _ = make(table=inputs[0])
    fresh = build_model(small_config(), small_schema(), language_model()).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(*inputs), model(*inputs))


def test_numbers_are_read_on_request_and_those_from_texts_never():
    inputs = random_inputs(2, 1, NUM_ROWS)
    for use_numeric in (False, True):
        model, _ = make(table=inputs[0], use_numeric=use_numeric)
        with torch.no_grad():
            before = model(*inputs)
            for place, name in enumerate(EVIDENCE):
                changed = [*inputs[:-1], inputs[-1].clone()]
                changed[-1][1, 0, place] = 1 - changed[-1][1, 0, place]
                seen = use_numeric and not name.startswith("text")
                assert (model(*changed) != before).tolist() == [[False], [seen]], name


def test_pretrained_weights_have_the_low_learning_rate():
    model, _ = make(table=random_inputs(1, 1, NUM_ROWS)[0])
    training = TrainingConfig(learning_rate=1e-3, deep_learning_rate=1e-5)
    peaks = {
        id(p): group["peak"]
        for group in make_optimizer(model, training).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert peaks[id(parameter)] == (1e-5 if name.startswith("deep_half.") else 1e-3), name


def test_a_window_that_is_too_short_is_refused():
    with pytest.raises(ArtifactError, match=r"num_tokens is 20.* reads at most 16 tokens"):
        FullText(small_config(), small_schema(), language_model(window=16))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_tokens": 1}, "num_tokens must be at least 2, got 1"),
        ({"max_tokens_per_behavior": 1}, "max_tokens_per_behavior must be at least 2, got 1"),
        ({"output_width": 0}, "output_width must be at least 1, got 0"),
        ({"num_crosses": -1}, "num_crosses must be at least 0, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_config_says_what_is_allowed(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_config(**changes)


# ---------------------------------------------------------------- from a home folder


def make_tokenizer(words, special):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": f"[{name.upper()}]" for name in special}
    )


@pytest.fixture(scope="module")
def text_world(tmp_path_factory):
    """The small world, whose texts are "thing itemNNN", with a model that can read them."""
    world = make_world(tmp_path_factory.mktemp("full_text") / "home", num_users=60)
    words = ["thing", *(f"item{i:03d}" for i in range(48))]
    folder = tmp_path_factory.mktemp("model")
    with quiet_transformers():
        language_model(hidden_size=WIDTH, vocab_size=60).save_pretrained(folder)
        tokenizer = make_tokenizer(words, ("pad", "unk", "sep", "cls"))
        tokenizer.save_pretrained(folder)
    manifest = describe_encoder(EncoderConfig(model=str(folder), split_layer=1))
    manifest.save(world.sources.home.encoder)
    table = world.sources.table
    table = EmbeddingTable(table.ids, table.vectors, manifest.fingerprint)
    return dataclasses.replace(world.sources, table=table), tokenizer


def test_behaviour_texts_are_tokenised_with_a_separator_each(text_world):
    sources, tokenizer = text_world
    behaviors = texts_to_read(FullTextConfig(max_tokens_per_behavior=3), sources)
    assert behaviors.start == (tokenizer.cls_token_id,)
    texts = behaviors.texts
    assert len(texts) == len(sources.table.ids)
    assert set(texts.lengths.tolist()) == {3}
    first = tokenizer.decode(texts.ids[:3])
    assert first.startswith("thing item")
    assert first.endswith("[SEP]")
    cut = texts_to_read(FullTextConfig(max_tokens_per_behavior=2), sources).texts
    assert set(cut.lengths.tolist()) == {2}
    assert texts_to_read(RECIPES["din_text"]().model, sources) is None


def test_a_text_that_the_home_folder_lost_has_no_tokens(text_world):
    sources, _ = text_world
    ids = np.append(sources.table.ids[:3], 2**62)
    lost = EmbeddingTable(ids, sources.table.vectors[:5], sources.table.fingerprint)
    behaviors = texts_to_read(FullTextConfig(), dataclasses.replace(sources, table=lost))
    assert behaviors.texts.lengths.tolist() == [3, 3, 3, 0]


def test_a_tokenizer_without_separator_is_refused(text_world, tmp_path):
    sources, _ = text_world
    with quiet_transformers():
        language_model(hidden_size=WIDTH).save_pretrained(tmp_path)
        make_tokenizer(["thing"], ("pad", "unk")).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="has neither a sep nor an eos token"):
        behavior_tokens(sources.home, sources.table.ids, model=str(tmp_path), max_tokens=8)


def test_the_whole_model_has_all_layers_and_no_head(text_world):
    sources, _ = text_world
    model = pretrained_layers(FullTextConfig(), sources)
    assert len(model.encoder.layer) == SIZES["num_hidden_layers"]
    assert model.pooler is None
    assert not model.config.use_cache


def test_a_run_learns_what_the_texts_tell_and_can_be_loaded_again(text_world):
    """Nothing but the texts tells who clicks what: see :func:`tests.training.world.make_world`."""
    sources, _ = text_world
    recipe = Recipe(
        name="full_text_tiny",
        model=small_config(num_tokens=12, max_tokens_per_behavior=4, num_crosses=0, dropout=0.0),
        training=TrainingConfig(
            epochs=16,
            batch_contexts=16,
            learning_rate=5e-3,
            deep_learning_rate=5e-3,
            warmup_steps=5,
            average_decay=0.8,
        ),
        sequence_length=LENGTH,
        baseline=True,
    )
    data = read_splits(sources, LENGTH)
    result = train(sources, recipe, run="full_text_tiny", threads=1, data=data)
    losses = [entry["train_loss"] for entry in result.history]
    base_rate = 1 / 4
    entropy = -base_rate * np.log(base_rate) - (1 - base_rate) * np.log(1 - base_rate)
    assert losses[-1] < entropy - 0.02
    model = load_model(sources, load_run_manifest(sources.home, "full_text_tiny"))
    table = torch.from_numpy(sources.table.vectors)
    eager = score(model, table, data["test"], truncate=True)
    program = load_artifact(sources.home, result.run).score
    exported = score(program, table, data["test"], truncate=False)
    np.testing.assert_allclose(exported, eager, atol=1e-4)


def test_the_recipe_is_known_and_its_config_can_be_read_back():
    recipe = RECIPES["full_text"]()
    assert recipe.baseline
    assert _CONFIGS["FullTextConfig"] is type(recipe.model)
    assert recipe.sequence_length * 2 >= recipe.model.num_tokens
