"""How examples are put into words: `styles` are the templates, `verbalize` renders an example in one of them within a
token budget, `numbers` writes numbers and ages, and `overlong` truncates and counts texts that do not fit."""
