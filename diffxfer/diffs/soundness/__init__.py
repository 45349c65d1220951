"""What the files of one model say of each other: config, tokenizer, templates, weights."""
