"""A model folder with random weights: a Llama's config.json and a tokenizer, made here, so that no hub is needed.

Serve it with `--load-format dummy`: the engine fills the weights with noise itself, and timing does not depend on their
values.  The tokenizer is a byte-level BPE trained on this package's own text and filled up to the vocabulary of
Llama 2, so that each id the model may draw decodes to text; like Llama's it puts a BOS before every prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 32_000
CONTEXT_TOKENS = 4_096
SPECIAL = ("<unk>", "<s>", "</s>")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".csv", ".yaml")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] }}"
    "{% endfor %}"
)

# name -> (hidden, feed-forward, layers, heads, key-value heads).  Below about 100 M parameters the overhead of a step
# hides the memory, and vLLM's CPU build has been seen to send all tokens of a request in one burst at the end.
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "llama-134m": (768, 2048, 12, 12, 12),
    "llama-518m": (1280, 3456, 22, 20, 20),
}


def config(shape: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """The config.json of a Llama of this shape, in the words of Hugging Face."""
    hidden, feed_forward, layers, heads, kv_heads = shape
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT_TOKENS, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "dtype": "bfloat16", "torch_dtype": "bfloat16",
    }  # fmt: skip


def package_text() -> Iterator[str]:
    """The text files of this package, in a fixed order."""
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in TEXT_SUFFIXES:
            yield path.read_text(encoding="utf-8")


def tokenizer_json() -> str:
    """A `tokenizer.json` of exactly VOCABULARY ids, trained on the package's text.  Needs `tokenizers`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(package_text(), trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    _fill(document["model"]["vocab"])
    # As Llama: one BOS in front, counted by the server as part of the prompt.
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return json.dumps(document, ensure_ascii=False)


def _fill(vocabulary: dict[str, int]) -> None:
    """Our text is too short for 32 000 tokens: the rest decode to numbered words (the Ġ is byte-level for a space).
    Without them most ids that random weights draw would decode to nothing, and no text would come to be timed."""
    for id in range(len(vocabulary), VOCABULARY):
        vocabulary[f"Ġw{id}"] = id


def write(folder: Path, shape: tuple[int, int, int, int, int]) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json into `folder` (made if need be)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": CONTEXT_TOKENS, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1) + "\n", encoding="utf-8")
    # Last, so that a folder with a config is a whole one.
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.random_model", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-134m")
    parser.add_argument("--force", action="store_true", help="write it again if it is there")
    arguments = parser.parse_args()
    if arguments.force or not (arguments.folder / "config.json").is_file():
        write(arguments.folder, SHAPES[arguments.shape])


if __name__ == "__main__":
    main()
