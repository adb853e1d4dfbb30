"""Text to token ids and back: raw bytes, or a file of the `tokenizers` package."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """identity: what the corpus's identity says about the tokenizer."""

    vocab_size: int
    end_of_document: int
    identity: str

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of `text`, without an end of document."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; an end of document stands for none."""
        ...

    def encode_document(self, content: bytes) -> np.ndarray:
        """Token ids of a whole document, as an integer array."""
        ...


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 is the end of a document."""

    vocab_size = 257
    end_of_document = 256
    identity = "bytes"

    def encode(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def encode_document(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, np.uint8)


class UTF8Tokenizer:
    """The 256 bytes, of which UTF-8 never uses 254: there a document begins. H-Net's vocabulary.

    What is no UTF-8 becomes the replacement character, U+FFFD. The authors (Hwang et al. 2025) also
    end a document by 255; here the next one's 254 does.
    """

    vocab_size = 256
    end_of_document = 254
    identity = "utf8"

    def encode(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        # A lone surrogate, which some file names hold, has no bytes of its own.
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i < 254)

    def encode_document(self, content: bytes) -> np.ndarray:
        return np.asarray(self.encode(content), np.uint8)


class FileTokenizer:
    """A `tokenizer.json`. Its end of document is the first it knows of the usual names.

    A tokenizer that knows none gets one more id, after its own.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"data.tokenizer: {str(path)!r} needs the package `tokenizers`: "
                "pip install 'effattn[tokenizers]'"
            ) from error
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"data.tokenizer: no file {str(path)!r}; 'bytes' needs none")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises a bare Exception
            raise ValueError(f"data.tokenizer: cannot read {str(path)!r}: {error}") from error
        # Documents are cut by seq_len, never by the tokenizer.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.identity = "sha256:" + hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        named = [self._tokenizer.token_to_id(name) for name in _ENDS]
        known = [i for i in named if i is not None]
        self.end_of_document: int = known[0] if known else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.end_of_document + 1)

    def encode(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> bytes:
        kept = [int(i) for i in ids if i != self.end_of_document]
        return self._tokenizer.decode(kept, skip_special_tokens=False).encode()

    def encode_document(self, content: bytes) -> np.ndarray:
        return np.asarray(self.encode(content), np.uint32)


def load_tokenizer(spec: str) -> Tokenizer:
    """spec: "bytes", "utf8" or the path of a `tokenizer.json`. Raises ValueError in a sentence."""
    if spec == "utf8":
        return UTF8Tokenizer()
    return ByteTokenizer() if spec == "bytes" else FileTokenizer(spec)
