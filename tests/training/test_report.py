import re
import time
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest

from feature_repo.artifact import ArtifactManifest, Calibration
from training.ablations import FULL, AblationStudy
from training.evaluate import ScoredRows, measure
from training.explain import Explanation
from training.plots import lift_by_decile, points
from training.report import write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers ids, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.alts, self.words = [], [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.alts += [values["aria-label"]] if "aria-label" in values else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data.split() if "style" not in self.open else []


def manifest(run, **changes):
    values = {
        "run": run,
        "created": datetime(2024, 2, 1, tzinfo=UTC),
        "dataset": "shop",
        "source_fingerprint": "s",
        "feature_service": "ctr_v1",
        "scenes": ("purchase",),
        "sequence_length": 50,
        "user_dense_names": ("u1", "u2"),
        "item_dense_names": ("price",),
        "context_names": (),
        "evidence_names": (),
        "category_vocabularies": {"brand": ("a",)},
        "encoder_fingerprint": "e1",
        "encoder_width": 8,
        "recipe": "bahe_small",
        "config": {
            "model": {"kind": "BaheConfig"},
            "training": {"epochs": 2},
            "validations": [
                {"step": 5, "train_loss": 0.6, "valid_logloss": 0.5, "valid_auc": 0.7},
                {"step": 9, "train_loss": 0.5, "valid_logloss": 0.45, "valid_auc": None},
            ],
        },
        "seed": 3,
        "git_revision": None,
        "versions": {"torch": "2"},
        "train_start": datetime(2024, 1, 1, tzinfo=UTC),
        "train_end": datetime(2024, 1, 9, tzinfo=UTC),
        "metrics": {},
    }
    return ArtifactManifest(**(values | changes))


CALIBRATION = Calibration(
    method="platt",
    knots=(0.0,),
    values=(-1.0,),
    slope_below=0.5,
    slope_above=0.5,
    cross_validated_logloss={"none": 0.7, "platt": 0.5},
)


@pytest.fixture(scope="module")
def scored():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 500)
    lengths = generator.integers(0, 5, 500)
    masks = {"novel": lengths > 2, "cold_items": lengths > 3}
    masks |= {
        "history_0": lengths == 0,
        "history_1_5": lengths > 0,
        "history_101_plus": lengths > 9,
    }
    runs = ("one", "two", "other <b>")
    return ScoredRows(
        rows="test",
        labels=labels,
        users=generator.integers(0, 40, 500),
        masks=masks,
        manifests={r: manifest(r, calibration=CALIBRATION if r == "one" else None) for r in runs},
        logits={r: (generator.normal(size=500) + labels).astype(np.float32) for r in runs},
        notes=["missing in every row: hour"],
    )


@pytest.fixture(scope="module")
def full_page(scored, tmp_path_factory):
    started = time.monotonic()
    evaluation = measure(scored, ["one", "two"], against=["other <b>"], started=started)
    full = measure(scored, ["one"], started=started)
    variant = measure(scored, ["two"], against=["one"], started=started)
    study = AblationStudy(
        recipe="bahe_small",
        rows="test",
        evaluations={FULL: full, "without-age": variant},
        scored=scored,
        trained=[],
        notes=["untuned-encoder left out: why"],
        seconds=1.0,
    )
    examples = [
        Explanation("7 & 8", "<x>", "kettle", 1.5, -0.5, [("bought <tea>", 0.25), ("milk", -0.125)])
    ]
    path = tmp_path_factory.mktemp("report") / "page.html"
    write_report(path, evaluation, scored, study=study, examples=examples)
    return evaluation, variant, path.read_text("utf-8")


def test_the_page_needs_nothing_from_outside(full_page):
    _, _, text = full_page
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "image", "object"}
    for tag, values in page.tags:
        for name in ("src", "href"):
            assert values.get(name, "#").startswith("#"), (tag, values)
    assert "http" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_references_are_there(full_page):
    _, _, text = full_page
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text))
    used |= {values["href"][1:] for _, values in page.tags if "href" in values}
    assert used
    assert used <= set(page.ids)


def test_every_section_and_figure_is_there(full_page):
    evaluation, variant, text = full_page
    page = Page(text)
    for title in ("Summary", "Probabilities and ranking", "Slices", "Ablations", "Training",
                  "Explained examples", "Model card"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    metrics, whole = evaluation.metrics, evaluation.comparison["all"]["auc"]
    assert (
        f"{metrics['auc']:.4f} [{metrics['auc_low']:.4f}, {metrics['auc_high']:.4f}]" in page.text
    )
    shown = f"{whole['difference']:+.4f} [{whole['low']:+.4f}, {whole['high']:+.4f}]"
    assert shown in page.text
    assert f"{variant.comparison['all']['auc']['difference']:+.4f}" in page.text
    assert "before calibration" in page.text
    assert "after calibration" in page.text
    assert "platt, fitted on validation (none 0.7000, platt 0.5000)" in page.text
    assert "missing in every row: hour" in page.text
    assert "untuned-encoder left out: why" in page.text
    assert "user 7 & 8, item <x>: kettle (logit 1.500; without any history -0.500)" in page.text
    assert "bought <tea> +0.2500" in page.text
    assert "other <b>" in page.text  # escaped in the source, or it would be a tag


def test_every_plot_says_in_words_what_it_shows(full_page):
    evaluation, _, text = full_page
    page = Page(text)
    assert len(page.alts) == sum(tag == "svg" for tag, _ in page.tags) == 6
    assert any(f"{evaluation.metrics['auc']:.4f}" in alt for alt in page.alts)
    curve = next(alt for alt in page.alts if alt.startswith("AUC by history length"))
    assert re.findall(r"([\w ]+): 0\.\d{3}", curve.split(": ", 1)[1]) == ["0", " 1 to 5"]
    assert "currentColor" in text
    assert "#010203" not in text


def test_a_single_run_has_a_short_page(scored, tmp_path):
    evaluation = measure(scored, ["two"], started=time.monotonic())
    write_report(tmp_path / "page.html", evaluation, scored)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert "Ablations" not in page.text
    assert "difference" not in page.text
    assert "before calibration" not in page.text


def test_lift_by_hand():
    labels = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0] * 2)
    chances = np.linspace(1, 0, 10).repeat(2)
    labels = np.sort(labels)[::-1]  # six clicks in the three highest tenths
    found = lift_by_decile(labels, chances)
    assert found == pytest.approx([1 / 0.3] * 3 + [0] * 7)


def test_the_same_plot_is_the_same_text():
    draw = [points("p", ["a", "b"], [1, 2], [(0, 2), (1, 3)], ylabel="y") for _ in range(2)]
    assert draw[0] == draw[1]
