"""Work on texts that a model's own files define, in helper processes with limits.

A chat template is a program, and a tokenizer.json may be one: either can multiply a text until
memory or time runs out, and no thread can be stopped. A helper process can.
"""
