"""What a language model computes: one decoder, and one file per architecture it can be."""
