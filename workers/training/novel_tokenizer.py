"""A small byte-level BPE tokenizer: the same text gives the same tokenizer, so that models can share it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

VOCABULARY = 2048
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def novel_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Any:
    """A library tokenizer, learnt from texts: tokens are runs of bytes, so every text comes back unchanged.

    Sennrich et al. 2016, arXiv:1508.07909, on bytes (Radford et al. 2019). It puts nothing before a text by itself: the models
    read rows that begin anywhere.

    Args:
        vocabulary: number of tokens, three marks and the 256 bytes among them; fewer if the texts have no more to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=raw,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
