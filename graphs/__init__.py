"""Floor 0, what a graph is: IR, vocabulary, checks, passes, text forms, model builders."""
