"""The tokenizer: one token per word of the prompts and answers, one per character for all other text."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsight.reader.scene import COLORS, SHAPES
from sparsight.reader.skills import PHRASES, plural

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>", "<|assistant|>")
PRINTABLE = "".join(chr(code) for code in range(32, 127)) + "\n"


def word_list() -> list[str]:
    """All words of prompts and answers, longest first."""
    fixed = " ".join(PHRASES).replace("{", " ").replace("}", " ")
    words = set("".join(c if c.isalpha() else " " for c in fixed).split())
    words |= {*SHAPES, *map(plural, SHAPES), *COLORS}
    return sorted((w for w in words if len(w) > 1), key=lambda w: (-len(w), w))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words with the blank before them, and single characters; decoding restores the text exactly."""
    words = word_list()
    pieces = list(SPECIAL) + list(PRINTABLE) + words + [f" {word}" for word in words]
    engine = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    pattern = f" ?\\b(?:{'|'.join(words)})\\b|[\\s\\S]"
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    engine.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=engine,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<|user|>", "<|assistant|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.model_max_length = 4096
    return fast
