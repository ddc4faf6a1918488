"""Folders in Hugging Face format, made here: a real tokenizer, tiny real models."""

from __future__ import annotations

import pathlib

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 400
PROSE = ["the cat sat on the mat and looked at the dog", "a dog barked at the moon all night"] * 20
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "</s>"]


def write_tokenizer(folder: pathlib.Path, *, masks: bool = True) -> pathlib.Path:
    """A byte-level BPE with special tokens, saved as transformers saves it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(PROSE, trainer)
    if masks:
        trained.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token="</s>",
        **(names | {"mask_token": "[MASK]"} if masks else {}),
    )
    fast.save_pretrained(folder)
    return folder


def write_llama(folder: pathlib.Path, *, vocabulary: int = 256) -> transformers.LlamaForCausalLM:
    """A tiny Llama whose heads share keys."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def write_bert(folder: pathlib.Path, *, vocabulary: int = 257) -> transformers.BertForMaskedLM:
    """A tiny BERT with the head that it was pretrained with."""
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model
