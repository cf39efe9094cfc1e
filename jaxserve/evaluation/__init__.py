"""What a setting costs: perplexity and next-token KL on given texts, beside the unquantized model.

    settings.py   names for combinations of flags, and how people write others
    texts.py      files to windows of tokens
    measure.py    one engine after the other over the same windows
    result.py     what was found, in numbers
    plot.py       the same as a picture

From a notebook: ``evaluate(config, parse_settings("unquantized,kv-int8"), {"mine": text})``.
"""
