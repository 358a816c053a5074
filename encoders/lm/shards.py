"""The corpus as token ids in memory-mapped files: each document is tokenised once.

A folder ``home.shards/<fingerprint of corpus and tokenizer>`` holds ``shards.json``
(:class:`ShardsManifest`) and per split and source::

    <split>/<source>.bin        token ids of all documents, flat, each followed by the end token
    <split>/<source>.index.npy  int64 [N, 2]: where each document's tokens stop, UTF-8 bytes of it

The index is written last: a source that has one is complete, and a killed run goes on after it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from encoders.lm.corpus import SPLITS, CorpusManifest, Split, document_batches, load_corpus
from encoders.lm.documents import end_token, text_bytes, tokenize_documents
from feature_repo.errors import EncoderError, StoreError
from feature_repo.home import Home, complete_file
from feature_repo.manifest import Document
from feature_repo.progress import Progress, silent

MANIFEST_FILE = "shards.json"
COMMAND = "longtrail lm pretrain"
_CHUNK_TEXTS = 2048
"""Documents tokenised at once."""


class ShardsManifest(Document):
    """What shards were made from."""

    format: Literal[1] = 1
    corpus: str
    """Fingerprint of the corpus."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: Literal["uint16", "uint32"]
    """Of the token ids."""


@dataclass(frozen=True)
class TokenShard:
    """The tokenised documents of one source and split.

    Args:
        tokens: Memory-mapped token ids of all N documents, uint16 or uint32.
        stops: Where each document's tokens stop, int64 [N].
        num_bytes: UTF-8 bytes of each document's text, int64 [N].
    """

    tokens: NDArray[Any]
    stops: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Of all documents, end tokens included."""
        return int(self.stops[-1]) if len(self.stops) else 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [N]."""
        return np.diff(self.stops, prepend=0)

    def document(self, index: int) -> NDArray[np.int64]:
        """Token ids of a document, int64, the end token last."""
        first = int(self.stops[index - 1]) if index else 0
        return self.tokens[first : int(self.stops[index])].astype(np.int64)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides a document's tokens, 32 hexadecimal digits.

    Raises:
        EncoderError: If the tokenizer is not one of the fast ones.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EncoderError(
            f"the tokenizer in {tokenizer.name_or_path!r} has no tokenizer.json: a fast tokenizer "
            "was expected; `longtrail lm tokenizer` makes one"
        )
    text = f"{backend.to_str()}\n{end_token(tokenizer)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def make_shards(
    home: Home, tokenizer: Any, *, progress: Progress = silent
) -> dict[str, dict[str, TokenShard]]:
    """Tokenise what is not tokenised yet of the home's corpus, and open all of it.

    Args:
        home: A corpus has been built.
        tokenizer: A fast one, with an end token.
        progress: Told bytes of text.

    Returns:
        Split -> source -> its documents.

    Raises:
        MissingStepError: If there is no corpus.
        EncoderError: If the tokenizer has no end token or is no fast one.
    """
    corpus = load_corpus(home)
    folder, manifest = _describe(home, corpus, tokenizer)
    with home.lock("shards"):
        manifest.save(folder / MANIFEST_FILE)
        total = sum(_size(corpus, split, source) for split in SPLITS for source in corpus.sources)
        for split in SPLITS:
            for source in corpus.sources:
                path = folder / split / source
                if _index_file(path).exists():
                    progress(_size(corpus, split, source), total)
                    continue
                for num_bytes in _write(home, split, source, tokenizer, path, manifest.dtype):
                    progress(num_bytes, total)
    return open_shards(home, tokenizer)


def open_shards(home: Home, tokenizer: Any) -> dict[str, dict[str, TokenShard]]:
    """Open what :func:`make_shards` made: split -> source -> its documents.

    Raises:
        MissingStepError: If it was not made.
    """
    corpus = load_corpus(home)
    folder, manifest = _describe(home, corpus, tokenizer)
    if ShardsManifest.load(folder / MANIFEST_FILE, made_by=COMMAND) != manifest:
        raise StoreError(f"{folder} holds other shards than its name says: delete it")
    return {
        split: {s: _open(folder / split / s, manifest.dtype) for s in corpus.sources}
        for split in SPLITS
    }


def _describe(home: Home, corpus: CorpusManifest, tokenizer: Any) -> tuple[Path, ShardsManifest]:
    """Where the shards of a corpus and a tokenizer lie, and what they are made from."""
    manifest = ShardsManifest(
        corpus=corpus.fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        dtype="uint16" if len(tokenizer) <= 1 << 16 else "uint32",
    )
    identity = f"{manifest.corpus}\n{manifest.tokenizer}"
    return home.shards / hashlib.sha256(identity.encode()).hexdigest()[:16], manifest


def _open(path: Path, dtype: str) -> TokenShard:
    """Open one source's files; ``path`` is theirs without the endings."""
    index: NDArray[np.int64] = np.load(_index_file(path), allow_pickle=False)
    # An empty file cannot be mapped.
    tokens = (
        np.memmap(_token_file(path), dtype=dtype, mode="r")
        if len(index)
        else np.empty(0, dtype=dtype)
    )
    return TokenShard(tokens, index[:, 0], index[:, 1])


def _write(
    home: Home, split: Split, source: str, tokenizer: Any, path: Path, dtype: str
) -> Iterator[int]:
    """Write one source's files; gives the bytes of text done, chunk by chunk."""
    lengths: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    num_bytes: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    with complete_file(_token_file(path)) as part, part.open("wb") as file:
        for texts in _texts(home, split, source):
            documents = tokenize_documents(tokenizer, texts)
            np.concatenate(documents).astype(dtype).tofile(file)
            lengths.append(np.array([len(tokens) for tokens in documents], dtype=np.int64))
            num_bytes.append(text_bytes(texts))
            yield int(num_bytes[-1].sum())
    index = np.stack([np.cumsum(np.concatenate(lengths)), np.concatenate(num_bytes)], axis=1)
    with complete_file(_index_file(path)) as part, part.open("wb") as file:
        np.save(file, index, allow_pickle=False)


def _texts(home: Home, split: Split, source: str) -> Iterator[list[str]]:
    for batch in document_batches(home, split, source):
        texts: list[str] = batch.column("text").to_pylist()
        for first in range(0, len(texts), _CHUNK_TEXTS):
            yield texts[first : first + _CHUNK_TEXTS]


def _size(corpus: CorpusManifest, split: Split, source: str) -> int:
    return corpus.sources[source].splits[split].bytes


def _index_file(path: Path) -> Path:
    return path.with_name(path.name + ".index.npy")


def _token_file(path: Path) -> Path:
    return path.with_name(path.name + ".bin")
