"""From text to tokens: the tokenizer of the Python language model, and windows to read.

    text  ->  pieces                    PIECES, below
          ->  bytes  ->  tokens         byte-level BPE, 4096 entries, lossless
          ->  windows of 512 tokens     documents joined by <|endoftext|>

The pieces are made for code. Indentation stays in one piece, apart from the line end before it
and the word behind it, so a prompt may stop after either; an identifier's leading underscores
stay with its first word.
"""

from collections.abc import Iterable, Sequence

import torch
from python_corpus import Document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

CONTEXT = 512
VOCABULARY = 4096
END, PAD = "<|endoftext|>", "<|pad|>"

PIECES = (
    r"[\r\n]+| {2,}|\t+"  # line ends; indentation or alignment
    r"| ?_*\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"  # words, numbers, punctuation
    r"|\s"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose merges were counted on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(docs: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return the tokens of each document, behind the separator."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([END + doc.text for doc in docs])
    return [encoding.ids for encoding in encodings]


def windows(tokens: Iterable[Sequence[int]], length: int = CONTEXT) -> Tensor:
    """Join documents and cut them into ``[windows, length]``, without what is left at the end."""
    stream = torch.tensor([token for document in tokens for token in document])
    return stream[: len(stream) // length * length].view(-1, length)
