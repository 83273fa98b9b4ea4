"""The process in which the sentencepiece library trains: lines on standard input, the model on standard output.

    python piecechild.py SIZE

The library tells on standard error how far it is. It ends the process for some inputs, and does not hear Ctrl-C.
"""

import io
import sys

import sentencepiece

RULES = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "max_sentence_length": 1 << 20,  # the library leaves out longer lines; `herd.train.piecetrainer` gives none
    "split_digits": True,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,
}
"""As the trainer_spec in the tokenizer.model of Llama 1 and 2 says."""


def main() -> None:
    """Train and write."""
    model = io.BytesIO()
    lines = (line[:-1].decode("utf-8") for line in sys.stdin.buffer)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=int(sys.argv[1]), **RULES
        )
    except RuntimeError as error:
        print(f"refused: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.stdout.buffer.write(model.getvalue())


if __name__ == "__main__":
    main()
