"""Step ``lm tokenizer``: a byte-level BPE of the corpus' own words and phrases.

The result is a folder ``home.tokenizers/<name>`` that ``AutoTokenizer.from_pretrained`` takes:
``tokenizer.json``, ``tokenizer_config.json``; beside them ``tokenizer_report.json`` and
``report.html`` (:mod:`encoders.lm.tokenizer_report`).
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from encoders.lm.corpus import CorpusManifest, load_corpus, sample_texts
from encoders.lm.phrases import Pair, learn_phrases
from encoders.lm.pretokenizer import phrase_pre_tokenizer, word_pre_tokenizer
from encoders.lm.records import END, PAD, field_texts
from encoders.lm.tokenizer_config import TokenizerConfig
from encoders.lm.tokenizer_report import REPORT_FILE, TokenizerReport, write_report
from encoders.pretrained import quiet_transformers
from feature_repo.errors import DataSetError, EncoderError, MissingStepError, StoreError
from feature_repo.home import Home, complete_file, complete_folder
from feature_repo.progress import Progress, silent


@dataclass(frozen=True)
class TokenizerSummary:
    """A tokenizer that is there."""

    folder: Path
    report: TokenizerReport


def train_tokenizer(
    home: Home,
    config: TokenizerConfig,
    progress: Progress = silent,
    *,
    phrase_progress: Progress = silent,
) -> TokenizerSummary:
    """Train a tokenizer on the corpus' training split; nothing where the same one is there already.

    Another one that this made is replaced: models carry their own copy.

    First ordinary byte-pair encoding within words, then merges of neighbouring tokens across spaces
    (:mod:`encoders.lm.phrases`), both by how often they are in the fields and lines of the text.
    A run that was killed keeps its words.

    Args:
        home: The corpus has been built.
        config: How.
        progress: Told distinct texts read.
        phrase_progress: Told phrases learned.

    Raises:
        MissingStepError: If there is no corpus, or it is of other tables.
        DataSetError: If it has no such source, or they hold no training text.
        EncoderError: If the name is that of a tokenizer that something else made.
    """
    corpus = load_corpus(home)
    sources = _chosen(corpus, config.sources)
    prints = {name: corpus.sources[name].fingerprint for name in sources}
    identity = json.dumps([asdict(config), prints, corpus.special_tokens])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = home.tokenizers / config.name
    with home.lock(f"tokenizer-{config.name}"):
        there = _there(folder)
        if there is not None and there.fingerprint == fingerprint:
            return TokenizerSummary(folder, there)
        if folder.exists() and not (folder / REPORT_FILE).exists():
            raise EncoderError(
                f"{folder} holds a tokenizer that `longtrail lm tokenizer` did not make: give "
                "another --name, or delete it"
            )
        texts = training_texts(home, sources, config.sample_bytes)
        unfinished = folder.with_name(f"{folder.name}.checkpoint.part")
        words_file = unfinished / f"words-{fingerprint}.json"
        if words_file.exists():
            words = Tokenizer.from_file(str(words_file))
        else:
            words = train_words(texts, corpus.special_tokens, config, progress)
            with complete_file(words_file) as part:
                words.save(str(part))
        tokenizer, num_phrases = words, 0
        if config.phrase_share:
            phrases = _learn(words, texts, config, phrase_progress)
            tokenizer, num_phrases = with_phrases(words, phrases), len(phrases)
        with complete_folder(folder) as part:
            wrapped = wrap(tokenizer, corpus.special_tokens)
            with quiet_transformers():
                wrapped.save_pretrained(part)
            report = write_report(
                home,
                corpus,
                wrapped,
                part,
                name=config.name,
                fingerprint=fingerprint,
                config=asdict(config),
                num_phrases=num_phrases,
                texts=texts,
            )
        shutil.rmtree(unfinished)
    return TokenizerSummary(folder, report)


def training_texts(home: Home, sources: Sequence[str], sample_bytes: int) -> Counter[str]:
    """How often each distinct text between special tokens is in the training split.

    Args:
        home: With the corpus.
        sources: Which.
        sample_bytes: Of a larger source, so much is taken, drawn by the documents' ids.
    """
    texts: Counter[str] = Counter()
    for source in sources:
        for text in sample_texts(home, "train", source, sample_bytes):
            texts.update(field_texts(text))
    return texts


def train_words(
    texts: Counter[str],
    special_tokens: Sequence[str],
    config: TokenizerConfig,
    progress: Progress = silent,
) -> Tokenizer:
    """Ordinary byte-level BPE within words; special tokens have the first ids.

    Args:
        texts: Distinct texts -> how often they are read.
        special_tokens: Single tokens that nothing else is merged with.
        config: How.
        progress: Told distinct texts.
    """

    def stream() -> Iterator[str]:
        for text, count in texts.items():
            yield from (text for _ in range(count))
            progress(1, len(texts))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = word_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - int(config.vocab_size * config.phrase_share),
        min_frequency=config.min_frequency,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special_tokens],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stream(), trainer)
    return tokenizer


def _learn(
    words: Tokenizer, texts: Counter[str], config: TokenizerConfig, progress: Progress
) -> list[Pair]:
    """Phrases over the texts as the words' merges leave them where nothing cuts at spaces."""
    joined = with_phrases(words, [])
    cut = phrase_pre_tokenizer()
    pieces: Counter[str] = Counter()
    for text, count in texts.items():
        for piece, _ in cut.pre_tokenize_str(text):
            pieces[piece] += count
    rows: Counter[tuple[str, ...]] = Counter()
    for piece, count in pieces.items():
        rows[tuple(token.value for token in joined.model.tokenize(piece))] += count
    return learn_phrases(
        rows,
        joined.get_vocab(),
        num_merges=config.vocab_size - joined.get_vocab_size(),
        min_frequency=config.phrase_min_frequency,
        min_texts=config.phrase_min_texts,
        progress=progress,
    )


def with_phrases(words: Tokenizer, phrases: Sequence[Pair]) -> Tokenizer:
    """A tokenizer that does not cut at spaces and merges phrases after words."""
    content = json.loads(words.to_str())
    model = content["model"]
    for first, second in phrases:
        model["vocab"][first + second] = len(model["vocab"])
        model["merges"].append([first, second])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = phrase_pre_tokenizer()
    return tokenizer


def wrap(tokenizer: Tokenizer, special_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[t for t in special_tokens if t not in (END, PAD)],
        clean_up_tokenization_spaces=False,
    )


def _chosen(corpus: CorpusManifest, names: Sequence[str]) -> list[str]:
    chosen = [name for name in names or corpus.sources if corpus.source(name).train_bytes]
    if not chosen:
        raise DataSetError(
            f"{', '.join(names) or 'the corpus'} has no training text to learn a tokenizer from: "
            "build a larger corpus with `longtrail lm corpus`"
        )
    return chosen


def _there(folder: Path) -> TokenizerReport | None:
    try:
        return TokenizerReport.load(folder / REPORT_FILE, made_by="longtrail lm tokenizer")
    except (MissingStepError, StoreError):
        return None
