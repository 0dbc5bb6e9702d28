"""Floor 0: the IR, vocabulary, checks, passes, text forms and model builders of graphs."""
