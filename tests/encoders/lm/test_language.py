"""Languages of free text."""

import pytest

from encoders.lm.language import LanguageLabels


@pytest.fixture(scope="module")
def label() -> LanguageLabels:
    return LanguageLabels()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The table is made of solid oak and comes with six chairs.", "en"),
        ("Der Tisch ist aus massiver Eiche und hat sechs Stühle.", "de"),
        ("La table est en chêne massif, livrée avec six chaises.", "fr"),
        ("Стол сделан из массива дуба, в комплекте шесть стульев.", "ru"),
        ("lunch bag", "und"),
    ],
)
def test_languages(label: LanguageLabels, text: str, language: str) -> None:
    assert label(text) == language
