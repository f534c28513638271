"""What a model reads, without any knowledge of tables: a `Prompt` of text pieces, tokenizers and their chat templates,
and the encoding of prompts and plain texts as tokens with attention labels."""
