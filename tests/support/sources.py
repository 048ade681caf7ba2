"""Folders of stored models as somebody would have them: with a tokenizer, and with a generation_config.json."""

import json

from support import parity

WORDS = {f"w{i}": i for i in range(9)}


def write_source(folder, family, config=None, generation=None):
    """The family's folder of stored numbers in `folder`, with a tokenizer of nine words.

    config: changes of config.json. generation: generation_config.json; None: there is none.
    """
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(words.to_str())
    (folder / "model.safetensors").symlink_to((parity.folder(family) / "model.safetensors").resolve())
    (folder / "config.json").write_text(json.dumps(parity.config(family) | (config or {})))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
