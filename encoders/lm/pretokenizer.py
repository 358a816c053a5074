r"""How text is cut before byte pairs are merged: no token crosses one of these cuts.

Three cuts, each a ``Split`` of the tokenizers library, so that ``tokenizer.json`` holds them:

* digits: a run of digits is cut after every third, from the left: ``12345`` is ``123|45``. A number
  is then written in one way only, and no token memorises a long one;
* lines: line ends stand alone;
* words: a space goes with the word after it; letters, digits and symbols are apart.

Words are learned with all three. Phrases, and every text later, are cut at digits and lines only:
merges learned for words join nothing that the words' cut would have kept apart, except runs of
white space, because each joins letters, digits, symbols or spaces among themselves.
"""

from tokenizers import Regex, pre_tokenizers

MAX_DIGITS = 3
"""In one token."""
_DIGITS = r"\p{N}{3}(?=\p{N})"
_LINES = r"[\r\n]+"
_WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
"""That of GPT-2 and its heirs, without English contractions."""


def phrase_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts at digits and lines; then bytes as printable characters."""
    return pre_tokenizers.Sequence([*_cuts(), _bytes()])


def word_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts at digits, lines and words; then bytes as printable characters."""
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    return pre_tokenizers.Sequence([*_cuts(), words, _bytes()])


def _cuts() -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(_DIGITS), "merged_with_previous"),
        pre_tokenizers.Split(Regex(_LINES), "isolated"),
    ]


def _bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
